"""Reading a model directory tensor by tensor, and copying each rank's own rows into its shards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from finetune_api.report import FailureClass
from finetune_trainer.failures import TrainerError
from finetune_trainer.untrusted import check_weight_map

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


class SafetensorsDirectory:
    """The tensors of all safetensors files of a directory, by name; each is read only when asked for, in part or whole.

    A context manager: files are opened on first use and closed at the end.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        self._file_of = self._files()

    def __enter__(self) -> SafetensorsDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._open.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a tensor."""
        found: torch.dtype = self._slice(name)[:0].dtype if self.shape(name) else self.read(name).dtype
        return found

    def read(self, name: str) -> Tensor:
        """The whole tensor, on the CPU."""
        tensor: Tensor = self._file(name).get_tensor(name)
        return tensor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor, and no others, on the CPU."""
        rows: Tensor = self._slice(name)[start:stop]
        return rows

    def _slice(self, name: str) -> Any:
        return self._file(name).get_slice(name)

    def _file(self, name: str) -> Any:
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = self._stack.enter_context(safe_open(self.directory / file, framework="pt"))
        return self._open[file]

    def _files(self) -> dict[str, str]:
        index = self.directory / INDEX_FILE
        if index.exists():
            return check_weight_map(INDEX_FILE, json.loads(index.read_text()).get("weight_map"))
        names = [SINGLE_FILE] if (self.directory / SINGLE_FILE).exists() else []
        names = names or sorted(path.name for path in self.directory.glob("*.safetensors"))
        if not names:
            raise TrainerError(
                FailureClass.BAD_SPEC,
                f"{self.directory} holds no safetensors files; convert the model with save_pretrained first.",
                "model",
            )
        found: dict[str, str] = {}
        for name in names:
            with safe_open(self.directory / name, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), name)
        return found


class ModelWeights:
    """A model directory by the names of the model's parameters: transformers' renamings and conversions applied.

    Some checkpoints differ from the model in memory (experts stacked, projections fused). Tensors under their own
    or a renamed name are read in slices; a converted one is made whole for as long as it takes to copy a slice.
    """

    def __init__(self, directory: SafetensorsDirectory, model: PreTrainedModel) -> None:
        self.directory = directory
        self._model = model
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self.direct: dict[str, str] = {}
        """Name in the file of each parameter that is not converted."""
        self._groups: dict[str, list[tuple[str, str]]] = {}
        expected = model.state_dict()
        for source in directory:
            if ".weight." in source:  # the state of a 4-bit weight
                continue
            target, pattern = rename_source_key(
                source, self._renamings, self._converters, model.base_model_prefix, expected
            )
            if pattern is None:
                self.direct[target] = source
            else:
                self._groups.setdefault(target, []).append((source, pattern))
        self.groups = {
            group: list(self._convert(group)) if len(self._converter_targets(group)) > 1 else [group]
            for group in self._groups
        }
        """Parameters that are converted from the same tensors of the files."""
        self._converted = {name: group for group, targets in self.groups.items() for name in targets}

    def __contains__(self, name: str) -> bool:
        return name in self.direct or name in self._converted

    def names(self) -> list[str]:
        """All parameters of the model that the directory holds."""
        return [*self.direct, *self._converted]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""
        return self.directory.shape(self.direct[name]) if name in self.direct else tuple(self.read(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Data type in the file."""
        source = self.direct.get(name) or self._groups[self._converted[name]][0][0]
        return self.directory.dtype(source)

    def read(self, name: str) -> Tensor:
        """The whole parameter, on the CPU."""
        if name in self.direct:
            return self.directory.read(self.direct[name])
        return self._convert(self._converted[name])[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a parameter, on the CPU."""
        if name in self.direct:
            return self.directory.rows(self.direct[name], start, stop)
        return self.read(name)[start:stop]

    def _convert(self, group: str) -> dict[str, Tensor]:
        sources = self._groups[group]
        converter = deepcopy(next(c for c in self._converters if sources[0][1] in c.source_patterns))
        for source, pattern in sources:
            converter.add_tensor(group, source, pattern, self.directory.read(source))
        made = converter.convert(group, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _converter_targets(self, group: str) -> list[str]:
        pattern = self._groups[group][0][1]
        targets: list[str] = next(c for c in self._converters if pattern in c.source_patterns).target_patterns
        return targets


def read_config(directory: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's config. Raises TrainerError (bad-spec) if it cannot be read or needs code that is not trusted."""
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        sentence = f"{directory}/config.json is not a model that transformers knows: {str(error).splitlines()[0]}"
        if "trust_remote_code" in str(error):
            sentence = "The model comes with its own code; set model.trustRemoteCode: true if you have read it."
        raise TrainerError(FailureClass.BAD_SPEC, sentence, "model") from error
    return config


def empty_model(
    config: PretrainedConfig, dtype: torch.dtype, attention: str | None = "eager", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The architecture with parameters on the meta device and real buffers (rotary frequencies are not in files)."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    model.tie_weights()  # moving parameters to the meta device one by one has untied them
    model.config.use_cache = False
    return model


def own_rows(parameter: Tensor) -> tuple[int, int]:
    """First and last+1 row of the whole tensor that this rank holds of a parameter sharded by rows."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.shape[0]
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offset[0], offset[0] + shape[0]


@torch.no_grad()
def fill(parameter: Tensor, source: Tensor | ModelWeights, name: str = "") -> None:
    """Copy this rank's rows into `parameter`, from a whole tensor or the parameter `name` of a model directory."""
    start, stop = own_rows(parameter)
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    if stop > start:
        local.copy_(source[start:stop] if isinstance(source, Tensor) else source.rows(name, start, stop))


def whole(parameter: Tensor) -> Tensor:
    """The whole tensor on every rank. Collective for shards: all ranks must call it, in the same order."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


@torch.no_grad()
def whole_on_leader(parameter: Tensor) -> Tensor:
    """The whole tensor on rank 0, an empty one on the other ranks, which never hold more than their own rows.

    Collective for shards: all ranks must call it, in the same order.
    """
    if not isinstance(parameter, DTensor):
        return parameter if not dist.is_initialized() or dist.get_rank() == 0 else parameter.new_empty(0)
    mesh = parameter.device_mesh
    group = mesh.get_group(mesh.ndim - 1)  # shards lie in the last dimension; the first one holds replicas
    local, ranks = parameter.to_local(), dist.get_process_group_ranks(group)
    if 0 not in ranks:
        return local.new_empty(0)
    rows = -(-parameter.shape[0] // len(ranks))  # the last ranks may hold fewer rows, or none
    own = local.new_zeros(rows, *local.shape[1:])
    own[: len(local)] = local
    if dist.get_rank() != 0:
        dist.gather(own, group=group, dst=0)
        return local.new_empty(0)
    full = local.new_empty(rows * len(ranks), *local.shape[1:])
    dist.gather(own, list(full.chunk(len(ranks))), group=group, dst=0)
    return full[: parameter.shape[0]]


def shape_mismatch(directory: Path, name: str, found: Sequence[int], expected: Sequence[int]) -> TrainerError:
    """The error for a tensor whose shape differs from the config's."""
    return TrainerError(
        FailureClass.BAD_SPEC,
        f"{directory}: tensor {name} has shape {list(found)}, but the config requires {list(expected)}.",
        "model",
    )
