"""SGM's names, also used by ComfyUI and LoRA trainers <-> diffusers' public names, of UNet and VAE.

The UNet's blocks are numbered consecutively, the VAE's decoder counts its levels from the outermost, and the
VAE's attention has 1x1 convolutions where diffusers has linear layers: the same values in another shape.
Source: Stability-AI/generative-models, sgm/modules/diffusionmodules/openaimodel.py and model.py.
"""

import re
from collections.abc import Callable, Iterable, Mapping

from weights_convert.key_mapping import inverse, rename

# SGM's names of the top-level modules, and of a block's parts; `sgm_blocks` has the rest.
SGM_TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
SGM_PARTS = {
    "resnets": {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    },
    "downsamplers": {"conv": "op"},
}
SGM_VAE = (
    ("down_blocks", "down"),
    ("up_blocks", "up"),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("resnets", "block"),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    ("conv_shortcut", "nin_shortcut"),
    ("attn_1.group_norm", "attn_1.norm"),
    ("attn_1.to_q", "attn_1.q"),
    ("attn_1.to_k", "attn_1.k"),
    ("attn_1.to_v", "attn_1.v"),
    ("attn_1.to_out.0", "attn_1.proj_out"),
    ("conv_norm_out", "norm_out"),
)
_BLOCK = re.compile(r"((?:down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(\w+)\.\d+)\.(.+)")
_SGM_BLOCK = re.compile(r"((?:input_blocks\.\d+|middle_block|output_blocks\.\d+)\.\d+)\.(.+)")
_DOWNSAMPLE = re.compile(r"input_blocks\.(\d+)\.0\.op\.weight")
_INPUT = re.compile(r"input_blocks\.(\d+)\.0\..+")
_POINTWISE = re.compile(r"(?:encoder|decoder)\.mid_block\.attentions\.0\.to_(?:q|k|v|out\.0)\.weight")


def sgm_blocks(public: Iterable[str]) -> dict[str, str]:
    """Map diffusers' blocks to SGM's, which number resnets and samplers consecutively, from module names."""
    blocks = sorted({match[1] for name in public if (match := _BLOCK.fullmatch(name))})
    resnets = sum(block.startswith("down_blocks.0.resnets.") for block in blocks)
    found = {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
             "mid_block.resnets.1": "middle_block.2"}  # fmt: skip
    for block in blocks:
        if block in found:
            continue
        direction, level, kind, number = block.split(".")
        is_sampler = kind.endswith("samplers")
        i = int(level) * (resnets + 1) + (resnets if is_sampler else int(number))
        part = int(kind == "attentions")
        if direction == "down_blocks":
            found[block] = f"input_blocks.{i + 1}.{part}"  # the first is conv_in
            continue
        if is_sampler:  # in the last resnet's block, after the transformer if there is one
            part = 1 + any(other.startswith(f"up_blocks.{level}.attentions.") for other in blocks)
        found[block] = f"output_blocks.{i}.{part}"
    return found


def to_sgm(public: str, blocks: Mapping[str, str]) -> str:
    """Convert a UNet module's name to SGM's; Kolors' text projection has none and keeps its name."""
    match = _BLOCK.fullmatch(public)
    if match is None:
        return SGM_TOP.get(public, public)
    block, kind, inner = match.groups()
    return f"{blocks[block]}.{SGM_PARTS.get(kind, {}).get(inner, inner)}"


def public_to_sgm(component: str, names: Iterable[str]) -> dict[str, str]:
    """Map public tensor names of a UNet or VAE to SGM's; other components' names stay."""
    names = list(names)
    if component == "vae":
        levels = _reverse_levels(names, "up_blocks")
        return {name: rename(levels[name], SGM_VAE) for name in names}
    if component != "unet":
        return {name: name for name in names}
    blocks = sgm_blocks(names)
    return {name: _rename_module(name, lambda module: to_sgm(module, blocks)) for name in names}


def sgm_to_public(component: str, names: Iterable[str]) -> dict[str, str]:
    """Map SGM's tensor names to public ones, the inverse of `public_to_sgm`; other names stay."""
    names = list(names)
    if component == "vae":
        levels = _reverse_levels(names, "up")
        return {name: rename(levels[name], inverse(SGM_VAE)) for name in names}
    if component != "unet":
        return {name: name for name in names}
    blocks = {sgm: public for public, sgm in sgm_blocks(_possible_blocks(names)).items()}
    tops = {sgm: public for public, sgm in SGM_TOP.items()}

    def public(module: str) -> str:
        match = _SGM_BLOCK.fullmatch(module)
        if match is None or (block := blocks.get(match[1])) is None:
            return tops.get(module, module)
        parts = {sgm: part for part, sgm in SGM_PARTS.get(block.split(".")[-2], {}).items()}
        return f"{block}.{parts.get(match[2], match[2])}"

    return {name: _rename_module(name, public) for name in names}


def _rename_module(name: str, change: Callable[[str], str]) -> str:
    """Change the module in a tensor's name."""
    module, dot, kind = name.rpartition(".")
    return change(module) + dot + kind


def _possible_blocks(names: list[str]) -> list[str]:
    """List a module of each block that a UNet of SGM's names may have, by diffusers' names."""
    samplers = [int(match[1]) for name in names if (match := _DOWNSAMPLE.fullmatch(name))]
    inputs = [int(match[1]) for name in names if (match := _INPUT.fullmatch(name))]
    resnets = min(samplers) - 1 if samplers else max(inputs, default=0)
    if resnets > 100 or len(samplers) > 16:
        return []  # not a UNet: only a damaged name has such numbers
    blocks, have, last = list[str](), set(names), len(samplers)
    for level in range(last + 1):
        attends = f"input_blocks.{level * (resnets + 1) + 1}.1.norm.weight" in have
        for kind in ("resnets", "attentions") if attends else ("resnets",):
            blocks += [f"down_blocks.{level}.{kind}.{i}.x" for i in range(resnets)]
            blocks += [f"up_blocks.{last - level}.{kind}.{i}.x" for i in range(resnets + 1)]
        if level < last:
            blocks += [f"down_blocks.{level}.downsamplers.0.x", f"up_blocks.{level}.upsamplers.0.x"]
    return blocks


def _reverse_levels(names: list[str], blocks: str) -> dict[str, str]:
    """Map each name to one whose VAE decoder level, after `blocks`, is counted from the other end."""
    levels = len({name.split(".")[2] for name in names if name.startswith(f"decoder.{blocks}.")})
    level = re.compile(rf"(?<=^decoder\.{blocks}\.)\d{{1,4}}(?=\..)")
    return {name: level.sub(lambda match: str(levels - 1 - int(match[0])), name) for name in names}


def is_1x1_conv(public: str) -> bool:
    """Return whether a VAE's tensor is [O, I] in the public format and [O, I, 1, 1] in SGM's."""
    return _POINTWISE.fullmatch(public) is not None
