"""Adapters in an image's metadata: where each is from, its scale by block, and its weights' fingerprint."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from kolors_core.adapters import lora
from kolors_core.adapters.block_scales import summarize_scales
from kolors_core.adapters.controlnet import ControlResiduals
from kolors_core.adapters.face_id import FaceIDAdapter
from kolors_core.adapters.ip_adapter import attached
from kolors_core.adapters.textual_inversion import WordEmbedding
from kolors_core.conditioning import Residuals
from kolors_core.devices import unwrap_compiled
from kolors_core.pipelines.fingerprint import adapter_fingerprint, fingerprint
from kolors_core.pipelines.png_metadata import as_json
from kolors_core.unet import UNet


def lora_metadata(models: Mapping[str, nn.Module]) -> dict[str, str]:
    """Describe the LoRAs that act; models: by component.

    A weight is a number or, by component, a number or the UNet's by blocks, as `set_adapters` takes it.
    """
    entries: dict[str, dict[str, Any]] = {}
    for component, model in models.items():
        fused = lora.fused_names(model)
        for name, adapter in lora.adapters(model).items():
            if name in fused or (adapter.is_active and adapter.is_enabled and not fused):
                parts = adapter.parts()
                entry = entries.setdefault(
                    name, {"name": name, "weight": {}, "from": None, "fingerprint": {}}
                )
                entry["from"] = next(iter(parts.values())).source
                entry["weight"][component] = _weight(adapter, model)
                entry["fingerprint"][component] = adapter_fingerprint(parts)
                if name in fused:
                    entry["fused"] = True
    for entry in entries.values():
        weights = entry["weight"]
        first = next(iter(weights.values()))
        if not isinstance(first, dict) and all(weight == first for weight in weights.values()):
            entry["weight"] = first
        entry["fingerprint"] = " ".join(entry["fingerprint"].values())
    return {"lora": as_json([*entries.values()])} if entries else {}


def _weight(adapter: lora.LoRAAdapter, model: nn.Module) -> Any:
    """Return an adapter's weight as `LoRAAdapter.scales` takes it; by layer where that cannot say it."""
    by_layer = {path: part.strength for path, part in adapter.parts().items()}
    if len(set(by_layer.values())) == 1:
        return next(iter(by_layer.values()))
    if isinstance(model, UNet):
        by_place = {path.partition(".blocks.")[0]: scale for path, scale in by_layer.items()}
        by_blocks = summarize_scales(by_place, model, default=1.0)
        if adapter.scales(by_blocks) == by_layer:
            return by_blocks
    return {"by_layer": by_layer}


def image_prompt_metadata(unet: UNet) -> dict[str, str]:
    """Describe IP-Adapters and a face adapter: where they are from, their scales and fingerprints."""
    metadata: dict[str, str] = {}
    for kind in ("ip_adapter", "face"):
        is_face = kind == "face"
        handles = [one for one in attached(unet) if isinstance(one.adapter, FaceIDAdapter) == is_face]
        if not handles:
            continue
        scales = []
        for handle in handles:
            by_place = {path.partition(".blocks.")[0]: b.scale for path, b in handle.branches.items()}
            scales.append(summarize_scales(by_place, handle.unet, default=0.0))
        name = "face_adapter" if is_face else kind
        for key, values in ((name, [h.source for h in handles]), (f"{kind}_scale", scales)):
            is_plain = len(values) == 1 and isinstance(values[0], str | int | float)
            metadata[key] = str(values[0]) if is_plain else as_json(values[0] if len(values) == 1 else values)
        digests = [adapter_fingerprint({"": handle.adapter}) for handle in handles]
        metadata[f"{name}_fingerprint"] = " ".join(digests)
    return metadata


def control_metadata(residuals: Residuals | None) -> dict[str, str]:
    """Describe the ControlNets of a call: where they are from, their scales, and the steps they act in."""
    if not isinstance(residuals, ControlResiduals):
        return {}
    nets = [unwrap_compiled(control.net) for control in residuals.controls]
    metadata = {
        "control": as_json([getattr(net, "source", None) for net in nets]),
        "control_fingerprint": " ".join(map(fingerprint, nets)),
        "control_scale": ", ".join(str(control.scale) for control in residuals.controls),
    }
    parts = [f"{_short(control.start)} to {_short(control.end)}" for control in residuals.controls]
    return metadata | ({} if set(parts) == {"0 to 1"} else {"control_steps": ", ".join(parts)})


def _short(number: float) -> str:
    return f"{number:g}" if float(f"{number:g}") == number else str(number)


def word_metadata(text_encoder: nn.Module | None) -> dict[str, str]:
    """Describe the learned words of a text encoder, and where they are from."""
    table = None if text_encoder is None else getattr(unwrap_compiled(text_encoder), "embedding", None)
    if not isinstance(table, WordEmbedding):
        return {}
    sources = {word: table.sources.get(word) for word in table.words}
    digest = adapter_fingerprint({"": table.learned})
    return {
        "learned_words": ", ".join(table.words), "textual_inversion": as_json(sources),
        "textual_inversion_fingerprint": digest,
    }  # fmt: skip
