"""Image prompts: methods of a pipeline that attach IP-Adapters and make image tokens.

Source: `IPAdapterMixin` in diffusers' loaders/ip_adapter.py, and `prepare_ip_adapter_image_embeds` of its
pipelines/kolors/pipeline_kolors.py.
Shapes: B images to make, I image prompts of an adapter, P patches of each (577), D CLIP's width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kolors_core.adapters.clip_vision import CLIPVision, preprocess_clip
from kolors_core.adapters.ip_adapter import AttachedAdapter, IPAdapter, attach, attached
from kolors_core.adapters.ip_adapter_files import adapter_sources, describe_source, load_adapter
from kolors_core.context import ImagePrompt
from kolors_core.devices import check_finite, named_device, unwrap_compiled
from kolors_core.image import as_list, to_8_bits, to_grayscale
from kolors_core.module import all_or_nothing
from kolors_core.pipelines.base import Components
from kolors_core.pipelines.masks import warn_alpha_only
from kolors_core.validation import check_int

# For each attached adapter the image prompts of the positive half and, under guidance, of the negative one.
ImagePromptPairs = dict[AttachedAdapter, tuple[ImagePrompt, ImagePrompt | None]]
Images = Any  # a PIL image, or an array or tensor of one, or a list of them for each adapter


class IPAdapterMethods(Components):
    """IP-Adapter methods of a pipeline."""

    def load_ip_adapter(
        self, pretrained_model_name_or_path_or_dict: Any, subfolder: str | Sequence[str] = "",
        weight_name: str | Sequence[str] | None = None, image_encoder_folder: str | None = "image_encoder",
        *, revision: str | None = None, cache_dir: str | Path | None = None, local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> None:  # fmt: skip
        """Load one or several IP-Adapters in place of those loaded before, and CLIP if there is none yet.

        pretrained_model_name_or_path_or_dict: a folder, hub repository, file, or dict of tensors; or a list.
        "tiny" is the embedded model's IP-Adapter.
        subfolder, weight_name: one, or one for each; None takes the only safetensors file there is.
        image_encoder_folder: where CLIP is, beside the adapter's file, or from the repository's top if it has
        a slash; None loads none, for pipelines that are given their `image_encoder` or image embeddings.
        Raises FileNotFoundError or ValueError naming the file or tensor; nothing is changed then.
        """
        hub = dict(revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token)
        unet, encoder, adapters = unwrap_compiled(self.unet), self._image_encoder, list[Any]()
        for place in adapter_sources(pretrained_model_name_or_path_or_dict, subfolder, weight_name):
            adapter, encoder = load_adapter(unet, "ip_adapter", *place, encoder, image_encoder_folder, hub)
            adapters.append((adapter, describe_source(*place, revision)))
        with all_or_nothing(unet):
            self.unload_ip_adapter()
            for adapter, origin in adapters:
                attach(unet, adapter, encoder if encoder is not self._image_encoder else None, origin)

    def set_ip_adapter_scale(self, scale: Any) -> None:
        """Scale the adapters: 1 is as trained, 0 has no effect.

        scale: for all, or a list of one for each: a number; a list of one for each masked image; or by block,
        such as {"down": {"block_2": [0.0, 1.0]}, "up": {"block_0": 1.0}}, where missing blocks get 0.
        """
        handles = self._need_adapters()
        given = list(scale) if isinstance(scale, list | tuple) else [scale] * len(handles)
        if len(given) != len(handles):
            raise ValueError(f"expected a scale for each of the {len(handles)} IP-Adapters, got {scale!r}")
        checked = [handle.scales(one) for handle, one in zip(handles, given, strict=True)]
        with all_or_nothing(unwrap_compiled(self.unet)):
            for handle, scales in zip(handles, checked, strict=True):
                handle.set_scales(scales)

    def unload_ip_adapter(self) -> None:
        """Detach the adapters, and CLIP if it was loaded with one; the UNet is as before, bit for bit."""
        with all_or_nothing(unwrap_compiled(self.unet)):
            for handle in self._ip_adapters:
                handle.detach()

    @torch.no_grad()
    def prepare_ip_adapter_image_embeds(
        self, ip_adapter_image: Images, ip_adapter_image_embeds: Sequence[Tensor] | None = None,
        device: torch.device | str | None = None, num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
    ) -> list[Tensor]:  # fmt: skip
        """Compute CLIP's states of images, for the argument `ip_adapter_image_embeds`.

        Returns a tensor for each adapter: [n, I, P, D] for n images a prompt; under guidance n negative rows,
        of an image in the mean color, come first.
        """
        device = self.device if device is None else named_device(str(device))
        copies = check_int("num_images_per_prompt", num_images_per_prompt)
        states = self._image_states(ip_adapter_image, ip_adapter_image_embeds, do_classifier_free_guidance)
        return [torch.cat([half.repeat(copies, 1, 1, 1) for half in own[::-1]]).to(device) for own in states]

    def _image_states(
        self, image: Images, embeds: Sequence[Tensor] | None, is_guided: bool
    ) -> list[Sequence[Tensor]]:
        """Compute each adapter's image states and then, under guidance, the negative ones: [n, I, P, D]."""
        handles = self._need_adapters()
        if (image is None) == (embeds is None):
            wanted = "either ip_adapter_image or ip_adapter_image_embeds"
            raise ValueError(f"expected {wanted}, got both or neither")
        name, given = ("ip_adapter_image", image) if embeds is None else ("ip_adapter_image_embeds", embeds)
        given = list(given) if isinstance(given, list | tuple) else [given]
        if len(given) != len(handles):
            wanted = f"one, or a list of them, for each of the {len(handles)} IP-Adapters"
            raise ValueError(f"{name} must be a list of {wanted}, got {len(given)}")
        if embeds is not None:
            return [_split_halves(embed, is_guided) for embed in given]
        encoder = self._need_encoder("ip_adapter_image_embeds")
        states: list[Sequence[Tensor]] = []
        for images in given:
            pixels = self._pixels(images, encoder)  # [I, 3, S, S]
            halves = [encoder.penultimate(pixels)[None]]  # [1, I, P, D]
            if is_guided:  # zeros in place of the normalized image, the same for all of them
                halves.append(encoder.penultimate(torch.zeros_like(pixels[:1]))[None].expand_as(halves[0]))
            states.append(halves)
        return states

    def _need_encoder(self, instead: str) -> CLIPVision:
        """Return CLIP on its device; without one, ValueError names the argument for states, `instead`."""
        if (encoder := self.image_encoder) is None:
            raise ValueError(f"this pipeline has no image encoder: give CLIP's states as {instead}")
        self._enter_stage("image_encoder")
        return encoder

    def _pixels(self, pictures: Any, encoder: CLIPVision) -> Tensor:
        """Preprocess images for CLIP: [I, 3, S, S]; a tensor is taken as preprocessed."""
        from PIL import Image

        if isinstance(pictures, Tensor):
            if not pictures.is_floating_point():
                raise ValueError(f"a tensor must be pixels as CLIP sees them, floats, got {pictures.dtype}")
            pixels = pictures
        elif self.feature_extractor is not None:
            given = pictures if isinstance(pictures, list | tuple) else [pictures]
            given = [to_8_bits(one) if isinstance(one, Image.Image) else one for one in given]
            pixels = self.feature_extractor(given, return_tensors="pt").pixel_values
        else:
            pixels = preprocess_clip(pictures, encoder.config.image_size)
        return self._to_model(encoder.projection.weight, pixels)

    def _image_prompts(
        self, image: Images, embeds: Sequence[Tensor] | None, masks: Any, batch: int, is_guided: bool
    ) -> ImagePromptPairs:
        """Make each IP-Adapter's tokens for B positive and, under guidance, B negative rows."""
        if not self._ip_adapters and image is None and embeds is None and masks is None:
            return {}
        handles = self._need_adapters()
        if image is None and embeds is None:
            hint = "unload_ip_adapter() first"
            raise ValueError(f"an IP-Adapter is loaded and no ip_adapter_image given: {hint}")
        states = self._image_states(image, embeds, is_guided)
        self._enter_stage("unet")
        prompts: ImagePromptPairs = {}
        for handle, own, mask in zip(handles, states, _check_masks(masks, len(handles), batch), strict=True):
            if batch % (rows := len(own[0])):
                raise ValueError(f"ip_adapter_image_embeds has {rows} rows, for {batch} images")
            handle.to_unet_device()
            adapter, mask = handle.adapter, None if mask is None else mask.to(self.device)
            assert isinstance(adapter, IPAdapter)
            tokens = (adapter.tokens(half.to(self.device)) for half in own)
            positive, *negative = (make_image_prompt(one, batch, mask) for one in tokens)
            prompts[handle] = positive, negative[0] if negative else None
        return prompts

    @property
    def _ip_adapters(self) -> list[AttachedAdapter]:
        return [handle for handle in attached(self.unet) if isinstance(handle.adapter, IPAdapter)]

    def _need_adapters(self) -> list[AttachedAdapter]:
        if not (handles := self._ip_adapters):
            raise ValueError("no IP-Adapter is loaded: load_ip_adapter first")
        return handles


def make_image_prompt(tokens: Tensor, batch: int, mask: Tensor | None = None) -> ImagePrompt:
    """Repeat finite tokens [n, I, Q, context_dim] of an adapter for B (`batch`) rows, a multiple of n."""
    check_finite(tokens, "the tokens of an image or face", tokens.dtype)
    return ImagePrompt(tokens.repeat_interleave(batch // len(tokens), dim=0), mask)


def _split_halves(embed: Any, is_guided: bool) -> Sequence[Tensor]:
    """Split given image embeddings under guidance: (positive, negative)."""
    fits = isinstance(embed, Tensor) and embed.ndim == 4 and embed.numel() and embed.is_floating_point()
    if not fits or (is_guided and len(embed) % 2):
        got = list(embed.shape) if isinstance(embed, Tensor) else type(embed).__name__
        shape = f"{'twice the batch, negative rows first' if is_guided else 'batch'}, images, patches, width"
        raise ValueError(f"ip_adapter_image_embeds must be tensors [{shape}], got {got}")
    return embed.chunk(2)[::-1] if is_guided else [embed]


def _check_masks(masks: Any, count: int, batch: int) -> list[Tensor | None]:
    """Check masks: [1 or B, I, H, W] or None for each adapter; a tensor [adapters, 1, H, W] is split."""
    if masks is None:
        return [None] * count
    listed = list(masks.unsqueeze(1)) if isinstance(masks, Tensor) and masks.ndim == 4 else masks
    if not isinstance(listed, list | tuple) or len(listed) != count:
        raise ValueError(f"ip_adapter_masks must be a list of one tensor for each of {count} IP-Adapters")
    for mask in (given for given in listed if given is not None):
        fits = isinstance(mask, Tensor) and mask.ndim == 4 and mask.numel() and len(mask) in (1, batch)
        if not fits or mask.is_complex():
            got = f"{list(mask.shape)} of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"ip_adapter_masks must be tensors [1, images, height, width], got {got}")
        if not 0 <= mask.min() <= mask.max() <= 1:
            raise ValueError(f"ip_adapter_masks must be from 0 to 1, got {mask.min()} to {mask.max()}")
    return list(listed)


class IPAdapterMaskProcessor:
    """Processor of masks that limit an IP-Adapter image to a region, as diffusers' class of this name."""

    def preprocess(self, image: Any, height: int | None = None, width: int | None = None) -> Tensor:
        """Binarize one PIL image or several, of any mode, at middle gray: float32 [n, 1, H, W].

        Each is resized to height and width, or to the first one's size, both rounded down to multiples of 8.
        """
        from PIL import Image

        masks = as_list(image)
        if strangers := [mask for mask in masks if not isinstance(mask, Image.Image)]:
            raise TypeError(f"expected masks as PIL images, got {type(strangers[0]).__name__}")
        warn_alpha_only(masks, "a mask of an IP-Adapter")
        h = masks[0].height if height is None else check_int("height", height)
        w = masks[0].width if width is None else check_int("width", width)
        if h < 8 or w < 8:
            raise ValueError(f"the sides of a mask must be at least 8, got {h} x {w}")
        return torch.stack([to_grayscale(one, (h - h % 8, w - w % 8))[None] >= 128 for one in masks]).float()
