"""Half precision for a VAE's decoder, where its images stay within a gray level of float32's.

The first image is decoded in float32 as well, and the difference decides; an image that is not finite is
decoded again in float32. Weights stay in float32: their halves last for a call. Feature maps are
channels-last, in which a GPU convolves halves.
Shapes: B images, H height, W width.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kolors_core.devices import all_finite
from kolors_core.performance.vae_tiling import TiledCoder
from kolors_core.vae import VAE, Decoder, call
from kolors_core.validation import check_float

HALVES = (torch.float16, torch.bfloat16)  # in this order: float16 is finer, where it does not overflow
LAST = torch.channels_last


@dataclass
class HalfPrecisionDecoder:
    """VAE's `run_coder` that runs the decoder in half precision and the encoder as it is.

    limit: the largest difference of a value, in gray levels of 255. dtype: None until the first image
    decides, and if none is within the limit. errors: what was measured, infinite for an overflow.
    """

    limit: float = 1.0
    dtype: torch.dtype | None = None
    errors: dict[torch.dtype, float] = field(default_factory=dict)

    def __call__(self, coder: nn.Module, x: Tensor) -> Tensor:
        """Return coder(x), in the dtype of x."""
        weights = [*coder.parameters()]
        has_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights))
        is_elsewhere = x.is_meta or any(weight.device != x.device for weight in weights)  # offloaded by block
        if not isinstance(coder, Decoder) or x.dtype != torch.float32 or has_gradients or is_elsewhere:
            return coder(x)
        if self.dtype is None:
            return coder(x) if self.errors else self._choose(coder, x)
        image = decode_in(self.dtype, coder, x)
        return image if all_finite(image) else coder(x)

    def _choose(self, coder: nn.Module, x: Tensor) -> Tensor:
        """Return coder(x), and set the first dtype that is within the limit on it."""
        exact = coder(x)
        for dtype in HALVES:
            self.errors[dtype] = gray_levels(decode_in(dtype, coder, x), exact)
            if self.errors[dtype] <= self.limit:
                self.dtype = dtype
                break
        return exact


def enable_half_precision(vae: VAE, limit: float = 1.0) -> HalfPrecisionDecoder:
    """Decode in float16 or bfloat16 from now on, if that is within `limit` gray levels on the first image.

    Returns what decodes, whose `dtype` and `errors` say what was chosen. ValueError for another limit than a
    number from 0 on, and for a VAE that is not float32; TypeError, naming its `run_coder`, for one in tiles,
    in slices or with split rows.
    """
    decoder = HalfPrecisionDecoder(check_float("limit", limit, 0))
    if (dtype := vae.post_quant_conv.weight.dtype) != torch.float32:
        hint = "half precision is measured against it: vae.to(torch.float32)"
        raise ValueError(f"expected a VAE in float32, got {dtype}: {hint}")
    own = vae.run_coder
    is_off = isinstance(own, TiledCoder) and not (own.use_tiling or own.use_slicing)
    if not (own is call or is_off or isinstance(own, HalfPrecisionDecoder)):
        raise TypeError(f"half precision is for a VAE whose run_coder is vae.call, got {own!r}")
    vae.run_coder = decoder
    return decoder


def disable_half_precision(vae: VAE) -> None:
    """Decode in float32 again."""
    if isinstance(vae.run_coder, HalfPrecisionDecoder):
        vae.run_coder = call


def decode_in(dtype: torch.dtype, coder: nn.Module, x: Tensor) -> Tensor:
    """Run a coder with weights, input [B, C, H, W] and feature maps of a dtype, channels-last."""
    weights = {
        name: tensor.to(dtype, memory_format=LAST if tensor.ndim == 4 else torch.preserve_format)
        for name, tensor in coder.state_dict().items()
    }
    image = functional_call(coder, weights, (x.to(dtype, memory_format=LAST),))
    return image.to(x.dtype, memory_format=torch.contiguous_format)


def gray_levels(image: Tensor, exact: Tensor) -> float:
    """Return the largest difference of two images [B, 3, H, W] in gray levels; inf if one is not finite."""
    if not all_finite(image):
        return float("inf")
    return (image.clamp(-1, 1) - exact.clamp(-1, 1)).abs().max().item() * 127.5
