"""Kolors from scratch: Chinese or English text to pictures, readable, and equal to the reference.

    from kolors_core import KolorsPipeline
    pipe = KolorsPipeline.from_pretrained("tiny")  # or "Kwai-Kolors/Kolors-diffusers", variant="fp16"
    pipe("一张瓢虫的照片").images[0].save("ladybug.png")

Reading order: tokenizer, chatglm, unet, vae, schedule, sampling, guidance, pipeline.
"""

from kolors_core.attention_maps import record_attention
from kolors_core.callback import SDXLCFGCutoffCallback
from kolors_core.canny import canny
from kolors_core.capturing import capture, inject
from kolors_core.config import VERSION as __version__
from kolors_core.control_image import KolorsControlNet
from kolors_core.control_pipeline import (
    KolorsControlNetImg2ImgPipeline,
    KolorsControlNetInpaintPipeline,
    KolorsControlNetPipeline,
)
from kolors_core.image import IPAdapterMaskProcessor, load_image
from kolors_core.image_prompt import CLIPVisionModelWithProjection, load_image_embeds, save_image_embeds
from kolors_core.inpaint import KolorsInpaintPipeline
from kolors_core.pag_pipeline import KolorsPAGPipeline
from kolors_core.pipeline import KolorsImg2ImgPipeline, KolorsPipeline
from kolors_core.schedule import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from kolors_core.task import KolorsPipelineOutput

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
