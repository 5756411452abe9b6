"""Chats become tokens so that exactly the assistant's words, and the token that ends them, are learnt."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.tiny import CHATML, tiny_tokenizer
from transformers import AutoTokenizer

from finetune_trainer.data.chat import (
    PLAIN_TEMPLATE,
    ChatFormat,
    ChatTemplateError,
    LabelledTokens,
    Message,
    choose_pad,
    with_plain_template,
)

CHAT: list[Message] = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": "No."},
]
IMPLICIT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}" + CHATML
)
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' <|im_end|>' }}{% endif %}{% endfor %}"
)
FORGETS_THOUGHTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_PREFIX = "{% for m in messages | reverse %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def tokenizer(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory)


def trained_text(format: ChatFormat, tokens: LabelledTokens) -> str:
    """The targets as text; checks that each is the token after its position."""
    assert [tokens.ids[position + 1] for position in tokens.target_position] == tokens.target_id
    return str(format.tokenizer.decode(tokens.target_id))


def formatted(tokenizer: Any, template: str) -> ChatFormat:
    tokenizer.chat_template = template
    return ChatFormat(tokenizer)


def test_every_assistant_turn_with_its_end_token_is_learnt_and_nothing_else(tokenizer: Any) -> None:
    chat = ChatFormat(tokenizer)
    [document] = chat.documents(CHAT)
    tokens = chat.tokens(document)[0]
    assert trained_text(chat, tokens) == "Hello.<|im_end|>No.<|im_end|>"
    whole = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert tokens.ids == whole[: len(tokens.ids)]
    assert tokenizer.decode(whole[len(tokens.ids) :]) == "\n"


def test_only_the_last_turn_is_learnt_on_request(tokenizer: Any) -> None:
    chat = ChatFormat(tokenizer)
    [document] = chat.documents(CHAT, [3])
    assert trained_text(chat, chat.tokens(document)[0]) == "No.<|im_end|>"


def test_a_prompt_has_the_same_tokens_with_and_without_its_answer(tokenizer: Any) -> None:
    chat = ChatFormat(tokenizer)
    _, prompt = chat.prompt(CHAT[:3])
    [document] = chat.documents(CHAT, [3])
    tokens = chat.tokens(document)[0]
    assert tokens.ids == prompt + chat.answer_ids("No.")
    assert tokens.target_position[0] == len(prompt) - 1


def test_a_control_token_in_the_data_is_plain_text(tokenizer: Any) -> None:
    chat = ChatFormat(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    text, ids = chat.prompt([{"role": "user", "content": "a <|im_end|> b"}])
    assert ids.count(end) == 1
    assert tokenizer.decode(ids) == text
    assert chat.answer_ids("a <|im_end|> b").count(end) == 1


def test_an_implicit_system_prompt_is_found_and_gives_way_to_the_job_s(tokenizer: Any) -> None:
    chat = formatted(tokenizer, IMPLICIT_SYSTEM)
    assert chat.implicit_system == "Be brief."
    assert ChatFormat(AutoTokenizer.from_pretrained(tokenizer.name_or_path)).implicit_system == ""
    text, _ = chat.prompt(chat.with_system("Be long.", CHAT[:1]))
    assert "Be long." in text
    assert "Be brief." not in text


def test_a_template_that_writes_words_after_the_prompt_has_them_learnt(tokenizer: Any) -> None:
    chat = formatted(tokenizer, LLAMA_2)
    [document] = chat.documents(CHAT)
    assert trained_text(chat, chat.tokens(document)[0]) == " Hello. <|im_end|> No. <|im_end|>"


def test_a_template_that_rewrites_earlier_turns_makes_a_document_of_each_turn(tokenizer: Any) -> None:
    chat = formatted(tokenizer, FORGETS_THOUGHTS)
    assert not chat.keeps_history
    documents = [chat.tokens(document)[0] for document in chat.documents(CHAT)]
    thoughtless = "<think>\n\n</think>\n\n"
    assert [trained_text(chat, tokens) for tokens in documents] == [
        f"{thoughtless}Hello.<|im_end|>",
        f"{thoughtless}No.<|im_end|>",
    ]
    assert len(chat.documents(CHAT, [3])) == 1


def test_a_system_prompt_goes_into_the_first_turn_where_the_template_has_no_place_for_it(tokenizer: Any) -> None:
    chat = formatted(tokenizer, NO_SYSTEM)
    assert not chat.takes_system
    assert chat.with_system("Be kind.", CHAT[:1]) == [{"role": "user", "content": "Be kind.\n\nHi"}]
    assert trained_text(chat, chat.tokens(chat.documents(CHAT)[0])[0]) == "Hello.<|im_end|>No.<|im_end|>"


def test_a_template_without_the_prefix_property_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ChatTemplateError, match=r"set model\.chatTemplate"):
        formatted(tokenizer, NO_PREFIX)


def test_a_base_model_gets_a_plain_template_with_its_end_token(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    assert with_plain_template(tokenizer)
    chat = ChatFormat(tokenizer)
    [document] = chat.documents([{"role": "system", "content": "S"}, *CHAT])
    assert trained_text(chat, chat.tokens(document)[0]) == "Hello.<|im_end|>No.<|im_end|>"
    assert chat.keeps_history
    assert not with_plain_template(tokenizer)


def test_a_template_without_end_tokens_still_teaches_to_stop(tokenizer: Any) -> None:
    chat = formatted(
        tokenizer,
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    )
    assert chat.answer_ids("No.")[-1] == tokenizer.eos_token_id
    assert [
        trained_text(chat, chat.tokens(document)[0]).endswith("<|im_end|>") for document in chat.documents(CHAT)
    ] == [True, True]


@pytest.mark.parametrize("template", [CHATML, "{{ bos_token }}" + CHATML])
def test_there_is_never_a_second_begin_token(directory: Path, template: str) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(directory, bos_token="<|endoftext|>")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    chat = formatted(tokenizer, template)
    _, ids = chat.prompt(CHAT[:1])
    assert ids.count(bos) == ("bos_token" in template)
    assert chat.plain_text_ids("words").count(bos) == 1
    assert formatted(tokenizer, "{{ bos_token * 2 }}" + CHATML).prompt(CHAT[:1])[1].count(bos) == 1


def test_the_pad_token_never_ends_an_answer(tokenizer: Any) -> None:
    ends = ChatFormat(tokenizer).end_token_ids
    assert choose_pad(tokenizer, ends).token == "<|pad|>"
    tokenizer.pad_token = tokenizer.eos_token
    chosen = choose_pad(tokenizer, ends)
    assert chosen.token not in (tokenizer.eos_token, tokenizer.bos_token)
    assert "also ends answers" in chosen.why


def test_a_byte_level_vocabulary_without_special_tokens_pads_with_a_byte_that_no_text_holds() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<eos>", *alphabet])}, merges=[]))
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<eos>")
    chosen = choose_pad(bare, [bare.eos_token_id])
    assert chosen is not None
    assert chosen.token == "ÿ"
    without = Tokenizer(models.WordLevel(vocab={"<eos>": 0, "word": 1}, unk_token="word"))
    assert choose_pad(PreTrainedTokenizerFast(tokenizer_object=without, eos_token="<eos>"), [0]) is None


AT_ONCE = {
    "chatml": CHATML,
    "implicit system": IMPLICIT_SYSTEM,
    "plain": PLAIN_TEMPLATE,
    "trimmed": NO_SYSTEM,
    "answers trimmed": "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' %}{{ m.content.strip() }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "turns that alternate": "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('They alternate') }}{% endif %}"
    "{% set text = m.role + ': ' + m.content | trim %}{{ text + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "counted": "{% for m in messages %}{{ loop.index }}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ messages | length + 1 }}assistant: {% endif %}",
    "an invitation without its space": "{% for m in messages %}{{ m.role }}:\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
}
ONE_BY_ONE = {
    "thoughts": FORGETS_THOUGHTS,
    "questions and answers": LLAMA_2,
    "contents changed": "{% for m in messages %}{{ m.role }}: {{ m.content | replace('a', 'b') }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "thoughts cut": "{% for m in messages %}{{ m.role }}: "
    "{{ m.content if loop.last else m.content.split('a')[-1] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "how many": "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
    "reversed": NO_PREFIX,
    "all but the first": "{% for m in messages[1:] %}{{ m.content }}<|im_end|>{% endfor %}",
    "a state": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{% endfor %}",
    "two loops": "{% for m in messages %}{{ m.content }}{% endfor %}{% for m in messages %}{{ m.role }}{% endfor %}",
    "an end": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}The end.",
    "another end": "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}A{% else %}E{% endif %}",
    "asked within": "{% for m in messages %}{{ m.content }}{% if add_generation_prompt %}?{% endif %}{% endfor %}",
    "the last one": "{% for m in messages %}{{ m.content }}{{ messages[-1].content }}{% endfor %}",
    "not a template": "{% for m in messages %}",
    "shown twice": "{% for m in messages %}{{ m.content }}{{ m.content }}<|im_end|>{% endfor %}",
    "the system at the end": "{% for m in messages %}{% if m.role != 'system' %}{{ m.role }}: "
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}{{ m.content }}<|im_end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
}
CONTENTS = st.lists(st.text("ab \n<|im_end|>\ufdd0"), min_size=1, max_size=9)


def chat_of(first: str, contents: list[str]) -> list[Message]:
    turns = ("assistant", "user") if first == "user" else ("user", "assistant")
    roles = [first, *(turns[i % 2] for i in range(len(contents) - 1))]
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


@pytest.mark.parametrize("template", (AT_ONCE | ONE_BY_ONE).values(), ids=AT_ONCE | ONE_BY_ONE)
@given(contents=CONTENTS, first=st.sampled_from(["system", "user", "assistant"]))
def test_the_beginnings_of_a_chat_are_what_the_template_writes_for_them(
    directory: Path, template: str, contents: list[str], first: str
) -> None:
    chat = ChatFormat.__new__(ChatFormat)
    chat.tokenizer = AutoTokenizer.from_pretrained(directory)
    chat.tokenizer.chat_template = template
    chat._skeleton = chat._find_skeleton
    messages = chat_of(first, contents)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
    begun: Any = chat._known_beginnings(messages, turns, ())
    for turn in turns if begun else ():
        for count, ask in ((turn, True), (turn + 1, False)):
            assert begun(count, ask) == chat._render(messages[:count], add_generation_prompt=ask)


@pytest.mark.parametrize("template", AT_ONCE.values(), ids=AT_ONCE)
def test_a_chat_is_rendered_once(tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = formatted(tokenizer, template)
    assert chat.keeps_history
    chat.documents(chat_of("user", ["Hi", "  Hello. ", "More\n", "No."]))
    counted = []
    render = chat._render
    monkeypatch.setattr(chat, "_render", lambda *given, **named: counted.append(1) or render(*given, **named))
    other = [message | {"content": f" {message['content']}!\n"} for message in CHAT]
    [document] = chat.documents(other)
    assert len(counted) == 1
    assert [segment.trainable for segment in document.segments] == [False, True, False, True]
    assert all("!" in segment.text for segment in document.segments)


def test_a_message_that_the_template_refuses_is_refused_in_its_words(tokenizer: Any) -> None:
    chat = formatted(tokenizer, CHATML)
    chat.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + m['note'] + '<|im_end|>' }}{% endfor %}"
    with pytest.raises(ChatTemplateError, match="no attribute 'note'"):
        chat.documents(CHAT)
