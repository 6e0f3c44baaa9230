"""The reference's scheduler classes, also those whose packages (scipy, torchsde) are not installed."""

import sys
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_lms_discrete
from torch import Tensor

from kolors_core.schedulers import SCHEDULERS
from kolors_core.sigmas import beta_quantile
from tests.support.reference_folder import KOLORS_SCHEDULER

# What the released config has beside KOLORS_SCHEDULER, which some classes have other defaults for.
RELEASED = KOLORS_SCHEDULER | {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}
TWICE = ("HeunDiscrete", "KDPM2", "DPMSolverSDE")  # with two timesteps and sigmas for a step


def reference_class(name: str) -> Any:
    """Return the class of a name; its module's own where diffusers has a stand-in for want of a package."""
    if name == "LMSDiscreteScheduler":
        return scheduling_lms_discrete.LMSDiscreteScheduler
    if name == "DPMSolverSDEScheduler":
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
            from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDEScheduler

        return DPMSolverSDEScheduler
    return getattr(diffusers, name)


def parameters(name: str) -> dict[str, Any]:
    """Return the fields of a class of the reference, with its defaults."""
    init: Any = reference_class(name).__init__.__wrapped__
    names = init.__code__.co_varnames[1 : init.__code__.co_argcount]
    return dict(zip(names, init.__defaults__, strict=True))


def reference_scheduler(name: str, **fields: Any) -> Any:
    """Return a scheduler of the reference with the released fields that its class has."""
    known = parameters(name)
    given = {key: value for key, value in (RELEASED | fields).items() if key in known}
    flags = {key: given.pop(key) for key in list(given) if key.startswith("use_")}
    with pytest.MonkeyPatch.context() as patch:  # some constructors compute a run of 1,100 steps
        if name.startswith((*TWICE, "LMS")):
            patch.setattr(reference_class(name), "set_timesteps", _set_nothing)
        scheduler = reference_class(name)(**given)
    scheduler.register_to_config(**flags)
    return scheduler


def use_our_quantile(patch: pytest.MonkeyPatch) -> None:
    """Give the reference our beta distribution in place of scipy's."""
    scipy = SimpleNamespace(stats=SimpleNamespace(beta=SimpleNamespace(ppf=_quantile)))
    for name in SCHEDULERS:
        module = sys.modules[reference_class(name).__module__]
        patch.setattr(module, "scipy", scipy, raising=False)
        patch.setattr(module, "is_scipy_available", lambda: True, raising=False)


def _set_nothing(scheduler: Any, *_: Any) -> None:
    scheduler.sigmas = torch.zeros(1)


def use_exact_integrals(patch: pytest.MonkeyPatch) -> None:
    """Give the reference's LMS Gauss' quadrature, exact for its polynomials, in place of scipy's quad."""
    nodes, weights = np.polynomial.legendre.leggauss(4)

    def quad(function: Any, low: Any, high: Any, epsrel: float) -> tuple[float]:
        half, middle = float(high - low) / 2, float(high + low) / 2
        points = zip(nodes, weights, strict=True)
        return (half * sum(weight * float(function(half * node + middle)) for node, weight in points),)

    patch.setattr(scheduling_lms_discrete, "integrate", SimpleNamespace(quad=quad), raising=False)


@cache
def _quantile(share: float, a: float, b: float) -> float:
    return float(beta_quantile(np.array(share), a, b))


def run_numbers(theirs: Any) -> tuple[Tensor, Tensor]:
    """Return the sigmas (times of a flow) and timesteps of its steps: [n + 1], [n]; see `kolors_core.sigmas`.

    Those without sigmas have them of their timesteps, and an end by where their last step goes.
    """
    name, times = type(theirs).__name__, theirs.timesteps.double()
    if name.startswith(TWICE):
        at = 1 if name.startswith("Heun") else 2
        times = torch.cat([times[:1], times[at::2]])
        return torch.cat([theirs.sigmas[: 2 * len(times) - 1 : 2], theirs.sigmas[-1:]]).double(), times
    if hasattr(theirs, "sigmas"):
        return theirs.sigmas.double(), times
    alphas, times = theirs.alphas_cumprod.clone(), times.unique().flip(0)  # PNDM has one of them twice
    if theirs.config.get("rescale_betas_zero_snr"):
        alphas[-1] = 2**-24
    table = ((1 - alphas) / alphas) ** 0.5
    end = table[0] if name == "TCDScheduler" else torch.zeros(())
    if name in ("DDIMScheduler", "PNDMScheduler"):
        last, final = int(times[-1]) - len(table) // len(times), theirs.final_alpha_cumprod
        end = table[last] if last >= 0 else ((1 - final) / final) ** 0.5
    return torch.cat([table[times.long()], end[None]]).double(), times
