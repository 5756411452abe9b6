"""Chats in the templates of many families: what is trained is what the model has to write, or the row is refused."""

import re
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.chat_templates import FAMILIES, tokenizer_of

from finetune_trainer.data.chat import (
    APART,
    DROPS_THOUGHTS,
    ChatDocument,
    ChatFormat,
    ChatTemplateError,
    LabelledTokens,
    Message,
)

FORMATS: dict[str, ChatFormat] = {}
CHAT: list[Message] = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "More, please"},
    {"role": "assistant", "content": "def f(x):\n    return x"},
]
SYSTEM: Message = {"role": "system", "content": "Be kind."}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"town": "Bern", "day": 3}}}
CALLS: list[Message] = [
    {"role": "user", "content": "How warm is it?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "0 degrees", "name": "weather", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "It has 0 degrees."},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a town",
            "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
        },
    }
]


def format_of(name: str) -> ChatFormat:
    if name not in FORMATS:
        FORMATS[name] = ChatFormat(tokenizer_of(name))
    return FORMATS[name]


def trained(chat: ChatFormat, document: ChatDocument, tokens: LabelledTokens) -> list[str]:
    """The trainable segments; checks that the targets are all of their tokens and nothing else."""
    pieces = chat.encode(document.segments)
    learnt = [i for piece, segment in zip(pieces, document.segments, strict=True) for i in piece * segment.trainable]
    assert [tokens.ids[position + 1] for position in tokens.target_position] == tokens.target_id
    assert tokens.target_id[: len(learnt)] == learnt
    assert tokens.target_id[len(learnt) :] == ([] if chat.end_text else [chat.end_token_ids[0]])
    return [segment.text for segment in document.segments if segment.trainable]


def own_ids(chat: ChatFormat, messages: list[Message], *, ask: bool = False, tools: Any = None) -> list[int]:
    """What the library makes of the messages."""
    ids: list[int] = chat.tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=ask, tokenize=True, return_dict=False
    )
    return ids


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tokens_are_the_template_s_own_and_what_follows_the_prompt_is_trained(name: str) -> None:
    family, chat = FAMILIES[name], format_of(name)
    messages = CHAT if name != "qwq" else [m | {"content": f"<think>\nHm.\n</think>\n\n{m['content']}"} for m in CHAT]
    documents = chat.documents(messages)
    assert len(documents) == (1 if chat.keeps_history else 2)
    for document, turn in zip(documents, (3,) if chat.keeps_history else (1, 3), strict=True):
        tokens, notes = chat.tokens(document)
        assert notes in ([], [APART])
        text = chat.tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
        assert text.startswith("".join(segment.text for segment in document.segments))
        learnt = trained(chat, document, tokens)
        prompt = chat.tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
        assert text.removeprefix(prompt).startswith(learnt[-1])
        assert learnt[-1].endswith(chat.end_text)
        if name != "vicuna":  # its tokenizer joins `:` and the space after it
            ids = own_ids(chat, messages[: turn + 1])
            assert tokens.ids[: len(tokens.ids) - (not chat.end_text)] == ids[: len(tokens.ids) - (not chat.end_text)]
            end = len(own_ids(chat, messages[:turn], ask=True))
            last = len(chat.encode(document.segments)[-1]) + (not chat.end_text)
            assert tokens.target_position[-last] == end - 1
    assert family.special[-1] == chat.tokenizer.eos_token


@pytest.mark.parametrize("name", FAMILIES)
def test_a_system_prompt_is_seen_once_and_before_the_answers(name: str) -> None:
    chat, family = format_of(name), FAMILIES[name]
    assert chat.takes_system == (family.system != "in user")
    turns = chat.with_system("Be kind.", CHAT if name != "qwq" else [])
    for document in chat.documents(turns) if turns else []:
        text = "".join(segment.text for segment in document.segments)
        assert text.count("Be kind.") == 1
        assert text.index("Be kind.") < text.index("Hello.")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "qwq"])
def test_a_system_message_in_mid_chat_stays_there_or_the_row_is_refused(name: str) -> None:
    chat = format_of(name)
    messages = [*CHAT[:2], SYSTEM, *CHAT[2:]]
    if FAMILIES[name].system == "anywhere":
        text = "".join(segment.text for segment in chat.documents(messages)[-1].segments)
        assert text.index("Hello.") < text.index("Be kind.") < text.index("More")
    else:
        with pytest.raises(ChatTemplateError, match=r"leaves out|refuses|moves the system message 3 before"):
            chat.documents(messages)


@pytest.mark.parametrize("name", FAMILIES)
def test_thoughts_are_trained_whole_or_the_row_is_refused(name: str) -> None:
    chat, family = format_of(name), FAMILIES[name]
    thoughtful = [
        m | {"content": f"<think>\nIdea {i}.\n</think>\n\n{m['content']}"} if m["role"] == "assistant" else m
        for i, m in enumerate(CHAT)
    ]
    if family.thoughts == "dropped":
        with pytest.raises(ChatTemplateError, match="leaves out the thought of the assistant message 2"):
            chat.documents(thoughtful)
        return
    documents = chat.documents(thoughtful)
    for document in documents:
        tokens, notes = chat.tokens(document)
        assert notes in ([], [APART])
        learnt = trained(chat, document, tokens)
        assert "Idea 3." in learnt[-1] or "Idea 1." in learnt[-1]
        assert not re.search(r"[\ufdd0-\ufdef]", chat.tokenizer.decode(tokens.ids))
    assert (DROPS_THOUGHTS in documents[-1].notes) == (family.thoughts == "last")
    tags = {"<think>", "</think>"} & {*family.special, *family.added}
    for tag in tags:
        assert chat.tokenizer.convert_tokens_to_ids(tag) in chat.tokens(documents[-1])[0].target_id or name == "qwq"


@pytest.mark.parametrize("name", FAMILIES)
def test_reasoning_in_its_own_field_is_trained_or_the_row_is_refused(name: str) -> None:
    chat, family = format_of(name), FAMILIES[name]
    messages = [CHAT[0], CHAT[1] | {"reasoning_content": "An idea."}]
    if not family.reasoning:
        with pytest.raises(ChatTemplateError, match=r"leaves out the thought|not render this answer"):
            chat.documents(messages)
        return
    [document] = chat.documents(messages)
    assert "An idea." in document.segments[-1].text
    assert "An idea." not in document.segments[0].text
    assert chat.tokens(document)[1] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_tool_calls_and_their_results_are_rendered_or_the_row_is_refused(name: str) -> None:
    chat, family = format_of(name), FAMILIES[name]
    if not family.tools:
        with pytest.raises(ChatTemplateError):
            chat.documents(CALLS, None, TOOLS)
        return
    documents = chat.documents(CALLS, None, TOOLS)
    segments = [segment for document in documents for segment in document.segments]
    learnt = [segment.text for segment in segments if segment.trainable]
    assert re.search(r'weather.*"town": "Bern", "day": 3', learnt[0], re.DOTALL)
    assert "It has 0 degrees." in learnt[1]
    context = [segment.text for segment in documents[-1].segments if not segment.trainable]
    assert "0 degrees" in context[-1]
    assert "Weather of a town" in context[0]
    for document in documents:
        assert chat.tokens(document)[1] == []
    if not chat.keeps_history:
        return
    ids = own_ids(chat, CALLS, tools=TOOLS)
    tokens, _ = chat.tokens(documents[0])
    assert tokens.ids == ids[: len(tokens.ids)]


SAID = st.one_of(
    st.sampled_from(
        ["0", "a", "assistant", " x ", "\n\n1. One\n", "  indented\n    more", "</think>", "<think>",
         "<think>a</think>b", "<tool_response>\nx\n</tool_response>", "{{ bos_token }}", "[INST] x [/INST]",
         "<|im_end|>", "</s>", "\ufdd0", "ÿ𝄞"]
    ),
    st.text("ab <>/|\n[]", max_size=12),
    st.text(max_size=8),
)  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=25)
@given(said=st.lists(SAID, min_size=2, max_size=5), system=st.none() | SAID)
def test_any_chat_is_rendered_whole_or_refused_with_a_sentence(name: str, said: list[str], system: str | None) -> None:
    chat = format_of(name)
    turns: list[Message] = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said[: len(said) // 2 * 2])
    ]
    messages = chat.with_system(system, turns)
    documents: list[ChatDocument] = []
    with suppress(ChatTemplateError):
        documents = chat.documents(messages)
    for document in documents:
        tokens, _ = chat.tokens(document)
        text = chat.encoder.shown("".join(segment.text for segment in document.segments))
        decoded = chat.tokenizer.decode(tokens.ids)
        for special in FAMILIES[name].special:
            written = sum(content.count(special) for content in (m["content"] for m in messages))
            ids = tokens.ids.count(chat.tokenizer.convert_tokens_to_ids(special))
            assert ids <= text.count(special) + (not chat.end_text) or not written
        assert "\ufdd0" not in decoded
        last = re.sub(r"^.*</think>", "", messages[-1]["content"], flags=re.DOTALL).split()
        assert document is not documents[-1] or "".join(last) in "".join(text.split())
