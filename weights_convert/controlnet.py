"""ControlNet: diffusers' `ControlNetModel` with a text projection <-> `ControlNet` of kolors_core."""

from weights_convert.key_mapping import Block, Table, weight_and_bias
from weights_convert.unet import EMBEDDINGS, RULES, encoder_blocks

_LEVEL = r"(down_blocks\.\d+|mid_block)"
_IMAGE = "controlnet_cond_embedding"

CONTROLNET = Table(
    component="controlnet",
    blocks=(
        Block("", weight_and_bias("conv_in", "encoder_hid_proj", "controlnet_mid_block", *EMBEDDINGS)),
        Block(_IMAGE, weight_and_bias("conv_in", "conv_out")),
        Block(rf"({_IMAGE}\.blocks|controlnet_down_blocks)\.\d+", ("weight", "bias")),
        *encoder_blocks(_LEVEL),
        Block(r"down_blocks\.\d+\.downsamplers\.0", weight_and_bias("conv")),
    ),
    rules=(
        (f"{_IMAGE}.conv_in", "image_embedding.conv_in"),
        (f"{_IMAGE}.blocks", "image_embedding.convs"),
        (f"{_IMAGE}.conv_out", "image_embedding.conv_out"),
        ("controlnet_down_blocks", "to_skips"),
        ("controlnet_mid_block", "to_mid"),
        *RULES,
    ),
    required={
        f"{_IMAGE}.conv_in.weight": "it reads the control image; a UNet has none",
        "controlnet_mid_block.weight": "it is what a ControlNet adds to the UNet's middle",
        "encoder_hid_proj.weight": "it projects ChatGLM's tokens; an SDXL ControlNet has none: load it "
        "with KolorsControlNet.from_sdxl",
    },
)
