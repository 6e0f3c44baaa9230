"""State of a run in a file: named tensors, and as metadata the step, the run's record and other facts.

Tensors of FSDP2 are written by `torch.distributed.checkpoint`, each rank its shards, to safetensors files in
a folder that the state names; they are read by any number of processes, sharded or not. The state appears
when its file does: a run that is killed while it writes leaves the state before.
"""

import inspect
import itertools
import json
import re
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

from weights_convert.safetensors_files import Source, save_tensors
from weights_convert.untrusted_files import open_safetensors

hf_storage: Any = None
with suppress(ImportError):
    hf_storage = import_module("torch.distributed.checkpoint.hf_storage")
# By torch before 2.9, whose writer gathers tensors if it is there, states are written whole.
WRITES_SHARDS = hasattr(hf_storage, "HuggingFaceStorageWriter") and (
    "save_distributed" in inspect.signature(hf_storage.HuggingFaceStorageWriter).parameters
)
SHARDS = re.compile(r"(state|best)-\d{8}\.\d+")  # name of a folder of shards


def write_state(
    folder: Path, name: str, step: int, tensors: Mapping[str, Tensor], small: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write `folder/name.safetensors` atomically; called on all ranks, and done on all when it returns.

    tensors: of the model, sharded by FSDP2 or the same on every rank. small: others that every rank has.
    facts: what JSON can hold, as metadata.
    """
    metadata = {"step": str(step), **{key: json.dumps(fact, sort_keys=True) for key, fact in facts.items()}}
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    folder.mkdir(parents=True, exist_ok=True)
    if WRITES_SHARDS and any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        metadata["shards"] = _write_shards(folder, f"{name}-{step:08}", tensors)
        tensors = {}
    tensors = {key: _whole(tensor) for key, tensor in tensors.items()}
    if is_first:
        save_tensors({**tensors, **small}, folder / f"{name}.safetensors", metadata)
        for old in folder.glob(f"{name}-*"):
            if SHARDS.fullmatch(old.name) and old.name != metadata.get("shards"):
                shutil.rmtree(old)
    if dist.is_initialized():
        dist.barrier()


def _whole(tensor: Tensor) -> Tensor:
    """Return a tensor whole and on the CPU; all ranks must call it for a sharded one."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu().contiguous()


def _write_shards(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> str:
    """Write each rank's shards to a new folder, and return its name."""
    names = [""]
    if dist.get_rank() == 0:
        names = [next(new for i in itertools.count() if not (folder / (new := f"{name}.{i}")).exists())]
        (folder / names[0]).mkdir()
    dist.broadcast_object_list(names)
    writer = hf_storage.HuggingFaceStorageWriter(str(folder / names[0]), save_distributed=True)
    save(_with_axes(tensors), storage_writer=writer)
    return names[0]


def _with_axes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """View tensors without axes, which shards cannot be read of, as those of one value."""
    return {name: tensor if tensor.ndim else tensor.reshape(1) for name, tensor in tensors.items()}


class SavedState:
    """State in a file, of which tensors are read when they are copied; ValueError naming a damaged one."""

    def __init__(self, file: Path) -> None:
        self.file, self.source = file, Source([file])
        self.metadata = self.source.metadata(file) or {}
        step = self.metadata.get("step", "")
        if not step.isdecimal():
            raise ValueError(f"{file}: its metadata give step {step[:100]!r}, expected a whole number")
        self.step = int(step)
        self.shapes = {name: list(self.source.shape(name)) for name in self.source}
        self.shards = None if (shards := self.metadata.get("shards")) is None else self._open_shards(shards)

    def _open_shards(self, name: str) -> Any:
        if not SHARDS.fullmatch(name):
            got = f"its metadata give shards {name[:100]!r}"
            raise ValueError(f"{self.file}: {got}, expected the name of a folder beside it")
        folder = self.file.parent / name
        if not (files := sorted(folder.glob("*.safetensors"))):
            raise FileNotFoundError(f"{folder}: the shards of {self.file.name} are not there")
        for file in files:
            open_safetensors(file)  # names a damaged one
        reader = hf_storage.HuggingFaceStorageReader(str(folder))
        saved: Any = reader.read_metadata().state_dict_metadata
        self.shapes |= {key: list(entry.size) for key, entry in saved.items()}
        return reader

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    @torch.no_grad()
    def copy_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy what is saved under these names; ValueError, before any is copied, if one does not fit."""
        for name, tensor in tensors.items():
            if name not in self:
                raise ValueError(f"{self.file}: is of another run: it has no {name}")
            expected = list(tensor.shape) or ([] if self.shards is None else [1])
            if (got := self.shapes[name]) != expected:
                raise ValueError(f"{self.file}: is of another run: {name} is {got}, expected {expected}")
        if self.shards is not None:
            with warnings.catch_warnings(action="ignore"):  # one process loads alone, which is meant
                own = _with_axes(tensors)
                load(own, storage_reader=self.shards, no_dist=not dist.is_initialized())
            return
        for name, tensor in tensors.items():
            value = self.source.mapped(name)
            if isinstance(tensor, DTensor):
                value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
            tensor.copy_(value)

    def numbers(self, name: str) -> Tensor:
        """Return a tensor that every rank has, or one without values if it was not saved."""
        return self.source[name] if name in self.source else torch.empty(0)
