"""LoRA methods of a pipeline: the reference's, for any number of adapters by name.

Source: `StableDiffusionLoraLoaderMixin` and `LoraBaseMixin` in diffusers' loaders.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kolors_core.adapters import lora
from kolors_core.adapters.block_scales import BlockScale
from kolors_core.adapters.lora_files import METADATA, LoRAReport, configs_of, parse_lora
from kolors_core.adapters.lora_layers import LoRAWeights
from kolors_core.chatglm import ChatGLM
from kolors_core.checkpoint import EMBEDDED, EMBEDDED_NAME
from kolors_core.devices import unwrap_compiled
from kolors_core.hub import find_file, named_source, reject_unused
from kolors_core.module import all_or_nothing, apply_to_all, require_plain
from kolors_core.unet import UNet
from kolors_core.validation import as_path, check_float, check_safe_serialization
from weights_convert.safetensors_files import PICKLES, Source, Tensors, save_tensors

COMPONENTS = ("unet", "text_encoder")
logger = logging.getLogger("kolors_core")
WEIGHT_NAME = "pytorch_lora_weights.safetensors"


def find_lora(
    source: str | Path, weight_name: str | None = None, subfolder: str | None = None, **hub: Any
) -> Path:
    """Find a LoRA's file by the names that diffusers and PEFT give it; PEFT's settings are fetched with it.

    "tiny" is the embedded model's, of few steps. Others and errors: see `find_file`.
    """
    if source == EMBEDDED_NAME and not subfolder:
        source, subfolder = EMBEDDED, "lora"
    preferred, settings = (WEIGHT_NAME, "adapter_model.safetensors"), ("adapter_config.json",)
    return find_file(source, weight_name, subfolder, preferred=preferred, with_files=settings, **hub)


class ClassAndInstanceMethod:
    """Method that may also be called on the class, as in the reference; `self` is then None."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function, self.__doc__ = function, function.__doc__

    def __get__(self, instance: Any, owner: type) -> Callable[..., None]:
        return partial(self.function, instance)


class LoRAMethods:
    """LoRA methods for a pipeline that has a `unet` and a `text_encoder`, which may be None."""

    unet: UNet
    text_encoder: ChatGLM | None

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None, *, weight_name: str | None = None, subfolder: str | None = None,
        revision: str | None = None, cache_dir: str | Path | None = None, local_files_only: bool = False,
        token: str | bool | None = None, allow_partial: bool = False,
    ) -> LoRAReport:  # fmt: skip
        """Attach a LoRA in any known naming scheme, and make it the only active one.

        pretrained_model_name_or_path_or_dict: a file, a folder, a hub repository or the tensors.
        adapter_name: "default_0", "default_1", ... if None. weight_name: the file, where there are several.
        LoHa, LoKr and whole differences are merged as a delta, each as large as its layer's weight.
        All of it is attached or nothing: FileNotFoundError names what was looked for, ValueError a name in
        use, and what does not match; with `allow_partial` the report names it unless nothing matches.
        """
        models, taken = self._lora_models(), self._attached_names()
        free = (f"default_{i}" for i in count(len(taken)))
        name = next(own for own in free if own not in taken) if adapter_name is None else adapter_name
        for model in models.values():
            lora.check_name(model, name)
        source = pretrained_model_name_or_path_or_dict
        if isinstance(source, Mapping):
            places = {"weight_name": weight_name, "subfolder": subfolder, "revision": revision}
            reject_unused("a dict of tensors", **places)
            tensors, origin = Tensors(source, "the given LoRA"), None
        else:
            hub = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
            file = find_lora(source, weight_name, subfolder, token=token, **hub)
            tensors = Source([file])
            origin = named_source(source, file, weight_name=weight_name, subfolder=subfolder)
        parts, report = parse_lora(tensors, configs_of(tensors), models, name, allow_partial)
        with all_or_nothing(*models.values()):
            for component, model in models.items():
                for other in lora.adapters(model).values():
                    other.set_active(False)
                if component in parts:
                    for part in lora.add_adapter(model, name, parts[component]).parts().values():
                        part.source = origin
        return report

    def set_adapters(
        self, adapter_names: str | Sequence[str],
        adapter_weights: BlockScale | Sequence[BlockScale | None] | None = None,
    ) -> None:  # fmt: skip
        """Make these adapters the active ones, each with its weight: 1 if None.

        adapter_weights: one for all or a list of one for each, of a number, or of a mapping {"unet": ...,
        "text_encoder": number}, where the UNet's may be by blocks (see `block_scales`) and what is left out
        is 1. A component without the adapter is named in a warning. ValueError, and no change, for unknown
        adapters or blocks, or if some are fused.
        """
        names = self._known_names(adapter_names)
        if len(set(names)) < len(names):
            raise ValueError(f"an adapter has one weight, got {', '.join(names)}")
        models = self._unfused_models(f"set {', '.join(names)}")
        weights: list[Any] = [adapter_weights] * len(names)
        if isinstance(adapter_weights, Sequence) and not isinstance(adapter_weights, str):
            weights = list(adapter_weights)
        if len(weights) != len(names):
            raise ValueError(f"expected a weight for each of {len(names)} adapters, got {len(weights)}")
        chosen = dict(zip(names, weights, strict=True))
        for name, weight in chosen.items():
            if isinstance(weight, Mapping):
                have = [component for component, model in models.items() if name in lora.adapters(model)]
                for component in (component for component in weight if component not in have):
                    if component not in (*COMPONENTS, "text_encoder_2"):  # the latter: scripts for SDXL
                        raise ValueError(f"LoRA goes into {' and '.join(COMPONENTS)}, not {component!r}")
                    parts = f"adapter {name!r} has parts in {' and '.join(have)} only"
                    logger.warning("adapter_weights for %r have no effect: %s", component, parts)
        changes = []
        for component, model in models.items():
            for name, adapter in lora.adapters(model).items():
                weight = chosen.get(name)
                own = weight.get(component) if isinstance(weight, Mapping) else weight
                changes.append((adapter, name in chosen, adapter.scales(1.0 if own is None else own)))
        with all_or_nothing(*models.values()):
            for adapter, is_active, scales in changes:
                adapter.set_active(is_active)
                if is_active:
                    adapter.set_scales(scales)

    def get_active_adapters(self) -> list[str]:
        """Return the active adapters, whether or not adapters are enabled."""
        found = [one for model in self._lora_models().values() for one in lora.adapters(model).values()]
        return list(dict.fromkeys(adapter.name for adapter in found if adapter.is_active))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return the attached adapters by component; a component without any is left out."""
        models = self._lora_models().items()
        return {component: names for component, model in models if (names := list(lora.adapters(model)))}

    def enable_lora(self) -> None:
        """Let the active adapters act again after `disable_lora`."""
        self._switch_lora(True)

    def disable_lora(self) -> None:
        """Let no adapter act, and keep which are active. ValueError while adapters are fused."""
        self._switch_lora(False)

    def _switch_lora(self, is_enabled: bool) -> None:
        models = self._unfused_models("switch adapters").values()
        with all_or_nothing(*models):
            for model in models:
                lora.enable(model, is_enabled)

    @contextmanager
    def lora_scaled(self, factor: float) -> Iterator[None]:
        """Multiply every adapter's scale in the UNet by `factor`, within a `with` block.

        A call's `cross_attention_kwargs={"scale": factor}` does so. ValueError if none is on or one is fused.
        """
        factor, unet = check_float("the scale of LoRAs", factor), unwrap_compiled(self.unet)
        lora.check_not_fused(unet, "scale adapters")
        if not self.has_acting_lora:
            raise ValueError("no LoRA is active on the UNet, so that a scale has no effect")
        parts = [part for adapter in lora.adapters(unet).values() for part in adapter.parts().values()]
        try:
            for part in parts:
                part.call_scale = factor
            yield
        finally:
            apply_to_all(_reset_call_scale, parts)

    @property
    def has_acting_lora(self) -> bool:
        """Whether an adapter on the UNet is active, and adapters are enabled."""
        unet = unwrap_compiled(self.unet)
        return any(one.is_active and one.is_enabled for one in lora.adapters(unet).values())

    def fuse_lora(
        self, components: Sequence[str] | None = None, lora_scale: float = 1.0, safe_fusing: bool = True,
        adapter_names: str | Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        """Add adapters, the active ones if None, to the weights of the components, all if None.

        Each counts at its weight times `lora_scale`. safe_fusing: that the sums are finite is always checked,
        and nothing is fused if they are not. The weights from before are kept on the CPU. Until
        `unfuse_lora`, other adapters do nothing and none can be loaded, weighed or deleted; but
        `unload_lora_weights` makes the fused weights the pipeline's own. ValueError if there is nothing to
        fuse, something is fused already, or a model is quantized.
        """
        names = self._known_names(self.get_active_adapters() if adapter_names is None else adapter_names)
        lora_scale, action = check_float("lora_scale", lora_scale), f"fuse {', '.join(names) or 'adapters'}"
        models = self._unfused_models(action, components)
        own = [(model, [name for name in names if name in lora.adapters(model)]) for model in models.values()]
        found = [(model, names) for model, names in own if names]
        if not found:
            raise ValueError(f"no active adapter to fuse in {' or '.join(models)}")
        for model, _ in found:
            require_plain(model, action)
        try:
            for model, names in found:
                lora.fuse(model, names, lora_scale)
        except BaseException:
            self.unfuse_lora(components)
            raise

    def unfuse_lora(self, components: Sequence[str] | None = None) -> None:
        """Undo `fuse_lora`: the weights are what they were, bit for bit."""
        apply_to_all(lora.unfuse, self._lora_models(components).values())

    @property
    def fused_loras(self) -> set[str]:
        """The adapters that the weights contain now."""
        return {name for model in self._lora_models().values() for name in lora.fused_names(model)}

    @property
    def num_fused_loras(self) -> int:
        """The number of adapters that the weights contain now."""
        return len(self.fused_loras)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Detach adapters; the others stay as they are. ValueError if unknown, or one is fused."""
        names = self._known_names(adapter_names)
        models = self._unfused_models(f"delete {', '.join(names)}").values()
        with all_or_nothing(*models):
            for name, adapter in (item for model in models for item in lora.adapters(model).items()):
                if name in names:
                    adapter.detach()

    def unload_lora_weights(self) -> None:
        """Detach all adapters, bit for bit; fused ones stay in the weights for good, as in the reference."""
        models = self._lora_models().values()
        with all_or_nothing(*models):
            for model in models:
                lora.unload(model)

    @ClassAndInstanceMethod
    def save_lora_weights(
        self: "LoRAMethods | None", save_directory: str | Path,
        unet_lora_layers: Mapping[str, Tensor] | None = None,
        text_encoder_lora_layers: Mapping[str, Tensor] | None = None, is_main_process: bool = True,
        weight_name: str | None = None, save_function: Callable[[dict[str, Tensor], str], Any] | None = None,
        safe_serialization: bool = True, *, adapter_name: str | None = None,
        unet_lora_adapter_metadata: Mapping[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Write a LoRA in diffusers' names, whole or not at all; a file of the name is replaced.

        Of a pipeline, the attached adapter `adapter_name`, or the only one. With `unet_lora_layers` or
        `text_encoder_lora_layers`, also on the class, these tensors, by the names of their model, with PEFT's
        settings as metadata. weight_name: pytorch_lora_weights.safetensors if None. is_main_process: others
        write nothing. save_function: called with tensors and path to write them another way. Raises
        ValueError if it is not clear what to write, or the names cannot say it.
        """
        weight_name = WEIGHT_NAME if weight_name is None else weight_name
        if not isinstance(weight_name, str):
            raise TypeError(f"weight_name must be a string or None, got {weight_name!r}")
        check_safe_serialization(safe_serialization and not weight_name.endswith(PICKLES))
        if not is_main_process:
            return
        given = {"unet": unet_lora_layers, "text_encoder": text_encoder_lora_layers}
        if not all(isinstance(layers, Mapping | None) for layers in given.values()):
            raise TypeError("unet_lora_layers and text_encoder_lora_layers must be dicts of tensors")
        metadata = {"unet": unet_lora_adapter_metadata, "text_encoder": text_encoder_lora_adapter_metadata}
        if any(layers is not None for layers in given.values()):
            if adapter_name is not None:
                raise ValueError("give either adapter_name or layers, not both")
            state = {f"{c}.{name}": t for c, layers in given.items() for name, t in (layers or {}).items()}
            if not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
                raise ValueError("unet_lora_layers and text_encoder_lora_layers must be dicts of tensors")
            settings = {f"{c}.{name}": v for c, of in metadata.items() for name, v in (of or {}).items()}
        elif self is None or any(metadata.values()):
            raise ValueError("give unet_lora_layers or text_encoder_lora_layers")
        else:
            state, settings = self._state_of(adapter_name), {}
        text = json.dumps(settings, sort_keys=True, default=sorted)  # PEFT's settings have sets
        folder = as_path("save_directory", save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if save_function is not None:
            save_function(state, str(folder / weight_name))
        else:
            save_tensors(state, folder / weight_name, {METADATA: text} if settings else None)

    def _state_of(self, name: str | None) -> dict[str, Tensor]:
        """Return an attached adapter's tensors in diffusers' names; the only adapter if the name is None."""
        names = self._known_names(self._attached_names() if name is None else [name])
        if len(names) != 1:
            raise ValueError(f"which adapter? There are {', '.join(names) or 'none'}: give adapter_name")
        state: dict[str, Tensor] = {}
        for component, model in self._lora_models().items():
            if adapter := lora.adapters(model).get(names[0]):
                state |= adapter.public_state(component)
        return state

    def _lora_models(self, components: Sequence[str] | None = None) -> dict[str, nn.Module]:
        """Return the models that can have adapters, by component. ValueError for another component."""
        names = COMPONENTS if components is None else _names(components)
        if unknown := [name for name in names if name not in COMPONENTS]:
            raise ValueError(f"LoRA goes into {' and '.join(COMPONENTS)}, not into {unknown[0]!r}")
        return {name: unwrap_compiled(model) for name in names if (model := getattr(self, name)) is not None}

    def _unfused_models(self, action: str, components: Sequence[str] | None = None) -> dict[str, nn.Module]:
        models = self._lora_models(components)
        for model in models.values():
            lora.check_not_fused(model, action)
        return models

    def _attached_names(self) -> list[str]:
        return list(dict.fromkeys(name for names in self.get_list_adapters().values() for name in names))

    def _known_names(self, names: str | Sequence[str]) -> list[str]:
        listed, have = _names(names), self._attached_names()
        if unknown := [name for name in listed if name not in have]:
            raise ValueError(f"no adapter is named {unknown[0]!r}; attached: {', '.join(have) or 'none'}")
        return listed


def _reset_call_scale(part: LoRAWeights) -> None:
    part.call_scale = 1.0


def _names(names: str | Sequence[str]) -> list[str]:
    listed = [names] if isinstance(names, str) else names
    if not isinstance(listed, Sequence) or not all(isinstance(name, str) for name in listed):
        raise TypeError(f"expected a name, or a list of names, got {names!r}")
    return list(listed)
