"""Pipelines under the reference's names, with the methods, models and scheduler that its scripts expect."""

from kolors_core.compat.pipeline_methods import ReferenceImageMethods, ReferenceMethods
from kolors_core.compat.pipeline_methods import retrieve_latents as retrieve_latents
from kolors_core.compat.pipeline_methods import retrieve_timesteps as retrieve_timesteps
from kolors_core.pipelines import controlnet, image_to_image, inpainting, pag, text_to_image


class KolorsPipeline(ReferenceMethods, text_to_image.KolorsPipeline):
    """Text to image."""


class KolorsImg2ImgPipeline(ReferenceImageMethods, image_to_image.KolorsImg2ImgPipeline):
    """Image to image: noise is added to an image and removed again under the prompt."""


class KolorsInpaintPipeline(ReferenceMethods, inpainting.KolorsInpaintPipeline):
    """Inpainting, with Kolors-Inpainting's UNet of 9 channels or any of 4."""


class KolorsPAGPipeline(ReferenceMethods, pag.KolorsPAGPipeline):
    """Text to image with perturbed-attention guidance (PAG)."""


class KolorsControlNetPipeline(ReferenceMethods, controlnet.KolorsControlNetPipeline):
    """Text to image under control images."""


class KolorsControlNetImg2ImgPipeline(ReferenceImageMethods, controlnet.KolorsControlNetImg2ImgPipeline):
    """Image to image under control images, of strength 0.8 if none is given."""


class KolorsControlNetInpaintPipeline(ReferenceMethods, controlnet.KolorsControlNetInpaintPipeline):
    """Inpainting under control images."""
