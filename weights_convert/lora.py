"""LoRA names: every spelling in the wild -> (component, our module's path, role).

A name is prefix, module and suffix. Prefixes and suffixes are rows of tables. Modules are looked up among all
spellings of the modules that the models have, made here from their public names; nothing is guessed, so that
kohya's underscores, which stand for dots and for themselves, are no riddle.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from weights_convert.chatglm import CHATGLM
from weights_convert.sgm import sgm_blocks, to_sgm
from weights_convert.unet import UNET

# What an error tells of the spellings.
KNOWN = (
    "unet.<module>.lora_A.weight (diffusers, PEFT), unet.<module>.processor.to_q_lora.down.weight (older "
    "diffusers), lora_unet_<module>.lora_down.weight (kohya, modules named by diffusers or SGM), the module "
    "alone, base_model.model.<module> (PEFT); text_encoder. or lora_te_ for ChatGLM; dora_scale, hada_, lokr_"
)

# Taken off one after another; None says nothing of the component.
PREFIXES: dict[str, str | None] = {
    "base_model.model.": None,
    "lycoris_": None,
    "unet.": "unet",
    "lora_unet_": "unet",
    "model.diffusion_model.": "unet",
    "diffusion_model.": "unet",
    "text_encoder.": "text_encoder",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
}

_ADAPTER = r"(?:\.[\w-]+)?"  # a model's own state dict has the adapter's name in its keys
_LYCORIS = (
    *(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
)
# Pattern of what follows the module -> role of the tensor; the first that fits counts.
SUFFIXES: tuple[tuple[str, str], ...] = (
    (rf"\.lora_A{_ADAPTER}\.weight", "down"),
    (rf"\.lora_B{_ADAPTER}\.weight", "up"),
    (rf"\.lora_B{_ADAPTER}\.bias", "up_bias"),
    (r"[._]lora\.down\.weight", "down"),
    (r"[._]lora\.up\.weight", "up"),
    (r"\.lora_linear_layer\.down\.weight", "down"),
    (r"\.lora_linear_layer\.up\.weight", "up"),
    (r"\.lora_down\.weight", "down"),
    (r"\.lora_mid\.weight", "mid"),
    (r"\.lora_up\.weight", "up"),
    (r"(?:_lora)?\.alpha", "alpha"),
    (r"\.dora_scale", "dora_scale"),
    (rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?", "magnitude"),
    (r"\.diff", "diff"),
    (r"\.diff_b", "diff_bias"),
    *((rf"\.{name}{_ADAPTER}", name) for name in _LYCORIS),
)

# Further spellings of diffusers' module names: of its old attention processors.
OLDER = ((r"(attn\d)\.to_([qkv])", r"\1.processor.to_\2"), (r"(attn\d)\.to_out\.0", r"\1.processor.to_out"),
         (r"to_out\.0", "to_out"))  # fmt: skip


class Place(NamedTuple):
    """What a tensor of a LoRA is: of which module of which model, and in which role."""

    component: str
    module: str
    role: str


def spellings(modules: Mapping[str, Collection[str]]) -> dict[str, dict[str, str]]:
    """By component, every spelling of its modules -> our path. modules: our paths of the layers.

    Raises ValueError if one spelling is two modules.
    """
    found: dict[str, dict[str, str]] = {}
    for component, paths in modules.items():
        table = {"unet": UNET, "text_encoder": CHATGLM}[component]
        public = {path: table.to_public(path) for path in paths}
        blocks = sgm_blocks(public.values()) if component == "unet" else {}
        known = found[component] = {}
        for path, name in public.items():
            if component == "unet":
                ways = {name, to_sgm(name, blocks), *(re.sub(old, new, name) for old, new in OLDER)}
            else:
                ways = {name, f"transformer.{name}"}  # THUDM's ChatGLM keeps its encoder one level down
            for way in ways | {way.replace(".", "_") for way in ways}:
                if known.setdefault(way, path) != path:
                    raise ValueError(f"{component}: {way} is both {known[way]} and {path}")
    return found


def parse_keys(
    names: Iterable[str], modules: Mapping[str, Collection[str]]
) -> tuple[dict[Place, str], list[str]]:
    """The place of each name, and the names that have none. modules: our paths of the layers, by component.

    Raises ValueError if two names are the same tensor, as in a file of two spellings.
    """
    known, places, unmatched = spellings(modules), dict[Place, str](), list[str]()
    for name in names:
        place = _place(name, known)
        if place is None:
            unmatched.append(name)
        elif place in places:
            raise ValueError(f"{places[place]} and {name} are two spellings of the same tensor")
        else:
            places[place] = name
    return places, unmatched


def _place(name: str, known: Mapping[str, Mapping[str, str]]) -> Place | None:
    rest, component = name, None
    while prefix := next(filter(rest.startswith, PREFIXES), None):
        rest, component = rest.removeprefix(prefix), PREFIXES[prefix] or component
    for pattern, role in SUFFIXES:
        if match := re.fullmatch(rf"(.+?){pattern}", rest):
            for candidate in known if component is None else (component,):
                if path := known.get(candidate, {}).get(match[1]):
                    return Place(candidate, path, role)
    return None
