"""Changed models in checkpoints: `config.json` names the class or block that is not this library's.

Such a model is loaded by its own class, and the error of any other way to load it says so, as that of a
quantized one does. Fields that its config adds are written and read too.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import nn

from kolors_core.config import PublicConfig
from kolors_core.registry import fields_of, frozen, read_fields, spec_of

FIELD = "_kolors_core"  # the reference ignores fields that start with an underscore
QUANTIZATION = "quantization_config"  # the reference reads it, and refuses a method that it does not know
_NAME = re.compile(r"[\w.<>]{1,200}")


def is_ours(kind: Any) -> bool:
    """Return whether a class or function is this library's or torch's."""
    return str(kind.__module__).partition(".")[0] in ("kolors_core", "torch")


def public_config(model: nn.Module, component: str) -> dict[str, Any]:
    """Return the content of a model's `config.json`, which names a changed model's class and added fields.

    A registered class (registry.py) has its own fields there. ValueError for a config that cannot be read
    again.
    """
    config: Any = model.config
    if (spec := spec_of(component, model)) is not None:
        names = {"class": _name(type(model)), "config": _name(type(config)), "registered": spec.name}
        return {"_class_name": spec.name, **fields_of(config), FIELD: names}
    public: dict[str, Any] = config.to_public()
    attached = {
        part for one in model.modules() if getattr(one, "is_adapter", False) for part in one.modules()
    }
    own = (type(part) for part in model.modules() if part not in attached)  # an adapter is not saved with it
    changed = next((kind for kind in own if not is_ours(kind)), None)
    if changed is None and is_ours(type(config)):
        return public
    added = {name: getattr(config, name) for name in _added_fields(type(config))}
    try:
        again = type(config).from_public(public) if added else config
        lost = {name: value for name, value in added.items() if getattr(again, name) != value}
        json.dumps(lost)
    except TypeError as error:  # a field without a default, or no JSON
        how = "give its new fields JSON values and defaults, or extend to_public and from_public"
        raise ValueError(f"{_name(type(config))} cannot be written and read again: {error}: {how}") from None
    maker = type(model) if changed is None else changed
    return public | {FIELD: {"class": _name(maker), "config": _name(type(config)), "fields": lost}}


def read_config(kind: Any, public: PublicConfig, where: str) -> Any:
    """Read a `config.json` with a class of config, added fields included; ValueError for unknown ones."""
    record = _record(public)
    if record.get("registered"):
        return read_fields(kind, public, where)
    config = kind.from_public(public, where)
    if not isinstance(values := record.get("fields", {}), dict):
        raise ValueError(f"{where}: the fields of {FIELD} must be names with values")
    if unknown := [name for name in values if name not in _added_fields(kind)]:
        got = f"{where}: has the field {unknown[0][:100]!r} of {record['config']}, which {_name(kind)} lacks"
        raise ValueError(f"{got}: load it by ModelSpec with that config")
    return replace(config, **{name: frozen(value) for name, value in values.items()}) if values else config


def describe(public: PublicConfig, component: str) -> str:
    """Say of whom a changed model's `config.json` is, and how to load it; "" for the library's own."""
    if public.get(QUANTIZATION) is not None:
        how = "KolorsPipeline.from_pretrained or kolors_core.performance.quantized_files.load_component"
        return f"its weights are quantized: load it by {how}"
    if not (record := _record(public)):
        return ""
    if name := record.get("registered"):
        arguments = f"{component!r}, {str(name)[:100]!r}, {record['config']}, {record['class']}"
        return f"it is a {record['class']}: register it first, registry.register({arguments})"
    how = f"load_component(FOLDER, {component!r}, kind=ModelSpec({record['config']}, {record['class']}))"
    instead = f"KolorsPipeline.from_pretrained(FOLDER, {component}=...)"
    return f"it is a changed model's, of {record['class']}: load it by {how}, and pass it to {instead}"


def _added_fields(kind: Any) -> set[str]:
    """Return the fields that a class of config has and the library's own class that it extends lacks."""
    own = next((base for base in kind.__mro__ if is_ours(base)), kind)
    known, names = ({f.name for f in fields(one)} if is_dataclass(one) else set() for one in (own, kind))
    return names - known


def _record(public: PublicConfig) -> Mapping[str, Any]:
    """Return what `public_config` wrote about a changed model, with names that can be printed."""
    record = public.get(FIELD)
    if not isinstance(record, dict):
        return {}
    names = {key: str(record.get(key, "")) for key in ("class", "config")}
    return record | {k: name if _NAME.fullmatch(name) else "an unknown class" for k, name in names.items()}


def _name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
