"""Chats as datasets write them: each key of a message is kept or obeyed, or the row is refused by the key's name."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.chat_templates import tokenizer_of

from finetune_api.spec import Columns
from finetune_api.traits import Task
from finetune_trainer.data.chat import TRIMS_ANSWERS, ChatFormat
from finetune_trainer.data.examples import Example, Reading, read_example
from finetune_trainer.data.messages import (
    LEFT_OUT_END,
    UNUSED_METADATA,
    BadRowError,
    Chat,
    Message,
    read_chat,
    read_prompt_and_completion,
)
from finetune_trainer.data.render import SYSTEM_IN_FIRST_TURN, Rendered, Rendering, render_training
from finetune_trainer.prepare.columns import find_columns

ASKED, ANSWERED = {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "It has 0 degrees."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Bern"}}}
NAMED = CALL | {"id": "call_1"}
RESULT = {"role": "tool", "content": "0 degrees"}
DEEP = json.loads('{"a":' * 300 + "1" + "}" * 300)
TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather of a town", "parameters": {}}}


def said(*turns: tuple[str, str], **more: Any) -> list[Message]:
    return [{"role": role, "content": content, **more} for role, content in turns]


def roles_of(*names: str) -> list[str]:
    return [
        message["role"] for message in read_chat([{"from": name, "value": f"says {name}"} for name in names]).messages
    ]


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        (("assistant", "customer", "assistant"), ["assistant", "user", "assistant"]),
        (("developer", "user", "assistant"), ["system", "user", "assistant"]),
        (("agent", "client", "agent"), ["assistant", "user", "assistant"]),
        (("Human", "AI"), ["user", "assistant"]),
        (("user", "tool-response", "gpt"), ["user", "tool", "assistant"]),
        (("human", "observation", "ipython", "model"), ["user", "tool", "tool", "assistant"]),
        (("Ann", "Bob"), ["user", "assistant"]),
    ],
)
def test_known_roles_stay_what_they_are_whoever_speaks_beside_them(names: tuple[str, ...], roles: list[str]) -> None:
    assert roles_of(*names) == roles


def test_an_unknown_role_beside_known_ones_is_refused_by_name() -> None:
    with pytest.raises(
        BadRowError, match=r"the role 'moderator' is not known, and stands beside user, assistant\. Known"
    ):
        roles_of("user", "moderator", "assistant")
    with pytest.raises(BadRowError, match=r"3 speakers \(ann, bob, eve\), none of them called user or assistant"):
        roles_of("Ann", "Bob", "Eve")


@pytest.mark.parametrize(
    "call",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": '{"town": "Bern"}'}]},
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"town": "Bern"}'}},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"town": "Bern"}}'},
        {"role": "assistant", "content": None, "refusal": None, "audio": [], "name": "", "tool_calls": [CALL]},
    ],
    ids=["openai", "json text", "bare", "function_call", "sharegpt", "keys of others"],
)
def test_tool_calls_of_every_form_are_one(call: Any) -> None:
    chat = read_chat([ASKED, call, RESULT, ANSWERED])
    assert chat.messages == [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT, ANSWERED]
    assert chat.trained == [False, True, False, True]


def test_results_of_parallel_calls_stand_in_the_order_of_the_calls() -> None:
    calls = [NAMED | {"id": name} for name in ("a", "b")]
    results = [RESULT | {"tool_call_id": name} for name in ("b", "a")]
    chat = read_chat([ASKED, {"role": "assistant", "tool_calls": calls}, *results, ANSWERED])
    assert [message.get("tool_call_id") for message in chat.messages] == [None, None, "a", "b", None]


@pytest.mark.parametrize(
    ("content", "text", "thought"),
    [
        ([{"type": "text", "text": "a "}, {"type": "text", "text": "b", "image_url": None}], "a b", None),
        ([{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "b"}], "b", "Hm."),
        (["a", "b"], "ab", None),
        (14, "14", None),
    ],
)
def test_content_may_be_parts(content: Any, text: str, thought: str | None) -> None:
    message = read_chat([ASKED, {"role": "assistant", "content": content}]).messages[1]
    assert (message["content"], message.get("reasoning_content")) == (text, thought)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_have_one_name(key: str) -> None:
    assert read_chat([ASKED, ANSWERED | {key: "Hm."}]).messages[1] == ANSWERED | {"reasoning_content": "Hm."}


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
def test_a_turn_of_weight_zero_is_context(key: str) -> None:
    chat = read_chat([ASKED, ANSWERED | {key: 0}, ASKED, ANSWERED | {key: 1}])
    assert chat.trained == [False, False, False, True]
    assert chat.messages == [ASKED, ANSWERED, ASKED, ANSWERED]


def test_tools_and_system_prompt_may_have_columns_of_their_own() -> None:
    bare = json.dumps([TOOL["function"]])
    for tools in ([TOOL], bare, [TOOL["function"]], [json.dumps(TOOL)]):
        assert read_chat([ASKED, ANSWERED], tools=tools, system="Be kind.").tools == [TOOL]
    assert read_chat([ASKED | {"tools": [TOOL]}, ANSWERED]).tools == [TOOL]
    with_system = read_chat([ASKED, ANSWERED], system="Be kind.").messages
    assert with_system == [{"role": "system", "content": "Be kind."}, ASKED, ANSWERED]
    assert read_chat(with_system, system="Be kind.").messages == with_system
    assert read_chat([ASKED, ANSWERED], tools=[], system=" ").messages == [ASKED, ANSWERED]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ([ASKED], [ANSWERED]),
        ("Weather?", "It has 0 degrees."),
        ([ASKED], "It has 0 degrees."),
        (json.dumps([ASKED]), [ANSWERED]),
    ],
)
def test_a_prompt_and_its_completion_are_a_chat(prompt: Any, completion: Any) -> None:
    chat = read_prompt_and_completion(prompt, completion)
    assert (chat.messages, chat.trained) == ([ASKED, ANSWERED], [False, True])


def test_only_the_completion_is_trained() -> None:
    assert read_prompt_and_completion([ASKED, ANSWERED, ASKED], [ANSWERED]).trained == [False, False, False, True]
    with pytest.raises(BadRowError, match="neither answers nor tool results"):
        read_prompt_and_completion([ASKED], [ANSWERED, ASKED, ANSWERED])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([ASKED, ANSWERED | {"mood": "glad"}], "a message has 'mood', which is not known"),
        ([ASKED | {"content": [{"type": "image_url", "image_url": "x"}]}, ANSWERED], "part of type 'image_url'"),
        ([ASKED | {"content": [{"type": "input_audio", "input_audio": {}}]}, ANSWERED], "part of type 'input_audio'"),
        ([ASKED | {"content": [{"type": "text", "text": "a", "cite": 1}]}, ANSWERED], "a part of a message has 'cite'"),
        ([ASKED | {"content": {"parts": ["a"]}}, ANSWERED], "the content of a message is an object"),
        ([ASKED, ANSWERED | {"weight": 0.5}], "weight 0.5 of a message is neither 0 nor 1"),
        ([ASKED | {"train": True}, ANSWERED], "a user message asks to be trained on"),
        ([ASKED, ANSWERED | {"weight": 0}], "no answer is to be trained on"),
        ([ASKED, {"role": "assistant", "content": None}], "a message has no content"),
        ([ASKED, {"role": "assistant", "content": "", "reasoning": "Hm."}], "an assistant turn is empty"),
        ([ASKED | {"tool_calls": [CALL]}, ANSWERED], "a user message holds tool calls or thoughts"),
        ([ASKED, ANSWERED | {"tool_calls": [{"type": "web_search"}]}], "a tool call of type 'web_search'"),
        ([ASKED, ANSWERED | {"tool_calls": [{"function": {"arguments": {}}}]}], "a tool call names no function"),
        ([ASKED, ANSWERED | {"tool_calls": [CALL | {"cost": 3}]}], "a tool call has 'cost'"),
        ([ASKED, ANSWERED | {"tool_calls": [{"name": "f", "arguments": "town=Bern"}]}], "of the tool call 'f' are not"),
        ([ASKED, ANSWERED | {"tool_calls": [NAMED]}, RESULT | {"tool_call_id": "x"}, ANSWERED], "names the call 'x'"),
        ([ASKED, ANSWERED | {"tools": [TOOL]}], "tools stand in a message that is not the first"),
        ([ASKED, ANSWERED | {"reasoning": "a", "thinking": "b"}], "two different thoughts"),
        ([ASKED, {"from": "function_call", "value": "weather in Bern"}], "a tool call names no function"),
        ({"role": ["user", "assistant"], "content": ["a"]}, "the lists of messages have different lengths"),
        ([ASKED, ANSWERED | {"tool_calls": [{"name": "f", "arguments": DEEP}]}], "50 levels"),
        ([ASKED, ANSWERED, RESULT | {"content": [DEEP]}], "more than 50 levels deep"),
        ([ASKED, ["assistant"], 3], "a message is neither text nor an object"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_by_name(messages: Any, reason: str) -> None:
    with pytest.raises(BadRowError) as error:
        read_chat(messages)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "value", [{"tools": "look it up"}, {"tools": [3]}, {"tools": [{"function": {}}]}, {"system": 3}]
)
def test_columns_beside_the_chat_are_refused_where_they_are_something_else(value: Any) -> None:
    with pytest.raises(BadRowError, match=r"no function with a name|system prompt is not text"):
        read_chat([ASKED, ANSWERED], **value)


def test_what_is_not_used_is_noted() -> None:
    assert read_chat([ASKED | {"id": "m1"}, ANSWERED]).notes == {UNUSED_METADATA}
    assert read_chat([ASKED, ANSWERED, ASKED]).notes == {LEFT_OUT_END}
    assert read_chat([ASKED, ANSWERED]).notes == frozenset()


def test_images_beside_a_chat_are_refused() -> None:
    row = {"messages": [ASKED, ANSWERED], "images": ["a.png"]}
    with pytest.raises(BadRowError, match="column images holds what is not text"):
        example(row)
    assert example(row | {"images": []}).chat
    assert example(row | {"images": None}).chat


# --- rendered ---


def example(row: dict[str, Any]) -> Example:
    found = find_columns(Task.CHAT, Columns(), list(row), templated=False, where="d", field="datasets[0]")
    return read_example(Task.CHAT, 1, row, Reading(found))


def render(row: dict[str, Any], family: str = "chatml", **settings: Any) -> tuple[ChatFormat, Rendered]:
    chat = ChatFormat(tokenizer_of(family))
    return chat, render_training(Rendering(Task.CHAT, chat, **({"max_tokens": 2000} | settings)), example(row))


def shown(row: dict[str, Any], family: str = "chatml", **settings: Any) -> list[str]:
    """Each document, with what is trained in brackets."""
    chat, rendered = render(row, family, **settings)
    texts = []
    for document in rendered.documents:
        marked, trained = "", {position + 1 for position in document.target_position}
        for i in range(len(document.ids)):
            marked += "⟦" * (i in trained and i - 1 not in trained)
            marked += chat.tokenizer.decode(document.ids[i])
            marked += "⟧" * (i in trained and i + 1 not in trained)
        texts.append(marked)
    return texts


def test_a_turn_of_weight_zero_is_not_trained_whatever_the_loss_is_on() -> None:
    row = {"messages": [ASKED, ANSWERED | {"weight": 0}, ASKED, ANSWERED]}
    [text] = shown(row)
    assert text.count("⟦It has 0 degrees.<|im_end|>⟧") == 1
    assert text.endswith("⟧")
    assert shown(row, loss_on="last") == [text]
    reverse = {"messages": [ASKED, ANSWERED, ASKED, ANSWERED | {"weight": 0}]}
    assert render(reverse)[1].notes == {LEFT_OUT_END}
    assert shown(reverse)[0].endswith("⟦It has 0 degrees.<|im_end|>⟧")
    with pytest.raises(BadRowError, match=r"no answer is left to train on \(weight or train, lossOn: last"):
        shown(reverse, loss_on="last")


def test_the_system_column_and_the_job_s_prompt_stand_before_the_chat() -> None:
    row = {"system": "Be kind.", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}
    [text] = shown(row, system_prompt="Be brief.")
    assert text.startswith("<|im_start|>system\nBe brief.\n\nBe kind.<|im_end|>\n<|im_start|>user\nhi")
    _, rendered = render(row, "mistral 0.3")
    assert rendered.notes == {SYSTEM_IN_FIRST_TURN}
    assert rendered.checked == 1


def test_functions_of_a_column_are_offered_or_the_row_is_refused() -> None:
    row = {"messages": [ASKED, ANSWERED], "tools": [TOOL]}
    assert "Weather of a town" in shown(row, "qwen 2.5")[0]
    with pytest.raises(BadRowError, match=r"leaves out the name of a function \('weather'\)"):
        shown(row)


def test_a_dropped_tool_result_is_noticed_though_the_answer_repeats_it() -> None:
    with pytest.raises(BadRowError, match=r"leaves out the content of the tool message 3 \('0 degrees'\)"):
        shown({"messages": [ASKED, {"role": "assistant", "content": "Let me look."}, RESULT, ANSWERED]}, "zephyr")


def test_special_tokens_of_the_data_are_plain_text_and_counted() -> None:
    _, rendered = render({"messages": [{"role": "user", "content": "a <|im_end|> b"}, ANSWERED]})
    assert rendered.notes == {"the special token <|im_end|> stands in messages, and is plain text"}
    assert rendered.checked == 0
    [text] = shown({"messages": [{"role": "user", "content": "a <|im_end|> b"}, ANSWERED]})
    assert "user\na <|im_end|> b<|im_end|>" in text


def test_white_space_that_a_template_takes_off_answers_is_counted() -> None:
    row = {"messages": [ASKED, {"role": "assistant", "content": "    return x"}]}
    assert render(row, "gemma 2")[1].notes == {TRIMS_ANSWERS}
    assert TRIMS_ANSWERS not in render(row, "llama 4")[1].notes


def test_a_name_that_no_template_writes_is_refused() -> None:
    with pytest.raises(BadRowError, match=r"leaves out the name of the user message 1 \('Ann'\)"):
        shown({"messages": [ASKED | {"name": "Ann"}, ANSWERED]})


# --- anything ---

TEXTS = st.one_of(
    st.text(max_size=12), st.sampled_from(["<think>a</think>b", "<|im_end|>", "\ufdd0", '{"name": "f"}', "[]"])
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.fixed_dictionaries(
    {
        "function": st.fixed_dictionaries(
            {"name": TEXTS | JSON, "arguments": st.dictionaries(TEXTS, JSON, max_size=2) | JSON}
        )
    },
    optional={"id": TEXTS | JSON, "type": st.just("function") | JSON},
)
NAMES = ["user", "assistant", "system", "tool", "gpt", "human", "function_call", "developer", "Ann"]
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(NAMES) | JSON, "content": TEXTS | JSON},
    optional={
        "tool_calls": st.lists(CALLS, max_size=2) | JSON,
        "reasoning_content": TEXTS | JSON,
        "weight": st.sampled_from([0, 1]) | JSON,
        "name": TEXTS | JSON,
        "tool_call_id": TEXTS | JSON,
        "id": JSON,
        "from": JSON,
        "other": st.none() | JSON,
    },
)
PLAIN = st.lists(TEXTS.filter(str.strip), min_size=2, max_size=4).map(
    lambda texts: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
)
ROWS = st.fixed_dictionaries(
    {"messages": PLAIN | st.lists(MESSAGES | JSON, max_size=4) | JSON},
    optional={"tools": st.none() | JSON, "system": TEXTS | JSON, "images": JSON},
)


def leaves(value: Any) -> list[str]:
    """All texts and numbers of something."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in (str(key), *leaves(item))]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [] if value is None else [str(value)]


@pytest.mark.parametrize("family", ["chatml", "qwen 3", "gpt-oss", "gemma 2"])
@settings(max_examples=120)
@given(row=ROWS)
def test_any_row_is_rendered_with_all_that_it_says_or_refused_with_a_sentence(family: str, row: dict[str, Any]) -> None:
    try:
        chat, rendered = render(row, family)
    except BadRowError:
        return
    read: Chat | None = example(row).chat
    assert read is not None
    assert rendered.documents
    text = "".join(chat.tokenizer.decode(rendered.documents[-1].ids).split())
    for message in read.messages[: max(i for i, wanted in enumerate(read.trained) if wanted) + 1]:
        for leaf in leaves([message["content"], message.get("tool_calls")]):
            if leaf not in ("function", "arguments", "type", "name", "id") and "</think>" not in leaf:
                assert "".join(leaf.split()) in text or "".join(json.dumps(leaf)[1:-1].split()) in text
    assert "\ufdd0" not in text
