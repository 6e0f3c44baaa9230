"""State of a run in a file: named tensors, and as metadata the step, the run's record and other facts."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from weights_convert.safetensors_files import Source, save_tensors


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor whole and on the CPU; all ranks must call it for a sharded one."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu().contiguous()


class SavedState:
    """State in a file, of which tensors are read when they are copied; ValueError naming a damaged one."""

    def __init__(self, file: Path) -> None:
        self.file, self.source = file, Source([file])
        self.metadata = self.source.metadata(file) or {}
        step = self.metadata.get("step", "")
        if not step.isdecimal():
            raise ValueError(f"{file}: its metadata give step {step[:100]!r}, expected a whole number")
        self.step = int(step)

    def __contains__(self, name: object) -> bool:
        return name in self.source

    @torch.no_grad()
    def copy_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy what is saved under these names; ValueError, before any is copied, if one does not fit."""
        for name, tensor in tensors.items():
            if name not in self.source:
                raise ValueError(f"{self.file}: is of another run: it has no {name}")
            if (got := list(self.source.shape(name))) != (expected := list(tensor.shape)):
                raise ValueError(f"{self.file}: is of another run: {name} is {got}, expected {expected}")
        for name, tensor in tensors.items():
            value = self.source.mapped(name)
            if isinstance(tensor, DTensor):
                value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
            tensor.copy_(value)

    def losses(self) -> list[float]:
        """Return the losses of the steps before it; none if it is of a version that did not save them."""
        return self.source["losses"].flatten().tolist() if "losses" in self else []


def save(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write whole tensors and metadata atomically, in a folder that is made if it is not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(dict(tensors), file, dict(metadata))
