"""Models under the reference's names: our plain models, which may also be called as the reference's are.

Each has the parameters and the `forward` of the plain model that it extends, and takes its place anywhere.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from kolors_core.adapters.clip_vision import IMAGE_ENCODER
from kolors_core.adapters.controlnet_files import KolorsControlNet
from kolors_core.adapters.freeu import FreeUMethods
from kolors_core.chatglm import ChatGLM, rotary_cos_sin
from kolors_core.chatglm import attention_mask as causal_or_pad
from kolors_core.checkpoint import ModelSpec
from kolors_core.compat import configs
from kolors_core.compat.model_methods import ModelMethods
from kolors_core.compat.model_outputs import (
    AutoencoderKLOutput,
    ChatGLMOutput,
    ControlNetOutput,
    DecoderOutput,
    DiagonalGaussianDistribution,
    UNet2DConditionOutput,
)
from kolors_core.context import Context
from kolors_core.performance import vae_tiling
from kolors_core.sampling import Generators
from kolors_core.unet import UNet
from kolors_core.vae import VAE, LatentDistribution, check_sides
from kolors_core.validation import short_repr


class CalledWithConditions(ModelMethods):
    """Model that a call runs by `predict`, as the reference's, if it has `added_cond_kwargs`."""

    predict: Callable[..., Any]

    def __call__(
        self, *inputs: Any, added_cond_kwargs: Mapping[str, Tensor] | None = None, **named: Any
    ) -> Any:
        """Call `predict` with `added_cond_kwargs`, and without them `forward`, our own."""
        if added_cond_kwargs is None:
            return super().__call__(*inputs, **named)
        return self.predict(*inputs, added_cond_kwargs=added_cond_kwargs, **named)


class UNet2DConditionModel(CalledWithConditions, FreeUMethods, UNet):
    """UNet that may also be called as the reference's: with `added_cond_kwargs`."""

    component, config_type = "unet", configs.UNetConfig

    @property
    def unet(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride] (a pipeline sets it)
        """The model itself, for `enable_freeu`, which a pipeline has too."""
        return self

    @property
    def in_channels(self) -> int:
        """The channels of the input, as scripts read them before `config.in_channels`."""
        return self.config.in_channels

    def predict(
        self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor, *,
        class_labels: None = None, down_intrablock_additional_residuals: None = None,
        added_cond_kwargs: Mapping[str, Tensor], timestep_cond: None = None, attention_mask: None = None,
        encoder_attention_mask: Tensor | None = None, cross_attention_kwargs: Mapping[str, Any] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None, return_dict: bool = True,
    ) -> Any:  # fmt: skip
        """Predict the noise in `sample` as the reference's UNet is asked for it: `.sample`, or a tuple.

        added_cond_kwargs: `text_embeds` [B, text_dim] and `time_ids` [B, 6]. encoder_attention_mask: [B, S],
        1 for tokens that count. The residuals of ControlNets belong together.
        """
        _refuse(
            cross_attention_kwargs, timestep_cond=timestep_cond, attention_mask=attention_mask,
            class_labels=class_labels,
            down_intrablock_additional_residuals=down_intrablock_additional_residuals,
        )  # fmt: skip
        down, mid = down_block_additional_residuals, mid_block_additional_residual
        if (down is None) != (mid is None):
            raise ValueError("expected the residuals of both the down blocks and the middle, or of neither")
        noise = self(
            sample, torch.as_tensor(timestep, device=sample.device), encoder_hidden_states,
            *_pooled_and_sizes(added_cond_kwargs),
            None if encoder_attention_mask is None else encoder_attention_mask.float(),
            residuals=() if down is None else [*down, mid],
        )  # fmt: skip
        return UNet2DConditionOutput(noise) if return_dict else (noise,)


class ControlNetModel(CalledWithConditions, KolorsControlNet):  # pyright: ignore[reportIncompatibleMethodOverride]
    """ControlNet that may also be called as the reference's: with `added_cond_kwargs`."""

    component, config_type = "controlnet", configs.ControlNetConfig

    def predict(
        self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor,
        controlnet_cond: Tensor, conditioning_scale: float = 1.0, *,
        added_cond_kwargs: Mapping[str, Tensor], class_labels: None = None, timestep_cond: None = None,
        attention_mask: None = None, cross_attention_kwargs: Mapping[str, Any] | None = None,
        guess_mode: bool = False, return_dict: bool = True,
    ) -> Any:  # fmt: skip
        """Compute the residuals as the reference's ControlNet is asked for them: by name, or a tuple of two.

        encoder_hidden_states: [B, S, text_dim], or projected already, [B, S, cross_attention_dim].
        guess_mode: scale the residuals by 0.1 at the outermost level, rising to 1 in the middle.
        """
        _refuse(
            cross_attention_kwargs, timestep_cond=timestep_cond, attention_mask=attention_mask,
            class_labels=class_labels,
        )  # fmt: skip
        pooled, sizes = _pooled_and_sizes(added_cond_kwargs)
        times = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        time = self.embed_time(times) + self.added_embedding(pooled, sizes)  # [B, T]
        text = encoder_hidden_states
        is_projected = text.shape[-1] != self.config.text_dim
        context = Context(text) if is_projected else self.context(text, None)
        image = self.image_embedding(controlnet_cond)
        residuals = self.residuals(sample, image, repeat(time), repeat(context))
        rising = (torch.logspace(-1, 0, len(residuals)) * conditioning_scale).tolist()
        scales = rising if guess_mode else repeat(conditioning_scale)
        *down, mid = (scale * r for r, scale in zip(residuals, scales, strict=False))
        return ControlNetOutput(tuple(down), mid) if return_dict else (down, mid)


class AutoencoderKL(ModelMethods, VAE):
    """VAE, whose `encode` and `decode` are the reference's: of latents that are not scaled."""

    component, config_type = "vae", configs.VAEConfig

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Encode images [B, 3, H, W] in [-1, 1] to a distribution of latents: `.latent_dist`, or a tuple."""
        moments = self.quant_conv(self._run(self.encoder, x.to(self.dtype)))
        distribution = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(distribution) if return_dict else (distribution,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """Decode latents [B, 4, H/8, W/8] to images: `.sample`, or a tuple. generator: has no effect."""
        images = self._run(self.decoder, self.post_quant_conv(z.to(self.dtype)))
        return DecoderOutput(images) if return_dict else (images,)

    def encode_images(self, images: Tensor) -> LatentDistribution:
        """Encode images for a pipeline, by `encode`, which a script may have compiled or replaced."""
        check_sides(images, self.config.vae_scale_factor)
        found, scale = self.encode(images).latent_dist, self.config.scaling_factor
        return LatentDistribution(found.mean * scale, found.std * scale)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode scaled latents for a pipeline, by `decode`, which a script may have compiled or replaced."""
        return self.decode(latents / self.config.scaling_factor, return_dict=False)[0]

    def forward(
        self, sample: Tensor, sample_posterior: bool = False, return_dict: bool = True,
        generator: Generators = None,
    ) -> Any:  # fmt: skip
        """Encode images and decode the mean of their latents, or a sample of them."""
        latents = self.encode(sample).latent_dist
        return self.decode(latents.sample(generator) if sample_posterior else latents.mode(), return_dict)

    @property
    def use_tiling(self) -> bool:
        """Whether large images are run in tiles."""
        return getattr(self.run_coder, "use_tiling", False)

    @property
    def use_slicing(self) -> bool:
        """Whether one image of a batch is run after another."""
        return getattr(self.run_coder, "use_slicing", False)

    def enable_tiling(self) -> None:
        """Run large images in tiles, with the same result up to rounding; see performance/vae_tiling.py."""
        vae_tiling.enable_tiling(self)

    def disable_tiling(self) -> None:
        """Run images whole again."""
        vae_tiling.disable_tiling(self)

    def enable_slicing(self) -> None:
        """Run one image of a batch after another."""
        vae_tiling.enable_slicing(self)

    def disable_slicing(self) -> None:
        """Run batches whole again."""
        vae_tiling.disable_slicing(self)


class ChatGLMModel(ModelMethods, ChatGLM):
    """ChatGLM that may also be called as the reference's: with token ids in place of a `TokenBatch`."""

    component, config_type = "text_encoder", configs.ChatGLMConfig

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Call `hidden_states` with token ids [B, L], and with a `TokenBatch` `forward`, our own."""
        is_own = "input_ids" not in named and not (inputs and isinstance(inputs[0], Tensor))
        return super().__call__(*inputs, **named) if is_own else self.hidden_states(*inputs, **named)

    def gradient_checkpointing_enable(self) -> None:
        """Recompute activations in the backward pass, by the name that text encoders have for it."""
        self.enable_gradient_checkpointing()

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations for the backward pass again."""
        self.disable_gradient_checkpointing()

    def hidden_states(
        self, input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None, *,
        use_cache: bool = False, output_hidden_states: bool = True, return_dict: bool = True,
    ) -> Any:  # fmt: skip
        """Compute the embeddings and each layer's output, each [L, B, C]: `.hidden_states`, or a tuple of it.

        attention_mask: [B, L], 1 for tokens and 0 for pads; all are tokens if None. position_ids: [B, L], 0,
        1, 2, ... if None. There is no final norm, so without hidden states nothing is left to return.
        """
        if not output_hidden_states:
            raise ValueError("output_hidden_states=False leaves nothing to return: there is no final norm")
        is_token = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        columns = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
        positions = columns if position_ids is None else position_ids
        states = [self.embedding(input_ids)]  # [B, L, C]
        rotation = rotary_cos_sin(positions, self.config.head_dim // 2, states[0].dtype)
        allowed = causal_or_pad(is_token.bool())
        for layer in self.layers:
            states.append(layer(states[-1], rotation, allowed))
        output = ChatGLMOutput(tuple(state.transpose(0, 1) for state in states))  # [L, B, C]
        return output if return_dict else output.to_tuple()


def _pooled_and_sizes(added_cond_kwargs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return pooled text and size ids; ValueError for other conditions."""
    if set(added_cond_kwargs) != {"text_embeds", "time_ids"}:
        got = ", ".join(map(str, added_cond_kwargs)) or "none"
        raise ValueError(f"added_cond_kwargs must be text_embeds and time_ids, got {got}")
    return added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]


def _refuse(cross_attention_kwargs: Mapping[str, Any] | None, **given: Any) -> None:
    """Raise ValueError for an argument that would change the result and that Kolors has no input for."""
    for name, value in (cross_attention_kwargs or {}).items():
        given[f"cross_attention_kwargs[{name!r}]"] = None if name == "scale" and value == 1 else value
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} has no place in this call, got {short_repr(value)}")


MODEL_SPECS = {
    model.component: ModelSpec(model.config_type, model)
    for model in (ChatGLMModel, UNet2DConditionModel, AutoencoderKL)
} | {"image_encoder": IMAGE_ENCODER}
