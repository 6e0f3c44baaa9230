"""Configs: those the reference writes are read; those of another computation are rejected."""

import json
from typing import Any

import pytest

from kolors_core.config import KOLORS, TINY, ChatGLMConfig, UNetConfig, VAEConfig
from tests.support.parity import reference_chatglm, reference_unet, reference_vae
from tests.support.published import TEXT_ENCODER, TEXT_ENCODER_CONFIG, configs
from tests.support.small import SMALL


@pytest.mark.parametrize("config", [KOLORS, TINY, SMALL], ids=["kolors", "tiny", "small"])
def test_public_and_back(config: Any) -> None:
    for part in (config.text_encoder, config.unet, config.vae):
        assert type(part).from_public(part.to_public()) == part


def test_what_the_reference_writes_is_read() -> None:
    assert UNetConfig.from_public(dict(reference_unet(SMALL.unet).config)) == SMALL.unet
    assert VAEConfig.from_public(dict(reference_vae(SMALL.vae).config)) == SMALL.vae
    written = json.loads(reference_chatglm(SMALL.text_encoder).config.to_json_string(use_diff=False))
    assert ChatGLMConfig.from_public(written) == SMALL.text_encoder


@pytest.mark.parametrize("public", configs(TEXT_ENCODER, TEXT_ENCODER_CONFIG))
def test_the_real_text_encoders_config_is_the_default(public: dict[str, Any]) -> None:
    assert ChatGLMConfig.from_public(public) == ChatGLMConfig()
    assert public.items() >= TEXT_ENCODER_CONFIG.items()


@pytest.mark.parametrize(
    "change",
    [
        {
            "cross_attention_dim": [2048] * 3,
            "layers_per_block": [2, 2, 2],
            "only_cross_attention": [False] * 3,
        },
        {"mid_block_only_cross_attention": False, "num_attention_heads": None, "upcast_attention": None},
        {"num_attention_heads": [5, 10, 20], "attention_head_dim": 8},
        {
            "mid_block_scale_factor": 1.0,
            "_diffusers_version": "0.18.0.dev0",
            "_name_or_path": "x",
            "later": None,
        },
    ],
    ids=str,
)
def test_other_spellings_of_the_same_model(change: dict) -> None:
    assert UNetConfig.from_public(KOLORS.unet.to_public() | change) == KOLORS.unet


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_hid_dim_type": None}, "encoder_hid_dim_type is None, expected 'text_proj'"),
        ({"addition_embed_type": "text"}, "addition_embed_type is 'text', expected 'text_time'"),
        ({"projection_class_embeddings_input_dim": 2816}, "input_dim is 2816, expected 5632"),
        (
            {"block_out_channels": [320, 640, 1281]},
            "block_out_channels is .* expected multiples of the 32 norm",
        ),
        ({"block_out_channels": []}, "block_out_channels is \\[\\], expected some positive whole numbers"),
        ({"up_block_types": ["UpBlock2D"] * 3}, "up_block_types is .* expected the down blocks mirrored"),
        ({"layers_per_block": [2, 3, 2]}, "layers_per_block is .* expected one number for all levels"),
        ({"transformer_layers_per_block": [1, 2]}, "expected 3 positive whole numbers"),
        ({"norm_eps": 0}, "norm_eps is 0, expected a positive number"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256, expected None"),
        ({"later": 3}, "later is 3, expected no such field"),
    ],
    ids=str,
)
def test_another_unet_is_refused_by_its_field(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"unet/config.json: .*{message}"):
        UNetConfig.from_public(KOLORS.unet.to_public() | change)


def test_another_text_encoder_and_vae_are_refused() -> None:
    for field, value, message in (
        ("rmsnorm", False, "rmsnorm is False, expected True"),
        ("multi_query_group_num", 3, "multi_query_group_num is 3, expected a divisor of the 32 heads"),
        ("kv_channels", 127, "kv_channels is 127, expected a multiple of 4"),
        ("rope_ratio", 50, "rope_ratio is 50, expected 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ChatGLMConfig.from_public(KOLORS.text_encoder.to_public() | {field: value})
    for field, value, message in (
        ("shift_factor", 0.1, "shift_factor is 0.1, expected None"),
        ("out_channels", 4, "out_channels is 4, expected 3"),
        ("scaling_factor", float("nan"), "scaling_factor is nan, expected a positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            VAEConfig.from_public(KOLORS.vae.to_public() | {field: value})
