"""Files of one or several models in one, recognised by their tensors, whatever they are called.

UNet, VAE, ChatGLM and CLIP's image encoder each stand behind a prefix or none; UNet and VAE by diffusers' or
SGM's names. ChatGLM may have THUDM's own whole numbers, for a row of each linear layer one scale:
`x.weight` int8 [O, I], or of 4 bits [O, I/2] with the even columns in the high half, both signed, and
`x.weight_scale` [O]. Source: THUDM/chatglm3-6b, quantization.py, and THUDM/chatglm-6b,
quantization_kernels.c. Prefixes: ComfyUI's, and MinusZoneAI/ComfyUI-Kolors-MZ, hook_comfyui_kolors_v2.py,
which keeps Kolors' text projection as `encoder_hid_proj` beside SGM's blocks.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from weights_convert import TABLES
from weights_convert.safetensors_files import Source
from weights_convert.sgm import is_1x1_conv, public_to_sgm, sgm_to_public

# The first of each is the one that is written. The names of THUDM's ChatGLM start with `transformer.`.
PREFIXES: Mapping[str, tuple[str, ...]] = {
    "unet": ("model.diffusion_model.", "diffusion_model.", "unet."),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("text_encoder.", "cond_stage_model.", "transformer."),
    "image_encoder": ("image_encoder.", "clip_vision."),
}
SCHEMES = ("public", "sgm", "ours")
FILES = "files."  # what stands in front of the path of a small file that is kept as a tensor of its bytes
SCALE = "_scale"  # what follows the name of a weight of whole numbers, in that of its scales


class NamingScheme(NamedTuple):
    """How one model is named in a file: what each name starts with, and one of `SCHEMES`."""

    prefix: str
    naming: str


class SubModel(Source):
    """One model of a file, by its public names and in the public format's shapes.

    bits: of its linear layers, 8 or 4, or None. Read as usual, they are multiplied out.
    """

    def __init__(
        self, whole: Source, component: str, spelling: NamingScheme, stored: Mapping[str, str]
    ) -> None:
        self.files, self._handles = whole.files, whole._handles
        self._whole, self._stored = whole, dict(stored)
        self.component, self.spelling, self.bits = component, spelling, None
        self.scales = dict[str, str]()
        for name in stored:
            if component == "text_encoder" and name.endswith(SCALE):
                self.scales[name.removesuffix(SCALE)] = self._stored.pop(name)
        self._file_of = {name: whole._file_of[there] for name, there in self._stored.items()}
        if self.scales:
            self.bits = self._count_bits()

    def mapped(self, name: str) -> Tensor:
        """See `Source`; of a quantized layer the product, which no file holds."""
        if name in self.scales:
            scale = self.scale(name)[:, None]
            return self.whole_numbers(name).to(scale.dtype) * scale  # [O, I]
        return self._whole.mapped(self._stored[name]).view(self.shape(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in the public format."""
        shape = self._whole.shape(self._stored[name])
        if name in self.scales and self.bits == 4:
            return *shape[:-1], 2 * shape[-1]
        has_pixels = self.component == "vae" and is_1x1_conv(name) and shape[2:] == (1, 1)
        return shape[:2] if has_pixels else shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype as it is read."""
        return self._whole.dtype(self.scales.get(name) or self._stored[name])

    def release(self, name: str) -> None:
        """See `Source`."""
        self._whole.release(self._stored[name])

    @property
    def where(self) -> str:
        """The file, for messages."""
        return f"{self._whole.where} ({self.component})"

    def whole_numbers(self, name: str) -> Tensor:
        """The whole numbers of a linear layer's weight, int8 [O, I]; `scale` has the rest."""
        stored = self._whole[self._stored[name]].view(torch.int8)
        if self.bits == 8:
            return stored
        return torch.stack([stored >> 4, (stored << 4) >> 4], dim=-1).flatten(1)

    def scale(self, name: str) -> Tensor:
        """The scales [O] of a linear layer's rows."""
        return self._whole[self.scales[name]]

    def _count_bits(self) -> int:
        """Of the whole numbers; ValueError for what is not THUDM's format."""
        width = self._whole.shape(self._stored["embedding.word_embeddings.weight"])[-1:]
        first = "encoder.layers.0.self_attention.query_key_value.weight"
        for name, scale in self.scales.items():
            if name not in self._stored:
                raise ValueError(f"{self.where}: {name + SCALE} is there, and {name} is not")
            shape, dtype = self._whole.shape(self._stored[name]), self._whole.dtype(self._stored[name])
            if dtype not in (torch.int8, torch.uint8) or len(shape) != 2:
                raise ValueError(f"{self.where}: {name} is {dtype} {list(shape)}, expected int8 [O, I]")
            if (got := self._whole.shape(scale)) != shape[:1]:
                raise ValueError(f"{self.where}: {name + SCALE} is {list(got)}, expected {list(shape[:1])}")
        columns = self._whole.shape(self._stored[first])[-1:]
        if width not in (columns, tuple(2 * count for count in columns)):
            wanted = f"{list(width)} (8 bits) or half of it (4 bits)"
            raise ValueError(f"{self.where}: {first} has {list(columns)} columns, expected {wanted}")
        return 8 if columns == width else 4


def open_models(file: Path) -> tuple[dict[str, SubModel], Source, list[str]]:
    """The models of a file by component, the file, and the names of its tensors that are small files.

    No tensor is read. Raises ValueError naming the tensor that shows that it is not of Kolors, or not whole.
    """
    whole = Source([file])
    rest = {name for name in whole if not name.startswith(FILES)}
    found = dict[str, SubModel]()
    for spelling, component in _candidate_schemes():
        inside = [name for name in rest if name.startswith(spelling.prefix)]
        names = public_names(component, inside, spelling) if component not in found else {}
        if not names or any(name not in names for name in TABLES[component].required):
            continue
        if twice := sorted(set(inside) - set(names.values())):
            raise ValueError(f"{file}: {twice[0]} is there under two names")
        found[component] = SubModel(whole, component, spelling, names)
        rest -= set(inside)
    if rest or not found:
        raise ValueError(f"{file}: not a file of Kolors: {_why(rest, found)}")
    return found, whole, [name for name in whole if name.startswith(FILES)]


def public_names(component: str, stored: Collection[str], spelling: NamingScheme) -> dict[str, str]:
    """The public name of each one in a file -> that."""
    bare = [name.removeprefix(spelling.prefix) for name in stored]
    if spelling.naming == "sgm":
        public = sgm_to_public(component, bare).values()
    elif spelling.naming == "ours":
        public = [TABLES[component].to_public(name) for name in bare]
    else:
        public = bare
    return dict(zip(public, stored, strict=True))


def to_stored_names(source: Source, component: str, spelling: NamingScheme) -> dict[str, Tensor]:
    """The tensors of a model in public names, as a file has them that spells them so: names and shapes."""
    names = {name: name for name in source}
    if spelling.naming == "sgm":
        names = public_to_sgm(component, source)
    elif spelling.naming == "ours":
        names = {name: TABLES[component].to_ours(name) for name in source}
    has_pixels = component == "vae" and spelling.naming == "sgm"
    return {
        spelling.prefix + there: source.mapped(name)[:, :, None, None] if has_pixels and is_1x1_conv(name)
        else source.mapped(name) for name, there in names.items()
    }  # fmt: skip


def _candidate_schemes() -> list[tuple[NamingScheme, str]]:
    """Every way in which every component may be named, those with a prefix first."""
    prefixes = [(prefix, component) for component, found in PREFIXES.items() for prefix in found]
    prefixes += [("", component) for component in PREFIXES]
    return [(NamingScheme(prefix, naming), component) for prefix, component in prefixes for naming in SCHEMES]


def _why(rest: Collection[str], found: Collection[str]) -> str:
    """What is missing of the model that these tensors are most like; or a tensor that no model has."""
    if not rest:
        return "it has no tensors"
    best, why = 0, f"{min(rest)} is no tensor of a Kolors UNet, VAE, ChatGLM or CLIP"
    for spelling, component in _candidate_schemes():
        inside, table = [name for name in rest if name.startswith(spelling.prefix)], TABLES[component]
        names = public_names(component, inside, spelling)
        absent = [name for name in table.required if name not in names]
        known = sum(table.has(name) for name in names)
        if component not in found and absent and known > best:
            best, why = known, f"{absent[0]} of the {component} is missing ({table.required[absent[0]]})"
    return why
