"""A random Llama of some 100,000 parameters with a real byte-level tokenizer, made in a moment."""

from __future__ import annotations

from pathlib import Path

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]


def tiny_tokenizer(directory: Path) -> Path:
    """Write a byte-level tokenizer (256 bytes and 4 special tokens) with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        unk_token="<|endoftext|>",
        pad_token="<|pad|>",
    )
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[:1]})
    fast.chat_template = CHATML
    fast.save_pretrained(directory)
    return directory


def tiny_llama(
    directory: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    key_value_heads: int = 2,
    intermediate: int = 128,
    tied: bool = True,
    context: int = 2048,
    seed: int = 0,
) -> Path:
    """Write a random Llama as safetensors with its config and tokenizer; returns `directory`."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tiny_tokenizer(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(directory)
    return directory


MOODS = {"good": ("lovely", "great", "nice"), "bad": ("awful", "sad", "ugly")}
"""Labels, and the words that stand for them."""


def days(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Sentences about days, and whether each was good or bad."""
    import random

    chance = random.Random(seed)
    labels = [("good", "bad")[day % 2] for day in range(count)]
    return [(f"a {chance.choice(MOODS[label])} day {day}", label) for day, label in enumerate(labels)]


def greetings(count: int, seed: int = 5) -> str:
    """Questions about days and kind answers, as JSON lines of chats."""
    import json
    import random

    chance = random.Random(seed)
    lines = []
    for day in range(count):
        said = (("user", f"how was day {day}?"), ("assistant", f"a {chance.choice(MOODS['good'])} day"))
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in said]}))
    return "\n".join(lines) + "\n"


def schooled_llama(directory: Path, steps: int = 120, seed: int = 0) -> Path:
    """A tiny Llama that has learnt to answer `good` or `bad`, but not when: what an adapter then learns in seconds."""
    import random

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny_llama(directory, seed=seed)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    chance = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        texts = []
        for sentence, _ in days(32, seed=step):
            answer = chance.choice(list(MOODS))
            chat = [{"role": "user", "content": sentence}, {"role": "assistant", "content": answer}]
            texts.append(tokenizer.apply_chat_template(chat, tokenize=False))
        batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    return directory
