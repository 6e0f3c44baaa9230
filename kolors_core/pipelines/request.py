"""Inputs that all tasks share, checked, and the output of a task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

from torch import Tensor

from kolors_core.conditioning import is_default_crop
from kolors_core.guidance import GuidanceRule
from kolors_core.image import OUTPUT_TYPES, Size
from kolors_core.pipelines.denoising_loop import TENSOR_NAMES, StepCallback
from kolors_core.pipelines.text_prompts import MAX_TOKENS, Prompt
from kolors_core.sampling import Generators
from kolors_core.validation import check_float

CONTROL_SCALE = 0.8  # the default controlnet_conditioning_scale


class KolorsPipelineOutput(NamedTuple):
    """Output: PIL images; or, in [0, 1], an array [B, H, W, 3] or tensor [B, 3, H, W]; or latents."""

    images: Any


class Extras(TypedDict, total=False):
    """Keyword arguments of every task that the reference lacks; see `PipelineInputs`."""

    face_embeds: Any
    face_image: Any
    control_image: Any
    controlnet_conditioning_scale: float | Sequence[float]
    control_guidance_start: float | Sequence[float]
    control_guidance_end: float | Sequence[float]
    guidance_rule: GuidanceRule | None


def check_extras(extras: Mapping[str, Any]) -> None:
    """Raise TypeError for a name that is not one of `Extras`."""
    names = Extras.__annotations__
    if strangers := sorted(extras.keys() - names):
        raise TypeError(f"{strangers[0]!r} is no argument of this task, nor of {', '.join(names)}")


@dataclass(frozen=True, kw_only=True)
class PipelineInputs:
    """Arguments of every task, under the reference's names and defaults.

    prompt: one or several, Chinese or English; or prompt_embeds and pooled_prompt_embeds (`encode_prompt`).
    num_inference_steps: or else `timesteps`, or `sigmas` with the last one where the run ends.
    guidance_scale: 1 or less runs without guidance; whatever is negative is then an error.
    generator: one for all images, or one for each; noise is drawn on its device, the CPU's if None.
    ip_adapter_image: for each loaded IP-Adapter an image, or a list of them; or ip_adapter_image_embeds from
    `prepare_ip_adapter_image_embeds`.
    face_embeds, face_image: for a loaded face adapter the id vector of the face, [1 or more, 512] as
    insightface's antelopev2 gives it (`embedding`, not normed), and a square image of it, or CLIP's states
    of that [1 or more, 577, 1024]; one for all, or one for each prompt or image.
    output_type: "pil", "np", "pt", or "latent" for what the VAE would decode.
    cross_attention_kwargs: {"ip_adapter_masks": where images act}, {"scale": a factor on every loaded LoRA}.
    original_size, crops_coords_top_left, target_size: SDXL's size conditions, (height, width) in pixels;
    what is not given for the negative prompt is as for the prompt.
    callback_on_step_end: see denoising_loop.py; it gets what `callback_on_step_end_tensor_inputs` names.
    control_image: what the ControlNet sees, resized to the image: one for all, for each prompt or for each
    image; of a list of ControlNets a list of these. controlnet_conditioning_scale, control_guidance_start,
    control_guidance_end: its weight, and the part of the run's steps in which it acts, from 0 to 1; a number
    for all ControlNets or a list with one for each.
    guidance_rule: a function of `guidance.guided`'s signature for this call; the pipeline's `guided` if None.
    eta: only DDIM uses it, which is not here: ValueError if it is set.
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

    @property
    def is_guided(self) -> bool:
        """Whether the negative half is computed."""
        return self.guidance_scale > 1

    @property
    def callback_tensors(self) -> Sequence[str]:
        """The names of the tensors that the callback sees."""
        return getattr(self.callback_on_step_end, "tensor_inputs", self.callback_on_step_end_tensor_inputs)

    def __post_init__(self) -> None:
        """Raise ValueError or TypeError for an argument of a wrong type, or without effect."""
        crop, scale = self.negative_crops_coords_top_left, check_float("guidance_scale", self.guidance_scale)
        object.__setattr__(self, "guidance_scale", scale)  # a dataclass that is frozen
        negatives = {
            "negative_prompt": None if self.negative_prompt in (None, "") else self.negative_prompt,
            "negative_prompt_embeds": self.negative_prompt_embeds,
            "negative_original_size": self.negative_original_size,
            "negative_target_size": self.negative_target_size,
            "negative_crops_coords_top_left": None if is_default_crop(crop) else crop,
        }  # fmt: skip
        if self.eta:
            raise ValueError(f"eta is {self.eta!r}, but only DDIM has a use for it, and that is not here")
        if not self.is_guided and (given := [name for name, value in negatives.items() if value is not None]):
            raise ValueError(f"{given[0]} has no effect without guidance, and guidance_scale is {scale}")
        _one_of("output_type", (self.output_type,), (*OUTPUT_TYPES, "latent"))
        _one_of("callback_on_step_end_tensor_inputs", self.callback_tensors, TENSOR_NAMES)
        if self.callback_on_step_end is None and tuple(self.callback_tensors) != ("latents",):
            raise ValueError("callback_on_step_end_tensor_inputs has no effect without callback_on_step_end")
        if self.num_inference_steps != 50 and (self.timesteps is not None or self.sigmas is not None):
            raise ValueError("num_inference_steps has no effect beside timesteps or sigmas")
        if not isinstance(self.cross_attention_kwargs, Mapping | None):
            raise TypeError(f"cross_attention_kwargs must be a dict, got {self.cross_attention_kwargs!r}")
        _one_of("cross_attention_kwargs", self.cross_attention_kwargs or (), ("ip_adapter_masks", "scale"))


def _one_of(name: str, got: Any, allowed: Sequence[str]) -> None:
    if strangers := [value for value in got if value not in allowed]:
        raise ValueError(f"{name} must be of {', '.join(allowed)}, got {strangers[0]!r}")
