"""Configs of all models, as frozen dataclasses; the defaults are the released Kolors.

`from_public` reads the `config.json` of a public checkpoint and rejects what we would compute differently;
`to_public` writes one that the reference reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from kolors_core.validation import MAX_COUNT, is_real, short_repr

EMBEDDED_NAME = "tiny"  # of the small Kolors in this package, wherever a checkpoint is named
VERSION = "0.1.0"
PublicConfig = Mapping[str, Any]  # the content of a public `config.json`


class ConfigDict(dict[str, Any]):
    """Dict whose items are attributes too, as scripts written for the reference expect of a `.config`."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"the config has no field {name!r}")
        return self[name]


@dataclass(frozen=True, kw_only=True)
class ChatGLMConfig:
    """Config of ChatGLM3-6B as a text encoder. num_kv_heads: K/V heads, each shared by a group of heads."""

    vocab_size: int = 65024
    hidden_size: int = 4096
    feed_forward_size: int = 13696
    layers: int = 28
    heads: int = 32
    head_dim: int = 128
    num_kv_heads: int = 2
    norm_eps: float = 1e-5

    @classmethod
    def from_public(cls, public: PublicConfig, where: str = "text_encoder/config.json") -> Self:
        """Read the `config.json` of ChatGLM3, or of a ChatGLMModel saved by transformers."""
        fields = ConfigReader(public, where)
        fields.require_fixed(_CHATGLM_REQUIRED_VALUES)
        config = cls(
            vocab_size=fields.integer("padded_vocab_size"), hidden_size=fields.integer("hidden_size"),
            feed_forward_size=fields.integer("ffn_hidden_size"),
            layers=fields.integer("num_layers", most=1000), head_dim=fields.integer("kv_channels", most=4096),
            heads=fields.integer("num_attention_heads", most=4096),
            num_kv_heads=fields.integer("multi_query_group_num"), norm_eps=fields.number("layernorm_epsilon"),
        )  # fmt: skip
        fields.reject_unknown(_CHATGLM_IGNORED_FIELDS)
        if (heads := config.heads) % config.num_kv_heads:
            fields.reject("multi_query_group_num", config.num_kv_heads, f"a divisor of the {heads} heads")
        if (width := config.head_dim) % 4:
            fields.reject("kv_channels", width, "a multiple of 4, since half of it is rotated in pairs")
        return config

    def to_public(self) -> dict[str, Any]:
        """Return the `config.json` that the reference's ChatGLMModel reads."""
        return {
            **_CHATGLM_REQUIRED_VALUES, "architectures": ["ChatGLMModel"], "seq_length": 32768,
            "padded_vocab_size": self.vocab_size, "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.feed_forward_size, "num_layers": self.layers,
            "num_attention_heads": self.heads, "kv_channels": self.head_dim,
            "multi_query_group_num": self.num_kv_heads, "layernorm_epsilon": self.norm_eps,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Config of the denoiser. Tuples have one entry a level, outermost first; depth 0 means no attention."""

    sample_size: int = 128
    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280)
    heads: tuple[int, ...] = (5, 10, 20)
    depths: tuple[int, ...] = (0, 2, 10)
    resnets_per_level: int = 2
    text_dim: int = 4096  # width of a text token and of the pooled text
    context_dim: int = 2048  # width that cross-attentions read
    size_dim: int = 256  # sinusoid width of each of the six size ids
    norm_groups: int = 32
    norm_eps: float = 1e-5

    @property
    def time_dim(self) -> int:
        """Width of the time embedding: four times the outermost level's."""
        return 4 * self.channels[0]

    @classmethod
    def from_public(cls, public: PublicConfig, where: str = "unet/config.json") -> Self:
        """Read diffusers' `UNet2DConditionModel` config; ValueError for SDXL's or Stable Diffusion's."""
        fields = ConfigReader(public, where)
        fields.require_fixed(_UNET_REQUIRED_VALUES)
        levels = len(channels := fields.integers("block_out_channels"))
        has_attention = fields.attention_per_level("Down", levels)
        if fields.attention_per_level("Up", levels) != has_attention[::-1]:
            fields.reject("up_block_types", public["up_block_types"], "the down blocks mirrored")
        if not has_attention[-1]:
            fields.reject("down_block_types", public["down_block_types"], "attention at the innermost level")
        depths = fields.integers("transformer_layers_per_block", levels, most=100)
        # diffusers' UNet configs misname the number of heads: attention_head_dim.
        is_named = public.get("num_attention_heads") is not None
        heads = fields.integers("num_attention_heads" if is_named else "attention_head_dim", levels)
        text_dim, size_dim = fields.integer("encoder_hid_dim"), fields.integer("addition_time_embed_dim")
        fields.require_equal("projection_class_embeddings_input_dim", text_dim + 6 * size_dim)
        config = cls(
            sample_size=fields.integer("sample_size"), in_channels=fields.integer("in_channels"),
            out_channels=fields.integer("out_channels"), channels=channels, heads=heads,
            depths=tuple(depth if on else 0 for depth, on in zip(depths, has_attention, strict=True)),
            resnets_per_level=fields.single_integer("layers_per_block", levels, most=100), text_dim=text_dim,
            context_dim=fields.single_integer("cross_attention_dim", levels), size_dim=size_dim,
            norm_groups=fields.integer("norm_num_groups"), norm_eps=fields.number("norm_eps"),
        )  # fmt: skip
        fields.reject_unknown(_UNET_IGNORED_FIELDS)
        if (blocks := sum(config.depths) * (2 * config.resnets_per_level + 1)) > 1000:
            fields.reject("transformer_layers_per_block", list(depths), f"up to 1,000 in all, not {blocks:,}")
        for width, heads in zip(config.channels, config.heads, strict=True):
            if width % config.norm_groups or width % heads:
                expected = f"multiples of the {config.norm_groups} norm groups and of the heads"
                fields.reject("block_out_channels", list(channels), f"{expected} {config.heads}")
        return config

    def to_public(self) -> dict[str, Any]:
        """Return the `config.json` that diffusers' UNet2DConditionModel reads."""
        attends = [depth > 0 for depth in self.depths]
        return {
            **_UNET_REQUIRED_VALUES, "sample_size": self.sample_size, "in_channels": self.in_channels,
            "out_channels": self.out_channels, "block_out_channels": list(self.channels),
            "attention_head_dim": list(self.heads),
            "transformer_layers_per_block": [max(depth, 1) for depth in self.depths],
            "down_block_types": ["CrossAttnDownBlock2D" if on else "DownBlock2D" for on in attends],
            "up_block_types": ["CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(attends)],
            "layers_per_block": self.resnets_per_level, "cross_attention_dim": self.context_dim,
            "encoder_hid_dim": self.text_dim, "addition_time_embed_dim": self.size_dim,
            "projection_class_embeddings_input_dim": self.text_dim + 6 * self.size_dim,
            "norm_num_groups": self.norm_groups, "norm_eps": self.norm_eps,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Config of SDXL's autoencoder. scaling_factor: scales the latents to unit variance."""

    sample_size: int = 1024
    image_channels: int = 3
    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)
    resnets_per_level: int = 2
    norm_groups: int = 32
    scaling_factor: float = 0.13025

    @property
    def vae_scale_factor(self) -> int:
        """Number of pixels per latent, along each side."""
        return 2 ** (len(self.channels) - 1)

    @classmethod
    def from_public(cls, public: PublicConfig, where: str = "vae/config.json") -> Self:
        """Read diffusers' `AutoencoderKL` config."""
        fields = ConfigReader(public, where)
        fields.require_fixed(_VAE_REQUIRED_VALUES)
        channels = fields.integers("block_out_channels")
        fields.require_equal("down_block_types", ["DownEncoderBlock2D"] * len(channels))
        fields.require_equal("up_block_types", ["UpDecoderBlock2D"] * len(channels))
        fields.require_equal("out_channels", fields.integer("in_channels"))
        config = cls(
            sample_size=fields.integer("sample_size"), image_channels=fields.integer("in_channels"),
            latent_channels=fields.integer("latent_channels"), channels=channels,
            resnets_per_level=fields.integer("layers_per_block", most=100),
            norm_groups=fields.integer("norm_num_groups"), scaling_factor=fields.number("scaling_factor"),
        )  # fmt: skip
        fields.reject_unknown(_VAE_IGNORED_FIELDS)
        if any(width % config.norm_groups for width in channels):
            groups = config.norm_groups
            fields.reject("block_out_channels", list(channels), f"multiples of the {groups} norm groups")
        return config

    def to_public(self) -> dict[str, Any]:
        """Return the `config.json` that diffusers' AutoencoderKL reads."""
        levels = len(self.channels)
        return {
            **_VAE_REQUIRED_VALUES, "force_upcast": True, "sample_size": self.sample_size,
            "in_channels": self.image_channels, "out_channels": self.image_channels,
            "latent_channels": self.latent_channels, "block_out_channels": list(self.channels),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels, "layers_per_block": self.resnets_per_level,
            "norm_num_groups": self.norm_groups, "scaling_factor": self.scaling_factor,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class KolorsConfig:
    """Configs of the three models of one Kolors, whose widths match."""

    text_encoder: ChatGLMConfig = ChatGLMConfig()
    unet: UNetConfig = UNetConfig()
    vae: VAEConfig = VAEConfig()


KOLORS = KolorsConfig()
TINY = KolorsConfig(
    text_encoder=ChatGLMConfig(
        vocab_size=2048, hidden_size=192, feed_forward_size=384, layers=3, heads=6, head_dim=32,
        num_kv_heads=2,
    ),
    unet=UNetConfig(
        sample_size=16, channels=(64, 96, 160), heads=(2, 3, 5), depths=(0, 1, 1), resnets_per_level=1,
        text_dim=192, context_dim=192, size_dim=32,
    ),
    vae=VAEConfig(sample_size=128, channels=(16, 32, 64, 96), resnets_per_level=1, norm_groups=8),
)  # fmt: skip


class ConfigReader:
    """Reader of a public config: checks each field, remembers which were read, and rejects the others."""

    def __init__(self, public: PublicConfig, where: str) -> None:
        if not isinstance(public, Mapping):
            raise TypeError(f"{where}: expected the fields of a config, got {short_repr(public)}")
        self.public, self.where, self.read_names = public, where, set[str]()

    def reject(self, name: str, got: Any, expected: str) -> None:
        """Raise the ValueError that names the config and the field, its value and the expected one."""
        field = name if name.isprintable() and len(name) <= 100 else repr(name[:100])
        raise ValueError(f"{self.where}: {field} is {short_repr(got)}, expected {expected}")

    def integer(self, name: str, most: int = MAX_COUNT) -> int:
        """Read a positive integer; `most` bounds it before a model with that many modules is built."""
        value = self._get(name)
        if not _is_count(value, most):
            self.reject(name, value, f"a positive whole number up to {most:,}")
        return value

    def integers(self, name: str, length: int | None = None, most: int = MAX_COUNT) -> tuple[int, ...]:
        """Read a list of positive integers; where `length` is known, a single number stands for all."""
        value = self._get(name)
        values = [value] * length if length is not None and isinstance(value, int) else value
        lengths = range(1, 16) if length is None else (length,)
        fits = isinstance(values, list | tuple) and len(values) in lengths
        if not fits or not all(_is_count(number, most) for number in values):
            self.reject(name, value, f"{length or 'some'} positive whole numbers")
        return tuple(values)

    def single_integer(self, name: str, length: int, most: int = MAX_COUNT) -> int:
        """Read a positive integer, which the reference may also write once for each level."""
        values = self.integers(name, length, most)
        if len(set(values)) > 1:
            self.reject(name, list(values), "one number for all levels")
        return values[0]

    def number(self, name: str, most: float = 1e6) -> float:
        """Read a positive number."""
        value = self._get(name)
        if not is_real(value) or not 0 < value <= most:
            self.reject(name, value, f"a positive number up to {most:g}")
        return float(value)

    def attention_per_level(self, path: str, length: int) -> list[bool]:
        """Read, for each level of the "Down" or "Up" path, whether its blocks have attention."""
        name, with_attention = f"{path.lower()}_block_types", f"CrossAttn{path}Block2D"
        value, allowed = self._get(name), (f"{path}Block2D", with_attention)
        fits = isinstance(value, list | tuple) and len(value) == length
        if not fits or any(kind not in allowed for kind in value):
            self.reject(name, value, f"{length} of {' and '.join(allowed)}")
        return [kind == with_attention for kind in value]

    def require_equal(self, name: str, expected: Any) -> None:
        """Raise ValueError if the field has another value."""
        value = self._get(name)
        if (list(value) if isinstance(value, tuple) else value) != expected:
            self.reject(name, value, repr(expected))

    def require_fixed(self, fixed: PublicConfig) -> None:
        """Raise ValueError if one of these fields, which may be absent, has another value."""
        for name, expected in fixed.items():
            self.read_names.add(name)
            value = self.public.get(name, expected)
            is_off = value is None or value is False or value == [False] * 3  # once, or for each level
            if value != expected and not (is_off and (expected is None or expected is False)):
                self.reject(name, value, repr(expected))

    def reject_unknown(self, ignored: set[str]) -> None:
        """Raise ValueError for an unknown field that is switched on: it would change the model."""
        for name, value in self.public.items():
            known = name in self.read_names or name in ignored or name.startswith("_")
            if not known and value is not None and value is not False:
                self.reject(name, value, "no such field, or null: its meaning is not known here")

    def _get(self, name: str) -> Any:
        self.read_names.add(name)
        if name not in self.public:
            raise ValueError(f"{self.where}: the field {name} is missing")
        return self.public[name]


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most


# The values that the code implements. A public config may leave a field out, but not set another value.
_CHATGLM_REQUIRED_VALUES: dict[str, Any] = {
    "model_type": "chatglm", "add_bias_linear": False, "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False, "fp32_residual_connection": False,
    "multi_query_attention": True, "original_rope": True, "post_layer_norm": True, "rmsnorm": True,
    "quantization_bit": 0, "rope_ratio": 1, "pre_seq_len": None,
}  # fmt: skip
# Fields that transformers writes for any model, or that only training and text generation read.
TRANSFORMERS_IGNORED_FIELDS = {
    "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "tie_word_embeddings",
    "attention_dropout", "return_dict", "output_hidden_states", "output_attentions",
    "chunk_size_feed_forward", "id2label", "label2id", "is_encoder_decoder", "is_decoder", "pruned_heads",
    "problem_type", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "max_length",
    "min_length", "num_beams", "num_beam_groups", "num_return_sequences", "do_sample", "temperature", "top_k",
    "top_p", "typical_p", "repetition_penalty", "length_penalty", "diversity_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "early_stopping", "finetuning_task",
}  # fmt: skip
_CHATGLM_IGNORED_FIELDS = TRANSFORMERS_IGNORED_FIELDS | {
    "apply_query_key_layer_scaling", "attention_softmax_in_fp32", "hidden_dropout", "classifier_dropout",
    "bias_dropout_fusion", "seq_length", "use_cache", "vocab_size", "prefix_projection",
}  # fmt: skip
_UNET_REQUIRED_VALUES: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel", "addition_embed_type": "text_time",
    "encoder_hid_dim_type": "text_proj", "use_linear_projection": True, "act_fn": "silu",
    "class_embed_type": None, "conv_in_kernel": 3, "conv_out_kernel": 3, "center_input_sample": False,
    "cross_attention_norm": None, "downsample_padding": 1, "dual_cross_attention": False,
    "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False, "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None, "time_cond_proj_dim": None, "time_embedding_act_fn": None,
    "time_embedding_dim": None, "time_embedding_type": "positional", "timestep_post_act": None,
    "attention_type": "default", "num_class_embeds": None,
}  # fmt: skip
_UNET_IGNORED_FIELDS = {
    "addition_embed_type_num_heads", "class_embeddings_concat", "dropout", "upcast_attention",
    "attention_head_dim",
}  # fmt: skip
_VAE_REQUIRED_VALUES: dict[str, Any] = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "latents_mean": None, "latents_std": None,
    "shift_factor": None, "mid_block_add_attention": True, "use_quant_conv": True,
    "use_post_quant_conv": True,
}  # fmt: skip
_VAE_IGNORED_FIELDS = {"force_upcast"}
