"""Kolors from scratch: Chinese or English text to images, readable, and equal to the reference.

    from kolors_core import KolorsPipeline
    pipe = KolorsPipeline.from_pretrained("tiny")  # or "Kwai-Kolors/Kolors-diffusers", variant="fp16"
    pipe("一张瓢虫的照片").images[0].save("ladybug.png")

Reading order: tokenizer, chatglm, unet, vae, schedule, sampling, guidance, pipeline.

Names are imported on first use: `import kolors_core.unet` loads only what the UNet needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kolors_core.config import VERSION as __version__

if TYPE_CHECKING:
    from kolors_core.adapters.canny import canny
    from kolors_core.adapters.controlnet_files import KolorsControlNet
    from kolors_core.adapters.ip_adapter_files import (
        CLIPVisionModelWithProjection,
        load_image_embeds,
        save_image_embeds,
    )
    from kolors_core.image import load_image
    from kolors_core.inspection.attention_maps import record_attention
    from kolors_core.inspection.features import capture, inject
    from kolors_core.pipelines.controlnet import (
        KolorsControlNetImg2ImgPipeline,
        KolorsControlNetInpaintPipeline,
        KolorsControlNetPipeline,
    )
    from kolors_core.pipelines.denoising_loop import SDXLCFGCutoffCallback
    from kolors_core.pipelines.image_prompts import IPAdapterMaskProcessor
    from kolors_core.pipelines.image_to_image import KolorsImg2ImgPipeline
    from kolors_core.pipelines.inpainting import KolorsInpaintPipeline
    from kolors_core.pipelines.pag import KolorsPAGPipeline
    from kolors_core.pipelines.request import KolorsPipelineOutput
    from kolors_core.pipelines.text_to_image import KolorsPipeline
    from kolors_core.schedule import DPMSolverMultistepScheduler, EulerDiscreteScheduler

_NAMES_IN = {
    "adapters.canny": ("canny",), "adapters.controlnet_files": ("KolorsControlNet",),
    "adapters.ip_adapter_files": ("CLIPVisionModelWithProjection", "load_image_embeds", "save_image_embeds"),
    "image": ("load_image",), "inspection.attention_maps": ("record_attention",),
    "inspection.features": ("capture", "inject"), "pipelines.denoising_loop": ("SDXLCFGCutoffCallback",),
    "pipelines.controlnet": (
        "KolorsControlNetImg2ImgPipeline", "KolorsControlNetInpaintPipeline", "KolorsControlNetPipeline",
    ),
    "pipelines.image_prompts": ("IPAdapterMaskProcessor",),
    "pipelines.image_to_image": ("KolorsImg2ImgPipeline",),
    "pipelines.inpainting": ("KolorsInpaintPipeline",), "pipelines.pag": ("KolorsPAGPipeline",),
    "pipelines.request": ("KolorsPipelineOutput",), "pipelines.text_to_image": ("KolorsPipeline",),
    "schedule": ("DPMSolverMultistepScheduler", "EulerDiscreteScheduler"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _NAMES_IN.items() for name in names}

__all__ = [
    "CLIPVisionModelWithProjection", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler",
    "IPAdapterMaskProcessor", "KolorsControlNet", "KolorsControlNetImg2ImgPipeline",
    "KolorsControlNetInpaintPipeline", "KolorsControlNetPipeline", "KolorsImg2ImgPipeline",
    "KolorsInpaintPipeline", "KolorsPAGPipeline", "KolorsPipeline", "KolorsPipelineOutput",
    "SDXLCFGCutoffCallback", "__version__", "canny", "capture", "inject", "load_image", "load_image_embeds",
    "record_attention", "save_image_embeds",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # the next access does not call this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
