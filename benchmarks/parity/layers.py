"""Two models side by side, module by module: which belong together, what they put out, where they part.

A module is known by our path. Its counterpart is found where the rename table takes the names of its weights,
so no list of pairs is kept.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from weights_convert.key_mapping import UNUSED, Table

Modules = dict[str, tuple[str, nn.Module]]  # our path -> the module's own path, and the module
Outputs = list[tuple[str, Tensor]]  # our path -> what it put out, in order of execution


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One run of a module. error: ours from the reference in the same dtype. ours_from_float64,
    reference_from_float64: how far each rounds, from the reference in float64. All relative, see
    `relative_error`.
    """

    ours: str
    reference: str
    error: float
    ours_from_float64: float
    reference_from_float64: float

    def is_beyond(self, tolerance: float) -> bool:
        """As in measure.py; written so that a NaN is."""
        return not self.error <= max(tolerance, 2 * self.reference_from_float64)

    @classmethod
    def of(cls, name: str, reference: str, got: Tensor, wanted: Tensor, exact: Tensor) -> Self:
        """What one module of ours put out, beside the reference's in the same dtype and in float64."""
        return cls(
            ours=name, reference=reference, error=relative_error(got, wanted),
            ours_from_float64=relative_error(got, exact),
            reference_from_float64=relative_error(wanted, exact),
        )  # fmt: skip


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference by largest value; infinite where shapes differ or a value is not finite."""
    if ours.shape != theirs.shape or not (torch.isfinite(ours).all() and torch.isfinite(theirs).all()):
        return float("inf")
    difference = (ours.double() - theirs.double()).abs().max()
    return (difference / theirs.double().abs().max()).item() if difference else 0.0


def our_modules(*models: nn.Module) -> Modules:
    """The modules of ours that have weights of their own."""
    return {path: (path, module) for model in models for path, module, _ in _with_weights(model)}


def their_modules(model: nn.Module, table: Table) -> Modules:
    """The reference's modules that have weights of their own, by our paths."""
    found = {}
    for path, module, weight in _with_weights(model):
        if path.endswith(".base_layer"):  # PEFT's: what counts is the layer with its LoRA
            path = path.removesuffix(".base_layer")
            module = model.get_submodule(path)
        if not (ours := table.to_ours(f"{path}.{weight}")).startswith(UNUSED):
            found[ours.rpartition(".")[0]] = path, module
    return found


def modules_of_file(model: nn.Module, tensors: Mapping[str, Tensor], table: Table) -> Modules:
    """The reference's modules that a file's tensors went into, by our paths, where it renames what it loads.

    Found by the values: a module belongs to the tensor that its weight is equal to, if just one is.
    """
    names: dict[bytes, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(_bytes(tensor), []).append(name)
    found = {}
    for path, module, weight in _with_weights(model):
        equal = names.get(_bytes(module.get_parameter(weight)), [])
        if len(equal) == 1:
            found[table.to_ours(equal[0]).rpartition(".")[0]] = path, module
    return found


def record(modules: Modules, run: Callable[[], Any]) -> tuple[Outputs, Any]:
    """What these modules put out, on the CPU, in the order in which they ran; and what the run returned."""
    outputs: Outputs = []

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _inputs, output: outputs.append((name, output.detach().to("cpu", copy=True)))

    handles = [module.register_forward_hook(keep(name)) for name, (_, module) in modules.items()]
    try:
        with torch.no_grad():
            return outputs, run()
    finally:
        for handle in handles:
            handle.remove()


def pairs(ours: Outputs, *theirs: Outputs) -> list[tuple[str, Tensor, *tuple[Tensor, ...]]]:
    """Our path, our output and that of each of their runs, in our order; what they lack is left out."""
    waiting: list[dict[str, list[Tensor]]] = []
    for outputs in theirs:
        waiting.append({})
        for name, output in outputs:
            waiting[-1].setdefault(name, []).append(output)
    return [
        (name, output, *(like(run[name].pop(0), output) for run in waiting))
        for name, output in ours
        if all(run.get(name) for run in waiting)
    ]


def like(other: Tensor, output: Tensor) -> Tensor:
    """The reference's output in the shape that ours has it in."""
    if other.shape != output.shape and other.transpose(0, 1).shape == output.shape:
        return other.transpose(0, 1)  # the reference's ChatGLM has the sequence first
    if output.ndim == other.ndim == 3 and output.shape[1] == 1 < len(other):
        return other.transpose(0, 1)[:, -1:]  # of its last layer ours computes the last position only
    if other.numel() == output.numel():
        return other.reshape(output.shape)  # height and width as one, or images and their tokens
    return other


def _with_weights(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Path, module and the name of its first weight."""
    found = []
    for path, module in model.named_modules():
        if (weight := next(module.named_parameters(recurse=False), None)) is not None:
            found.append((path, module, weight[0]))
    return found


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
