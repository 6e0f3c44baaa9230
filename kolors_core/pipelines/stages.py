"""Steps between a task's arguments and its images: condition, denoise, decode, describe.

Source: the `__call__` of diffusers' pipelines/kolors/pipeline_kolors.py and pipeline_kolors_img2img.py.
Shapes: B images (prompts times images per prompt).
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kolors_core.chatglm import TextEmbedding
from kolors_core.conditioning import Conditioning, positive_and_negative_size_ids
from kolors_core.context import ImagePrompt
from kolors_core.devices import check_finite, named_device
from kolors_core.guidance import GuidanceRule
from kolors_core.image import Size, to_images
from kolors_core.pipelines.adapter_methods import AdapterMethods
from kolors_core.pipelines.component_checks import check_target, warn_of_dropout
from kolors_core.pipelines.denoising_loop import DenoisingLoop
from kolors_core.pipelines.embedded import warn_unknown
from kolors_core.pipelines.performance_methods import PerformanceMethods
from kolors_core.pipelines.provenance import describe_images
from kolors_core.pipelines.request import KolorsPipelineOutput, PipelineInputs, warn_unused
from kolors_core.pipelines.single_file import SingleFileMethods
from kolors_core.pipelines.text_prompts import MAX_TOKENS, Prompt, embed_prompts, fill_tokens, repeat_text
from kolors_core.sampling import Generators, Noise, Sampler, randn_latents
from kolors_core.schedule import Schedule
from kolors_core.validation import check_int


class Task(AdapterMethods, PerformanceMethods, SingleFileMethods):
    """Steps that tasks are composed of, and `encode_prompt`."""

    @torch.no_grad()
    def encode_prompt(
        self, prompt: Prompt | None = None, device: torch.device | str | None = None,
        num_images_per_prompt: int = 1, do_classifier_free_guidance: bool = True,
        negative_prompt: Prompt | None = None, prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None, negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None, max_sequence_length: int = MAX_TOKENS,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
        """Encode prompts and repeat each embedding for its images: prompt by prompt, image by image.

        Returns prompt and negative embeddings [B, S, text_dim], then both pooled ones [B, text_dim]; the
        negative ones are None without guidance. Errors as in `embed_prompts`.
        """
        text, negative = embed_prompts(
            self, prompt, do_classifier_free_guidance, negative_prompt, prompt_embeds, pooled_prompt_embeds,
            negative_prompt_embeds, negative_pooled_prompt_embeds, max_sequence_length,
        )  # fmt: skip
        place = self.device if device is None else named_device(str(device))
        copies = check_int("num_images_per_prompt", num_images_per_prompt)
        text = repeat_text(text.expand_padding(), copies, place)
        if negative is None:
            return text.tokens, None, text.pooled, None
        negative = repeat_text(negative.expand_padding(), copies, place)
        return text.tokens, negative.tokens, text.pooled, negative.pooled

    def _schedule(self, inputs: PipelineInputs) -> Schedule:
        """Return the schedule of all steps, of which a task may take a part."""
        self._check_can_draw()
        check_target(self.unet, self.scheduler)
        warn_of_dropout(self.unet)
        warn_of_dropout(self.text_encoder)
        is_custom = inputs.timesteps is not None or inputs.sigmas is not None
        steps = None if is_custom else inputs.num_inference_steps
        return self.scheduler.schedule(steps, timesteps=inputs.timesteps, sigmas=inputs.sigmas)

    def _size(self, name: str, value: int | None) -> int:
        """Check a side in pixels, a multiple of 8; the UNet's own (1024) if None."""
        scale = self.vae.config.vae_scale_factor
        return check_int(name, self.unet.config.sample_size * scale if value is None else value, scale)

    def _condition(
        self, inputs: PipelineInputs, size: Size, text: TextEmbedding, negative_text: TextEmbedding | None
    ) -> tuple[Conditioning, Conditioning | None]:
        """Combine text, sizes and the adapters' inputs for B images of (height, width).

        Returns the positive conditioning, and the negative one or, without guidance, None.
        """
        copies = check_int("num_images_per_prompt", inputs.num_images_per_prompt)
        warn_unknown(self, inputs.prompt, size)
        ids, negative_ids = positive_and_negative_size_ids(
            size, inputs.original_size, inputs.crops_coords_top_left, inputs.target_size,
            inputs.negative_original_size, inputs.negative_crops_coords_top_left, inputs.negative_target_size,
        )  # fmt: skip
        given = self._adapter_inputs(inputs, size, len(text.tokens) * copies, copies)
        sees_tokens = {"prompt_embeds", "negative_prompt_embeds"}.intersection(inputs.callback_tensors)

        def conditioning(text: TextEmbedding, ids: Tensor, images: tuple[ImagePrompt, ...]) -> Conditioning:
            check_finite(text.tokens, "the prompt's embeddings", text.tokens.dtype)
            if sees_tokens and not text.is_ragged:  # a callback knows no counts
                text = text.expand_padding()
            text = fill_tokens(repeat_text(text, copies, self.device), self.device)
            tokens, pooled = text.tokens.to(self.dtype), text.pooled.to(self.dtype)
            ids = ids.to(self.device).expand(len(tokens), -1)
            return Conditioning(tokens, pooled, ids, text.counts, images, residuals=given.residuals)

        positive = conditioning(text, ids, given.image_prompts)
        if negative_text is None:
            return positive, None
        return positive, conditioning(negative_text, negative_ids, given.negative_image_prompts)

    def _rule(self, inputs: PipelineInputs) -> GuidanceRule:
        return self._wrap_rule(self.guided if inputs.guidance_rule is None else inputs.guidance_rule)

    def _latent_shape(self, count: int, size: Size) -> tuple[int, int, int, int]:
        scale = self.vae.config.vae_scale_factor
        return count, self.vae.config.latent_channels, size[0] // scale, size[1] // scale

    def _given_latents(self, latents: Any, shape: tuple[int, ...]) -> Tensor:
        """Check the argument `latents` and move it; ValueError unless it is floats of this shape."""
        if not isinstance(latents, Tensor) or tuple(latents.shape) != shape:
            got = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise ValueError(f"latents must be a tensor {list(shape)}, got {got}")
        if not latents.is_floating_point():
            raise ValueError(f"latents must be floats, got {latents.dtype}")
        return latents.to(self.device, self.precision)

    def _draw(self, shape: Sequence[int], generator: Generators) -> Tensor:
        """Draw standard normal noise in the UNet's precision, but at least float32."""
        return randn_latents(tuple(shape), generator, self.device, self.precision)

    @property
    def precision(self) -> torch.dtype:
        """The dtype of latents between steps: float32, or the UNet's if that is wider."""
        return torch.promote_types(self.dtype, torch.float32)

    def _denoise(
        self, inputs: PipelineInputs, schedule: Schedule, x: Tensor, positive: Conditioning,
        negative: Conditioning | None, wrap_sampler: Callable[[Sampler], Sampler] | None = None,
    ) -> Tensor:  # fmt: skip
        """Denoise x = clean latents + sigma * noise along the schedule: [B, 4, H/8, W/8].

        wrap_sampler: wraps the pipeline's sampler, such as `preserve_masked_latents`.
        """
        draw = partial(randn_latents, tuple(x.shape), inputs.generator, self.device, torch.float32)
        sampler = self._choose_sampler(schedule, draw, inputs.eta)
        sampler = sampler if wrap_sampler is None else wrap_sampler(sampler)
        self._enter_stage("unet")
        with self._lora_factor(inputs), self._progress_bar(len(schedule.timesteps)) as bar:
            loop = DenoisingLoop(
                self, self.runs.current(), schedule, positive, negative,
                rule=self._rule(inputs), scale=inputs.guidance_scale, callback=inputs.callback_on_step_end,
                names=inputs.callback_tensors, progress=bar.update,
            )  # fmt: skip
            return loop(sampler, x)

    def _choose_sampler(self, schedule: Schedule, noise: Noise, eta: float) -> Sampler:
        """Return the pipeline's sampler, or the scheduler's, with the call's eta if it takes one.

        A sampler of the pipeline's with an argument `noise` that has no default gets the call's: a function
        that draws standard normal noise like x from the call's generator.
        """
        if self.sampler is None and self.scheduler.takes_eta:
            return self.scheduler.sampler(schedule, noise, **{"eta": eta})
        if eta:
            name = type(self.scheduler).__name__ if self.sampler is None else "pipe.sampler"
            warn_unused("eta", f"with {name}: DDIMScheduler and TCDScheduler use it")
        if self.sampler is None:
            return self.scheduler.sampler(schedule, noise)
        wanted = inspect.signature(self.sampler).parameters.get("noise")
        is_asked = wanted is not None and wanted.default is wanted.empty
        return partial(self.sampler, noise=noise) if is_asked else self.sampler

    def _output(
        self, inputs: PipelineInputs, latents: Tensor, positive: Conditioning, metadata: Mapping[str, Any],
        postprocess: Callable[[Tensor], Tensor] | None = None,
    ) -> KolorsPipelineOutput:  # fmt: skip
        """Decode latents and return images of the `output_type`.

        metadata: of `describe_call`. postprocess: maps decoded to final images [B, 3, H, W] in [-1, 1].
        """
        if inputs.output_type == "latent":
            images: Any = latents.to(self.dtype)
        else:
            decoded = self._decode(latents)
            images = to_images(decoded if postprocess is None else postprocess(decoded), inputs.output_type)
        if inputs.output_type == "pil":
            describe_images(self, images, inputs, metadata, positive)
        return KolorsPipelineOutput(images)

    def _decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, 4, H/8, W/8] to images [B, 3, H, W] in the VAE's own precision."""
        self._enter_stage("vae")
        weight = self._vae_weight
        decoded = self.vae.decode_latents(self._to_model(weight, latents))
        return check_finite(decoded, "the VAE's image", weight.dtype)

    @property
    def _vae_weight(self) -> Tensor:
        """A weight of the VAE, for its device and dtype; ValueError for float16, in which it overflows."""
        weight = self.vae.post_quant_conv.weight
        if weight.dtype == torch.float16:
            raise ValueError("the VAE overflows in float16: pipe.vae.to(torch.float32)")
        return weight


def encode_prompts(
    pipe: Task, prompt: Prompt | None, inputs: PipelineInputs
) -> tuple[TextEmbedding, TextEmbedding | None]:
    """Encode a call's prompts, or check its embeddings, see `embed_prompts`; warn of unused arguments."""
    inputs.warn_of_unused()
    return embed_prompts(
        pipe, prompt, inputs.is_guided, inputs.negative_prompt, inputs.prompt_embeds,
        inputs.pooled_prompt_embeds, inputs.negative_prompt_embeds, inputs.negative_pooled_prompt_embeds,
        inputs.max_sequence_length, prompt_attention_mask=inputs.prompt_attention_mask,
        negative_prompt_attention_mask=inputs.negative_prompt_attention_mask,
    )  # fmt: skip
