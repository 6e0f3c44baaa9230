"""Inputs that all tasks share, checked, and the output of a task."""

import inspect
import logging
from collections.abc import Callable, ItemsView, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict, TypeVar

from torch import Tensor

from kolors_core.conditioning import is_default_crop
from kolors_core.guidance import GuidanceRule
from kolors_core.image import OUTPUT_TYPES, Size
from kolors_core.pipelines.denoising_loop import TENSOR_NAMES, StepCallback
from kolors_core.pipelines.pipeline_repr import row_of_images
from kolors_core.pipelines.text_prompts import MAX_TOKENS, Prompt
from kolors_core.sampling import Generators
from kolors_core.validation import check_float, did_you_mean, short_repr

CONTROL_SCALE = 0.8  # the default controlnet_conditioning_scale
Call = TypeVar("Call", bound=Callable[..., Any])
logger = logging.getLogger("kolors_core")


class KolorsPipelineOutput(NamedTuple):
    """Output: PIL images; or, in [0, 1], an array [B, H, W, 3] or tensor [B, 3, H, W]; or latents.

    A tuple of one, also where `return_dict` asks for a dict, whose methods it has.
    """

    images: Any

    def __repr__(self) -> str:
        """Return the kind and number of images, without their pixels."""
        images = self.images
        if isinstance(images, list):
            got = f"{len(images)} of {images[0].width}x{images[0].height}" if images else "none"
        else:
            got = f"{type(images).__name__} {list(images.shape)} of {images.dtype}"
        return f"{type(self).__name__}(images: {got})"

    def _repr_png_(self) -> bytes | None:  # in notebooks
        return row_of_images(self.images) if isinstance(self.images, list) and self.images else None

    def __getitem__(self, key: Any) -> Any:
        """Return the item of a name, an index or a slice."""
        return self._asdict()[key] if isinstance(key, str) else tuple.__getitem__(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self._fields

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a name, or the default for another."""
        return self._asdict().get(key, default)

    def keys(self) -> KeysView[str]:
        """Return the names."""
        return self._asdict().keys()

    def values(self) -> ValuesView[Any]:
        """Return the values."""
        return self._asdict().values()

    def items(self) -> ItemsView[str, Any]:
        """Return the names with their values."""
        return self._asdict().items()

    def to_tuple(self) -> tuple[Any]:
        """Return a plain tuple."""
        return tuple(self)


class Extras(TypedDict, total=False):
    """Keyword arguments of every task that the reference lacks; see `PipelineInputs`."""

    face_embeds: Any
    face_image: Any
    control_image: Any
    controlnet_conditioning_scale: float | Sequence[float]
    control_guidance_start: float | Sequence[float]
    control_guidance_end: float | Sequence[float]
    guidance_rule: GuidanceRule | None
    prompt_attention_mask: Tensor | None
    negative_prompt_attention_mask: Tensor | None
    guess_mode: bool
    clip_skip: None


# What other programs call an argument, where the nearest spelling is another one.
OTHER_NAMES = {
    "steps": "num_inference_steps", "num_steps": "num_inference_steps", "guidance": "guidance_scale",
    "cfg": "guidance_scale", "cfg_scale": "guidance_scale", "num_images": "num_images_per_prompt",
    "seed": "generator=torch.Generator().manual_seed(...)", "image": "KolorsImg2ImgPipeline",
    "mask_image": "KolorsInpaintPipeline",
}  # fmt: skip


def check_extras(extras: Extras, pipe: Any) -> None:
    """Raise TypeError for a name that is no argument of the pipeline's call; it names the nearest one."""
    calls = [vars(kind)["__call__"] for kind in type(pipe).__mro__ if "__call__" in vars(kind)]
    own = {name for call in calls for name in inspect.signature(call).parameters} - {"self", "arguments"}
    for stranger in sorted(extras.keys() - Extras.__annotations__):
        other, names = OTHER_NAMES.get(stranger), own | Extras.__annotations__.keys()
        hint = did_you_mean(stranger, names) if other is None else f", did you mean {other}?"
        hint = hint or f"; help({type(pipe).__name__}.__call__) lists them"
        raise TypeError(f"{stranger!r} is no argument of {type(pipe).__name__}{hint}")


def documented_like(source: Any) -> Callable[[Call], Call]:
    """Decorate a call: its docstring is continued with the arguments in another's, after the first line."""

    def decorate(call: Call) -> Call:
        parts = [inspect.cleandoc(one.__doc__ or "") for one in (call, source)]
        call.__doc__ = "\n".join([parts[0], *parts[1].partition("\n")[2].splitlines()])
        return call

    return decorate


@dataclass(frozen=True, kw_only=True)
class PipelineInputs:
    """Arguments of every task, under the reference's names and defaults.

    prompt, negative_prompt: one or several, Chinese or English.
    prompt_embeds, pooled_prompt_embeds, negative_prompt_embeds, negative_pooled_prompt_embeds: in their
    places, of `encode_prompt`.
    num_inference_steps: the number of steps.
    timesteps, sigmas: in its place the training timesteps to visit, or the noise levels with the last one
    where the run ends.
    guidance_scale: 1 or less runs without guidance, and what is negative has no effect then.
    num_images_per_prompt: how many images are made of each prompt.
    eta: noise that DDIM and TCD add in each step, 0 to 1; of no effect with other schedulers.
    generator: one for all images, or one for each; noise is drawn on its device, the CPU's if None.
    ip_adapter_image: for each loaded IP-Adapter an image, or a list of them.
    ip_adapter_image_embeds: in its place, from `prepare_ip_adapter_image_embeds`.
    output_type: "pil", "np", "pt", or "latent" for what the VAE would decode.
    return_dict: False for scripts that unpack a tuple; the output is a tuple with names in any case.
    cross_attention_kwargs: {"ip_adapter_masks": where images act}, {"scale": a factor on every loaded LoRA}.
    original_size, crops_coords_top_left, target_size: SDXL's size conditions, (height, width) in pixels;
    negative_original_size, negative_crops_coords_top_left, negative_target_size: those of the negative
    prompt; what is not given is as for the prompt.
    callback_on_step_end: called after each step as `callback(pipe, i, timestep, tensors)`; it returns a dict
    of the tensors to replace. See denoising_loop.py.
    callback_on_step_end_tensor_inputs: names of the tensors that it gets.
    max_sequence_length: the most tokens of a prompt, with prefix and padding, 3 to 256.
    face_embeds, face_image: for a loaded face adapter the id vector of the face, [1 or more, 512] as
    insightface's antelopev2 gives it (`embedding`, not normed), and a square image of it, or CLIP's states
    of that [1 or more, 577, 1024]; one for all, or one for each prompt or image.
    control_image: what the ControlNet sees, resized to the image: one for all, for each prompt or for each
    image; of a list of ControlNets a list of these.
    controlnet_conditioning_scale, control_guidance_start, control_guidance_end: the ControlNet's weight, and
    the part of the run's steps in which it acts, from 0 to 1; a number for all ControlNets or a list with one
    for each.
    guidance_rule: a function of `guidance.guided`'s signature for this call; the pipeline's `guided` if None.
    prompt_attention_mask, negative_prompt_attention_mask: of given embeddings, [B, S]: 0 for tokens that are
    not read, 1 for others, or how many each stands for.
    guess_mode, clip_skip: of ControlNet scripts; False and None alone, which change nothing.
    """

    prompt: Prompt | None = None
    num_inference_steps: int = 50
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    guidance_scale: float = 5.0
    negative_prompt: Prompt | None = None
    num_images_per_prompt: int = 1
    eta: float = 0.0
    generator: Generators = None
    prompt_embeds: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    ip_adapter_image: Any = None
    ip_adapter_image_embeds: list[Tensor] | None = None
    face_embeds: Any = None
    face_image: Any = None
    output_type: str = "pil"
    return_dict: bool = True
    cross_attention_kwargs: Mapping[str, Any] | None = None
    original_size: Size | None = None
    crops_coords_top_left: Size = (0, 0)
    target_size: Size | None = None
    negative_original_size: Size | None = None
    negative_crops_coords_top_left: Size = (0, 0)
    negative_target_size: Size | None = None
    callback_on_step_end: StepCallback | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    max_sequence_length: int = MAX_TOKENS
    control_image: Any = None
    controlnet_conditioning_scale: float | Sequence[float] = CONTROL_SCALE
    control_guidance_start: float | Sequence[float] = 0.0
    control_guidance_end: float | Sequence[float] = 1.0
    guidance_rule: GuidanceRule | None = None
    prompt_attention_mask: Tensor | None = None
    negative_prompt_attention_mask: Tensor | None = None
    guess_mode: bool = False
    clip_skip: None = None

    @property
    def is_guided(self) -> bool:
        """Whether the negative half is computed."""
        return self.guidance_scale > 1

    @property
    def callback_tensors(self) -> Sequence[str]:
        """The names of the tensors that the callback sees."""
        return getattr(self.callback_on_step_end, "tensor_inputs", self.callback_on_step_end_tensor_inputs)

    def __post_init__(self) -> None:
        """Raise ValueError or TypeError for an argument of a wrong type."""
        scale = check_float("guidance_scale", self.guidance_scale)
        object.__setattr__(self, "guidance_scale", scale)  # a dataclass that is frozen
        _one_of("output_type", (self.output_type,), (*OUTPUT_TYPES, "latent"))
        _one_of("callback_on_step_end_tensor_inputs", self.callback_tensors, TENSOR_NAMES)
        if not isinstance(self.cross_attention_kwargs, Mapping | None):
            raise TypeError(f"cross_attention_kwargs must be a dict, got {self.cross_attention_kwargs!r}")
        _one_of("cross_attention_kwargs", self.cross_attention_kwargs or (), ("ip_adapter_masks", "scale"))
        for name, neutral in (("guess_mode", False), ("clip_skip", None)):
            if (got := getattr(self, name)) is not neutral:
                raise ValueError(f"{name} can only be {neutral}, got {short_repr(got)}")

    def warn_of_unused(self) -> None:
        """Log a warning for each argument that changes nothing beside the others."""
        crop = self.negative_crops_coords_top_left
        negatives = {
            "negative_prompt": None if self.negative_prompt in (None, "") else self.negative_prompt,
            "negative_prompt_embeds": self.negative_prompt_embeds,
            "negative_original_size": self.negative_original_size,
            "negative_target_size": self.negative_target_size,
            "negative_crops_coords_top_left": None if is_default_crop(crop) else crop,
        }  # fmt: skip
        if not self.is_guided:
            for name in (name for name, value in negatives.items() if value is not None):
                warn_unused(name, f"without guidance, and guidance_scale is {self.guidance_scale}")
        if self.callback_on_step_end is None and tuple(self.callback_tensors) != ("latents",):
            warn_unused("callback_on_step_end_tensor_inputs", "without callback_on_step_end")
        if self.num_inference_steps != 50 and (self.timesteps is not None or self.sigmas is not None):
            warn_unused("num_inference_steps", "beside timesteps or sigmas")


def warn_unused(name: str, why: str) -> None:
    """Log a warning that an argument has no effect."""
    logger.warning("%s has no effect %s", name, why)


def _one_of(name: str, got: Any, allowed: Sequence[str]) -> None:
    if strangers := [value for value in got if value not in allowed]:
        raise ValueError(f"{name} must be of {', '.join(allowed)}, got {strangers[0]!r}")
