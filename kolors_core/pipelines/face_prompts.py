"""Face prompts: methods of a pipeline that attach IP-Adapter-FaceID-Plus and make its tokens.

Source: kolors/pipelines/pipeline_stable_diffusion_xl_chatglm_256_ipadapter_FaceID.py in
https://github.com/Kwai-Kolors/Kolors.
Shapes: B images to make, n faces (1 or a divisor of B), P patches of each (577), D CLIP's width.
"""

from typing import Any

import torch
from torch import Tensor

from kolors_core.adapters.block_scales import BlockScale
from kolors_core.adapters.face_id import FaceIDAdapter
from kolors_core.adapters.ip_adapter import AttachedAdapter, attach, attached
from kolors_core.adapters.ip_adapter_files import describe_source, load_adapter
from kolors_core.devices import check_finite, unwrap_compiled
from kolors_core.module import all_or_nothing
from kolors_core.pipelines.image_prompts import ImagePromptPairs, IPAdapterMethods, make_image_prompt

DEFAULT_NUM_PATCHES = 577  # of an image for CLIP, where no image encoder is loaded


class FaceIDMethods(IPAdapterMethods):
    """IP-Adapter-FaceID methods of a pipeline."""

    def load_ip_adapter_face_id(
        self, pretrained_model_name_or_path_or_dict: Any, subfolder: str = "", weight_name: str | None = None,
        image_encoder_folder: str | None = "clip-vit-large-patch14-336", *, revision: str | None = None,
        cache_dir: Any = None, local_files_only: bool = False, token: str | bool | None = None,
    ) -> None:  # fmt: skip
        """Load IP-Adapter-FaceID-Plus in place of one loaded before, and CLIP if there is none yet.

        IP-Adapters of images and LoRAs stay. Arguments and errors are those of `load_ip_adapter`. The
        published file is a pickle: `python -m weights_convert --pickle` makes the safetensors file of it.
        """
        hub = dict(revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token)
        unet, source = unwrap_compiled(self.unet), pretrained_model_name_or_path_or_dict
        given = source, subfolder, weight_name, self.image_encoder, image_encoder_folder, hub
        adapter, encoder = load_adapter(unet, "face_id", *given)
        origin = describe_source(source, subfolder, weight_name, revision)
        with all_or_nothing(unet):
            self.unload_ip_adapter_face_id()
            attach(unet, adapter, encoder if encoder is not self._image_encoder else None, origin)

    def set_ip_adapter_face_id_scale(self, scale: BlockScale) -> None:
        """Scale the face adapter, by a number or by block as in `set_ip_adapter_scale`; upstream: 0.8."""
        self._need_face().set_scale(scale)

    def unload_ip_adapter_face_id(self) -> None:
        """Detach the face adapter, and CLIP if it was loaded with it; the UNet is as before, bit for bit."""
        if (handle := self._face) is not None:
            handle.detach()

    @property
    def _face(self) -> AttachedAdapter | None:
        return next((one for one in attached(self.unet) if isinstance(one.adapter, FaceIDAdapter)), None)

    def _need_face(self) -> AttachedAdapter:
        if (handle := self._face) is None:
            raise ValueError("no face adapter is loaded: load_ip_adapter_face_id first")
        return handle

    def _face_prompts(self, image: Any, embeds: Any, batch: int, is_guided: bool) -> ImagePromptPairs:
        """Make the face adapter's tokens for B positive and, under guidance, B negative rows."""
        if image is None and embeds is None and self._face is None:
            return {}
        handle = self._need_face()
        if image is None and embeds is None:
            hint = "unload_ip_adapter_face_id() first"
            raise ValueError(f"a face adapter is loaded and no face_embeds given: {hint}")
        if image is None or embeds is None:
            raise ValueError("face_embeds and face_image need each other")
        adapter = handle.adapter
        assert isinstance(adapter, FaceIDAdapter)
        ids, states = _ids(embeds, adapter.config.id_dim), self._face_states(image, adapter.config.image_dim)
        count = max(len(ids), len(states))
        if any(n not in (1, count) for n in (len(ids), len(states))) or batch % count:
            got = f"{len(ids)} face_embeds and {len(states)} face_image"
            raise ValueError(f"expected one face, or one for each of {batch} images or prompts, got {got}")
        self._enter_stage("unet")
        handle.to_unet_device()
        weight, unet = adapter.resampler.proj_in.weight, unwrap_compiled(self.unet)
        ids = self._to_model(weight, ids).expand(count, -1)  # [n, id_dim]
        states = self._to_model(weight, states).expand(count, -1, -1)  # [n, P, D]
        positive, negative = make_image_prompt(adapter.tokens(unet, ids, states), batch), None
        if is_guided:
            nobody = torch.zeros_like(ids[:1]), torch.zeros_like(states[:1])
            negative = make_image_prompt(adapter.tokens(unet, *nobody), batch)
        return {handle: (positive, negative)}

    def placeholder_inputs(self, device: torch.device, is_guided: bool) -> dict[str, Any]:
        """Make arguments without values for a plan: an image for each adapter, or states without CLIP."""
        handles, face, encoder = self._ip_adapters, self._face, self.image_encoder
        given: dict[str, Any] = {}

        def image(handle: AttachedAdapter, *rows: int) -> Tensor:
            shape, dtype = (*rows, DEFAULT_NUM_PATCHES, handle.adapter.config.image_dim), self.dtype
            if encoder is not None:
                shape, dtype = (1, 3, encoder.config.image_size, encoder.config.image_size), torch.float32
            return torch.empty(shape, device=device, dtype=dtype)

        if handles:
            name = "ip_adapter_image_embeds" if encoder is None else "ip_adapter_image"
            given[name] = [image(handle, 1 + is_guided, 1) for handle in handles]
        if face is not None:
            assert isinstance(face.adapter, FaceIDAdapter)
            given["face_embeds"] = torch.empty(1, face.adapter.config.id_dim, device=device)
            given["face_image"] = image(face, 1)
        return given

    def _face_states(self, image: Any, width: int) -> Tensor:
        """Compute CLIP's states [n, P, D] of images; given states are checked and returned."""
        if isinstance(image, Tensor) and image.ndim == 3:
            if image.shape[-1] != width or not image.numel() or not image.is_floating_point():
                got = f"{list(image.shape)} of {image.dtype}"
                raise ValueError(f"face_image must be images or CLIP's states [n, P, {width}], got {got}")
            return image
        encoder = self._need_encoder("face_image")
        return encoder.penultimate(self._pixels(image, encoder))


def _ids(embeds: Any, width: int) -> Tensor:
    """Check id vectors [n, id_dim]."""
    expected = f"face_embeds must be floats [1 or more, {width}]"
    try:
        ids = torch.as_tensor(embeds)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{expected}, got {embeds!r:.99}") from None
    if ids.ndim != 2 or not len(ids) or ids.shape[1] != width or not ids.is_floating_point():
        raise ValueError(f"{expected}, got {list(ids.shape)} of {ids.dtype}")
    return check_finite(ids, "face_embeds", ids.dtype)
