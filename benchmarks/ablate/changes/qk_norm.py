"""QK-norm: queries and keys of every attention are normalized, head by head.

Source: https://arxiv.org/abs/2302.05442, section 2; with a learned RMSNorm as in https://arxiv.org/abs/2403.03206,
section 5.3.2. Logits cannot grow without bound, which is what made larger models diverge.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.ablate.change import Change
from kolors_core.config import UNetConfig
from kolors_core.unet import Attention, UNet


class NormedLinear(nn.Linear):
    """Linear layer whose output is normalized in each head; it adds one parameter, `norm`."""

    def __init__(self, linear: nn.Linear, heads: int) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.heads, self.norm = heads, nn.Parameter(torch.ones(linear.out_features // heads))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., C] to [..., C']."""
        x = super().forward(x).unflatten(-1, (self.heads, -1))
        return F.rms_norm(x, x.shape[-1:], self.norm.to(x.dtype), eps=1e-6).flatten(-2)


def make(config: UNetConfig) -> UNet:
    """Make a UNet whose attentions have it."""
    unet = UNet(config)
    for module in list(unet.modules()):
        if isinstance(module, Attention):
            module.to_q = NormedLinear(module.to_q, module.heads)
            module.to_k = NormedLinear(module.to_k, module.heads)
    return unet


CHANGE = Change(denoiser=make)
