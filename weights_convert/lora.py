"""LoRA key names: every known spelling -> (component, our module's path, role).

A name is prefix, module and suffix. Prefixes and suffixes are rows of tables. Modules are looked up among all
spellings of the models' modules, derived here from their public names, so that kohya's underscores, which
replace dots and are also parts of names, are not ambiguous.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from weights_convert.chatglm import CHATGLM
from weights_convert.key_mapping import Table
from weights_convert.sgm import sgm_blocks, to_sgm
from weights_convert.unet import UNET

# The known spellings, for an error message.
KNOWN_SPELLINGS = (
    "unet.<module>.lora_A.weight (diffusers, PEFT), unet.<module>.processor.to_q_lora.down.weight (older "
    "diffusers), lora_unet_<module>.lora_down.weight (kohya, modules named by diffusers or SGM), the module "
    "alone, base_model.model.<module> (PEFT); text_encoder. or lora_te_ for ChatGLM; dora_scale, hada_, lokr_"
)

# Removed one after another; None if the prefix does not tell the component.
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
# Pattern of the suffix after the module -> role of the tensor; the first match counts.
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
LEGACY_NAMES = (
    (r"(attn\d)\.to_([qkv])", r"\1.processor.to_\2"),
    (r"(attn\d)\.to_out\.0", r"\1.processor.to_out"),
    (r"to_out\.0", "to_out"),
)


TABLES: Mapping[str, Table] = {"unet": UNET, "text_encoder": CHATGLM}


class LoRAKey(NamedTuple):
    """LoRA key: the component, the module's path in it, and the tensor's role."""

    component: str
    module: str
    role: str


def spellings(
    modules: Mapping[str, Collection[str]], tables: Mapping[str, Table] = TABLES
) -> dict[str, dict[str, str]]:
    """Map every spelling of each component's modules to our path. modules: our paths of the layers.

    tables: public names by component; those of another table than Kolors' have one spelling.
    Raises ValueError if two modules have the same spelling.
    """
    found: dict[str, dict[str, str]] = {}
    for component, paths in modules.items():
        table = tables[component]
        public = {path: table.to_public(path) for path in paths}
        blocks = sgm_blocks(public.values()) if table is UNET else {}
        known = found[component] = {}
        for path, name in public.items():
            if table is not TABLES[component]:
                aliases = {name}
            elif component == "unet":
                aliases = {name, to_sgm(name, blocks), *(re.sub(old, new, name) for old, new in LEGACY_NAMES)}
            else:
                aliases = {name, f"transformer.{name}"}  # THUDM's ChatGLM keeps its encoder one level down
            for alias in aliases | {alias.replace(".", "_") for alias in aliases}:
                if known.setdefault(alias, path) != path:
                    raise ValueError(f"{component}: {alias} is both {known[alias]} and {path}")
    return found


def parse_keys(
    names: Iterable[str], modules: Mapping[str, Collection[str]], tables: Mapping[str, Table] = TABLES
) -> tuple[dict[LoRAKey, str], list[str]]:
    """Parse tensor names: key -> name, and the unmatched names. modules: our layers' paths, by component.

    tables: as for `spellings`.
    Raises ValueError if two names are the same tensor, as in a file of two spellings.
    """
    known, keys, unmatched = spellings(modules, tables), dict[LoRAKey, str](), list[str]()
    for name in names:
        key = _parse_key(name, known)
        if key is None:
            unmatched.append(name)
        elif key in keys:
            raise ValueError(f"{keys[key]} and {name} are two spellings of the same tensor")
        else:
            keys[key] = name
    return keys, unmatched


def _parse_key(name: str, known: Mapping[str, Mapping[str, str]]) -> LoRAKey | None:
    rest, component = name, None
    while prefix := next(filter(rest.startswith, PREFIXES), None):
        rest, component = rest.removeprefix(prefix), PREFIXES[prefix] or component
    for pattern, role in SUFFIXES:
        if match := re.fullmatch(rf"(.+?){pattern}", rest):
            for candidate in known if component is None else (component,):
                if path := known.get(candidate, {}).get(match[1]):
                    return LoRAKey(candidate, path, role)
    return None
