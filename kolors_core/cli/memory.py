"""Memory of a call, asked of the plan before an image is drawn; refusals name flags of the command line."""

import argparse
from typing import Any

from kolors_core.pipelines.stages import Task

SMALL = 256 * 256  # pixels of all images: what these need is there where the weights are
LARGEST_BOUND, ROOM = 1024 * 1024, 2**14  # pixels of an image up to which it needs fewer bytes a pixel
MOST_IN_TILES = 16384 * 16384  # of all images: the plan of more takes minutes, and tiles little memory
FLAGS = {
    "enable_vae_tiling()": "--vae-tiling", "enable_model_cpu_offload()": "--offload model",
    "enable_sequential_cpu_offload()": "--offload block",
}  # fmt: skip


def check_memory(pipe: Task, options: argparse.Namespace, image: Any = None) -> None:
    """Raise ValueError, with the numbers and what would make it fit, for a call that cannot fit; or --force.

    image: whose size is drawn, rounded down to a multiple of 8, where the options have none.
    """
    own = pipe.unet.config.sample_size * pipe.vae.config.vae_scale_factor
    height, width = (
        getattr(options, side) or (own if image is None else getattr(image, side) // 8 * 8)
        for side in ("height", "width")
    )
    pixels = options.images * height * width
    if options.force or pixels <= SMALL or (options.vae_tiling and pixels > MOST_IN_TILES):
        return
    # Kolors takes a fifth of that, in float32, and a plan takes seconds of each start.
    if pipe.offload.device is None and height * width <= LARGEST_BOUND:
        free = pipe._available_memory()
        if free is not None and free >= ROOM * pixels:
            return
    from kolors_core.pipelines.memory_plan import check_fits

    try:
        check_fits(
            pipe, height, width, num_images_per_prompt=options.images, guidance_scale=options.guidance,
            max_sequence_length=options.max_tokens,
        )  # fmt: skip
    except ValueError as error:
        text = str(error)
        for method, flag in FLAGS.items():
            text = text.replace(method, flag)
        raise ValueError(f"{text}; --force goes on") from None
