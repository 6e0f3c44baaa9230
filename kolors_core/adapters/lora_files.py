"""LoRA files: tensors of any spelling -> an adapter's weights, checked against the models, with a report.

weights_convert/lora.py parses the names. This file has the decompositions: factors, DoRA, LoHa
(https://arxiv.org/abs/2108.06098), LoKr (https://arxiv.org/abs/2309.14859), as of LyCORIS, PEFT and kohya.
Shapes: R rank, I and O the layer's widths, K a convolution's kernel (no axes in a linear layer).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kolors_core.adapters.lora import supported_layers
from kolors_core.adapters.lora_layers import LoRAWeights
from kolors_core.checkpoint import read_json
from kolors_core.config import PublicConfig
from kolors_core.devices import all_finite
from kolors_core.registry import table_of
from kolors_core.validation import is_real
from weights_convert.lora import KNOWN_SPELLINGS, parse_keys
from weights_convert.safetensors_files import Source, Tensors
from weights_convert.untrusted_files import parse_object, printable

METADATA = "lora_adapter_metadata"  # the reference's name of its configs in a file's metadata
TensorsByRole = Mapping[str, Tensor]
Shape = tuple[int, ...]
Built = tuple[dict[str, Tensor], int | None]  # tensors of a `LoRAWeights`, and their rank if they have one


@dataclass(frozen=True)
class LoRAReport:
    """Report of the tensors of a LoRA file, by their names there. misshapen: those that do not fit their
    layer, each with the reason. layers: number of the models' layers that got an adapter.
    """

    adapter: str
    layers: int
    matched: tuple[str, ...]
    unmatched: tuple[str, ...]
    misshapen: tuple[str, ...]

    def __str__(self) -> str:
        total = len(self.matched) + len(self.unmatched) + len(self.misshapen)
        text = f"{self.adapter}: {len(self.matched)} of {total} tensors matched, on {self.layers} layers"
        for kind, names in (("unmatched", self.unmatched), ("of the wrong shape", self.misshapen)):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                text += f"; {len(names)} {kind}: {', '.join(map(_shown, names[:3]))}{more}"
        return text

    def __repr__(self) -> str:
        """Return the text, without the names of all tensors."""
        return f"<{type(self).__name__} {self}>"


def _shown(name: str) -> str:
    line = printable(" ".join(name.split()))
    return line if len(line) <= 200 else f"{line[:200]}..."


class IncompatibleTensors(ValueError):
    """Error for tensors that are no adapter of their layer."""


def parse_lora(
    source: Source | Tensors, configs: Mapping[str, PublicConfig], models: Mapping[str, nn.Module],
    adapter: str, allow_partial: bool,
) -> tuple[dict[str, dict[str, LoRAWeights]], LoRAReport]:  # fmt: skip
    """Parse an adapter: its weights by component and layer path, and a report.

    The weights have the layers' dtype and device. configs: PEFT's by component, see `configs_of`. models: by
    component, only read. Raises ValueError if no tensor matches, or some do not without `allow_partial`.
    """
    layers = {component: supported_layers(model) for component, model in models.items()}
    tables = {component: table_of(component, model) for component, model in models.items()}
    try:
        places, unmatched = parse_keys(source, layers, tables)
    except ValueError as error:
        raise ValueError(f"{source.where}: {error}") from None
    grouped: dict[tuple[str, str], dict[str, str]] = {}
    for place, name in places.items():
        grouped.setdefault((place.component, place.module), {})[place.role] = name
    parts: dict[str, dict[str, LoRAWeights]] = {}
    matched, misshapen = [], []
    for (component, path), names in grouped.items():
        layer, config = layers[component][path], configs.get(component, {})
        try:
            for role, name in names.items():
                if role != "alpha" and not source.dtype(name).is_floating_point:
                    raise IncompatibleTensors(f"expected floating-point numbers, got {source.dtype(name)}")
            tensors = {role: source[name] for role, name in names.items()}
            public = tables[component].to_public(path)
            part = _build_weights(tensors, layer, public, config)
            parts.setdefault(component, {})[path] = part
            matched += names.values()
        except IncompatibleTensors as error:
            misshapen += [f"{name} ({error})" for name in names.values()]
    count = sum(map(len, parts.values()))
    report = LoRAReport(adapter, count, tuple(matched), tuple(unmatched), tuple(misshapen))
    if not parts:
        example = _shown(next(iter([*misshapen, *unmatched]), "it is empty"))
        fault = f"none of its {len(source)} tensors fits this pipeline's {' and '.join(models)}, for example"
        raise ValueError(f"{source.where}: {fault} {example}. Known spellings: {KNOWN_SPELLINGS}")
    if (unmatched or misshapen) and not allow_partial:
        raise ValueError(f"{source.where}: {report}. allow_partial=True takes what matches")
    return parts, report


def configs_of(source: Source | Tensors) -> dict[str, PublicConfig]:
    """Read PEFT's settings by component, from `adapter_config.json` next to the file or the file's metadata.

    They give alpha if the tensors do not. Raises ValueError for anything but JSON of such settings.
    """
    if isinstance(source, Tensors):
        return {}
    file, config_file = source.files[0], source.files[0].with_name("adapter_config.json")
    if (embedded := (source.metadata(file) or {}).get(METADATA)) is not None:
        config = parse_object(embedded.encode(errors="replace"), f"{file}: {METADATA}")
    elif file.name == "adapter_model.safetensors" and config_file.is_file():  # else it is another adapter's
        config = read_json(config_file)
    else:
        return {}
    # The reference writes `unet.lora_alpha`; PEFT, for one model, `lora_alpha`.
    configs, for_all = {}, config if config.keys() & {"lora_alpha", "alpha"} else {}
    for prefix in ("unet.", "text_encoder."):
        settings = {name.removeprefix(prefix): config[name] for name in config if name.startswith(prefix)}
        configs[prefix[:-1]] = settings or for_all
    return configs


def _build_weights(roles: TensorsByRole, layer: nn.Module, public: str, config: PublicConfig) -> LoRAWeights:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    extra = {role: roles.get(role) for role in ("alpha", "dora_scale", "magnitude", "up_bias", "diff_bias")}
    factors = {role: tensor for role, tensor in roles.items() if role not in extra}
    build = _find_decomposition(factors, roles)
    if flat := [role for role, tensor in factors.items() if tensor.ndim < 2]:
        raise IncompatibleTensors(f"{flat[0]} is {list(roles[flat[0]].shape)}, expected at least two axes")
    if broken := [role for role, tensor in roles.items() if not all_finite(tensor)]:
        raise IncompatibleTensors(f"{broken[0]} has numbers that are not finite")
    factors = {role: t if t.dtype == torch.float64 else t.float() for role, t in factors.items()}
    try:
        tensors, rank = build(factors, tuple(weight.shape))
    except (RuntimeError, IndexError) as error:  # of a product of factors that do not fit each other
        raise IncompatibleTensors(f"its factors do not fit: {str(error).splitlines()[0]}") from None
    if rank == 0:
        raise IncompatibleTensors("its rank is 0")
    scale = _scale(extra["alpha"], rank, public, config)
    if extra["dora_scale"] is not None or extra["magnitude"] is not None:
        tensors["magnitude"] = _magnitude(extra["dora_scale"], extra["magnitude"], weight)
    added = extra["diff_bias"] if extra["up_bias"] is None else extra["up_bias"] * scale
    if added is not None:
        if bias is None or added.shape != bias.shape:
            have = "none" if bias is None else list(bias.shape)
            raise IncompatibleTensors(f"its bias is {list(added.shape)}, the layer has {have}")
        tensors["bias"] = added
    weights = LoRAWeights({name: tensor.to(weight, copy=True) for name, tensor in tensors.items()}, scale)
    return weights.requires_grad_(False)


def _factors(roles: TensorsByRole, shape: Shape) -> Built:
    """Reshape down and up to the layer, whose kernel axes of size 1 they may lack, or have in addition."""
    down, up = roles["down"], roles["up"]
    if "mid" in roles:  # LoCon's third factor, between the two
        down = torch.einsum("mnkl, ni -> mikl", roles["mid"], down.flatten(1))
    rank, factors = len(down), {"down": down, "up": up}
    expected = {"down": (rank, *shape[1:]), "up": (shape[0], rank, *(1 for _ in shape[2:]))}
    for name, factor in factors.items():
        if _without_ones(factor.shape) != _without_ones(expected[name]):
            got = list(factor.shape)
            raise IncompatibleTensors(f"{name} is {got}, expected {list(expected[name])} for the layer")
    return {name: factor.reshape(expected[name]) for name, factor in factors.items()}, rank


def _loha(roles: TensorsByRole, shape: Shape) -> Built:
    """Compute (w1_a w1_b) * (w2_a w2_b), each with a core t in a Tucker decomposition."""
    names = ((f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2))
    one, two = (_product(roles[a], roles[b], roles.get(core)) for a, b, core in names)
    return {"delta": _reshape_delta(one * two, shape)}, len(roles["hada_w1_b"])


def _lokr(roles: TensorsByRole, shape: Shape) -> Built:
    """Compute the Kronecker product of w1 and w2, each whole or as factors; both whole have no rank."""
    rank, matrices = None, []
    for i in (1, 2):
        w, a, b = (roles.get(f"lokr_w{i}{factor}") for factor in ("", "_a", "_b"))
        if w is None:
            if a is None or b is None:
                raise IncompatibleTensors(f"its layer's lokr_w{i}, or a factor of it, is missing")
            w, rank = _product(a, b, roles.get("lokr_t2") if i == 2 else None), len(b)
        matrices.append(w)
    one, two = matrices
    one = one.reshape(*one.shape, *(1 for _ in two.shape[one.ndim :]))
    return {"delta": _reshape_delta(torch.kron(one, two.contiguous()), shape)}, rank


def _full_difference(roles: TensorsByRole, shape: Shape) -> Built:
    """Return the full difference of the weights; it has no rank, and so alpha has no effect."""
    return {"delta": _reshape_delta(roles["diff"], shape)}, None


Build = Callable[[TensorsByRole, Shape], Built]
# Decompositions of a weight change: how to build it for a layer's shape, and its required and optional roles.
DECOMPOSITIONS: tuple[tuple[Build, set[str], set[str]], ...] = (
    (_factors, {"down", "up"}, {"mid"}),
    (_loha, {f"hada_w{i}_{f}" for i in (1, 2) for f in "ab"}, {"hada_t1", "hada_t2"}),
    (_lokr, set(), {f"lokr_w{i}{f}" for i in (1, 2) for f in ("", "_a", "_b")} | {"lokr_t2"}),
    (_full_difference, {"diff"}, set()),
)


def _find_decomposition(factors: TensorsByRole, roles: TensorsByRole) -> Build:
    for build, required, optional in DECOMPOSITIONS:
        if factors and factors.keys() <= required | optional:
            if missing := required - factors.keys():
                raise IncompatibleTensors(f"its layer's {', '.join(sorted(missing))} is missing")
            return build
    raise IncompatibleTensors(f"{', '.join(sorted(roles))} make no form of adapter that is known")


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """Compute a @ b; around a core [R, R, *K] it is [O, I, *K], with a [R, O] and b [R, I]."""
    return a @ b if core is None else torch.einsum("ijkl, ip, jr -> prkl", core, a, b)


def _reshape_delta(delta: Tensor, shape: Shape) -> Tensor:
    if len(delta) != shape[0] or delta.numel() != torch.Size(shape).numel():
        raise IncompatibleTensors(f"its delta is {list(delta.shape)}, expected {list(shape)} for the layer")
    return delta.reshape(shape)


def _magnitude(dora_scale: Tensor | None, magnitude: Tensor | None, weight: Tensor) -> Tensor:
    """Reshape DoRA's magnitudes to [O, 1, ...], or [1, I, ...] of columns.

    PEFT's `lora_magnitude_vector` is always of rows; of `dora_scale`, from other trainers, the shape decides.
    """
    given, ones = (dora_scale if magnitude is None else magnitude), [1] * (weight.ndim - 2)
    assert given is not None
    shape, of_weight = list(given.shape), list(weight.shape)
    if given.numel() == of_weight[0] and (given is magnitude or shape[0] == of_weight[0]):
        return given.reshape(-1, 1, *ones)
    if given is dora_scale and given.numel() == of_weight[1]:
        return given.reshape(1, -1, *ones)
    raise IncompatibleTensors(f"DoRA's magnitudes are {shape}, the layer's weight is {of_weight}")


def _scale(alpha: Tensor | None, rank: int | None, public: str, config: PublicConfig) -> float:
    """Compute alpha / rank, with alpha from the file, or else from PEFT's config, or else the rank."""
    if alpha is not None:
        if alpha.numel() != 1:
            raise IncompatibleTensors(f"alpha is {list(alpha.shape)}, expected one number")
        return alpha.item() / rank if rank is not None else 1.0
    config_alpha = _setting(config, "alpha_pattern", public, config.get("lora_alpha", config.get("alpha")))
    size = _setting(config, "rank_pattern", public, config.get("r")) if rank is None else rank
    if config_alpha is None or size is None:
        return 1.0
    return config_alpha / (size**0.5 if config.get("use_rslora") else size)


def _setting(config: PublicConfig, pattern: str, public: str, default: Any) -> float | None:
    """Look up a layer in one of PEFT's patterns, which match the end of its name; else return the default."""
    values = config.get(pattern) or {}
    try:
        found = next((v for key, v in values.items() if re.fullmatch(rf"(.*\.)?({key})", public)), default)
    except (AttributeError, re.error) as error:
        raise ValueError(f"the adapter's config has {values!r} for {pattern}: {error}") from None
    if found is not None and not is_real(found):
        raise ValueError(f"the adapter's config has {found!r} for {public}, expected a number")
    return found


def _without_ones(shape: Shape) -> Shape:
    return (*shape[:2], *(size for size in shape[2:] if size != 1))
