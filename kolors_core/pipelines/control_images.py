"""Control images: loading ControlNets, and what a pipeline makes of the pictures that they are to see.

Source: diffusers' pipelines/controlnet/pipeline_controlnet_sd_xl.py and the community's
pipeline_controlnet_xl_kolors.py, which projects the text for several ControlNets by the last one's weights;
here each has its own.
Shapes: B pictures to make, P prompts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from kolors_core.adapters.controlnet import (
    Control,
    ControlNet,
    ControlNetConfig,
    ControlResiduals,
    as_list,
    is_multi,
)
from kolors_core.checkpoint import (
    EMBEDDED,
    EMBEDDED_NAME,
    Kind,
    base_state,
    fetch_component,
    load_component,
    read_json,
    save_component,
    weights_in,
)
from kolors_core.devices import (
    Dtypes,
    dtype_of,
    one_dtype,
    plain,
    refuse_pickles,
    refuse_second_copy,
)
from kolors_core.image import control_pixels
from kolors_core.loading import LoadReport, load
from kolors_core.module import require_plain
from kolors_core.pipelines.base import Components
from kolors_core.unet import UNet
from kolors_core.validation import path_of
from weights_convert.atomic_write import new_folder
from weights_convert.safetensors_files import Source, Tensors

DEFAULT_SCALE = 0.8


class KolorsControlNet(ControlNet):
    """A ControlNet that loads and saves itself, such as Kwai-Kolors/Kolors-ControlNet-Canny."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        subfolder: str = "",
        torch_dtype: Dtypes = None,
        dtype: Dtypes = None,
        device: torch.device | str = "cpu",
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool = True,
    ) -> Self:
        """Load a folder or hub repository, strictly; only its own files are fetched. "tiny" is the embedded
        model's, of Canny's edges.

        torch_dtype, or by its newer name dtype: float32 if None, and wanted as the UNet's. variant: such as
        "fp16"; None takes the only one there is. Raises FileNotFoundError or ValueError naming the file,
        field or tensor.
        """
        refuse_pickles(use_safetensors)
        refuse_second_copy(low_cpu_mem_usage)
        name = pretrained_model_name_or_path
        net = load_component(
            EMBEDDED / "controlnet" if name == EMBEDDED_NAME else name, "controlnet", subfolder=subfolder,
            variant=variant, dtype=dtype_of("unet", one_dtype(torch_dtype, dtype)), device=device,
            kind=Kind(ControlNetConfig, cls), revision=revision, cache_dir=cache_dir,
            local_files_only=local_files_only, token=token,
        )  # fmt: skip
        assert isinstance(net, cls)
        return net

    @classmethod
    def borrow(
        cls,
        pretrained_model_name_or_path: str | Path,
        unet: UNet,
        *,
        subfolder: str = "",
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> tuple[Self, LoadReport]:
        """An SDXL ControlNet beside a Kolors UNet: an approximation, since it was trained beside another.

        It has no text projection, and its added condition is as wide as SDXL's text: both are the UNet's. All
        else is SDXL's, whose time it takes for Kolors'. The report names as `missing` what the UNet gave.
        Returns it with the UNet's dtype and device. Raises FileNotFoundError or ValueError naming what does
        not fit; for one with a text projection, which needs no borrowing, too.
        """
        folder = fetch_component(
            pretrained_model_name_or_path, "controlnet", subfolder, variant, True, revision=revision,
            cache_dir=cache_dir, local_files_only=local_files_only, token=token,
        )  # fmt: skip
        place = folder / subfolder
        file, unet = place / "config.json", plain(unet)
        require_plain(unet, "borrow from it; borrow from a plain UNet, then quantise")
        public = read_json(file)
        if public.get("encoder_hid_dim_type") is not None:
            raise ValueError(f"{file}: it has a text projection: load it by from_pretrained")
        added = unet.config.text_dim + 6 * unet.config.size_dim
        config = ControlNetConfig.from_public(
            public | {
                "encoder_hid_dim_type": "text_proj", "encoder_hid_dim": unet.config.text_dim,
                "projection_class_embeddings_input_dim": added,
            },
            str(file),
        )  # fmt: skip
        source: Source | Tensors = weights_in(place, variant)
        lent = ["text_proj"]
        if public.get("projection_class_embeddings_input_dim") != added:  # its two layers belong together
            lent.append("add_embedding")
            kept = {name: source[name] for name in source if not name.startswith("add_embedding.")}
            source = Tensors(kept, source.where)
        with torch.device("meta"):
            net = cls(config)
        state = base_state(unet)
        partial = {
            name: (lambda shape, found, name=name: state[name]) for name in net.state_dict()
            if name.partition(".")[0] in lent
        }  # fmt: skip
        weight = unet.conv_in.weight
        report = load(net, source, "controlnet", dtype=weight.dtype, device=weight.device, partial=partial)
        if report.unexpected:
            raise ValueError(f"{source.where}: {report.unexpected[0]} is no tensor of a ControlNet")
        return net.eval(), report

    def save_pretrained(self, folder: str | Path, *, variant: str | None = None) -> None:
        """Write a new folder that the reference and `from_pretrained` load, whole or not at all.

        Raises FileExistsError if `folder` is there already and not empty, ValueError for a variant that is
        not letters, digits and underscores.
        """
        with new_folder(path_of("folder", folder)) as place:
            save_component(self, place, "controlnet", subfolder="", variant=variant)


class Controlling(Components):
    """A pipeline that ControlNets can steer."""

    def _controls(
        self,
        image: Any,
        scale: float | Sequence[float],
        start: float | Sequence[float],
        end: float | Sequence[float],
        size: tuple[int, int],
        count: int,
        images_per_prompt: int,
    ) -> ControlResiduals | None:
        """What the ControlNets see, for B (`count`) pictures of (height, width).

        Raises ValueError for images without ControlNets and the other way round, numbers that do not match,
        and what has no effect.
        """
        nets = as_list(self.controlnet)
        given = {  # and what each is if it is not given
            "controlnet_conditioning_scale": (scale, DEFAULT_SCALE),
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
        images = _of_each("control images", image, len(nets)) if is_multi(self.controlnet) else [image]
        numbers = [
            _of_each(name, value, len(nets)) if isinstance(value, list | tuple) else [value] * len(nets)
            for name, (value, _) in given.items()
        ]
        weight, controls = self.unet.conv_in.weight, []
        for net, one, *numbers_of in zip(nets, images, *numbers, strict=True):
            own = net.conv_in.weight
            if (own.dtype, own.device) != (weight.dtype, weight.device):
                got = f"the ControlNet is {own.dtype} on {own.device}"
                wanted = f"the UNet {weight.dtype} on {weight.device}"
                raise ValueError(f"{got}, {wanted}: pipe.to(...) moves both")
            pixels = _rows(control_pixels(one, *size), count, images_per_prompt)
            controls.append(Control(net, self._input_for(own, pixels), *numbers_of))
        return ControlResiduals(tuple(controls))


def _of_each(name: str, values: Any, count: int) -> list[Any]:
    """A list with one for each ControlNet."""
    if not isinstance(values, list | tuple) or len(values) != count:
        got = f"{len(values)}" if isinstance(values, list | tuple) else type(values).__name__
        raise ValueError(f"{name}: wanted a list with one for each of the {count} ControlNets, got {got}")
    return list(values)


def _rows(pixels: Tensor, count: int, images_per_prompt: int) -> Tensor:
    """A control image for all pictures [1, ...], or one for each, [B, ...], of one for each prompt."""
    if len(pixels) in (1, count):
        return pixels
    if len(pixels) * images_per_prompt != count:
        wanted = f"one, {count // images_per_prompt} (one a prompt) or {count} (one a picture)"
        raise ValueError(f"wanted {wanted} control images, got {len(pixels)}")
    return pixels.repeat_interleave(images_per_prompt, dim=0)
