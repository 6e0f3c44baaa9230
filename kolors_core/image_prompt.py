"""Pictures as prompts: loading IP-Adapters and CLIP into a pipeline, and making image tokens of pictures.

Source: `IPAdapterMixin` in diffusers' loaders/ip_adapter.py, and `prepare_ip_adapter_image_embeds` of its
pipelines/kolors/pipeline_kolors.py.
Shapes: B pictures to make, I pictures that guide for an adapter, P patches of each (577), D CLIP's width.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kolors_core.checkpoint import component_files, load_component
from kolors_core.clip_vision import CLIPVision
from kolors_core.components import Components
from kolors_core.config import IPAdapterConfig
from kolors_core.context import ImagePrompt
from kolors_core.face_id import FaceIDAdapter, FaceIDConfig
from kolors_core.fields import new_path, path_of, whole_number
from kolors_core.hub import fetch, find_file, refuse_unused
from kolors_core.image import clip_pixels
from kolors_core.ip_adapter import (
    Adapter,
    Attached,
    IPAdapter,
    attach,
    attached,
)
from kolors_core.loading import load
from kolors_core.placement import (
    dtype_of,
    finite,
    loading_device,
    named_device,
    one_dtype,
    plain,
    refuse_second_copy,
)
from weights_convert import TABLES, recognise
from weights_convert.source import Source, Tensors, save_tensors

ADAPTERS: dict[str, tuple[Callable[..., Adapter], type[IPAdapterConfig]]] = {
    "ip_adapter": (IPAdapter, IPAdapterConfig),
    "face_id": (FaceIDAdapter, FaceIDConfig),
}
# What each attached adapter has its branches read, and in the negative half, if there is one.
Told = dict[Attached, tuple[ImagePrompt, ImagePrompt | None]]
Images = Any  # a PIL image, or an array or tensor of one, or a list of them for each adapter


class CLIPVisionModelWithProjection:
    """The reference's name under which scripts load CLIP's vision encoder."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        subfolder: str = "",
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        low_cpu_mem_usage: bool = True,
    ) -> CLIPVision:
        """Load the encoder from a folder or hub repository; only its own files are fetched.

        torch_dtype, or by its newer name dtype: float32 if None. low_cpu_mem_usage: True is how weights are
        loaded here. Raises FileNotFoundError or ValueError naming the file, field or tensor.
        """
        refuse_second_copy(low_cpu_mem_usage)
        name, asked = pretrained_model_name_or_path, one_dtype(torch_dtype, dtype)
        place = loading_device(device)

        def pick(listing: list[str]) -> list[str]:
            has_weights = place.type != "meta"
            return component_files(
                listing, "image_encoder", subfolder or ".", variant, str(name), has_weights
            )

        folder = fetch(
            name, pick, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token
        )
        return load_component(
            folder, "image_encoder", subfolder=subfolder, variant=variant, device=place,
            dtype=dtype_of("image_encoder", asked),
        )  # fmt: skip


class ImagePrompting(Components):
    """A pipeline that pictures can guide."""

    def load_ip_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        subfolder: str | Sequence[str] = "",
        weight_name: str | Sequence[str] | None = None,
        image_encoder_folder: str | None = "image_encoder",
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        low_cpu_mem_usage: bool = True,
    ) -> None:
        """Load one or several IP-Adapters in place of those loaded before, and CLIP if there is none yet.

        pretrained_model_name_or_path_or_dict: a folder, hub repository, file, or dict of tensors; or a list.
        subfolder, weight_name: one, or one for each; None takes the only safetensors file there is.
        image_encoder_folder: where CLIP is, beside the adapter's file, or from the repository's top if it has
        a slash; None loads none, for pipelines that are given their `image_encoder` or image embeddings.
        Raises FileNotFoundError or ValueError naming the file or tensor; nothing is changed then.
        """
        refuse_second_copy(low_cpu_mem_usage)
        hub = {
            "revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only,
            "token": token,
        }  # fmt: skip
        encoder = own = self._image_encoder
        adapters = []
        for source, folder, file in _matched_sources(
            pretrained_model_name_or_path_or_dict, subfolder, weight_name
        ):
            adapter, encoder = self._opened(
                "ip_adapter", source, folder, file, encoder, image_encoder_folder, hub
            )
            adapters.append(adapter)
        self.unload_ip_adapter()
        for adapter in adapters:
            attach(plain(self.unet), adapter, encoder if encoder is not own else None)

    def _opened(
        self,
        component: str,
        source: Any,
        subfolder: str,
        weight_name: str | None,
        encoder: CLIPVision | None,
        encoder_folder: str | None,
        hub: dict[str, Any],
    ) -> tuple[Adapter, CLIPVision | None]:
        """An adapter of a kind, and the image encoder: the given one, or else what lies in the folder."""
        weight = self.unet.conv_in.weight
        if not isinstance(source, Mapping) and path_of("the IP-Adapter", source).is_file():
            if subfolder or weight_name is not None:
                raise ValueError(f"{source} is a file: subfolder and weight_name have no effect on it")
            source, weight_name = Path(source).parent, Path(source).name
        adapter = _build(component, _tensors(source, subfolder, weight_name, hub), weight)
        adapter.check_fits(plain(self.unet))
        if encoder is None and encoder_folder is not None:
            if isinstance(source, Mapping):
                raise ValueError("a dict has no image encoder: image_encoder_folder must be None")
            encoder = CLIPVisionModelWithProjection.from_pretrained(
                source, subfolder=_encoder_folder(subfolder, encoder_folder), dtype=weight.dtype,
                device=weight.device, **hub,
            )  # fmt: skip
        if encoder is not None and adapter.config.image_dim != encoder.config.hidden_size:
            got = f"the image encoder is {encoder.config.hidden_size} wide"
            raise ValueError(f"{got}, and the IP-Adapter reads {adapter.config.image_dim}")
        return adapter, encoder

    def set_ip_adapter_scale(self, scale: Any) -> None:
        """Weigh the adapters: 1 is as trained, 0 as if there were none.

        scale: for all adapters, or a list with one for each, of: a number; a list with a number for each
        masked picture; or by block, such as {"down": {"block_2": [0.0, 1.0]}, "up": {"block_0": 1.0}}, where
        what is left out gets 0.
        """
        handles = self._need_adapters()
        given = list(scale) if isinstance(scale, list | tuple) else [scale] * len(handles)
        if len(given) != len(handles):
            raise ValueError(f"wanted a scale for each of the {len(handles)} IP-Adapters, got {scale!r}")
        checked = [handle.scales(one) for handle, one in zip(handles, given, strict=True)]
        for handle, scales in zip(handles, checked, strict=True):
            handle.set_scales(scales)

    def unload_ip_adapter(self) -> None:
        """Take the adapters out, and CLIP if it came with one; the UNet is as before, bit for bit."""
        for handle in self._picture_adapters:
            handle.detach()

    @torch.no_grad()
    def prepare_ip_adapter_image_embeds(
        self,
        ip_adapter_image: Images,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
    ) -> list[Tensor]:
        """CLIP's states of pictures, to be given again as `ip_adapter_image_embeds`.

        Returns a tensor for each adapter: [n, I, P, D] for n images a prompt, and under guidance the n
        negative rows (of a picture that is all mean colour) before.
        """
        device = self.device if device is None else named_device(str(device))
        num_images_per_prompt = whole_number("num_images_per_prompt", num_images_per_prompt)
        pairs = self._image_states(ip_adapter_image, ip_adapter_image_embeds, do_classifier_free_guidance)
        embeds = []
        for states, negative in pairs:
            halves = [states] if negative is None else [negative, states]
            embeds.append(
                torch.cat([half.repeat(num_images_per_prompt, 1, 1, 1) for half in halves]).to(device)
            )
        return embeds

    def _image_states(
        self, image: Images, embeds: Sequence[Tensor] | None, is_guided: bool
    ) -> list[tuple[Tensor, Tensor | None]]:
        """For each adapter the states of its pictures, and the negative ones under guidance: [n, I, P, D]."""
        handles = self._need_adapters()
        if (image is None) == (embeds is None):
            raise ValueError(
                "give either ip_adapter_image or ip_adapter_image_embeds, not both and not neither"
            )
        given = embeds if image is None else image
        given = list(given) if isinstance(given, list | tuple) else [given]
        if len(given) != len(handles):
            name = "ip_adapter_image" if embeds is None else "ip_adapter_image_embeds"
            wanted = f"one, or a list of them, for each of the {len(handles)} IP-Adapters"
            raise ValueError(f"{name} must be a list of {wanted}, got {len(given)}")
        if embeds is not None:
            return [_halves(embed, is_guided) for embed in given]
        encoder = self.image_encoder
        if encoder is None:
            raise ValueError("this pipeline has no image encoder: pass ip_adapter_image_embeds instead")
        self._on_device("image_encoder")
        pairs = []
        for pictures in given:
            pixels = self._pixels(pictures, encoder.config.image_size)
            pixels = self._input_for(encoder.projection.weight, pixels)  # [I, 3, S, S]
            states = encoder.penultimate(pixels)[None]  # [1, I, P, D]
            negative = None
            if is_guided:  # zeros in place of the normalised picture, the same for all of them
                negative = encoder.penultimate(torch.zeros_like(pixels[:1]))[None].expand_as(states)
            pairs.append((states, negative))
        return pairs

    def _pixels(self, pictures: Any, size: int) -> Tensor:
        """Pictures as CLIP sees them [I, 3, S, S]; a tensor is taken as that already."""
        if isinstance(pictures, Tensor):
            if not pictures.is_floating_point():
                raise ValueError(f"a tensor must be pixels as CLIP sees them, floats, got {pictures.dtype}")
            return pictures
        if self.feature_extractor is not None:
            return self.feature_extractor(pictures, return_tensors="pt").pixel_values
        return clip_pixels(pictures, size)

    def _image_prompts(
        self, image: Images, embeds: Sequence[Tensor] | None, masks: Any, batch: int, is_guided: bool
    ) -> Told:
        """What the UNet is told of the pictures in each of its B rows, and in each negative one."""
        if not self._picture_adapters and image is None and embeds is None and masks is None:
            return {}
        handles = self._need_adapters()
        if image is None and embeds is None:
            raise ValueError(
                "an IP-Adapter is loaded and no ip_adapter_image given: unload_ip_adapter() first"
            )
        pairs = self._image_states(image, embeds, is_guided)
        self._on_device("unet")
        told: Told = {}
        for handle, (states, negative), mask in zip(
            handles, pairs, _masks_of(masks, len(handles), batch), strict=True
        ):
            if batch % len(states):
                raise ValueError(f"ip_adapter_image_embeds has {len(states)} rows, for {batch} pictures")
            mask = None if mask is None else mask.to(self.device)
            handle.follow_unet()
            positive = _prompt(handle, states.to(self.device), batch, mask)
            told[handle] = (
                positive,
                None if negative is None else _prompt(handle, negative.to(self.device), batch, mask),
            )
        return told

    @property
    def _picture_adapters(self) -> list[Attached]:
        """The adapters that pictures guide, but not a face's."""
        return [handle for handle in attached(self.unet) if isinstance(handle.adapter, IPAdapter)]

    def _need_adapters(self) -> list[Attached]:
        if not (handles := self._picture_adapters):
            raise ValueError("no IP-Adapter is loaded: load_ip_adapter first")
        return handles


def save_image_embeds(embeds: Sequence[Tensor], file: str | Path, *, overwrite: bool = False) -> None:
    """Write what `prepare_ip_adapter_image_embeds` returns to a safetensors file, whole or not at all.

    Raises FileExistsError for a file that is there, unless `overwrite`, TypeError for no list of tensors.
    """
    if not isinstance(embeds, list | tuple) or not all(isinstance(embed, Tensor) for embed in embeds):
        raise TypeError(f"embeds must be a list of tensors, got {type(embeds).__name__}")
    file = new_path("file", file, overwrite)
    save_tensors({f"ip_adapter.{i}": embed for i, embed in enumerate(embeds)}, file)


def load_image_embeds(file: str | Path) -> list[Tensor]:
    """Read a file of `save_image_embeds`. FileNotFoundError or ValueError if it is none."""
    source = Source([path_of("file", file)])
    names = [f"ip_adapter.{i}" for i in range(len(source))]
    if not names or set(names) != set(source):
        raise ValueError(f"{file}: no image embeddings, wanted tensors ip_adapter.0 and so on")
    return [source[name] for name in names]


def _matched_sources(
    source: Any, subfolder: str | Sequence[str], weight_name: str | Sequence[str] | None
) -> list[tuple[Any, str, str | None]]:
    """One (source, subfolder, file) for each adapter; a single value serves all."""
    lists = [
        list(part) if isinstance(part, list | tuple) else [part] for part in (source, subfolder, weight_name)
    ]
    count = max(map(len, lists))
    for name, part in zip(("sources", "subfolder", "weight_name"), lists, strict=True):
        if len(part) not in (1, count):
            raise ValueError(f"wanted as many {name} as IP-Adapters ({count}) or one, got {len(part)}")
    return list(zip(*(part * (count if len(part) == 1 else 1) for part in lists), strict=True))


def _encoder_folder(subfolder: str, folder: str) -> str:
    return folder if "/" in folder else "/".join(part for part in (subfolder, folder) if part)


def _tensors(source: Any, subfolder: str, weight_name: str | None, hub: Any) -> Source | Tensors:
    """An adapter's tensors; of a dict also nested, {"image_proj": {...}, "ip_adapter": {...}}."""
    if not isinstance(source, Mapping):
        return Source([find_file(source, weight_name, subfolder, **hub)])
    refuse_unused("a dict of tensors", subfolder=subfolder, weight_name=weight_name, **hub)
    flat: dict[str, Any] = {}
    for name, value in source.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": tensor for inner, tensor in value.items()}
        else:
            flat[name] = value
    return Tensors(flat, "the dict of tensors")


def _build(component: str, source: Source | Tensors, like: Tensor) -> Adapter:
    """An adapter of the shape that its tensors have, in the dtype and on the device of `like`."""
    table, is_ours = recognise(source.keys(), source.where)
    if table is not TABLES[component]:
        hint = ": load_ip_adapter_face_id loads it" if table is TABLES["face_id"] else ""
        raise ValueError(f"{source.where}: wanted an {component}, got a {table.component}{hint}")
    kind, config = ADAPTERS[component]
    shapes = {name if is_ours else table.to_ours(name): source.shape(name) for name in source}
    with torch.device("meta"):
        adapter = kind(config.from_shapes(shapes, source.where))
    load(adapter, source, component, dtype=like.dtype, device=like.device)
    return adapter.eval()


def _prompt(handle: Attached, states: Tensor, batch: int, mask: Tensor | None) -> ImagePrompt:
    """What an adapter's branches read of states [n, I, P, D], in each of B rows."""
    tokens = handle.tokens(states)  # [n, I, Q, context_dim]
    finite(tokens, "the image prompt's tokens", tokens.dtype)
    return ImagePrompt(tokens.repeat_interleave(batch // len(tokens), dim=0), mask)


def _halves(embed: Any, is_guided: bool) -> tuple[Tensor, Tensor | None]:
    """Given image embeddings, split under guidance: (positive, negative)."""
    fits = isinstance(embed, Tensor) and embed.ndim == 4 and embed.numel() and embed.is_floating_point()
    if not fits or (is_guided and len(embed) % 2):
        got = list(embed.shape) if isinstance(embed, Tensor) else type(embed).__name__
        rows = "twice the batch, negative rows first" if is_guided else "batch"
        raise ValueError(
            f"ip_adapter_image_embeds must be tensors [{rows}, images, patches, width], got {got}"
        )
    if not is_guided:
        return embed, None
    negative, positive = embed.chunk(2)
    return positive, negative


def _masks_of(masks: Any, count: int, batch: int) -> list[Tensor | None]:
    """One tensor [1 or B, I, H, W] or None for each adapter; a tensor [adapters, 1, H, W] is taken apart."""
    if masks is None:
        return [None] * count
    listed = list(masks.unsqueeze(1)) if isinstance(masks, Tensor) and masks.ndim == 4 else masks
    if not isinstance(listed, list | tuple) or len(listed) != count:
        raise ValueError(f"ip_adapter_masks must be a list of one tensor for each of {count} IP-Adapters")
    for mask in listed:
        if mask is None:
            continue
        if not isinstance(mask, Tensor) or mask.ndim != 4 or not mask.numel() or len(mask) not in (1, batch):
            got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"ip_adapter_masks must be tensors [1, images, height, width], got {got}")
        if mask.is_complex() or not 0 <= mask.min() <= mask.max() <= 1:
            raise ValueError(f"ip_adapter_masks must be from 0 to 1, got {mask.min()} to {mask.max()}")
    return list(listed)
