"""The Kolors UNet: diffusers' `UNet2DConditionModel` <-> `kolors_core.unet.UNet` (1,682 tensors)."""

from weights_convert.rules import Table

_BLOCK = r"norm[123]|attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)"
_ATTENTION = rf"attentions\.\d+\.(norm|proj_in|proj_out|transformer_blocks\.\d+\.({_BLOCK}))"
_RESNET = r"resnets\.\d+\.(norm1|conv1|time_emb_proj|norm2|conv2|conv_shortcut)"
_LEVEL = r"down_blocks\.\d+|mid_block|up_blocks\.\d+"
_ENDS = r"conv_in|conv_norm_out|conv_out|encoder_hid_proj|(time|add)_embedding\.linear_[12]"

UNET = Table(
    component="unet",
    names=rf"({_ENDS}|({_LEVEL})\.({_RESNET}|{_ATTENTION}|(down|up)samplers\.0\.conv))\.(weight|bias)",
    rules=(
        ("down_blocks", "down"),
        ("mid_block", "mid"),
        ("up_blocks", "up"),
        ("downsamplers.0.conv", "downsample"),
        ("upsamplers.0.conv", "upsample"),
        ("time_emb_proj", "time_proj"),
        ("conv_shortcut", "shortcut"),
        ("transformer_blocks", "blocks"),
        ("attn1", "self_attention"),
        ("attn2", "cross_attention"),
        ("to_out.0", "to_out"),
        ("ff.net.0.proj", "feed_forward.proj_in"),
        ("ff.net.2", "feed_forward.proj_out"),
        ("conv_norm_out", "norm_out"),
        ("encoder_hid_proj", "text_proj"),
    ),
    required={
        "encoder_hid_proj.weight": "it projects ChatGLM's tokens; an SDXL or a stale Kolors UNet has none",
        "add_embedding.linear_1.weight": "it takes the pooled text and the size ids, as in SDXL",
        "mid_block.resnets.0.conv1.weight": "it is a UNet's middle",
    },
)
