"""One model of both libraries with the same random weights, in the very same memory.

The reference is imported when one of its models is made: ours alone needs no diffusers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from kolors_core.chatglm import ChatGLM
from kolors_core.config import ChatGLMConfig, UNetConfig, VAEConfig
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from weights_convert import TABLES
from weights_convert.key_mapping import UNUSED, compare

Config = ChatGLMConfig | UNetConfig | VAEConfig
OURS: dict[type[Config], type[nn.Module]] = {ChatGLMConfig: ChatGLM, UNetConfig: UNet, VAEConfig: VAE}


def make_pair(
    component: str,
    config: Config,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[nn.Module, nn.Module]:
    """The reference's model and ours, without ever holding more than one copy of the weights."""
    reference = make_reference(config, seed, dtype, device)
    with torch.device("meta"):
        ours = OURS[type(config)](config)
    share(reference, ours, component)
    return reference, ours.eval()


def make_ours(
    config: Config, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Any:
    """Our model with random weights."""
    with torch.device("meta"):
        ours = OURS[type(config)](config)
    ours = ours.to(dtype).to_empty(device=device).eval()
    randomise(ours, seed)
    return ours


def make_reference(
    config: Config, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> nn.Module:
    """The reference's model with random weights."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig as ReferenceChatGLMConfig
    from diffusers.pipelines.kolors.text_encoder import ChatGLMModel

    with torch.device("meta"):
        if isinstance(config, ChatGLMConfig):
            reference = ChatGLMModel(ReferenceChatGLMConfig(**config.to_public()), device="meta")
        elif isinstance(config, UNetConfig):
            reference = UNet2DConditionModel.from_config(config.to_public())
        else:
            reference = AutoencoderKL.from_config(config.to_public())
    reference = reference.to(dtype).to_empty(device=device).eval()
    randomise(reference, seed)
    return reference


def randomise(model: nn.Module, seed: int) -> None:
    """Draw every parameter, so that no norm or bias is an identity that would hide a swap."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                mean, std = 0.0, 0.3
            elif parameter.ndim == 1:
                mean, std = 1.0, 0.3
            elif isinstance(module, nn.Embedding):
                mean, std = 0.0, 1.0
            else:
                # Below 1 / sqrt(fan in): the residual sums of 70 transformer blocks stay in range.
                mean, std = 0.0, 0.7 * parameter[0].numel() ** -0.5
            parameter.data.normal_(mean, std, generator=generator)


def share(reference: nn.Module, ours: nn.Module, component: str) -> None:
    """Give ours the reference's tensors under our names, the very same memory."""
    table = TABLES[component]
    state = {table.to_ours(name): tensor for name, tensor in reference.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    target = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    if mismatch := compare(table, shapes, target):
        raise ValueError(str(mismatch))
    used = {name: tensor for name, tensor in state.items() if not name.startswith(UNUSED)}
    ours.load_state_dict(used, strict=True, assign=True)


class WeightsAs(TorchFunctionMode):
    """Within it every floating-point parameter is read in this dtype by the operation that uses it.

    So a model runs as if it had been loaded in the dtype, bit for bit, without a copy: in float64 the UNet's
    would take 20.6 GB.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func == torch.Tensor.dtype.__get__ and self._is_weight(args[0]):
            return self.dtype  # asked for often, and no copy is needed to answer
        named = {name: self._read(value) for name, value in (kwargs or {}).items()}
        return func(*(self._read(value) for value in args), **named)

    def _read(self, value: Any) -> Any:
        if not self._is_weight(value):
            return value
        # matmul folds a batch into rows where the weight requires a gradient, and so adds in another order
        return torch.Tensor.to(value, self.dtype).requires_grad_(value.requires_grad)

    @staticmethod
    def _is_weight(value: Any) -> bool:
        return isinstance(value, nn.Parameter) and value.is_floating_point()


class OneNoise(TorchFunctionMode):
    """Within it a seed is the same noise in float64 as in float32."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        if func is torch.randn and named.get("dtype") == torch.float64:
            return func(*args, **named | {"dtype": torch.float32}).double()
        return func(*args, **named)
