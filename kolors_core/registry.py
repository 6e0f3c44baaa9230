"""Registry of the classes that a checkpoint may name: this library's, and those of your own.

    register("unet", "DiT", DiTConfig, DiT)

From then on `save_pretrained` writes such a model and `from_pretrained` reads it, as strictly as any other:
`config.json` and `model_index.json` name the class, and names and shapes of tensors are compared with those
of `build(config)` before anything is read.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from kolors_core.chatglm import ChatGLM
from kolors_core.config import ChatGLMConfig, PublicConfig, UNetConfig, VAEConfig
from kolors_core.schedule import Scheduler
from kolors_core.scheduler_config import KNOWN
from kolors_core.schedulers import SCHEDULERS
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from kolors_core.validation import short_repr
from weights_convert import TABLES
from weights_convert.key_mapping import Table


@dataclass(frozen=True)
class ModelSpec:
    """Specification of a component: the class of its config, and the function that builds it from one.

    name, table: of a registered class, see `register`; "" and None for the library's tables.
    """

    config: Any
    build: Callable[[Any], nn.Module]
    name: str = ""
    table: Table | None = None

    def empty(self, config: Any) -> nn.Module:
        """Build a model on the meta device, without values."""
        with gc_disabled(), torch.device("meta"), SkipInit():
            return self.build(config)


MODEL_SPECS = {
    "text_encoder": ModelSpec(ChatGLMConfig, ChatGLM),
    "unet": ModelSpec(UNetConfig, UNet),
    "vae": ModelSpec(VAEConfig, VAE),
}
SELF_DESCRIBED = ("scheduler", "tokenizer")  # components that are their own config
_models: dict[tuple[str, str], ModelSpec] = {}  # by component and name
_described: dict[tuple[str, str], Any] = {}  # likewise, the classes of components that are their own config


def register(
    component: str, name: str, config_class: Any, build: Callable[[Any], nn.Module] | None = None,
    table: Table | None = None,
) -> None:  # fmt: skip
    """Let checkpoints have a model, scheduler or tokenizer of a class of your own, until the process ends.

    component: "unet", "text_encoder" or "vae"; or "scheduler" or "tokenizer", whose class is its own config.
    name: of the class in files; registered again, it replaces the class, as a notebook's cell does. The same
    name must be registered where the files are read. config_class: a dataclass whose fields are JSON values,
    tuples among them; of one name alone. build: makes a model from a config, such as the model's class; None
    for a scheduler or tokenizer. table: public names of tensors for the model's; None if they are the same.
    ValueError or TypeError, naming the argument, for what cannot be read again.
    """
    if component not in (*MODEL_SPECS, *SELF_DESCRIBED):
        expected = ", ".join((*MODEL_SPECS, *SELF_DESCRIBED))
        raise ValueError(f"component must be one of {expected}, got {short_repr(component)}")
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name must be that of a class, got {short_repr(name)}")
    if name in (*SCHEDULERS, *REFERENCE_CLASSES.values()):
        raise ValueError(f"name must be another than the library's own classes have, got {name!r}")
    if not isinstance(config_class, type) or not is_dataclass(config_class):
        raise TypeError(f"config_class must be a dataclass, got {short_repr(config_class)}")
    if component == "scheduler" and not issubclass(config_class, Scheduler):
        expected = "a subclass of kolors_core.schedule.Scheduler"
        raise TypeError(f"a scheduler's class must be {expected}, got {config_class.__name__}")
    if (component in SELF_DESCRIBED) != (build is None):
        wanted = "None, since it is its own config" if build is not None else "a function of a config"
        raise TypeError(f"build of a {component} must be {wanted}, got {short_repr(build)}")
    if build is None:
        _register_described(component, name, config_class)
        return
    others = (spec.name for spec in _models.values() if spec.config is config_class and spec.name != name)
    if (other := next(others, None)) is not None:
        why = "a model's name is found by its config's class"
        raise ValueError(f"config_class {config_class.__name__} is that of {other!r} already: {why}")
    own_names = Table(component=component, blocks=(), rules=())
    _models[component, name] = ModelSpec(config_class, build, name, own_names if table is None else table)


def _register_described(component: str, name: str, kind: Any) -> None:
    if component == "scheduler":  # another class then ignores its fields in `from_config`
        KNOWN[:] = [other for other in KNOWN if other is not _described.get((component, name))] + [kind]
    _described[component, name] = kind


# The classes that the reference's files name.
REFERENCE_CLASSES = {
    "vae": "AutoencoderKL", "text_encoder": "ChatGLMModel", "tokenizer": "ChatGLMTokenizer",
    "unet": "UNet2DConditionModel",
}  # fmt: skip


def registered_spec(component: str, name: Any) -> ModelSpec | None:
    """Return what was registered under a name that a `config.json` has; None if nothing was."""
    return _models.get((component, name)) if isinstance(name, str) else None


def spec_of(component: str, model: Any) -> ModelSpec | None:
    """Return the registered specification of a model; None if its class is not registered."""
    kind = type(getattr(model, "config", None))
    found = (spec for (part, _), spec in _models.items() if part == component and spec.config is kind)
    if (spec := next(found, None)) is None:
        return None
    is_another = isinstance(spec.build, type) and not isinstance(model, spec.build)
    return None if is_another else spec


def is_librarys(component: str, model: Any) -> bool:
    """Return whether a model is of the library's class for a component, or of one that extends it."""
    kind = MODEL_SPECS[component].build
    return isinstance(kind, type) and isinstance(model, kind)


def table_of(component: str, model: Any) -> Table:
    """Return the names of a model's tensors in files: the library's table, the registered one, or its own."""
    spec = spec_of(component, model)
    if spec is not None and spec.table is not None:
        return spec.table
    if component in MODEL_SPECS and not is_librarys(component, model):
        return Table(component=component, blocks=(), rules=())
    return TABLES[component]


def described_class(component: str, name: Any) -> Any:
    """Return a scheduler's or tokenizer's class by its name in files, the library's schedulers among them."""
    if not isinstance(name, str):
        return None
    known = SCHEDULERS if component == "scheduler" else {}
    return known.get(name) or _described.get((component, name))


def described_name(component: str, part: Any) -> str | None:
    """Return the name under which a scheduler's or tokenizer's class is registered; None if it is not."""
    names = (name for (of, name), kind in _described.items() if of == component and type(part) is kind)
    return next(names, None)


def fields_of(config: Any) -> dict[str, Any]:
    """Return the fields of a registered class's config, for JSON."""
    return {field.name: getattr(config, field.name) for field in fields(config) if field.init}


def read_fields(kind: Any, public: PublicConfig, where: str) -> Any:
    """Build a registered class's config from JSON; ValueError naming a field that is missing or unknown."""
    own = {field.name: field for field in fields(kind) if field.init}
    given = {name: value for name, value in public.items() if name in own}
    ignored = {"quantization_config", "tokenizer_class", "padding_side"}
    if unknown := [name for name in public if name not in own and name[:1] != "_" and name not in ignored]:
        raise ValueError(f"{where}: {kind.__name__} has no field {unknown[0][:100]!r}")
    needed = (f.name for f in own.values() if f.default is MISSING and f.default_factory is MISSING)
    if absent := [name for name in needed if name not in given]:
        raise ValueError(f"{where}: the field {absent[0]} is missing")
    try:
        return kind(**{name: frozen(value) for name, value in given.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def frozen(value: Any) -> Any:
    """Convert JSON's lists to tuples, since a config is hashed."""
    return tuple(map(frozen, value)) if isinstance(value, list) else value


@contextmanager
def gc_disabled() -> Iterator[None]:
    """Disable garbage collection: building thousands of modules triggers it, a third of loading's time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class SkipInit(TorchFunctionMode):
    """Mode in which new parameters stay uninitialized, for models whose weights are loaded.

    On the meta device it saves the import of torch's decompositions, half of the time to start.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the tensor of an `nn.init` function unchanged; run all other functions."""
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))
