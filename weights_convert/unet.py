"""The Kolors UNet: diffusers' `UNet2DConditionModel` <-> `kolors_core.unet.UNet` (1,682 tensors)."""

from weights_convert.key_mapping import Block, Table, weight_and_bias, weight_only

_LEVEL = r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)"
_NORMS = ("norm1", "norm2", "norm3")
_OUT = ("attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")
_QKV = tuple(f"attn{i}.to_{name}" for i in (1, 2) for name in "qkv")
EMBEDDINGS = tuple(f"{kind}_embedding.linear_{i}" for kind in ("time", "add") for i in (1, 2))

# Shared with ControlNets.
RULES = (
    ("down_blocks", "down"),
    ("mid_block", "mid"),
    ("downsamplers.0.conv", "downsample"),
    ("time_emb_proj", "time_proj"),
    ("conv_shortcut", "shortcut"),
    ("transformer_blocks", "blocks"),
    ("attn1", "self_attention"),
    ("attn2", "cross_attention"),
    ("to_out.0", "to_out"),
    ("ff.net.0.proj", "feed_forward.proj_in"),
    ("ff.net.2", "feed_forward.proj_out"),
    ("encoder_hid_proj", "text_proj"),
)


def encoder_blocks(level: str) -> tuple[Block, ...]:
    """Return the resnet and transformer blocks of levels, whose paths match `level`."""
    attention = rf"{level}\.attentions\.\d+"
    return (
        Block(
            rf"{level}\.resnets\.\d+",
            weight_and_bias("norm1", "conv1", "time_emb_proj", "norm2", "conv2"),
            optional=weight_and_bias("conv_shortcut"),
        ),
        Block(attention, weight_and_bias("norm", "proj_in", "proj_out")),
        Block(rf"{attention}\.transformer_blocks\.\d+", weight_and_bias(*_NORMS, *_OUT) + weight_only(*_QKV)),
    )


UNET = Table(
    component="unet",
    blocks=(
        Block("", weight_and_bias("conv_in", "conv_norm_out", "conv_out", "encoder_hid_proj", *EMBEDDINGS)),
        *encoder_blocks(_LEVEL),
        Block(r"(down_blocks\.\d+\.down|up_blocks\.\d+\.up)samplers\.0", weight_and_bias("conv")),
    ),  # fmt: skip
    rules=(
        *RULES,
        ("up_blocks", "up"),
        ("upsamplers.0.conv", "upsample"),
        ("conv_norm_out", "norm_out"),
    ),
    required={
        "encoder_hid_proj.weight": "it projects ChatGLM's tokens; an SDXL or a stale Kolors UNet has none",
        "add_embedding.linear_1.weight": "it takes the pooled text and the size ids, as in SDXL",
        "mid_block.resnets.0.conv1.weight": "it is a UNet's middle",
    },
)
