"""The VAE: diffusers' `AutoencoderKL` <-> `kolors_core.vae.VAE` (248 tensors)."""

from weights_convert.key_mapping import Block, Table, weight_and_bias

_LEVEL = r"(encoder\.down_blocks\.\d+|decoder\.up_blocks\.\d+)"
_MID = r"(encoder|decoder)\.mid_block"

VAE = Table(
    component="vae",
    blocks=(
        Block("", weight_and_bias("quant_conv", "post_quant_conv")),
        Block(r"encoder|decoder", weight_and_bias("conv_in", "conv_norm_out", "conv_out")),
        Block(
            rf"({_LEVEL}|{_MID})\.resnets\.\d+",
            weight_and_bias("norm1", "conv1", "norm2", "conv2"),
            optional=weight_and_bias("conv_shortcut"),
        ),
        Block(rf"{_MID}\.attentions\.0", weight_and_bias("group_norm", "to_q", "to_k", "to_v", "to_out.0")),
        Block(rf"{_LEVEL}\.(down|up)samplers\.0", weight_and_bias("conv")),
    ),  # fmt: skip
    rules=(
        ("down_blocks", "down"),
        ("up_blocks", "up"),
        ("mid_block.resnets.0", "mid.resnet_in"),
        ("mid_block.attentions.0", "mid.attention"),
        ("mid_block.resnets.1", "mid.resnet_out"),
        ("downsamplers.0.conv", "downsample"),
        ("upsamplers.0.conv", "upsample"),
        ("conv_shortcut", "shortcut"),
        ("group_norm", "norm"),
        ("to_out.0", "to_out"),
        ("conv_norm_out", "norm_out"),
    ),
    required={
        "encoder.mid_block.attentions.0.to_q.weight": "it is the encoder's middle attention",
        "decoder.mid_block.attentions.0.to_q.weight": "it is the decoder's middle attention",
    },
)
