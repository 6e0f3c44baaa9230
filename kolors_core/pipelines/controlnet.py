"""ControlNet tasks, with the reference's names and argument names.

Every task takes control images, with a list of ControlNets a list with one for each; these are the names that
scripts know. Source: diffusers' pipelines/controlnet/pipeline_controlnet_sd_xl.py and
pipeline_controlnet_sd_xl_img2img.py, and the community's pipeline_controlnet_xl_kolors.py.
"""

from typing import Any

from kolors_core.adapters.controlnet import is_multi
from kolors_core.image import preprocess_control
from kolors_core.pipelines.image_to_image import KolorsImg2ImgPipeline
from kolors_core.pipelines.inpainting import KolorsInpaintPipeline
from kolors_core.pipelines.request import KolorsPipelineOutput, documented_like
from kolors_core.pipelines.text_prompts import Prompt
from kolors_core.pipelines.text_to_image import KolorsPipeline


class KolorsControlNetPipeline(KolorsPipeline):
    """Text to image under control images."""

    @documented_like(KolorsPipeline.__call__)
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] (the reference's own order)
        self, prompt: Prompt | None = None, image: Any = None, height: int | None = None,
        width: int | None = None, **arguments: Any,
    ) -> KolorsPipelineOutput:  # fmt: skip
        """Make images from prompts and control images; arguments: as for `KolorsPipeline`.

        image: the control image, as `control_image` below.
        height, width: multiples of 8 in pixels; the first control image's own, rounded down, if None.
        """
        if image is None:
            raise ValueError("no image: expected the control image, or one for each of several ControlNets")
        if height is None or width is None:
            several = isinstance(image, list | tuple) and image and is_multi(self.controlnet)
            height, width = preprocess_control(image[0] if several else image, height, width).shape[-2:]
        return super().__call__(prompt, height, width, control_image=image, **arguments)


class KolorsControlNetImg2ImgPipeline(KolorsImg2ImgPipeline):
    """Image to image under control images, of strength 0.8 if none is given."""

    default_strength = 0.8

    @documented_like(KolorsImg2ImgPipeline.__call__)
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] (the reference's own order)
        self, prompt: Prompt | None = None, image: Any = None, control_image: Any = None,
        height: int | None = None, width: int | None = None, strength: float = default_strength,
        **arguments: Any,
    ) -> KolorsPipelineOutput:  # fmt: skip
        """Make images from images, prompts and control images; others as for `KolorsImg2ImgPipeline`."""
        if control_image is None:
            raise ValueError("no control_image: expected one, or one for each of several ControlNets")
        arguments["control_image"] = control_image
        return super().__call__(prompt, image, strength, height, width, **arguments)


class KolorsControlNetInpaintPipeline(KolorsInpaintPipeline):
    """Inpainting under control images."""

    @documented_like(KolorsInpaintPipeline.__call__)
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] (the reference's own order)
        self, prompt: Prompt | None = None, image: Any = None, mask_image: Any = None,
        control_image: Any = None, **arguments: Any,
    ) -> KolorsPipelineOutput:  # fmt: skip
        """Inpaint the white part of a mask under control images; others as for `KolorsInpaintPipeline`."""
        if control_image is None:
            raise ValueError("no control_image: expected one, or one for each of several ControlNets")
        return super().__call__(prompt, image, mask_image, control_image=control_image, **arguments)
