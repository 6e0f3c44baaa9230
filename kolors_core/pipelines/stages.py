"""What every task does between its arguments and its images: check, condition, denoise, decode, describe.

Source: the `__call__` of diffusers' pipelines/kolors/pipeline_kolors.py and pipeline_kolors_img2img.py.
Shapes: B images (prompts times images per prompt).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kolors_core.adapters.controlnet import ControlResiduals
from kolors_core.adapters.face_id import FaceIDAdapter
from kolors_core.adapters.freeu import FreeUMethods
from kolors_core.adapters.ip_adapter import attached
from kolors_core.adapters.textual_inversion import words_of
from kolors_core.chatglm import TextEmbedding
from kolors_core.conditioning import Conditioning, Residuals, positive_and_negative_size_ids
from kolors_core.config import VERSION
from kolors_core.devices import finite, plain
from kolors_core.guidance import GuidanceRule
from kolors_core.image import Size, to_output
from kolors_core.pipelines.control_images import ControlNetMethods
from kolors_core.pipelines.denoising_loop import DenoisingLoop
from kolors_core.pipelines.face_prompts import FaceIDMethods
from kolors_core.pipelines.lora_methods import LoRAMethods
from kolors_core.pipelines.performance_methods import PerformanceMethods
from kolors_core.pipelines.png_metadata import attach_metadata
from kolors_core.pipelines.request import KolorsPipelineOutput, PipelineInputs
from kolors_core.pipelines.single_file import SingleFileMethods
from kolors_core.pipelines.text_prompts import PromptMethods
from kolors_core.sampling import Generators, Sampler, make_sampler, randn_latents
from kolors_core.schedule import Schedule
from kolors_core.validation import check_int


class Task(
    PerformanceMethods,
    PromptMethods,
    FaceIDMethods,
    ControlNetMethods,
    LoRAMethods,
    FreeUMethods,
    SingleFileMethods,
):
    """The steps that tasks are composed of."""

    def _schedule(self, inputs: PipelineInputs) -> Schedule:
        """The whole run's numbers, before a task takes a part of them."""
        custom = inputs.timesteps is not None or inputs.sigmas is not None
        return self.scheduler.schedule(
            None if custom else inputs.num_inference_steps, timesteps=inputs.timesteps,
            sigmas=inputs.sigmas,
        )  # fmt: skip

    def _size(self, name: str, value: int | None) -> int:
        """A side in pixels, a multiple of 8; the UNet's own (1024) if None."""
        scale = self.vae.config.vae_scale_factor
        return check_int(name, self.unet.config.sample_size * scale if value is None else value, scale)

    def _prepare_conditioning(
        self, inputs: PipelineInputs, size: Size, text: TextEmbedding, negative_text: TextEmbedding | None
    ) -> tuple[Conditioning, Conditioning | None]:
        """Combine text, sizes, image prompts and ControlNets for B images of (height, width).

        Returns the positive conditioning, and the negative one unless negative_text is None.
        """
        copies = check_int("num_images_per_prompt", inputs.num_images_per_prompt)
        ids, negative_ids = positive_and_negative_size_ids(
            size, inputs.original_size, inputs.crops_coords_top_left, inputs.target_size,
            inputs.negative_original_size, inputs.negative_crops_coords_top_left,
            inputs.negative_target_size,
        )  # fmt: skip
        batch = len(text.tokens) * copies
        pictures = self._image_prompts(
            inputs.ip_adapter_image, inputs.ip_adapter_image_embeds,
            (inputs.cross_attention_kwargs or {}).get("ip_adapter_masks"), batch, inputs.is_guided,
        )  # fmt: skip
        with self._lora_factor(inputs):  # a face's tokens go through a layer of the UNet
            faces = self._face_prompts(inputs.face_image, inputs.face_embeds, batch, inputs.is_guided)
        guides = [(pictures | faces)[handle] for handle in attached(self.unet)]
        images = tuple(guide for guide, _ in guides)
        negative_images = tuple(guide for _, guide in guides if guide is not None)
        controls = self._controls(
            inputs.control_image, inputs.controlnet_conditioning_scale, inputs.control_guidance_start,
            inputs.control_guidance_end, size, batch, copies,
        )  # fmt: skip
        sees_tokens = {"prompt_embeds", "negative_prompt_embeds"}.intersection(inputs.callback_tensors)

        def told(text: TextEmbedding, ids: Tensor, images: Any) -> Conditioning:
            finite(text.tokens, "the prompt's embeddings", text.tokens.dtype)
            text = text.expand_padding() if sees_tokens else text  # a callback knows no counts
            tokens, pooled = (
                part.to(self.device, self.dtype).repeat_interleave(copies, dim=0)
                for part in (text.tokens, text.pooled)
            )
            counts = text.counts
            if counts is not None:
                counts = counts.to(self.device).repeat_interleave(copies, dim=0)
            ids = ids.to(self.device).expand(len(tokens), -1)
            return Conditioning(tokens, pooled, ids, counts, images, residuals=controls)

        positive = told(text, ids, images)
        return positive, None if negative_text is None else told(negative_text, negative_ids, negative_images)

    def _rule(self, inputs: PipelineInputs) -> GuidanceRule:
        return self.guided if inputs.guidance_rule is None else inputs.guidance_rule

    def _lora_factor(self, inputs: PipelineInputs) -> AbstractContextManager[None]:
        """Return a context in which every LoRA is scaled as `cross_attention_kwargs` say."""
        factor = (inputs.cross_attention_kwargs or {}).get("scale")
        if factor is None:
            return nullcontext()
        self.runs.require_alone("a LoRA scale of its own")
        return self.lora_scaled(factor)

    def _latent_shape(self, count: int, size: Size) -> tuple[int, ...]:
        scale = self.vae.config.vae_scale_factor
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
        return randn_latents(tuple(shape), generator, self.device, self.precision)

    @property
    def precision(self) -> torch.dtype:
        """What latents are kept in between steps: float32, or what the UNet has if that is more."""
        return torch.promote_types(self.dtype, torch.float32)

    def _denoise(
        self,
        inputs: PipelineInputs,
        schedule: Schedule,
        x: Tensor,
        positive: Conditioning,
        negative: Conditioning | None,
        wrap_sampler: Callable[[Sampler], Sampler] | None = None,
    ) -> Tensor:
        """Denoise x = clean latents + sigma * noise along the schedule: [B, 4, H/8, W/8].

        wrap_sampler: makes another sampler of the pipeline's.
        """
        sampler = self.sampler
        if sampler is None:
            shape, generator = tuple(x.shape), inputs.generator
            draw = partial(randn_latents, shape, generator, self.device, torch.float32)
            sampler = make_sampler(self.scheduler, schedule, draw)
        if wrap_sampler is not None:
            sampler = wrap_sampler(sampler)
        self._enter_stage("unet")
        with self._lora_factor(inputs), self._progress_bar(len(schedule.timesteps)) as bar:
            loop = DenoisingLoop(
                self, self.runs.current(), schedule, positive, negative,
                rule=self._rule(inputs), scale=inputs.guidance_scale, callback=inputs.callback_on_step_end,
                names=inputs.callback_tensors, progress=bar.update,
            )  # fmt: skip
            return loop(sampler, x)

    def _output(
        self,
        inputs: PipelineInputs,
        latents: Tensor,
        positive: Conditioning,
        metadata: Mapping[str, Any],
        postprocess: Callable[[Tensor], Tensor] | None = None,
    ) -> KolorsPipelineOutput | tuple[Any]:
        """Decode latents, and return them in the form that is asked for.

        metadata: what PNG metadata says of the task. postprocess: makes the final images [B, 3, H, W] of the
        decoded ones, all in [-1, 1].
        """
        if inputs.output_type == "latent":
            images: Any = latents.to(self.dtype)
        else:
            decoded = self._decode(latents)
            images = to_output(decoded if postprocess is None else postprocess(decoded), inputs.output_type)
        if inputs.output_type == "pil":
            self._describe(images, inputs, {**metadata, **_control_facts(positive.residuals)})
        return KolorsPipelineOutput(images) if inputs.return_dict else (images,)

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents [B, 4, H/8, W/8] to images [B, 3, H, W] in the VAE's own precision."""
        self._enter_stage("vae")
        weight = self._vae_weight
        return finite(self.vae.decode(self._to_model(weight, latents)), "the VAE's image", weight.dtype)

    @property
    def _vae_weight(self) -> Tensor:
        """A weight that tells the VAE's place and dtype; ValueError for float16, where it overflows."""
        weight = self.vae.post_quant_conv.weight
        if weight.dtype == torch.float16:
            raise ValueError("the VAE overflows in float16: pipe.vae.to(torch.float32)")
        return weight

    def _describe(self, images: Any, inputs: PipelineInputs, told: Mapping[str, Any]) -> None:
        """Attach to each image how it was made."""
        generator, sampler = inputs.generator, self.scheduler.describe()
        if self.sampler is not None:
            sampler = f"{_named(self.sampler)} with {sampler}"
        for i, image in enumerate(images):
            facts: dict[str, Any] = {}
            for name in ("prompt", "negative_prompt"):
                if (texts := getattr(inputs, name)) is not None:
                    texts = [texts] if isinstance(texts, str) else texts
                    facts[name] = texts[i * len(texts) // len(images)]
            if generator is not None:
                one = generator if isinstance(generator, torch.Generator) else generator[i]
                facts["seed"] = one.initial_seed()
                if isinstance(generator, torch.Generator) and len(images) > 1:
                    facts["picture"] = f"{i + 1} of {len(images)} of this seed"
            facts |= {
                **told, "sampler": sampler, "guidance_scale": inputs.guidance_scale,
                **self._adapter_facts(self._rule(inputs)), "size": f"{image.width}x{image.height}",
                "software": f"kolors_core {VERSION}",
            }  # fmt: skip
            attach_metadata(image, facts)

    def _adapter_facts(self, rule: GuidanceRule) -> dict[str, Any]:
        """What the images' description says of the guidance rule, FreeU, LoRAs, words and IP-Adapters."""
        facts = {}
        if (name := _named(rule)) != "guided":
            facts["guidance"] = name
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


def _control_facts(residuals: Residuals | None) -> dict[str, Any]:
    """What the images' description says of ControlNets."""
    if not isinstance(residuals, ControlResiduals):
        return {}
    controls = residuals.controls
    facts = {"control_scale": ", ".join(str(control.scale) for control in controls)}
    parts = [f"{control.start:g} to {control.end:g}" for control in controls]
    return facts if set(parts) == {"0 to 1"} else facts | {"control_steps": ", ".join(parts)}
