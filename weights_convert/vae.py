"""The VAE: diffusers' `AutoencoderKL` <-> `kolors_core.vae.VAE` (248 tensors)."""

from weights_convert.rules import Table

_RESNET = r"resnets\.\d+\.(norm1|conv1|norm2|conv2|conv_shortcut)"
_ATTENTION = r"attentions\.0\.(group_norm|to_[qkv]|to_out\.0)"
_ENDS = r"(en|de)coder\.(conv_in|conv_norm_out|conv_out)|quant_conv|post_quant_conv"
_LEVEL = rf"(encoder\.down|decoder\.up)_blocks\.\d+\.({_RESNET}|(down|up)samplers\.0\.conv)"

VAE = Table(
    component="vae",
    names=rf"({_ENDS}|{_LEVEL}|(en|de)coder\.mid_block\.({_RESNET}|{_ATTENTION}))\.(weight|bias)",
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
