"""Adapters of a pipeline: the methods of every kind of adapter, and what a call makes of their arguments.

To remove adapters from the library, delete kolors_core/adapters/, this file and the files of `pipelines`
that it imports, and this base of `stages.Task`.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import nn

from kolors_core.adapters.clip_vision import IMAGE_ENCODER
from kolors_core.adapters.controlnet import check_fits, controlnets_of
from kolors_core.adapters.freeu import FreeUMethods
from kolors_core.adapters.ip_adapter import attached
from kolors_core.adapters.textual_inversion import TextualInversionMethods, words_of
from kolors_core.checkpoint import MODEL_SPECS
from kolors_core.conditioning import Residuals
from kolors_core.devices import unwrap_compiled
from kolors_core.image import Size
from kolors_core.pipelines.adapter_metadata import (
    control_metadata,
    image_prompt_metadata,
    lora_metadata,
    word_metadata,
)
from kolors_core.pipelines.base import AdapterInputs
from kolors_core.pipelines.control_images import ControlNetMethods
from kolors_core.pipelines.face_prompts import FaceIDMethods
from kolors_core.pipelines.lora_methods import LoRAMethods
from kolors_core.pipelines.request import PipelineInputs, warn_unused
from kolors_core.validation import check_float

MODELS = MODEL_SPECS | {"image_encoder": IMAGE_ENCODER}


class ModelAdapterMethods(LoRAMethods, FreeUMethods, TextualInversionMethods):
    """Adapters that change the UNet's or the text encoder's own layers."""


class AdapterMethods(ModelAdapterMethods, FaceIDMethods, ControlNetMethods):
    """Adapters of all kinds, in the places where `Components` and `stages.Task` ask for them."""

    model_specs: ClassVar = MODELS

    def _check_dimensions(self) -> None:
        super()._check_dimensions()
        vae, unet = unwrap_compiled(self.vae), unwrap_compiled(self.unet)
        if unet is not None and vae is not None:
            check_fits(self.controlnet, unet, vae.config.vae_scale_factor)

    def _attached_models(self) -> list[nn.Module]:
        return [*(handle.adapter for handle in attached(self.unet)), *controlnets_of(self.controlnet)]

    def _adapter_image_encoder(self) -> Any:
        return next((one.encoder for one in attached(self.unet) if one.encoder is not None), None)

    def _placeholder_words(self) -> dict[str, Any]:
        words = words_of(unwrap_compiled(self.text_encoder))
        return {"words": words} if words else {}

    def _adapter_inputs(
        self, inputs: PipelineInputs, size: Size, batch: int, images_per_prompt: int
    ) -> AdapterInputs:
        masks = (inputs.cross_attention_kwargs or {}).get("ip_adapter_masks")
        if "scale" in (inputs.cross_attention_kwargs or {}) and not self.has_acting_lora:
            warn_unused("the scale in cross_attention_kwargs", "without an active LoRA on the UNet")
        images = inputs.ip_adapter_image, inputs.ip_adapter_image_embeds
        prompts = self._image_prompts(*images, masks, batch, inputs.is_guided)
        with self._lora_factor(inputs):  # a face's tokens go through a layer of the UNet
            prompts |= self._face_prompts(inputs.face_image, inputs.face_embeds, batch, inputs.is_guided)
        pairs = [prompts[handle] for handle in attached(self.unet)]
        residuals = self._controls(
            inputs.control_image, inputs.controlnet_conditioning_scale, inputs.control_guidance_start,
            inputs.control_guidance_end, size, batch, images_per_prompt,
        )  # fmt: skip
        negative = tuple(prompt for _, prompt in pairs if prompt is not None)
        return AdapterInputs(tuple(prompt for prompt, _ in pairs), negative, residuals)

    def _lora_factor(self, inputs: PipelineInputs) -> AbstractContextManager[None]:
        if (factor := (inputs.cross_attention_kwargs or {}).get("scale")) is None:
            return nullcontext()
        check_float("the scale of LoRAs", factor)
        if not self.has_acting_lora and not self.fused_loras:
            return nullcontext()
        self.runs.require_alone("a LoRA scale of its own")
        return self.lora_scaled(factor)

    def _adapter_metadata(self, residuals: Residuals | None) -> dict[str, Any]:
        metadata = control_metadata(residuals)
        if self.freeu is not None:
            metadata["freeu"] = ", ".join(f"{name}={value}" for name, value in self.freeu.items())
        metadata |= lora_metadata(self._lora_models()) | word_metadata(self.text_encoder)
        return metadata | image_prompt_metadata(self.unet)
