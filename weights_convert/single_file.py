"""Single files of one or several models, recognized by their tensors, not by file names.

UNet, VAE, ChatGLM and CLIP's image encoder each have a prefix or none; UNet and VAE have diffusers' or SGM's
names. ChatGLM may be quantized in THUDM's format, with one scale for each row of a linear layer: `x.weight`
int8 [O, I], or 4 bits [O, I/2] with the even columns in the high half, both signed, and `x.weight_scale` [O].
Source: THUDM/chatglm3-6b, quantization.py, and THUDM/chatglm-6b,
quantization_kernels.c. Prefixes: ComfyUI's, and MinusZoneAI/ComfyUI-Kolors-MZ, hook_comfyui_kolors_v2.py,
which keeps Kolors' text projection as `encoder_hid_proj` with SGM's blocks.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from weights_convert import TABLES
from weights_convert.safetensors_files import Source
from weights_convert.sgm import is_1x1_conv, public_to_sgm, sgm_to_public

# The first of each is used for writing. The names of THUDM's ChatGLM start with `transformer.`.
PREFIXES: Mapping[str, tuple[str, ...]] = {
    "unet": ("model.diffusion_model.", "diffusion_model.", "unet."),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("text_encoder.", "cond_stage_model.", "transformer."),
    "image_encoder": ("image_encoder.", "clip_vision."),
}
SCHEMES = ("public", "sgm", "ours")
FILES = "files."  # prefix of the path of a small file that is stored as a tensor of its bytes
SCALE = "_scale"  # suffix of the name of a quantized weight, for its scales


class NamingScheme(NamedTuple):
    """Naming of one model in a file: the prefix of each name, and one of `SCHEMES`."""

    prefix: str
    naming: str


class SubModel(Source):
    """Model in a file of several, by its public names and in the public format's shapes.

    bits: of its linear layers, 8 or 4, or None. They are dequantized when read as usual.
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
        self._file_of = {name: whole._file_of[key] for name, key in self._stored.items()}
        if self.scales:
            self.bits = self._count_bits()

    def mapped(self, name: str) -> Tensor:
        """Return one tensor, see `Source`; dequantize that of a quantized layer."""
        if name in self.scales:
            scale = self.scale(name)[:, None]
            return self.integers(name).to(scale.dtype) * scale  # [O, I]
        return self._whole.mapped(self._stored[name]).view(self.shape(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape in the public format."""
        shape = self._whole.shape(self._stored[name])
        if name in self.scales and self.bits == 4:
            return *shape[:-1], 2 * shape[-1]
        is_conv = self.component == "vae" and is_1x1_conv(name) and shape[2:] == (1, 1)
        return shape[:2] if is_conv else shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of the tensor as read."""
        return self._whole.dtype(self.scales.get(name) or self._stored[name])

    def release(self, name: str) -> None:
        """Release pages, see `Source`."""
        self._whole.release(self._stored[name])

    @property
    def where(self) -> str:
        """The file, for messages."""
        return f"{self._whole.where} ({self.component})"

    def integers(self, name: str) -> Tensor:
        """Return the integers of a quantized weight, int8 [O, I], without its `scale`."""
        stored = self._whole[self._stored[name]].view(torch.int8)
        if self.bits == 8:
            return stored
        return torch.stack([stored >> 4, (stored << 4) >> 4], dim=-1).flatten(1)

    def scale(self, name: str) -> Tensor:
        """Return the scales [O] of a linear layer's rows."""
        return self._whole[self.scales[name]]

    def _count_bits(self) -> int:
        """Return the bits of the quantized weights; ValueError if they are not in THUDM's format."""
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
            expected = f"{list(width)} (8 bits) or half of it (4 bits)"
            raise ValueError(f"{self.where}: {first} has {list(columns)} columns, expected {expected}")
        return 8 if columns == width else 4


def open_models(file: Path) -> tuple[dict[str, SubModel], Source, list[str]]:
    """Open a file: its models by component, the file, and the names of its tensors that are small files.

    No tensor is read. Raises ValueError naming an unknown or missing tensor if it is not a whole Kolors file.
    """
    whole = Source([file])
    rest = {name for name in whole if not name.startswith(FILES)}
    found = dict[str, SubModel]()
    for spelling, component in _candidate_schemes():
        stored = [name for name in rest if name.startswith(spelling.prefix)]
        names = public_names(component, stored, spelling) if component not in found else {}
        if not names or any(name not in names for name in TABLES[component].required):
            continue
        if twice := sorted(set(stored) - set(names.values())):
            raise ValueError(f"{file}: {twice[0]} is there under two names")
        found[component] = SubModel(whole, component, spelling, names)
        rest -= set(stored)
    if rest or not found:
        raise ValueError(f"{file}: not a file of Kolors: {_why(rest, found)}")
    return found, whole, [name for name in whole if name.startswith(FILES)]


def public_names(component: str, stored: Collection[str], spelling: NamingScheme) -> dict[str, str]:
    """Map public names to those of tensors stored in a file."""
    bare = [name.removeprefix(spelling.prefix) for name in stored]
    if spelling.naming == "sgm":
        public = sgm_to_public(component, bare).values()
    elif spelling.naming == "ours":
        public = [TABLES[component].to_public(name) for name in bare]
    else:
        public = bare
    return dict(zip(public, stored, strict=True))


def to_stored_names(source: Source, component: str, spelling: NamingScheme) -> dict[str, Tensor]:
    """Rename and reshape the tensors of a model with public names as a file of this naming stores them."""
    names = {name: name for name in source}
    if spelling.naming == "sgm":
        names = public_to_sgm(component, source)
    elif spelling.naming == "ours":
        names = {name: TABLES[component].to_ours(name) for name in source}
    tensors = {name: source.mapped(name) for name in names}
    if component == "vae" and spelling.naming == "sgm":
        tensors |= {name: tensors[name][:, :, None, None] for name in names if is_1x1_conv(name)}
    return {spelling.prefix + names[name]: tensor for name, tensor in tensors.items()}


def _candidate_schemes() -> list[tuple[NamingScheme, str]]:
    """List the naming schemes of every component, those with a prefix first."""
    prefixes = [(prefix, component) for component, known in PREFIXES.items() for prefix in known]
    prefixes += [("", component) for component in PREFIXES]
    return [(NamingScheme(prefix, naming), component) for prefix, component in prefixes for naming in SCHEMES]


def _why(rest: Collection[str], found: Collection[str]) -> str:
    """Return what the model that these tensors resemble most lacks; or a tensor that no model has."""
    if not rest:
        return "it has no tensors"
    best, why = 0, f"{min(rest)} is no tensor of a Kolors UNet, VAE, ChatGLM or CLIP"
    for spelling, component in _candidate_schemes():
        stored, table = [name for name in rest if name.startswith(spelling.prefix)], TABLES[component]
        names = public_names(component, stored, spelling)
        absent = [name for name in table.required if name not in names]
        known = sum(table.has(name) for name in names)
        if component not in found and absent and known > best:
            best, why = known, f"{absent[0]} of the {component} is missing ({table.required[absent[0]]})"
    return why
