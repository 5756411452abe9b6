"""Loading: empty model, adapters, sharding, then each rank's own rows; and the module that the loop trains.

No rank ever holds the whole model: the peak is its shard, the largest tensor and a constant.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import AutoTokenizer, PreTrainedModel

from finetune_api.report import Choice, FailureClass
from finetune_api.spec import Tuning
from finetune_api.traits import Method
from finetune_trainer.data.packing import Batch
from finetune_trainer.failures import TrainerError
from finetune_trainer.model import adapters, nf4
from finetune_trainer.model.adapters import base_name
from finetune_trainer.model.attention import (
    AttentionChoice,
    attention_arguments,
    choose_attention,
    obstacle_to_sharing,
)
from finetune_trainer.model.loss import logits_transform, target_losses
from finetune_trainer.model.sharding import shard
from finetune_trainer.model.shared_prefix import kernel_obstacle, masks_only
from finetune_trainer.model.weights import (
    ModelWeights,
    SafetensorsDirectory,
    empty_model,
    fill,
    read_config,
    shape_mismatch,
)
from finetune_trainer.untrusted import refuse_without_attention

PACKED_DEVIATION = 0.05
"""Relative difference of logits that rounding may make in bfloat16; a leak makes several times as much."""


class CausalModel(nn.Module):
    """A causal language model with its adapters: the FSDP root. Everything that needs weights runs in `forward`."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        method: Method,
        attention: str,
        label_smoothing: float,
        neftune_alpha: float,
        autocast: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.method = method
        self.label_smoothing = label_smoothing
        self.neftune_alpha = neftune_alpha
        self.choices: dict[str, Choice] = {}
        """What each `auto` became; for the report."""
        self.trainable: list[tuple[str, nn.Parameter]] = []
        """Names and parameters (shards, under FSDP) that are trained; names do not depend on the world size."""
        self.initial: dict[str, Tensor] = {}
        """PiSSA's first A and B, which the export takes away again; empty for other methods."""
        self.packs = False
        """Whether batches are packed rows; otherwise they are padded."""
        self.shares_prefixes = False
        """Whether batches may hold shared prefixes."""
        self.attention = attention
        self._autocast = autocast
        self._logits_transform = logits_transform(self.config)
        self._noise_scale: Tensor | None = None
        if neftune_alpha:
            self.causal_lm.get_input_embeddings().register_forward_hook(self._add_noise)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model inside."""
        inner = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        found: PreTrainedModel = inner
        return found

    @property
    def config(self) -> Any:
        """The text model's config."""
        return self.causal_lm.config.get_text_config()

    @overload
    def forward(self, batch: Batch) -> Tensor: ...
    @overload
    def forward(self, batch: Batch, with_correct: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def forward(self, batch: Batch, with_correct: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Cross entropy of each target of the batch, float32[L] (label smoothing included), unweighted.

        `with_correct` adds bool[L]: whether the target is the most likely token. L = 0 gives an empty tensor that
        is connected to the graph, so that a rank without a label still takes part in the backward pass.
        """
        with self._precision(batch):
            hidden = self._hidden(batch)
            losses, correct = target_losses(
                hidden.flatten(0, 1),
                batch.target_position,
                batch.target_id,
                self._head,
                self.config.vocab_size,
                self.label_smoothing if self.training else 0.0,
            )
        return (losses, correct) if with_correct else losses

    @torch.no_grad()
    def deviation_when_packed(self, device: torch.device, shared: bool) -> float:
        """Norm of the difference over the norm of the logits: a document behind another one against alone.

        `shared`: both have their first tokens in common, which stand once in the row.
        """
        ids = torch.arange(1, 12, device=device) % self.config.vocab_size
        bounds = [0, 4, 7, 11] if shared else [0, 6, 11]
        start = bounds[-2]  # of the document that is looked at, or of its own part
        alone = torch.cat([ids[:4], ids[start:]]) if shared else ids[start:]
        positions = [torch.arange(end - begin) for begin, end in itertools.pairwise(bounds)]
        if shared:
            positions[1:] = [position + bounds[1] for position in positions[1:]]
        nothing = torch.empty(0, dtype=torch.long, device=device)
        batch = Batch(
            ids=ids[None],
            positions=torch.cat(positions).to(device)[None],
            cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=device),
            bounds=tuple(bounds),
            max_length=max(len(position) for position in positions),
            target_position=nothing,
            target_id=nothing,
            target_weight=nothing.float(),
            target_document=nothing,
            shared=((bounds[0], bounds[1], bounds[-1]),) if shared else (),
        )
        with self._precision(batch):
            packed = self._head(self._hidden(batch)[:, start:]).float()
            logits = self.causal_lm(input_ids=alone[None], use_cache=False).logits.float()[:, -packed.shape[1] :]
        return float((packed - logits).norm() / logits.norm())

    def sync_gradients(self, last: bool) -> None:
        """Whether the next backward pass is the last of the step: only then are adapters' gradients exchanged.

        Full tuning exchanges in every backward pass, or each rank would hold the whole model's gradients.
        """
        if not self.method.traits.trains_base and isinstance(self, FSDPModule):
            self.set_requires_gradient_sync(last)

    def _precision(self, batch: Batch) -> AbstractContextManager[Any]:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(batch.ids.device.type, self._autocast)

    def _head(self, hidden: Tensor) -> Tensor:
        return self._logits_transform(self.causal_lm.get_output_embeddings()(hidden))

    def _hidden(self, batch: Batch) -> Tensor:
        """Hidden states [B, T, H] of the batch's own tokens."""
        decoder = self.causal_lm.get_decoder()
        if decoder is self.causal_lm:  # transformers did not find it, as in Llama 4
            decoder = self.causal_lm.model
        self._noise_scale = self._neftune(batch)
        if self.method is Method.PROMPT:
            return self._hidden_after_prompt(decoder, batch)
        if self.method is Method.PREFIX:
            return self._hidden_after_prefix(decoder, batch)
        output = decoder(
            input_ids=batch.ids,
            position_ids=batch.positions,
            attention_mask=batch.attention_mask,
            use_cache=False,
            **attention_arguments(batch, self.attention),
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _hidden_after_prompt(self, decoder: nn.Module, batch: Batch) -> Tensor:
        embedded = self.causal_lm.get_input_embeddings()(batch.ids)
        prompt = self._virtual(batch).to(embedded.dtype)
        output = decoder(
            inputs_embeds=torch.cat([prompt, embedded], 1),
            attention_mask=_longer_mask(batch, prompt.shape[1]),
            use_cache=False,
        )
        hidden: Tensor = output.last_hidden_state[:, prompt.shape[1] :]
        return hidden

    def _hidden_after_prefix(self, decoder: nn.Module, batch: Batch) -> Tensor:
        cache = self._virtual(batch)
        output = decoder(
            input_ids=batch.ids,
            attention_mask=_longer_mask(batch, cache.get_seq_length()),
            past_key_values=cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _virtual(self, batch: Batch) -> Any:
        if batch.attention_mask is None:
            raise ValueError(f"{self.method} needs padded batches: packed documents would see each other's prompt")
        assert isinstance(self.model, PeftModel)
        return self.model.get_prompt(batch.ids.shape[0])

    def _neftune(self, batch: Batch) -> Tensor | None:
        """float[B, T, 1]: the noise's bound alpha / sqrt(L * d) with each token's own document length L."""
        if not (self.neftune_alpha and self.training):
            return None
        bounds = batch.cu_seqlens.long()
        lengths = bounds.diff()
        if batch.attention_mask is not None:
            lengths = batch.attention_mask.sum(1).clamp(min=1)
        scale = self.neftune_alpha / torch.sqrt(lengths.float() * self.config.hidden_size)
        return scale.repeat_interleave(bounds.diff()).view(*batch.ids.shape, 1)

    def _add_noise(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """NEFTune (https://arxiv.org/abs/2310.05914), from the step's own random state."""
        if self._noise_scale is None:
            return output
        return output + (self._noise_scale * (2 * torch.rand_like(output, dtype=torch.float32) - 1)).to(output.dtype)


def load_model(
    *,
    directory: Path | str,
    method: Method,
    tuning: Tuning,
    precision: torch.dtype,
    device: torch.device,
    mesh: DeviceMesh | None,
    seed: int,
    attention: str = "auto",
    packing: bool | None = None,
    share_prefixes: bool | None = None,
    activation_checkpointing: bool = False,
    compile: bool = False,
    neftune_alpha: float = 0.0,
    label_smoothing: float = 0.0,
    adapter_directory: Path | str | None = None,
    nf4_directory: Path | str | None = None,
    trust_remote_code: bool = False,
) -> CausalModel:
    """The model, ready to train; a collective call when `mesh` is given.

    directory: config and safetensors of the base; nf4_directory: its 4-bit copy (qlora); adapter_directory: a LoRA
    adapter to go on from. precision: type of frozen weights and of products; what is trained is float32.
    mesh: None keeps plain tensors on `device` (one process), else FSDP over [ranks] or [replicas, ranks].
    packing: batches are packed rows, not padded ones (which prompt and prefix always get); None: wherever documents in
    one row do not see each other, as `packs` then says.
    share_prefixes: packed rows may hold shared prefixes; None: wherever that is exact, as `shares_prefixes` then says.
    Raises TrainerError (bad-spec) for files, modules or kernels that do not fit.
    """
    directory = Path(directory)
    adapter_directory = Path(adapter_directory) if adapter_directory else None
    nf4_directory = Path(nf4_directory) if nf4_directory else None
    _refuse_combinations(method, tuning, activation_checkpointing)
    nf4.refuse_quantized(directory, trust_remote_code)
    config = read_config(directory, trust_remote_code)
    refuse_without_attention(config)
    packed = packing is not False and method.traits.can_pack
    dtype = torch.float32 if method.traits.trains_base else precision
    base = empty_model(config, dtype, None, trust_remote_code)  # some models keep the attention they are made with
    attend = partial(_set_attention, base, requested=attention, device=device, precision=precision)
    chosen = attend(packed=packed)
    layers = list(adapters.decoder_layers(base))
    with SafetensorsDirectory(_source(directory, method, nf4_directory)) as files:
        weights = ModelWeights(files, base)
        root = CausalModel(
            _attach(base, method, tuning, precision, adapter_directory),
            method=method,
            attention=chosen.implementation,
            label_smoothing=label_smoothing,
            neftune_alpha=neftune_alpha,
            autocast=precision if mesh is None and precision != torch.float32 else None,
        )
        root.choices["attention"] = chosen.choice
        if left_out := adapters.left_out(base) if tuning.lora.target_modules == "all-linear" else []:
            root.choices["targetModules"] = Choice(
                value=tuning.lora.target_modules, why=f"adapts all but {', '.join(left_out)}"
            )
        _train_in_float32(root)
        if activation_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        buffers = {name: buffer.clone() for name, buffer in root.named_buffers()}
        if mesh is not None:
            shard(root, layers, [] if _tied(base) else [base.get_input_embeddings()], mesh, precision)
        _materialise(root, base, buffers, device)
        if method.traits.four_bit:
            nf4.read_states(base, files, device)
        _fill(base, weights)
        if method.traits.four_bit and mesh is not None:
            check_bits(base, layers[0], weights)
    _initialise(root, directory, tuning, seed, adapter_directory)
    root.trainable = [(name, p) for name, p in root.named_parameters() if p.requires_grad]
    root.packs = packed and _keeps_documents_apart(root, device, required=packing is True)
    if packed and not root.packs:
        chosen = attend(packed=False)
        root.attention, root.choices["attention"] = chosen.implementation, chosen.choice
    _choose_sharing(root, share_prefixes, root.packs, device, precision)
    if compile:  # after the check, whose few tokens would be compiled for
        for layer in layers:
            layer.compile()
    return root.train()


def _source(directory: Path, method: Method, nf4_directory: Path | None) -> Path:
    if not method.traits.four_bit:
        return directory
    if nf4_directory is None:
        raise ValueError("qlora needs the 4-bit copy that Prepare writes")
    return nf4_directory


def _set_attention(
    base: PreTrainedModel, *, requested: str, packed: bool, device: torch.device, precision: torch.dtype
) -> AttentionChoice:
    chosen = choose_attention(
        requested,
        config=base.config.get_text_config(),
        supports_backend=bool(base._supports_attention_backend),
        packed=packed,
        device=device,
        precision=precision,
    )
    base.set_attn_implementation(chosen.implementation)
    return chosen


def _keeps_documents_apart(root: CausalModel, device: torch.device, required: bool) -> bool:
    """Whether this architecture, packed, computes what it computes for one document alone.

    Catches both attention that reaches over into other documents and a head that does more than is known here.
    Raises TrainerError (bad-spec) if it does not, but is `required` to.
    """
    register_fsdp_forward_method(root, "deviation_when_packed")
    deviation = _deviation(root, device, shared=False)
    if deviation < PACKED_DEVIATION:
        return True
    why = f"{root.config.model_type} gives different results for packed examples: logits differ by {deviation:.0%}"
    if required:
        raise TrainerError(FailureClass.BAD_SPEC, f"{why}. Remove training.packing.", "training.packing")
    root.choices["packing"] = Choice(value="off", why=why)
    return False


def _deviation(root: CausalModel, device: torch.device, shared: bool) -> float:
    root.eval()
    deviation = root.deviation_when_packed(device, shared)
    if isinstance(root, FSDPModule):
        root.reshard()
    return deviation


def _choose_sharing(
    root: CausalModel, requested: bool | None, packed: bool, device: torch.device, precision: torch.dtype
) -> None:
    """Decide whether what documents begin with is computed once. Raises TrainerError (bad-spec) if it must but cannot.

    Neither architecture nor device is trusted. What the model computes behind a shared prefix is compared with what
    it computes alone, with masks: the kernel rounds otherwise, which some models blow up in 16 bits. The kernel is
    compared with masks by itself.
    """
    obstacle = obstacle_to_sharing(root, root.config, root.attention, packed=packed, noise=root.neftune_alpha)
    if not obstacle and requested is not False:
        with masks_only():
            deviation = _deviation(root, device, shared=True)
        if not deviation < PACKED_DEVIATION:
            obstacle = f"{root.config.model_type} gives different results with them: logits differ by {deviation:.0%}"
        else:
            head_width = (
                getattr(root.config, "head_dim", None) or root.config.hidden_size // root.config.num_attention_heads
            )
            obstacle = kernel_obstacle(int(head_width), precision, device)
    if requested and obstacle:
        raise TrainerError(
            FailureClass.BAD_SPEC,
            f"This job cannot share prefixes: {obstacle}. Remove training.sharedPrefixes.",
            "training.sharedPrefixes",
        )
    root.shares_prefixes = requested is not False and not obstacle
    why = obstacle or "a common prefix of several examples is computed once"
    root.choices["sharedPrefixes"] = Choice(
        value="on" if root.shares_prefixes else "off", why=why if requested is None else "set in the spec"
    )


def _refuse_combinations(method: Method, tuning: Tuning, activation_checkpointing: bool) -> None:
    """What cannot be computed rightly, whatever the spec's own rules let through (an out-of-memory forces options)."""
    if activation_checkpointing and not method.traits.can_recompute:
        raise TrainerError(
            FailureClass.BAD_SPEC,
            f"{method.traits.title} does not support activation checkpointing: "
            "set training.activationCheckpointing to false.",
            "training.activationCheckpointing",
        )
    if method.traits.four_bit and tuning.lora.init == "pissa":
        raise TrainerError(
            FailureClass.BAD_SPEC,
            "PiSSA subtracts the adapter from the base, which a 4-bit base cannot express: use lora, or init: default.",
            "tuning.lora.init",
        )


def _attach(
    base: PreTrainedModel, method: Method, tuning: Tuning, precision: torch.dtype, adapter_directory: Path | None
) -> PreTrainedModel | PeftModel:
    if method.traits.trains_base:
        return base.requires_grad_(True)
    if method.traits.four_bit:
        nf4.refuse_saving_quantized(base, tuning.lora.modules_to_save)
        nf4.make_linear_4bit(base, tuning.quantization, _compute_dtype(tuning, precision))
    attached = adapters.attach(base, tuning, adapter_directory)
    if method.traits.four_bit:
        nf4.pack_empty(base)
    return attached


def _compute_dtype(tuning: Tuning, precision: torch.dtype) -> torch.dtype:
    asked = tuning.quantization.compute_dtype
    found: torch.dtype = precision if asked == "auto" else getattr(torch, asked)
    return found


def _tied(base: PreTrainedModel) -> bool:
    head, embedding = _unwrapped(base.get_output_embeddings()), _unwrapped(base.get_input_embeddings())
    return head.weight is embedding.weight


def _unwrapped(module: Any) -> Any:
    """The model's own module inside PEFT's wrappers."""
    while inner := getattr(module, "base_layer", None) or getattr(module, "original_module", None):
        module = inner
    return module


def _longer_mask(batch: Batch, virtual: int) -> Tensor:
    mask = batch.attention_mask
    assert mask is not None
    return torch.cat([mask.new_ones(mask.shape[0], virtual), mask], 1)


def _train_in_float32(root: nn.Module) -> None:
    for parameter in root.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def _materialise(root: nn.Module, base: PreTrainedModel, buffers: dict[str, Tensor], device: torch.device) -> None:
    tied = _tied(base)
    root.to_empty(device=device)
    if tied:  # to_empty makes a tensor for each name
        _unwrapped(base.get_output_embeddings()).weight = _unwrapped(base.get_input_embeddings()).weight
    for name, buffer in root.named_buffers():
        buffer.copy_(buffers[name])


def _fill(base: PreTrainedModel, weights: ModelWeights) -> None:
    """Copy this rank's rows of every base weight from the files."""
    for name, parameter in base.named_parameters():
        key = base_name(name)
        if key not in weights:
            if adapters.is_adapter(name):
                continue
            key = _tied_name(base, key, weights)
        if weights.shape(key) != tuple(parameter.shape):
            raise shape_mismatch(weights.directory.directory, key, weights.shape(key), parameter.shape)
        fill(parameter, weights, key)


def check_bits(base: PreTrainedModel, layer: nn.Module, weights: ModelWeights) -> None:
    """Raise RuntimeError if a layer's 4-bit weights, gathered as for a forward pass, are not the file's to the bit.

    Gathering in a float type has altered NaN bit patterns on GPUs (bitsandbytes#1945). Collective.
    """
    assert isinstance(layer, FSDPModule)
    layer.unshard()
    inside = set(layer.modules())
    for name, module in nf4.linear_4bit(base).items():
        if module in inside:
            key = base_name(f"{name}.weight")
            if not torch.equal(module.weight.detach().cpu().flatten(), weights.read(key).flatten()):
                raise RuntimeError(f"{key} was altered when it was gathered from the ranks")
    layer.reshard()


def _tied_name(base: PreTrainedModel, key: str, weights: ModelWeights) -> str:
    """The name under which the files hold a tied weight. Raises TrainerError if they do not."""
    tied: dict[str, str] = base.all_tied_weights_keys or {}
    for one, other in tied.items():
        for name, alias in ((one, other), (other, one)):
            if name == key and alias in weights:
                return alias
    raise TrainerError(FailureClass.BAD_SPEC, f"{weights.directory.directory} lacks the tensor {key}.", "model")


def _initialise(root: CausalModel, directory: Path, tuning: Tuning, seed: int, adapter_directory: Path | None) -> None:
    model = root.model
    if not isinstance(model, PeftModel):
        return
    if adapter_directory is not None:
        adapters.load_adapter(model, adapter_directory)
    elif root.method.traits.low_rank:
        adapters.initialise_lora(root.causal_lm, tuning.lora, seed)
        if tuning.lora.init == "pissa":
            factors = {name: p for name, p in root.named_parameters() if ".lora_A." in name or ".lora_B." in name}
            root.initial = {name: p.detach().clone() for name, p in factors.items()}
    elif root.method.traits.prepends_tokens:
        rows = _prompt_rows(directory, tuning, seed) if root.method is Method.PROMPT else None
        adapters.initialise_virtual_tokens(model, rows, seed)


def _prompt_rows(directory: Path, tuning: Tuning, seed: int) -> Tensor:
    """Embeddings of the tokens of `initText`, repeated to the prompt's length, or of random tokens."""
    count = tuning.prompt.virtual_tokens
    with SafetensorsDirectory(directory) as files:
        base = empty_model(read_config(directory), torch.float32)
        weights = ModelWeights(files, base)
        name = next(n for n, p in base.named_parameters() if p is base.get_input_embeddings().weight)
        if tuning.prompt.init_text:
            tokenizer: Callable[..., Any] = AutoTokenizer.from_pretrained(directory)
            ids = tokenizer(tuning.prompt.init_text, add_special_tokens=False)["input_ids"]
            ids = (ids * -(-count // len(ids)))[:count]
        else:
            random = adapters.generator(seed, "prompt")
            ids = torch.randint(weights.shape(name)[0], (count,), generator=random).tolist()
        return torch.cat([weights.rows(name, i, i + 1) for i in ids]).float()
