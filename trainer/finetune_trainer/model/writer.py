"""Writing safetensors from tensors that come one by one: never more than one file's worth in memory."""

from __future__ import annotations

import errno
import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from finetune_trainer.model.weights import INDEX_FILE, SINGLE_FILE

SHARD_BYTES = 2**30


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one safetensors file. Raises OSError (ENOSPC) if the volume is full."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if "os error 28" in str(error) or "No space left" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device", str(path)) from error
        raise


class ShardWriter:
    """safetensors files of at most `shard_bytes` each, with an index, from tensors that come one by one."""

    def __init__(self, directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.directory = directory
        self.shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; a full shard is written at once."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += size
        self._total_bytes += size

    def close(self) -> None:
        """Write what is left, give the files their final names, and write the index if there are several."""
        if self._pending:
            self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, start=1):
            final = SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            (self.directory / self._temporary(number)).rename(self.directory / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            (self.directory / INDEX_FILE).write_text(json.dumps(index, indent=1, sort_keys=True))

    def _flush(self) -> None:
        self._shards.append(list(self._pending))
        save_tensors(self._pending, self.directory / self._temporary(len(self._shards)))
        self._pending, self._pending_bytes = {}, 0

    @staticmethod
    def _temporary(number: int) -> str:
        return f".shard-{number}"
