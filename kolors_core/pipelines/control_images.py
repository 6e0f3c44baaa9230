"""Control images: a call's arguments for ControlNets, checked and prepared.

Source: diffusers' pipelines/controlnet/pipeline_controlnet_sd_xl.py and the community's
pipeline_controlnet_xl_kolors.py, which projects the text for several ControlNets by the last one's weights;
here each has its own. Shapes: B images to make.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kolors_core.adapters.controlnet import ControlInput, ControlResiduals, controlnets_of, is_multi
from kolors_core.denoiser import require_unet
from kolors_core.image import preprocess_control
from kolors_core.pipelines.base import Components
from kolors_core.pipelines.request import CONTROL_SCALE


class ControlNetMethods(Components):
    """ControlNet arguments of a pipeline."""

    def _controls(
        self, image: Any, scale: float | Sequence[float], start: float | Sequence[float],
        end: float | Sequence[float], size: tuple[int, int], count: int, images_per_prompt: int,
    ) -> ControlResiduals | None:  # fmt: skip
        """Prepare control images for B (`count`) images of (height, width); ValueError for invalid values."""
        nets = controlnets_of(self.controlnet)
        given = {  # and what each is if it is not given
            "controlnet_conditioning_scale": (scale, CONTROL_SCALE),
            "control_guidance_start": (start, 0.0),
            "control_guidance_end": (end, 1.0),
        }
        if image is None:
            for name, (value, default) in given.items():
                if value != default:
                    raise ValueError(f"{name} has no effect without a control image, got {value!r}")
            if nets:
                what = f"{len(nets)} ControlNets and no control image"
                raise ValueError(f"the pipeline has {what}: give one, or set pipe.controlnet = None")
            return None
        if not nets:
            raise ValueError("a control image is given, and the pipeline has no ControlNet: controlnet=...")
        images = _per_net("control images", image, len(nets), is_multi(self.controlnet))
        numbers = [_per_net(key, n, len(nets), isinstance(n, list | tuple)) for key, (n, _) in given.items()]
        require_unet(self.unet, "a ControlNet")
        weight, controls = self.unet.conv_in.weight, []
        for net, one, *numbers_of in zip(nets, images, *numbers, strict=True):
            own = net.conv_in.weight
            if (own.dtype, own.device) != (weight.dtype, weight.device):
                places = f"{own.dtype} on {own.device}, the UNet {weight.dtype} on {weight.device}"
                raise ValueError(f"the ControlNet is {places}: pipe.to(...) moves both")
            pixels = _rows(preprocess_control(one, *size), count, images_per_prompt)
            controls.append(ControlInput(net, self._to_model(own, pixels), *numbers_of))
        return ControlResiduals(tuple(controls))


def _per_net(name: str, values: Any, count: int, is_list: bool) -> list[Any]:
    """Check a list with one value for each ControlNet; a value for all is repeated."""
    if not is_list:
        return [values] * count
    if not isinstance(values, list | tuple) or len(values) != count:
        got = f"{len(values)}" if isinstance(values, list | tuple) else type(values).__name__
        raise ValueError(f"{name}: expected a list with one for each of the {count} ControlNets, got {got}")
    return list(values)


def _rows(pixels: Tensor, count: int, images_per_prompt: int) -> Tensor:
    """Repeat control images, given per prompt, for the images of each prompt: [1 or B, ...]."""
    if len(pixels) in (1, count):
        return pixels
    if len(pixels) * images_per_prompt != count:
        wanted = f"one, {count // images_per_prompt} (one a prompt) or {count} (one an image)"
        raise ValueError(f"expected {wanted} control images, got {len(pixels)}")
    return pixels.repeat_interleave(images_per_prompt, dim=0)
