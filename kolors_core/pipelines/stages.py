"""What every task does between its arguments and its pictures: check, condition, denoise, decode, describe.

Source: the `__call__` of diffusers' pipelines/kolors/pipeline_kolors.py and pipeline_kolors_img2img.py.
Shapes: B pictures (prompts times images per prompt).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from numbers import Real
from typing import Any, NamedTuple, Self, TypedDict

import torch
from torch import Tensor

from kolors_core.adapters.controlnet import Control
from kolors_core.adapters.controlnet_files import DEFAULT_SCALE
from kolors_core.adapters.face_id import FaceIDAdapter
from kolors_core.adapters.freeu import FreeUSwitch
from kolors_core.adapters.ip_adapter import attached
from kolors_core.adapters.textual_inversion import words_of
from kolors_core.chatglm import TextEmbedding
from kolors_core.conditioning import Conditioning, is_origin, size_ids_of_both
from kolors_core.config import VERSION
from kolors_core.devices import finite, plain
from kolors_core.image import OUTPUT_TYPES, Size, to_output
from kolors_core.pipelines.control_images import Controlling
from kolors_core.pipelines.denoising_loop import NAMES, Run, StepCallback
from kolors_core.pipelines.face_prompts import FacePrompting
from kolors_core.pipelines.lora_methods import LoRALoading
from kolors_core.pipelines.png_metadata import attach_metadata
from kolors_core.pipelines.quantization_report import Quantizing
from kolors_core.pipelines.single_file import SingleFile
from kolors_core.pipelines.text_prompts import MAX_TOKENS, Prompt, TextPrompting
from kolors_core.sampling import Generators, Sampler, draw_noise, sampler_of
from kolors_core.schedule import Schedule
from kolors_core.validation import whole_number


class KolorsPipelineOutput(NamedTuple):
    """`images`: PIL images; or, in [0, 1], an array [B, H, W, 3] or tensor [B, 3, H, W]; or latents."""

    images: Any


class Extras(TypedDict, total=False):
    """Arguments that every task has and the reference does not, described at `Request`; by name only."""

    face_embeds: Any
    face_image: Any
    control_image: Any
    controlnet_conditioning_scale: float | Sequence[float]
    control_guidance_start: float | Sequence[float]
    control_guidance_end: float | Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments that every task has, under the reference's names and defaults.

    prompt: one or several, Chinese or English; or prompt_embeds and pooled_prompt_embeds from
    `encode_prompt`.
    num_inference_steps: or else `timesteps`, or `sigmas` with the last one where the run ends.
    guidance_scale: 1 or less runs without guidance; whatever is negative is then an error.
    generator: one for all pictures, or one for each; noise is drawn on its device, the CPU's if None.
    ip_adapter_image: for each loaded IP-Adapter a picture, or a list of them; or ip_adapter_image_embeds
    from `prepare_ip_adapter_image_embeds`.
    face_embeds, face_image: for a loaded face adapter the id vector of the face, [1 or more, 512] as
    insightface's antelopev2 gives it (`embedding`, not normed), and a square picture of it, or CLIP's states
    of that [1 or more, 577, 1024]; one for all, or one for each prompt or picture.
    output_type: "pil", "np", "pt", or "latent" for what the VAE would decode.
    cross_attention_kwargs: {"ip_adapter_masks": masks} of where pictures act, and {"scale": a factor on
    every loaded LoRA}.
    original_size, crops_coords_top_left, target_size: SDXL's size conditions, (height, width) in pixels;
    what is not given for the negative prompt is as for the prompt.
    callback_on_step_end: see kolors_core/pipelines/denoising_loop.py; it gets the tensors that
    `callback_on_step_end_tensor_inputs` names.
    control_image: what the ControlNet sees, resized to the picture: one for all, for each prompt or for each
    picture; of a list of ControlNets a list of these. controlnet_conditioning_scale, control_guidance_start,
    control_guidance_end: how much it says, and the part of the run's steps in which it does, from 0 to 1; a
    number for all ControlNets or a list with one for each.
    eta: of the reference's signature, without effect here and so refused if set.
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
    controlnet_conditioning_scale: float | Sequence[float] = DEFAULT_SCALE
    control_guidance_start: float | Sequence[float] = 0.0
    control_guidance_end: float | Sequence[float] = 1.0

    @property
    def is_guided(self) -> bool:
        """Whether the negative half is computed."""
        return self.guidance_scale > 1

    @property
    def callback_tensors(self) -> Sequence[str]:
        """The names of the tensors that the callback sees."""
        return getattr(self.callback_on_step_end, "tensor_inputs", self.callback_on_step_end_tensor_inputs)

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """Those of a task's arguments that every task has, checked."""
        extras, names = arguments["extras"], Extras.__annotations__
        if strangers := sorted(extras.keys() - names):
            raise TypeError(f"{strangers[0]!r} is no argument of this task, nor of {', '.join(names)}")
        own = (field.name for field in fields(cls) if field.name not in names)
        request = cls(**{name: arguments[name] for name in own}, **extras)
        request.check()
        return request

    def check(self) -> None:
        """Raises ValueError or TypeError for what is of a wrong kind, or would do nothing."""
        scale, crop = self.guidance_scale, self.negative_crops_coords_top_left
        negatives = {
            "negative_prompt": None if self.negative_prompt in (None, "") else self.negative_prompt,
            "negative_prompt_embeds": self.negative_prompt_embeds,
            "negative_original_size": self.negative_original_size,
            "negative_target_size": self.negative_target_size,
            "negative_crops_coords_top_left": None if is_origin(crop) else crop,
        }  # fmt: skip
        if isinstance(scale, bool) or not isinstance(scale, Real):
            raise TypeError(f"guidance_scale must be a number, got {scale!r}")
        if not math.isfinite(scale):
            raise ValueError(f"guidance_scale must be finite, got {scale}")
        if self.eta:
            raise ValueError(f"eta is {self.eta!r}, but only DDIM has a use for it, and that is not here")
        given = [name for name, value in negatives.items() if value is not None]
        if not self.is_guided and given:
            raise ValueError(f"{given[0]} has no effect without guidance, and guidance_scale is {scale}")
        _one_of("output_type", (self.output_type,), (*OUTPUT_TYPES, "latent"))
        _one_of("callback_on_step_end_tensor_inputs", self.callback_tensors, NAMES)
        if self.callback_on_step_end is None and tuple(self.callback_tensors) != ("latents",):
            raise ValueError("callback_on_step_end_tensor_inputs has no effect without callback_on_step_end")
        if self.num_inference_steps != 50 and (self.timesteps is not None or self.sigmas is not None):
            raise ValueError("num_inference_steps has no effect beside timesteps or sigmas")
        if not isinstance(self.cross_attention_kwargs, Mapping | None):
            raise TypeError(f"cross_attention_kwargs must be a dict, got {self.cross_attention_kwargs!r}")
        _one_of("cross_attention_kwargs", self.cross_attention_kwargs or (), ("ip_adapter_masks", "scale"))


class Task(TextPrompting, FacePrompting, Controlling, LoRALoading, Quantizing, FreeUSwitch, SingleFile):
    """The steps that tasks are composed of."""

    def _schedule(self, request: Request) -> Schedule:
        """The whole run's numbers, before a task takes a part of them."""
        custom = request.timesteps is not None or request.sigmas is not None
        return self.scheduler.schedule(
            None if custom else request.num_inference_steps, timesteps=request.timesteps,
            sigmas=request.sigmas,
        )  # fmt: skip

    def _size(self, name: str, value: int | None) -> int:
        """A side in pixels, a multiple of 8; the UNet's own (1024) if None."""
        scale = self.vae.config.downscale
        return whole_number(name, self.unet.config.sample_size * scale if value is None else value, scale)

    def _conditions(self, request: Request, size: Size) -> tuple[Conditioning, Conditioning | None]:
        """What the UNet is told for B pictures of (height, width), and the negative half if there is one."""
        copies = whole_number("num_images_per_prompt", request.num_images_per_prompt)
        ids, negative_ids = size_ids_of_both(
            size, request.original_size, request.crops_coords_top_left, request.target_size,
            request.negative_original_size, request.negative_crops_coords_top_left,
            request.negative_target_size,
        )  # fmt: skip
        text, negative_text = self.embed(
            request.prompt, request.is_guided, request.negative_prompt, request.prompt_embeds,
            request.pooled_prompt_embeds, request.negative_prompt_embeds,
            request.negative_pooled_prompt_embeds, request.max_sequence_length,
        )  # fmt: skip
        batch = len(text.tokens) * copies
        pictures = self._image_prompts(
            request.ip_adapter_image, request.ip_adapter_image_embeds,
            (request.cross_attention_kwargs or {}).get("ip_adapter_masks"), batch, request.is_guided,
        )  # fmt: skip
        with self._lora_factor(request):  # a face's tokens go through a layer of the UNet
            faces = self._face_prompts(request.face_image, request.face_embeds, batch, request.is_guided)
        guides = [(pictures | faces)[handle] for handle in attached(self.unet)]
        images = tuple(guide for guide, _ in guides)
        negative_images = tuple(guide for _, guide in guides if guide is not None)
        controls = self._controls(
            request.control_image, request.controlnet_conditioning_scale, request.control_guidance_start,
            request.control_guidance_end, size, batch, copies,
        )  # fmt: skip
        sees_tokens = {"prompt_embeds", "negative_prompt_embeds"}.intersection(request.callback_tensors)

        def told(text: TextEmbedding, ids: Tensor, images: Any) -> Conditioning:
            finite(text.tokens, "the prompt's embeddings", text.tokens.dtype)
            text = text.expanded() if sees_tokens else text  # a callback knows no counts
            tokens, pooled = (
                part.to(self.device, self.dtype).repeat_interleave(copies, dim=0)
                for part in (text.tokens, text.pooled)
            )
            counts = text.counts
            if counts is not None:
                counts = counts.to(self.device).repeat_interleave(copies, dim=0)
            ids = ids.to(self.device).expand(len(tokens), -1)
            return Conditioning(tokens, pooled, ids, counts, images, controls=controls)

        positive = told(text, ids, images)
        return positive, None if negative_text is None else told(negative_text, negative_ids, negative_images)

    def _lora_factor(self, request: Request) -> AbstractContextManager[None]:
        """Within it every LoRA counts as `cross_attention_kwargs` say."""
        factor = (request.cross_attention_kwargs or {}).get("scale")
        return nullcontext() if factor is None else self.lora_scaled(factor)

    def _latent_shape(self, count: int, size: Size) -> tuple[int, ...]:
        scale = self.vae.config.downscale
        return count, self.vae.config.latent_channels, size[0] // scale, size[1] // scale

    def _given_latents(self, latents: Any, shape: tuple[int, ...]) -> Tensor:
        """The `latents` argument, in the precision of the steps; ValueError unless it has this shape."""
        if not isinstance(latents, Tensor) or tuple(latents.shape) != shape:
            got = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise ValueError(f"latents must be a tensor {list(shape)}, got {got}")
        if not latents.is_floating_point():
            raise ValueError(f"latents must be floats, got {latents.dtype}")
        return latents.to(self.device, self.precision)

    def _draw(self, shape: Sequence[int], generator: Generators) -> Tensor:
        """Standard normal noise in the UNet's precision, but at least float32."""
        return draw_noise(tuple(shape), generator, self.device, self.precision)

    @property
    def precision(self) -> torch.dtype:
        """What latents are kept in between steps: float32, or what the UNet has if that is more."""
        return torch.promote_types(self.dtype, torch.float32)

    def _pictures(
        self,
        request: Request,
        schedule: Schedule,
        x: Tensor,
        positive: Conditioning,
        negative: Conditioning | None,
        facts: Mapping[str, Any],
        around: Callable[[Sampler], Sampler] | None = None,
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> KolorsPipelineOutput | tuple[Any]:
        """Denoise x = image + sigma * noise along the schedule, and bring it into the form asked for.

        facts: what the pictures' description says of the task. around: makes another sampler of the
        pipeline's. finish: makes the final images [B, 3, H, W] of the decoded ones, all in [-1, 1].
        """
        sampler = sampler_of(
            self.scheduler, schedule,
            lambda: draw_noise(tuple(x.shape), request.generator, self.device, torch.float32),
        ) if self.sampler is None else self.sampler  # fmt: skip
        self._num_timesteps = len(schedule.timesteps)
        self._guidance_scale = request.guidance_scale
        self._on_device("unet")
        with (
            self._lora_factor(request),
            self._progress_bar(self._num_timesteps) as bar,
        ):
            result = Run(
                self, schedule, positive, negative, request.callback_on_step_end, request.callback_tensors,
                bar.update,
            )(sampler if around is None else around(sampler), x)  # fmt: skip
        kind = request.output_type
        if kind == "latent":
            images: Any = result.to(self.dtype)
        else:
            decoded = self._decode(result)
            images = to_output(decoded if finish is None else finish(decoded), kind)
        if kind == "pil":
            self._describe(images, request, {**facts, **_control_facts(positive.controls)})
        return KolorsPipelineOutput(images) if request.return_dict else (images,)

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents [B, 4, H/8, W/8] to images [B, 3, H, W] in the VAE's own precision."""
        self._on_device("vae")
        weight = self._vae_weight
        return finite(self.vae.decode(self._input_for(weight, latents)), "the VAE's image", weight.dtype)

    @property
    def _vae_weight(self) -> Tensor:
        """A weight that tells the VAE's place and dtype; ValueError for float16, where it overflows."""
        weight = self.vae.post_quant_conv.weight
        if weight.dtype == torch.float16:
            raise ValueError("the VAE overflows in float16: pipe.vae.to(torch.float32)")
        return weight

    def _describe(self, images: Any, request: Request, told: Mapping[str, Any]) -> None:
        """Attach to each picture how it was made."""
        generator, sampler = request.generator, self.scheduler.describe()
        if self.sampler is not None:
            sampler = f"{_named(self.sampler)} with {sampler}"
        for i, image in enumerate(images):
            facts: dict[str, Any] = {}
            for name in ("prompt", "negative_prompt"):
                if (texts := getattr(request, name)) is not None:
                    texts = [texts] if isinstance(texts, str) else texts
                    facts[name] = texts[i * len(texts) // len(images)]
            if generator is not None:
                one = generator if isinstance(generator, torch.Generator) else generator[i]
                facts["seed"] = one.initial_seed()
                if isinstance(generator, torch.Generator) and len(images) > 1:
                    facts["picture"] = f"{i + 1} of {len(images)} of this seed"
            facts |= {
                **told, "sampler": sampler, "guidance_scale": request.guidance_scale,
                **self._adapter_facts(), "size": f"{image.width}x{image.height}",
                "software": f"kolors_core {VERSION}",
            }  # fmt: skip
            attach_metadata(image, facts)

    def _adapter_facts(self) -> dict[str, Any]:
        """What the pictures' description says of the guidance rule, FreeU, LoRAs, words and IP-Adapters."""
        facts = {}
        if (rule := _named(self.guided)) != "guided":
            facts["guidance"] = rule
        if self.freeu is not None:
            facts["freeu"] = ", ".join(f"{name}={value}" for name, value in self.freeu.items())
        if names := self.get_active_adapters():
            facts["lora"] = ", ".join(names)
        if self.text_encoder is not None and (words := words_of(plain(self.text_encoder))):
            facts["learned_words"] = ", ".join(words)
        for handle in attached(self.unet):
            name = "face_scale" if isinstance(handle.adapter, FaceIDAdapter) else "ip_adapter_scale"
            scale = str(next(iter(handle.branches.values())).scale)
            facts[name] = f"{facts[name]}, {scale}" if name in facts else scale
        return facts


def _named(function: Callable[..., Any]) -> str:
    """A function's name, and the arguments that it has been given."""
    if not isinstance(function, partial):
        return getattr(function, "__name__", type(function).__name__)
    told = ", ".join(f"{name}={value!r}" for name, value in function.keywords.items())
    return f"{_named(function.func)}({told})"


def _control_facts(controls: Sequence[Control]) -> dict[str, Any]:
    """What the pictures' description says of ControlNets."""
    if not controls:
        return {}
    facts = {"control_scale": ", ".join(str(control.scale) for control in controls)}
    parts = [f"{control.start:g} to {control.end:g}" for control in controls]
    return facts if set(parts) == {"0 to 1"} else facts | {"control_steps": ", ".join(parts)}


def _one_of(name: str, got: Any, allowed: Sequence[str]) -> None:
    if strangers := [value for value in got if value not in allowed]:
        raise ValueError(f"{name} must be of {', '.join(allowed)}, got {strangers[0]!r}")
