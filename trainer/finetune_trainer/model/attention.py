"""Attention that keeps packed documents apart without a dense mask, registered with transformers.

`documents` calls SDPA once per document: exact, on any device, and linear in the row where a block mask is quadratic
(measured on two CPU cores, documents of 80 tokens in a row of 2048: 20 ms per layer against 234 ms). `varlen` is
torch's variable-length flash attention for CUDA. Neither builds a mask: the bounds travel as keyword arguments.
Rows with shared prefixes go to `shared_prefix`, from either, and so do those that a CPU computes: it has a faster way
to call SDPA's kernel.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PretrainedConfig

from finetune_api.report import Choice, FailureClass
from finetune_trainer.data.packing import Batch
from finetune_trainer.failures import TrainerError
from finetune_trainer.model.shared_prefix import Layout, repeated, shared_prefix_attention

DOCUMENTS = "finetune_documents"
VARLEN = "finetune_varlen"
FLASH = "flash_attention_2"
FLEX = "flex_attention"

KNOW_SHARED_PREFIXES = (DOCUMENTS, VARLEN)
"""Implementations that compute what documents begin with once."""

_SPOKEN = {DOCUMENTS: "sdpa, document by document", VARLEN: "varlen", FLASH: "flash", FLEX: "flex"}


@dataclass(frozen=True)
class AttentionChoice:
    """The name by which transformers knows the attention, and what the report says about it."""

    implementation: str
    choice: Choice


def attention_arguments(batch: Batch, implementation: str) -> dict[str, Any]:
    """Keyword arguments through which the decoder's layers learn where the documents of a packed row begin."""
    if batch.shared and implementation not in KNOW_SHARED_PREFIXES:
        raise ValueError(f"{implementation} does not know of shared prefixes")
    if batch.shared or implementation == DOCUMENTS:
        return {"row_layout": Layout.of(batch.bounds, batch.shared)}
    if implementation in (VARLEN, FLASH):
        return {
            "cu_seq_lens_q": batch.cu_seqlens,
            "cu_seq_lens_k": batch.cu_seqlens,
            "max_length_q": batch.max_length,
            "max_length_k": batch.max_length,
        }
    return {}  # transformers builds the block mask from positions that restart


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the number of documents differs from row to row: a graph for each would be compiled
def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    row_layout: Layout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document. query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D].

    `row_layout` says where the documents are; without one they are one.
    """
    layout = row_layout or Layout.of([0, query.shape[2]], ())
    flash = query.device.type == "cpu" and query.shape[-1] == value.shape[-1] and not dropout
    if layout.shared or flash:
        return shared_prefix_attention(query, key, value, layout, scaling, sliding_window), None
    key, value = repeated(query, key, value)
    lengths = [end - start for start, end in layout.segments]
    outputs = []
    split = (torch.split(tensor, lengths, 2) for tensor in (query, key, value))
    for q, k, v in zip(*split, strict=True):
        mask = _window(q.shape[2], sliding_window, q.device)
        outputs.append(
            functional.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=scaling)
        )
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def _window(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """bool[length, length]: the causal band of a sliding window, or None where the window covers the document."""
    if window is None or length <= window:
        return None
    at = torch.arange(length, device=device)
    distance = at[:, None] - at[None, :]
    return (distance >= 0) & (distance < window)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    row_layout: Layout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """As `document_attention`, by torch's variable-length flash attention (CUDA, 16-bit)."""
    from torch.nn.attention.varlen import varlen_attn

    if row_layout is not None:
        return shared_prefix_attention(query, key, value, row_layout, scaling, sliding_window), None
    key, value = repeated(query, key, value)
    length = query.shape[2]
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.tensor([0, length], dtype=torch.int32, device=query.device)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
    longest = max_length_q or length
    output = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, longest, longest, scale=scaling, window_size=window)
    assert isinstance(output, Tensor)
    return output[None], None


AttentionInterface.register(DOCUMENTS, document_attention)
AttentionInterface.register(VARLEN, varlen_attention)


def obstacle_to_sharing(
    model: nn.Module, config: PretrainedConfig, implementation: str, *, packed: bool, noise: float
) -> str:
    """Why sharing prefixes would change the results; empty if it would not. `noise` is NEFTune's alpha.

    Dropout and noise, drawn per token, differ between the copies of a prefix.
    """
    if not packed:
        return "examples do not share rows"
    if implementation not in KNOW_SHARED_PREFIXES:
        return f"{_SPOKEN.get(implementation, implementation)} attention does not support it"
    if noise:
        return "NEFTune's noise differs between the copies of a prefix"
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()) or _any_dropout(config):
        return "dropout differs between the copies of a prefix"
    return ""


# --- which one -------------------------------------------------------------------------------------------------------


def choose_attention(
    requested: str,
    *,
    config: PretrainedConfig,
    supports_backend: bool,
    packed: bool,
    device: torch.device,
    precision: torch.dtype,
) -> AttentionChoice:
    """The attention for this model and device. Raises TrainerError (bad-spec) for one that is not available here.

    `supports_backend`: the architecture hands keyword arguments through to its attention function.
    `packed`: rows hold several documents; padded batches use transformers' own attention with a padding mask.
    """
    obstacle = _obstacle(config, supports_backend, packed)
    refused = _refusal(requested, config, device, precision, obstacle)
    if refused:
        raise TrainerError(FailureClass.BAD_SPEC, refused, "model.attention")
    if requested != "auto":
        names = {"flash": FLASH, "flex": FLEX, "varlen": VARLEN, "eager": "eager"}
        names["sdpa"] = "sdpa" if obstacle else DOCUMENTS
        return _choice(names[requested], "set in the spec" + (f"; {obstacle}" if obstacle else ""))
    if obstacle:
        return _choice("eager" if _softcap(config) or _sinks(config) else "sdpa", obstacle)
    if device.type == "cuda" and precision != torch.float32 and not _dropout(config):
        # flash-attn, if installed, is the same kernel, but does not support shared prefixes.
        return _choice(VARLEN, "torch's variable-length flash attention needs no mask and supports shared prefixes")
    return _choice(DOCUMENTS, "needs no mask; linear in the row length")


def _choice(implementation: str, why: str) -> AttentionChoice:
    return AttentionChoice(implementation, Choice(value=_SPOKEN.get(implementation, implementation), why=why))


def _obstacle(config: PretrainedConfig, supports_backend: bool, packed: bool) -> str:
    """Why attention without a mask is not possible for this model; empty if it is."""
    if _softcap(config):
        return f"{config.model_type} caps its attention scores"
    if _sinks(config):
        return f"{config.model_type} has attention sinks"
    if not packed:
        return "padded batches need a padding mask"
    if not supports_backend:
        return f"{config.model_type} does not support other attention functions"
    kinds = set(getattr(config, "layer_types", None) or [])
    if getattr(config, "attention_chunk_size", None) or kinds - {"full_attention", "sliding_attention"}:
        return f"{config.model_type} uses further kinds of attention"
    return ""


def _refusal(
    requested: str, config: PretrainedConfig, device: torch.device, precision: torch.dtype, obstacle: str
) -> str:
    """Why the requested attention is not available here; empty if it is."""
    if requested == "flash":
        if device.type != "cuda" or precision == torch.float32:
            return "flash attention needs a GPU and 16-bit precision: set model.attention to auto."
        if not _has_flash():
            return "flash-attn is not installed in this image: set model.attention to auto or varlen."
    if requested == "flex" and device.type != "cuda":
        return "flex attention has no backward pass on a CPU: set model.attention to auto."
    if requested == "sdpa" and (_softcap(config) or _sinks(config)):
        return f"sdpa cannot compute this model's attention ({obstacle}): set model.attention to auto."
    if requested == "varlen":
        if device.type != "cuda" or precision == torch.float32:
            return "varlen attention needs a GPU and 16-bit precision: set model.attention to auto."
        if not obstacle and _dropout(config):
            obstacle = "its config has attention dropout"
        if obstacle:
            return f"varlen attention does not work for this model ({obstacle}): set model.attention to auto."
    return ""


def _softcap(config: PretrainedConfig) -> bool:
    return bool(getattr(config, "attn_logit_softcapping", None))


def _dropout(config: PretrainedConfig) -> bool:
    return bool(getattr(config, "attention_dropout", None) or getattr(config, "attn_pdrop", None))


def _any_dropout(config: PretrainedConfig) -> bool:
    """Whether a config asks for dropout or noise of any kind in the decoder, as a module or not."""
    named = {name: value for name, value in config.to_dict().items() if isinstance(value, float) and value > 0}
    drawn = [name for name in named if re.search("dropout|pdrop|jitter", name)]
    return any(not name.startswith(("summary", "classifier")) for name in drawn)


def _sinks(config: PretrainedConfig) -> bool:
    return bool(config.model_type == "gpt_oss")


def _has_flash() -> bool:
    return importlib.util.find_spec("flash_attn") is not None
