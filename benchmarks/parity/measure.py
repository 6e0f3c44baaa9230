"""A model in both libraries, in every dtype: how far its outputs and its modules are from the reference's.

An error is beyond if it exceeds its dtype's tolerance, and also twice what the reference itself is from
float64 there: two roundings may lie on both sides.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from benchmarks.full_size import Tensors, cast
from benchmarks.pairs import WeightsAs
from benchmarks.parity.layers import Layer, Modules, pairs, record, relative_error
from kolors_core.notebook import table_html

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EXACT, FLOAT32 = 1e-10, 5e-6
BETWEEN = "no module differs, so it lies between modules"
TOLERANCES = {"float64": EXACT, "float32": FLOAT32, "bfloat16": 5e-2, "float16": 5e-3}


@dataclass(frozen=True, kw_only=True)
class Side:
    """One library's models ready to run. modules: those to compare, by our paths."""

    models: tuple[nn.Module, ...]
    modules: Modules
    run: Callable[[Tensors], Tensors]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One component. inputs: in float64. left_out: dtypes that are not run, each with the reason."""

    name: str
    inputs: Tensors
    ours: Callable[[], Side]
    theirs: Callable[[], Side]
    tolerances: Mapping[str, float] = field(default_factory=lambda: TOLERANCES)
    left_out: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    weights: str = "checkpoint"


@dataclass(frozen=True, kw_only=True)
class Error:
    """One output: largest and mean difference of ours from the reference, by themselves and relative to the
    reference's largest and mean value; and the largest relative error of each from the reference in float64.
    """

    output: str
    max: float
    mean: float
    max_relative: float
    mean_relative: float
    ours_from_float64: float
    reference_from_float64: float

    def is_beyond(self, tolerance: float) -> bool:
        """Written so that a NaN is."""
        return not self.max_relative <= max(tolerance, 2 * self.reference_from_float64)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One component in one dtype. first: the first module whose error is beyond, or None.
    unpaired: modules of ours that ran and have no counterpart of their own.
    """

    component: str
    dtype: str
    tolerance: float
    errors: list[Error]
    layers: list[Layer]
    first: Layer | None
    unpaired: list[str]

    @classmethod
    def of(
        cls, component: str, dtype: str, tolerance: float, errors: list[Error], layers: list[Layer],
        unpaired: Sequence[str] = (),
    ) -> Self:  # fmt: skip
        """With the first module found."""
        first = next((layer for layer in layers if layer.is_beyond(tolerance)), None)
        return cls(
            component=component, dtype=dtype, tolerance=tolerance, errors=errors, layers=layers, first=first,
            unpaired=list(unpaired),
        )  # fmt: skip

    @property
    def worst(self) -> Error:
        """The output that differs most."""
        return max(self.errors, key=lambda error: error.max_relative)

    @property
    def divergence(self) -> str:
        """Where ours parts from the reference, or "none"."""
        if self.first is not None:
            return self.first.ours
        return BETWEEN if any(error.is_beyond(self.tolerance) for error in self.errors) else "none"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One component in all dtypes. weights: the "checkpoint"'s, "random" ones, or "–". left_out: dtypes
    that are not run, each with the reason. unit: of what is compared one by one."""

    name: str
    weights: str
    measured: list[Measured]
    left_out: Mapping[str, str]
    note: str
    unit: str = "module"

    def _repr_html_(self) -> str:  # in notebooks: the output that differs most, by dtype
        columns = ("dtype", "output", "largest relative difference", "tolerance", "first divergence")
        rows = [
            (
                one.dtype,
                one.worst.output,
                f"{one.worst.max_relative:.1e}",
                f"{one.tolerance:.0e}",
                one.divergence,
            )
            for one in self.measured
        ]
        return table_html(f"Parity of {self.name}", columns, rows, self.note)


def name_of(dtype: torch.dtype) -> str:
    """Such as "float64"."""
    return str(dtype).removeprefix("torch.")


def measure(case: Case, device: torch.device, dtypes: Sequence[torch.dtype] = DTYPES) -> Result:
    """Run the reference in every dtype, let it go, and run ours; float64, the measure of rounding, first."""
    dtypes = [dtype for dtype in dtypes if name_of(dtype) not in case.left_out]
    side = case.theirs()
    paths = {name: path for name, (path, _) in side.modules.items()}
    theirs = {dtype: _run(side, case.inputs, dtype, device) for dtype in dtypes}
    del side
    let_go()
    side, found = case.ours(), []
    exact_layers, exact = theirs[torch.float64]
    for dtype in dtypes:
        layers, outputs = _run(side, case.inputs, dtype, device)
        their_layers, wanted = theirs.pop(dtype)
        paired = pairs(layers, their_layers, exact_layers)
        compared = [Layer.of(name, paths[name], *tensors) for name, *tensors in paired]
        tolerance = case.tolerances[name_of(dtype)]
        errors = [error_of(name, outputs[name], wanted[name], exact[name]) for name in wanted]
        missing = sorted({name for name, _ in layers} - {layer.ours for layer in compared})
        found.append(Measured.of(case.name, name_of(dtype), tolerance, errors, compared, missing))
    return Result(
        name=case.name, weights=case.weights, measured=found, left_out=case.left_out, note=case.note
    )


def _run(side: Side, inputs: Tensors, dtype: torch.dtype, device: torch.device) -> tuple[Any, Tensors]:
    """What the modules put out, and what the model did, as if it had been loaded in this dtype."""
    for model in side.models:
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point():  # the reference's; their dtype says what it computes in
                    module._buffers[name] = buffer.to(dtype)
    given = {name: x.to(device) for name, x in cast(inputs, dtype).items()}
    with WeightsAs(dtype):
        layers, outputs = record(side.modules, lambda: side.run(given))
    return layers, {name: x.cpu() for name, x in outputs.items()}


def error_of(output: str, got: Tensor, wanted: Tensor, exact: Tensor) -> Error:
    """How far an output of ours is from the reference's in the same dtype, and both from float64."""
    difference, scale = (got.double() - wanted.double()).abs(), wanted.double().abs()
    return Error(
        output=output, max=difference.max().item(), mean=difference.mean().item(),
        max_relative=relative_error(got, wanted), mean_relative=(difference.mean() / scale.mean()).item(),
        ours_from_float64=relative_error(got, exact), reference_from_float64=relative_error(wanted, exact),
    )  # fmt: skip


def let_go() -> None:
    """Free what was deleted."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
