"""Kolors from scratch: Chinese or English text to pictures, readable, and equal to the reference.

    from kolors_core import KolorsPipeline
    pipe = KolorsPipeline.from_pretrained("tiny")  # or "Kwai-Kolors/Kolors-diffusers", variant="fp16"
    pipe("一张瓢虫的照片").images[0].save("ladybug.png")

Reading order: tokenizer, chatglm, unet, vae, schedule, sampling, guidance, pipeline.
"""

from kolors_core.inspection.attention_maps import record_attention
from kolors_core.pipelines.denoising_loop import SDXLCFGCutoffCallback
from kolors_core.adapters.canny import canny
from kolors_core.inspection.features import capture, inject
from kolors_core.config import VERSION as __version__
from kolors_core.pipelines.control_images import KolorsControlNet
from kolors_core.pipelines.controlnet import (
    KolorsControlNetImg2ImgPipeline,
    KolorsControlNetInpaintPipeline,
    KolorsControlNetPipeline,
)
from kolors_core.image import IPAdapterMaskProcessor, load_image
from kolors_core.pipelines.image_prompts import CLIPVisionModelWithProjection, load_image_embeds, save_image_embeds
from kolors_core.pipelines.inpainting import KolorsInpaintPipeline
from kolors_core.pipelines.pag import KolorsPAGPipeline
from kolors_core.pipelines.text_to_image import KolorsImg2ImgPipeline, KolorsPipeline
from kolors_core.schedule import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from kolors_core.pipelines.stages import KolorsPipelineOutput

__all__ = [
    "CLIPVisionModelWithProjection",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "IPAdapterMaskProcessor",
    "KolorsControlNet",
    "KolorsControlNetImg2ImgPipeline",
    "KolorsControlNetInpaintPipeline",
    "KolorsControlNetPipeline",
    "KolorsImg2ImgPipeline",
    "KolorsInpaintPipeline",
    "KolorsPAGPipeline",
    "KolorsPipeline",
    "KolorsPipelineOutput",
    "SDXLCFGCutoffCallback",
    "__version__",
    "canny",
    "capture",
    "inject",
    "load_image",
    "load_image_embeds",
    "record_attention",
    "save_image_embeds",
]
