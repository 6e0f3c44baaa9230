"""IP-Adapter files: loading of adapters and of CLIP's vision encoder; saved image embeddings.

Source: `IPAdapterMixin` in diffusers' loaders/ip_adapter.py.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kolors_core.adapters.clip_vision import IMAGE_ENCODER, CLIPVision
from kolors_core.adapters.face_id import FaceIDAdapter, FaceIDConfig
from kolors_core.adapters.ip_adapter import ImagePromptAdapter, IPAdapter, IPAdapterConfig
from kolors_core.checkpoint import EMBEDDED, EMBEDDED_NAME, load_component
from kolors_core.denoiser import require_unet
from kolors_core.devices import dtype_of, merge_dtype_arguments
from kolors_core.hub import find_file, reject_unused
from kolors_core.loading import load
from kolors_core.unet import UNet
from kolors_core.validation import as_new_path, as_path
from weights_convert import detect_component
from weights_convert.safetensors_files import Source, Tensors, save_tensors

ADAPTER_CLASSES: dict[str, tuple[Callable[..., ImagePromptAdapter], type[IPAdapterConfig]]] = {
    "ip_adapter": (IPAdapter, IPAdapterConfig), "face_id": (FaceIDAdapter, FaceIDConfig),
}  # fmt: skip


class CLIPVisionModelWithProjection:
    """Loader of CLIP's vision encoder, under the reference's name."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, subfolder: str = "",
        torch_dtype: torch.dtype | None = None, dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu", variant: str | None = None, revision: str | None = None,
        cache_dir: str | Path | None = None, local_files_only: bool = False, token: str | bool | None = None,
        low_cpu_mem_usage: bool = True,
    ) -> CLIPVision:  # fmt: skip
        """Load the encoder from a folder or hub repository; only its own files are fetched.

        torch_dtype, or by its newer name dtype: float32 if None. low_cpu_mem_usage: has no effect.
        Raises FileNotFoundError or ValueError naming the file, field or tensor.
        """
        return load_component(
            pretrained_model_name_or_path, "image_encoder", kind=IMAGE_ENCODER, device=device, token=token,
            variant=variant, dtype=dtype_of("image_encoder", merge_dtype_arguments(torch_dtype, dtype)),
            subfolder=subfolder, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only,
        )  # fmt: skip


def load_adapter(
    unet: UNet, component: str, source: Any, subfolder: str, weight_name: str | None,
    encoder: CLIPVision | None, encoder_folder: str | None, hub: dict[str, Any],
) -> tuple[ImagePromptAdapter, CLIPVision | None]:  # fmt: skip
    """Load an "ip_adapter" or "face_id" that fits the UNet, and its image encoder unless one is given."""
    require_unet(unet, "an IP-Adapter")
    weight = unet.conv_in.weight
    if isinstance(source, str) and source == EMBEDDED_NAME and not subfolder:
        source, subfolder = EMBEDDED, "ip_adapter"
    if not isinstance(source, Mapping) and as_path("the IP-Adapter", source).is_file():
        if subfolder or weight_name is not None:
            raise ValueError(f"{source} is a file: subfolder and weight_name have no effect on it")
        source, weight_name = Path(source).parent, Path(source).name
    adapter = _build(component, _tensors(source, subfolder, weight_name, hub), weight)
    adapter.check_fits(unet)
    if encoder is None and encoder_folder is not None:
        if isinstance(source, Mapping):
            raise ValueError("a dict has no image encoder: image_encoder_folder must be None")
        if subfolder and "/" not in encoder_folder:
            encoder_folder = f"{subfolder}/{encoder_folder}"
        encoder = CLIPVisionModelWithProjection.from_pretrained(
            source, subfolder=encoder_folder, dtype=weight.dtype, device=weight.device, **hub
        )
    if encoder is not None and (got := encoder.config.hidden_size) != (width := adapter.config.image_dim):
        raise ValueError(f"the image encoder is {got} wide, and the IP-Adapter reads {width}")
    return adapter, encoder


def adapter_sources(
    source: Any, subfolder: str | Sequence[str], weight_name: str | Sequence[str] | None
) -> list[tuple[Any, str, str | None]]:
    """List (source, subfolder, file) of each adapter; a single value serves all."""
    given = {"sources": source, "subfolder": subfolder, "weight_name": weight_name}
    lists = {name: list(v) if isinstance(v, list | tuple) else [v] for name, v in given.items()}
    count = max(map(len, lists.values()))
    for name, values in lists.items():
        if len(values) not in (1, count):
            raise ValueError(f"expected as many {name} as IP-Adapters ({count}) or one, got {len(values)}")
    return list(zip(*(v * count if len(v) == 1 else v for v in lists.values()), strict=True))


def describe_source(source: Any, subfolder: str, weight_name: str | None, revision: str | None) -> str | None:
    """Describe where an adapter was loaded from, for metadata; None for a dict of tensors."""
    if isinstance(source, Mapping):
        return None
    return str(Path(source, subfolder, weight_name or "")) + (f"@{revision}" if revision else "")


def _tensors(source: Any, subfolder: str, weight_name: str | None, hub: Any) -> Source | Tensors:
    """Open an adapter's tensors; a dict may be nested, {"image_proj": {...}, "ip_adapter": {...}}."""
    if not isinstance(source, Mapping):
        return Source([find_file(source, weight_name, subfolder, **hub)])
    reject_unused("a dict of tensors", subfolder=subfolder, weight_name=weight_name, **hub)
    flat: dict[str, Any] = {}
    for name, value in source.items():
        is_nested = isinstance(value, Mapping)
        flat |= {f"{name}.{inner}": t for inner, t in value.items()} if is_nested else {name: value}
    return Tensors(flat, "the dict of tensors")


def _build(component: str, source: Source | Tensors, like: Tensor) -> ImagePromptAdapter:
    """Build an adapter of the tensors' sizes, in the dtype and on the device of `like`."""
    table, is_ours = detect_component(source.keys(), source.where)
    if table.component != component:
        hint = ": load_ip_adapter_face_id loads it" if table.component == "face_id" else ""
        raise ValueError(f"{source.where}: expected tensors of {component}, got {table.component}{hint}")
    kind, config = ADAPTER_CLASSES[component]
    shapes = {name if is_ours else table.to_ours(name): source.shape(name) for name in source}
    with torch.device("meta"):
        adapter = kind(config.from_shapes(shapes, source.where))
    load(adapter, source, component, dtype=like.dtype, device=like.device)
    return adapter.eval()


def save_image_embeds(embeds: Sequence[Tensor], file: str | Path, *, overwrite: bool = False) -> None:
    """Write the result of `prepare_ip_adapter_image_embeds` to a safetensors file, whole or not at all.

    Raises FileExistsError for an existing file, unless `overwrite`, TypeError if not a list of tensors.
    """
    if not isinstance(embeds, list | tuple) or not all(isinstance(embed, Tensor) for embed in embeds):
        raise TypeError(f"embeds must be a list of tensors, got {type(embeds).__name__}")
    save_tensors({f"ip_adapter.{i}": t for i, t in enumerate(embeds)}, as_new_path("file", file, overwrite))


def load_image_embeds(file: str | Path) -> list[Tensor]:
    """Read a file of `save_image_embeds`. FileNotFoundError or ValueError for any other file."""
    source = Source([as_path("file", file)])
    names = [f"ip_adapter.{i}" for i in range(len(source))]
    if not names or set(names) != set(source):
        raise ValueError(f"{file}: no image embeddings, expected tensors ip_adapter.0 and so on")
    for name in names:
        if len(shape := source.shape(name)) != 4 or not source.dtype(name).is_floating_point:
            got = f"{name} is {list(shape)} of {source.dtype(name)}"
            raise ValueError(f"{file}: {got}, expected floats [batch, images, patches, width]")
    return [source[name] for name in names]
