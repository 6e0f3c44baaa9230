"""Denoisers: what the library asks of the network that predicts from noisy latents; `UNet` is one.

Any `nn.Module` with the attributes of `DenoisingModel` takes its place in a pipeline, in guidance and in
training. Only what reaches into the UNet's own layers refuses another, by `require_unet`.
"""

import inspect
from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor, nn

from kolors_core.devices import unwrap_compiled
from kolors_core.unet import UNet

CONFIG_FIELDS = ("sample_size", "in_channels", "out_channels", "text_dim")
INPUTS = ("latents", "timestep", "text_tokens", "pooled_text", "size_ids", "text_counts")
# Further arguments of forward, which are passed if a call has them, and what they are for.
OPTIONAL_INPUTS = {
    "image_prompts": "an IP-Adapter", "residuals": "a ControlNet",
    "perturbed": "perturbed-attention guidance", "added": "`Conditioning.added`",
}  # fmt: skip


class DenoisingModel(Protocol):
    """Module that predicts what its scheduler's `prediction_type` says, see targets.py.

    config: has at least `sample_size`, the side of latents where a call gives no size, `in_channels`,
    `out_channels` and `text_dim`. The dtype and device that it computes in are those of its first
    floating-point parameter. Its repeated layers set `is_block`, see module.py.
    """

    @property
    def config(self) -> Any:
        """The sizes."""
        ...

    def __call__(
        self, latents: Tensor, timestep: Tensor, text_tokens: Tensor, pooled_text: Tensor, size_ids: Tensor,
        text_counts: Tensor | None = None, /, **optional: Any,
    ) -> Tensor:  # fmt: skip
        """Predict from latents [B, in_channels, H, W] of variance 1: [B, out_channels, H, W].

        timestep: [] or [B], see `Target.timestep`. text_tokens: [B, S, text_dim]. pooled_text:
        [B, text_dim]. size_ids: float32 [B, 6], see `conditioning.size_ids`. text_counts: None, or [B, S],
        the multiplicity of each token, 0 for one that is not to be read (`attention.log_multiplicity_bias`).
        optional: some of `OPTIONAL_INPUTS`, as in `UNet.forward`, if forward has arguments of these names.
        """
        ...


def faults_of(part: Any) -> list[str]:
    """List what a module lacks to be a `DenoisingModel`."""
    if not isinstance(part, nn.Module):
        return ["it is no nn.Module"]
    config = getattr(part, "config", None)
    faults = [f"its config has no {name}" for name in CONFIG_FIELDS if not hasattr(config, name)]
    if fault := fault_of_forward(part):
        faults.append(fault)
    return faults


def fault_of_forward(part: nn.Module) -> str:
    """Say why a module's forward cannot be called as a denoiser's; "" if it can."""
    try:
        inspect.signature(part.forward).bind(*INPUTS)
    except TypeError as error:
        return f"its forward is called with {', '.join(INPUTS)}, and has {error}"
    return ""


def check_widths(model: Any, latents: Tensor, text_tokens: Tensor, added: Tensor | None = None) -> None:
    """Raise ValueError unless inputs are as wide as a denoiser's config says, if it does."""
    plain = unwrap_compiled(model)
    given = [("in_channels", "channels of latents", latents.shape[1]),
             ("text_dim", "numbers of a text token", text_tokens.shape[-1])]  # fmt: skip
    if added is not None:
        given.append(("time_dim", "numbers that are added to the time", added.shape[-1]))
    for field, what, got in given:
        if (wanted := getattr(getattr(plain, "config", None), field, got)) != got:
            raise ValueError(f"the {type(plain).__name__} reads {wanted} {what} ({field}), got {got}")


def require_unet(model: Any, feature: str) -> None:
    """Raise TypeError, naming a feature that works on the UNet's own layers, for another denoiser."""
    if not isinstance(plain := unwrap_compiled(model), UNet):
        raise TypeError(f"{feature} needs kolors_core's UNet, and the denoiser is a {type(plain).__name__}")


def check_accepts(model: Any, names: Iterable[str]) -> None:
    """Raise TypeError naming the feature whose input, of `OPTIONAL_INPUTS`, a denoiser's forward lacks."""
    parameters = inspect.signature(unwrap_compiled(model).forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in names:
        if name not in parameters:
            require_unet(model, OPTIONAL_INPUTS[name])
