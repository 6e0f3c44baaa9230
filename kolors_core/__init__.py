"""Kolors from scratch: Chinese or English text to images, readable, and equal to the reference.

    from kolors_core import KolorsPipeline
    pipe = KolorsPipeline.from_pretrained("tiny")  # or "Kwai-Kolors/Kolors-diffusers", variant="fp16"
    pipe("一张瓢虫的照片").images[0].save("ladybug.png")

Reading order: tokenizer, chatglm, unet, vae, schedule, sampling, guidance, pipeline.

Names are imported on first use: `import kolors_core.unet` loads only what the UNet needs.
"""

from importlib import import_module
from pathlib import Path
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
    from kolors_core.compat.auto import (
        AutoPipelineForImage2Image,
        AutoPipelineForInpainting,
        AutoPipelineForText2Image,
        DiffusionPipeline,
    )
    from kolors_core.compat.image_processor import VaeImageProcessor
    from kolors_core.compat.models import (
        AutoencoderKL,
        ChatGLMModel,
        ControlNetModel,
        UNet2DConditionModel,
    )
    from kolors_core.compat.pipelines import (
        KolorsControlNetImg2ImgPipeline,
        KolorsControlNetInpaintPipeline,
        KolorsControlNetPipeline,
        KolorsImg2ImgPipeline,
        KolorsInpaintPipeline,
        KolorsPAGPipeline,
        KolorsPipeline,
    )
    from kolors_core.compat.schedulers import (
        DDIMScheduler,
        DDPMScheduler,
        DEISMultistepScheduler,
        DPMSolverMultistepScheduler,
        DPMSolverSDEScheduler,
        DPMSolverSinglestepScheduler,
        EDMDPMSolverMultistepScheduler,
        EDMEulerScheduler,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
        HeunDiscreteScheduler,
        KDPM2AncestralDiscreteScheduler,
        KDPM2DiscreteScheduler,
        LCMScheduler,
        LMSDiscreteScheduler,
        PNDMScheduler,
        TCDScheduler,
        UniPCMultistepScheduler,
    )
    from kolors_core.compat.tokenizer import ChatGLMTokenizer
    from kolors_core.compat.utils import make_image_grid
    from kolors_core.image import load_image
    from kolors_core.inspection.attention_changes import inject_attention
    from kolors_core.inspection.attention_maps import record_attention
    from kolors_core.inspection.features import capture, inject
    from kolors_core.pipelines.denoising_loop import SDXLCFGCutoffCallback
    from kolors_core.pipelines.image_prompts import IPAdapterMaskProcessor
    from kolors_core.pipelines.request import KolorsPipelineOutput
    from kolors_core.registry import register

_SCHEDULERS = (
    "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler", "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "TCDScheduler",
    "UniPCMultistepScheduler",
)  # fmt: skip
_NAMES_IN = {
    "adapters.canny": ("canny",), "adapters.controlnet_files": ("KolorsControlNet",),
    "adapters.ip_adapter_files": ("CLIPVisionModelWithProjection", "load_image_embeds", "save_image_embeds"),
    "image": ("load_image",), "inspection.attention_changes": ("inject_attention",),
    "registry": ("register",), "inspection.attention_maps": ("record_attention",),
    "inspection.features": ("capture", "inject"), "pipelines.denoising_loop": ("SDXLCFGCutoffCallback",),
    "pipelines.controlnet": (
        "KolorsControlNetImg2ImgPipeline", "KolorsControlNetInpaintPipeline", "KolorsControlNetPipeline",
    ),
    "pipelines.image_prompts": ("IPAdapterMaskProcessor",),
    "pipelines.image_to_image": ("KolorsImg2ImgPipeline",),
    "pipelines.inpainting": ("KolorsInpaintPipeline",), "pipelines.pag": ("KolorsPAGPipeline",),
    "pipelines.request": ("KolorsPipelineOutput",), "pipelines.text_to_image": ("KolorsPipeline",),
    "schedulers": _SCHEDULERS,
}  # fmt: skip
# The drop-in classes, which stand before the plain ones of the same names; without compat/ those remain.
_COMPAT_NAMES_IN = {
    "compat.auto": (
        "AutoPipelineForImage2Image", "AutoPipelineForInpainting", "AutoPipelineForText2Image",
        "DiffusionPipeline",
    ),
    "compat.image_processor": ("VaeImageProcessor",),
    "compat.models": ("AutoencoderKL", "ChatGLMModel", "ControlNetModel", "UNet2DConditionModel"),
    "compat.pipelines": (
        "KolorsControlNetImg2ImgPipeline", "KolorsControlNetInpaintPipeline", "KolorsControlNetPipeline",
        "KolorsImg2ImgPipeline", "KolorsInpaintPipeline", "KolorsPAGPipeline", "KolorsPipeline",
    ),
    "compat.schedulers": _SCHEDULERS,
    "compat.tokenizer": ("ChatGLMTokenizer",), "compat.utils": ("make_image_grid",),
}  # fmt: skip
if (Path(__file__).parent / "compat").is_dir():
    _NAMES_IN |= _COMPAT_NAMES_IN
_MODULE_OF = {name: module for module, names in _NAMES_IN.items() for name in names}

__all__ = [
    "AutoPipelineForImage2Image", "AutoPipelineForInpainting", "AutoPipelineForText2Image",
    "AutoencoderKL", "CLIPVisionModelWithProjection", "ChatGLMModel", "ChatGLMTokenizer",
    "ControlNetModel", "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler",
    "DiffusionPipeline", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler", "IPAdapterMaskProcessor", "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler", "KolorsControlNet", "KolorsControlNetImg2ImgPipeline",
    "KolorsControlNetInpaintPipeline", "KolorsControlNetPipeline", "KolorsImg2ImgPipeline",
    "KolorsInpaintPipeline", "KolorsPAGPipeline", "KolorsPipeline", "KolorsPipelineOutput",
    "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "SDXLCFGCutoffCallback", "TCDScheduler",
    "UNet2DConditionModel", "UniPCMultistepScheduler", "VaeImageProcessor", "__version__", "canny",
    "capture", "inject", "inject_attention", "load_image", "load_image_embeds", "make_image_grid",
    "record_attention", "register", "save_image_embeds",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # the next access does not call this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
