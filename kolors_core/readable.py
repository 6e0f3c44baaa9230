"""Checks before saving: what `from_pretrained` could not read again as it is, is refused by name."""

import json
from typing import Any

from torch import Tensor, nn

from kolors_core import changed_models
from kolors_core.module import require_plain
from kolors_core.registry import (
    MODEL_SPECS,
    SELF_DESCRIBED,
    described_class,
    described_name,
    fields_of,
    is_librarys,
    read_fields,
    spec_of,
    table_of,
)
from weights_convert.key_mapping import compare
from weights_convert.safetensors_files import check_whole


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's own tensors, without those of attached adapters."""
    adapters = tuple(f"{path}." for path, m in model.named_modules() if getattr(m, "is_adapter", False))
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(adapters)}


def check_savable(model: nn.Module, component: str) -> None:
    """Raise ValueError for a model that `checkpoint.open_component` would not read again as it is.

    A quantized one is saved by performance/quantized_files.py; one of your own class if it is registered, or
    extends the library's, whose file then says which class reads it.
    """
    require_plain(model, f"save the {component} for the reference, which reads full weights only")
    if component not in MODEL_SPECS:
        return
    check_known(model, component)
    public = _as_in_files(changed_models.public_config(model, component))
    if (spec := spec_of(component, model)) is None:
        if changed_models.describe(public, component):
            return
        spec = MODEL_SPECS[component]
    config: Any = changed_models.read_config(spec.config, public, f"the {component}'s config")
    if spec.table is not None and config != model.config:
        raise ValueError(f"the {component}'s {model.config} would be read as {config}")
    check_whole(own := base_state(model))
    expected = {name: tuple(tensor.shape) for name, tensor in spec.empty(config).state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in own.items()}
    if mismatch := compare(table_of(component, model), got, expected):
        hint = "a model with other layers is a class of its own, see kolors_core/registry.py"
        raise ValueError(f"the {component} could not be read again from its config: {mismatch}; {hint}")
    if odd := [name for name, tensor in own.items() if not tensor.is_floating_point()]:
        got_dtype = f"{odd[0]} of {own[odd[0]].dtype}"
        raise ValueError(f"the {component} has {got_dtype}, expected floating-point tensors alone")


def check_known(model: nn.Module, component: str) -> None:
    """Raise ValueError for a model of a class that is neither the library's nor registered."""
    if spec_of(component, model) is None and not is_librarys(component, model):
        raise _unreadable(component, model)


def check_describable(component: str, part: Any) -> None:
    """Raise ValueError for a scheduler or tokenizer that would not be read again as it is."""
    name = described_name(component, part)
    if name is None and not changed_models.is_ours(type(part)):
        raise _unreadable(component, part)
    if component == "scheduler":
        kind = described_class(component, type(part).__name__ if name is None else name)
        again = kind.from_config({"steps_offset": 0} | _as_in_files(part.to_public()))
    elif name is not None:
        again = read_fields(described_class(component, name), _as_in_files(fields_of(part)), "the tokenizer")
    else:
        return
    for field, value in fields_of(again).items():
        if getattr(part, field) != value:
            raise ValueError(f"the {component}'s {field} {getattr(part, field)!r} would be read as {value!r}")


def _as_in_files(content: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(content))


def _unreadable(component: str, part: Any) -> ValueError:
    kind = type(part)
    arguments = [repr(component), repr(kind.__name__)]
    arguments += [] if component in SELF_DESCRIBED else [type(getattr(part, "config", None)).__name__]
    how = f"kolors_core.registry.register({', '.join([*arguments, kind.__name__])})"
    got = f"{kind.__module__}.{kind.__qualname__}"
    return ValueError(
        f"the {component} is a {got}, which from_pretrained cannot read: register it first, by {how}"
    )
