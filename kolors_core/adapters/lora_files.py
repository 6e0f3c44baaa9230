"""LoRA files: tensors of any spelling -> an adapter's parts, checked against the models, with a report.

The names are weights_convert/lora.py's. Here are the forms: factors, DoRA, LoHa (https://arxiv.org/abs/2108.06098)
and LoKr (https://arxiv.org/abs/2309.14859), as LyCORIS, PEFT and kohya write them.
Shapes: R rank, I and O the layer's widths, K a convolution's kernel (no axes in a linear layer).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kolors_core.adapters.lora import linear_and_conv
from kolors_core.adapters.lora_layers import LoRAWeights
from weights_convert import TABLES
from weights_convert.lora import KNOWN, parse_keys
from weights_convert.safetensors_files import Source, Tensors

METADATA = "lora_adapter_metadata"  # the reference's name of its configs in a file's own metadata
Roles = Mapping[str, Tensor]
Made = tuple[dict[str, Tensor], int | None]  # tensors of a `LoRAWeights`, and their rank if they have one


@dataclass(frozen=True)
class LoRAReport:
    """What became of a LoRA's tensors, by their names in the file.

    misshapen: tensors that have a place where they do not fit, each with what is wrong. layers: how many
    layers of the models got an adapter.
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


def _shown(name: str) -> str:
    """A tensor's name, whatever it is, in one line of bearable length."""
    line = " ".join(name.split())
    return line if len(line) <= 200 else f"{line[:200]}..."


class Misfit(ValueError):
    """Tensors that make no adapter for their layer."""


def read(
    source: Source | Tensors,
    configs: Mapping[str, Mapping[str, Any]],
    models: Mapping[str, nn.Module],
    adapter: str,
    allow_partial: bool,
) -> tuple[dict[str, dict[str, LoRAWeights]], LoRAReport]:
    """An adapter's parts by component and layer path, in the layers' dtype and place, and the report.

    configs: PEFT's, by component, see `configs_of`. models: by component. Raises ValueError where nothing
    matches, or something does not and `allow_partial` is not set; the models are only read.
    """
    layers = {component: linear_and_conv(model) for component, model in models.items()}
    try:
        places, unmatched = parse_keys(source, layers)
    except ValueError as error:
        raise ValueError(f"{source.where}: {error}") from None
    grouped: dict[tuple[str, str], dict[str, str]] = {}
    for place, name in places.items():
        grouped.setdefault((place.component, place.module), {})[place.role] = name
    parts: dict[str, dict[str, LoRAWeights]] = {}
    matched, misshapen = [], []
    for (component, path), names in grouped.items():
        layer, config = layers[component][path], configs.get(component)
        try:
            for role, name in names.items():
                if role != "alpha" and not source.dtype(name).is_floating_point:
                    raise Misfit(f"it holds {source.dtype(name)}, expected floating-point numbers")
            tensors = {role: source[name] for role, name in names.items()}
            part = _part(tensors, layer, TABLES[component].to_public(path), config)
        except Misfit as error:
            misshapen += [f"{name} ({error})" for name in names.values()]
        else:
            parts.setdefault(component, {})[path] = part
            matched += names.values()
    count = sum(map(len, parts.values()))
    report = LoRAReport(adapter, count, tuple(matched), tuple(unmatched), tuple(misshapen))
    if not parts:
        example = _shown(next(iter([*misshapen, *unmatched]), "it is empty"))
        raise ValueError(
            f"{source.where}: none of its {len(source)} tensors fits this pipeline's {' and '.join(models)}, "
            f"for example {example}. Known spellings: {KNOWN}"
        )
    if (unmatched or misshapen) and not allow_partial:
        raise ValueError(f"{source.where}: {report}. allow_partial=True takes what matches")
    return parts, report


def configs_of(source: Source | Tensors) -> dict[str, Mapping[str, Any]]:
    """PEFT's settings by component: of `adapter_config.json` beside the file, or in the file's metadata.

    They say alpha where the tensors do not. Raises ValueError for what is not JSON of such settings.
    """
    if isinstance(source, Tensors):
        return {}
    file = source.files[0]
    beside, inside = file.with_name("adapter_config.json"), (source.metadata(file) or {}).get(METADATA)
    if inside is not None:
        where, text = f"{file}: {METADATA}", inside
    elif file.name == "adapter_model.safetensors" and beside.is_file():  # else it is another adapter's
        where, text = str(beside), beside.read_bytes()
    else:
        return {}
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(config).__name__}")
    # The reference writes `unet.lora_alpha`; PEFT, for one model, `lora_alpha`.
    found: dict[str, Mapping[str, Any]] = {}
    for component in ("unet", "text_encoder"):
        prefix = f"{component}."
        own = {name.removeprefix(prefix): config[name] for name in config if name.startswith(prefix)}
        found[component] = own or (config if "lora_alpha" in config or "alpha" in config else {})
    return found


def _part(roles: Roles, layer: nn.Module, public: str, config: Mapping[str, Any] | None) -> LoRAWeights:
    """One layer's share, of the tensors that the file has for it. Misfit if they do not fit the layer."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    rest = dict(roles)
    alpha, dora, magnitude = (rest.pop(name, None) for name in ("alpha", "dora_scale", "magnitude"))
    up_bias, diff_bias = rest.pop("up_bias", None), rest.pop("diff_bias", None)
    form = next((form for form, (must, may) in FORMS.items() if rest.keys() & (must | may)), None)
    if form is None or not rest.keys() <= FORMS[form][0] | FORMS[form][1]:
        raise Misfit(f"{', '.join(sorted(roles))} make no form of adapter that is known")
    if absent := FORMS[form][0] - rest.keys():
        raise Misfit(f"its layer's {', '.join(sorted(absent))} is missing")
    if flat := [role for role, tensor in rest.items() if tensor.ndim < 2]:
        raise Misfit(f"{flat[0]} is {list(rest[flat[0]].shape)}, expected at least two axes")
    if broken := [role for role, tensor in roles.items() if not torch.isfinite(tensor).all()]:
        raise Misfit(f"{broken[0]} has numbers that are not finite")
    wide = {role: t if t.dtype == torch.float64 else t.float() for role, t in rest.items()}
    try:
        tensors, rank = form(wide, tuple(weight.shape))
    except (RuntimeError, IndexError) as error:  # of a product of factors that do not fit each other
        raise Misfit(f"its factors do not fit: {str(error).splitlines()[0]}") from None
    if rank == 0:
        raise Misfit("its rank is 0")
    scale = _scale(alpha, rank, public, config)
    if dora is not None or magnitude is not None:
        tensors["magnitude"] = _magnitude(dora, magnitude, weight)
    added = up_bias * scale if up_bias is not None else diff_bias
    if added is not None:
        if bias is None or added.shape != bias.shape:
            have = "none" if bias is None else list(bias.shape)
            raise Misfit(f"its bias is {list(added.shape)}, the layer has {have}")
        tensors["bias"] = added
    part = LoRAWeights({name: tensor.to(weight, copy=True) for name, tensor in tensors.items()}, scale)
    return part.requires_grad_(False)


def _factors(roles: Roles, shape: tuple[int, ...]) -> Made:
    """down and up, which may have kernel axes that the layer lacks, if they are 1, or lack such."""
    down, up = roles["down"], roles["up"]
    if "mid" in roles:  # LoCon's third factor, between the two
        down = torch.einsum("mnkl, ni -> mikl", roles["mid"], down.flatten(1))
    rank, kernel = len(down), shape[2:]
    wanted = {"down": (rank, *shape[1:]), "up": (shape[0], rank, *(1 for _ in kernel))}
    factors = {"down": down, "up": up}
    for name, factor in factors.items():
        if _without_ones(factor.shape) != _without_ones(wanted[name]):
            raise Misfit(f"{name} is {list(factor.shape)}, the layer wants {list(wanted[name])}")
    return {name: factor.reshape(wanted[name]) for name, factor in factors.items()}, rank


def _loha(roles: Roles, shape: tuple[int, ...]) -> Made:
    """(w1_a w1_b) * (w2_a w2_b), each with a core t where it is a Tucker decomposition."""
    one, two = (
        _product(roles[f"hada_w{i}_a"], roles[f"hada_w{i}_b"], roles.get(f"hada_t{i}")) for i in (1, 2)
    )
    return {"delta": _shaped(one * two, shape)}, len(roles["hada_w1_b"])


def _lokr(roles: Roles, shape: tuple[int, ...]) -> Made:
    """The Kronecker product of w1 and w2, each whole or as factors; with both whole there is no rank."""
    rank, whole = None, []
    for i in (1, 2):
        w = roles.get(f"lokr_w{i}")
        if w is None:
            a, b = roles.get(f"lokr_w{i}_a"), roles.get(f"lokr_w{i}_b")
            if a is None or b is None:
                raise Misfit(f"its layer's lokr_w{i}, or a factor of it, is missing")
            w, rank = _product(a, b, roles.get("lokr_t2") if i == 2 else None), len(b)
        whole.append(w)
    one, two = whole
    one = one.reshape(*one.shape, *(1 for _ in two.shape[one.ndim :]))
    return {"delta": _shaped(torch.kron(one, two.contiguous()), shape)}, rank


def _difference(roles: Roles, shape: tuple[int, ...]) -> Made:
    """The whole difference of the weights; it has no rank, and so alpha says nothing."""
    return {"delta": _shaped(roles["diff"], shape)}, None


# Each form with the roles that it must have and those that it may have.
FORMS = {
    _factors: ({"down", "up"}, {"mid"}),
    _loha: ({f"hada_w{i}_{f}" for i in (1, 2) for f in "ab"}, {"hada_t1", "hada_t2"}),
    _lokr: (set[str](), {f"lokr_w{i}{f}" for i in (1, 2) for f in ("", "_a", "_b")} | {"lokr_t2"}),
    _difference: ({"diff"}, set[str]()),
}


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """a @ b; around a core [R, R, *K] it is [O, I, *K], with a [R, O] and b [R, I]."""
    return a @ b if core is None else torch.einsum("ijkl, ip, jr -> prkl", core, a, b)


def _shaped(delta: Tensor, shape: tuple[int, ...]) -> Tensor:
    if len(delta) != shape[0] or delta.numel() != torch.Size(shape).numel():
        raise Misfit(f"it makes a change of {list(delta.shape)}, the layer wants {list(shape)}")
    return delta.reshape(shape)


def _magnitude(dora: Tensor | None, magnitude: Tensor | None, weight: Tensor) -> Tensor:
    """DoRA's magnitudes [O, 1, ...], or of columns [1, I, ...].

    PEFT's `lora_magnitude_vector` is always of rows; `dora_scale`, of the others, shows it by its shape.
    """
    given, ones = (dora if magnitude is None else magnitude), [1] * (weight.ndim - 2)
    assert given is not None
    if given.numel() == len(weight) and (given is magnitude or given.shape[0] == len(weight)):
        return given.reshape(-1, 1, *ones)
    if given is dora and given.numel() == weight.shape[1]:
        return given.reshape(1, -1, *ones)
    raise Misfit(f"DoRA's magnitudes are {list(given.shape)}, the layer's weight is {list(weight.shape)}")


def _scale(alpha: Tensor | None, rank: int | None, public: str, config: Mapping[str, Any] | None) -> float:
    """alpha / rank: alpha from the file, or else from PEFT's config, or else the rank."""
    if alpha is not None:
        if alpha.numel() != 1:
            raise Misfit(f"alpha is {list(alpha.shape)}, expected one number")
        return alpha.item() / rank if rank is not None else 1.0
    if not config:
        return 1.0
    wanted = _setting(config, "alpha_pattern", public, config.get("lora_alpha", config.get("alpha")))
    size = _setting(config, "rank_pattern", public, config.get("r")) if rank is None else rank
    if wanted is None or size is None:
        return 1.0
    return wanted / (size**0.5 if config.get("use_rslora") else size)


def _setting(config: Mapping[str, Any], pattern: str, public: str, default: Any) -> float | None:
    """A layer's own value in one of PEFT's patterns (of the end of its name), or the default."""
    values = config.get(pattern) or {}
    try:
        for key, value in values.items():
            if re.fullmatch(rf"(.*\.)?({key})", public):
                default = value
                break
    except (AttributeError, re.error) as error:
        raise ValueError(f"the adapter's config has {values!r} for {pattern}: {error}") from None
    if default is not None and (isinstance(default, bool) or not isinstance(default, int | float)):
        raise ValueError(f"the adapter's config has {default!r} for {public}, expected a number")
    return default


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the kernel axes at its end that are 1."""
    return (*shape[:2], *(size for size in shape[2:] if size != 1))
