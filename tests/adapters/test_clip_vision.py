"""CLIP's image encoder against the reference: every hidden state, the projection, configs and names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection

import kolors_core
from kolors_core.adapters.clip_vision import CLIPVision, CLIPVisionConfig
from tests.support.parity import assert_parity, first_divergence, pair, reference_clip, transfer
from tests.support.published import IMAGE_ENCODER, IMAGE_ENCODER_CONFIG, configs
from tests.support.small import EXACT, FLOAT32, SMALL_CLIP, randomise, relative_error
from weights_convert import TABLES, detect_component
from weights_convert.__main__ import convert

pytestmark = pytest.mark.numerical

Spoil = Callable[[CLIPVision, nn.Module], object]


def pixels(batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    side = SMALL_CLIP.image_size
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 3, side, side, generator=generator, dtype=torch.float64).to(dtype)


@torch.no_grad()
def compare_all(dtype: torch.dtype, tolerance: float, spoil: Spoil = lambda ours, theirs: None) -> None:
    """Every state and the projection of both; a failure names the first module that differs."""
    ours, theirs = pair("image_encoder", dtype)
    spoil(ours, theirs)
    images = pixels(dtype=dtype)
    run = lambda: ours(images, output_hidden_states=True), lambda: theirs(images, output_hidden_states=True)

    def explain() -> str:
        return first_divergence(ours, theirs, "image_encoder", *run, tolerance)

    mine, other = run[0](), run[1]()
    assert len(mine.hidden_states) == len(other.hidden_states) == SMALL_CLIP.layers + 1
    for state, other_state in zip(mine.hidden_states, other.hidden_states, strict=True):
        assert_parity(state, other_state, tolerance, explain)
    assert_parity(mine.last_hidden_state, other.last_hidden_state, tolerance, explain)
    assert_parity(mine.image_embeds, other.image_embeds, tolerance, explain)
    assert_parity(ours.penultimate(images), other.hidden_states[-2], tolerance, explain)


def test_it_equals_the_reference() -> None:
    compare_all(torch.float64, EXACT)
    compare_all(torch.float32, FLOAT32)


def wrong_eps(ours: CLIPVision, theirs: nn.Module) -> None:
    ours.layers[1].mlp_norm.eps = 1e-6


def wrong_activation(ours: CLIPVision, theirs: nn.Module) -> None:
    theirs.vision_model.encoder.layers[0].mlp.activation_fn = nn.GELU()


def swapped_norms(ours: CLIPVision, theirs: nn.Module) -> None:
    ours.norm_in, ours.norm_out = ours.norm_out, ours.norm_in


def wrong_last_eps(ours: CLIPVision, theirs: nn.Module) -> None:
    ours.norm_out.eps = 1e-6


@pytest.mark.parametrize(
    ("spoil", "module"),
    [
        (wrong_eps, r"layers.1.mlp_norm \(vision_model.encoder.layers.1.layer_norm2 in the reference\)"),
        (wrong_activation, r"layers.0.mlp.proj_out \(vision_model.encoder.layers.0.mlp.fc2"),
        (swapped_norms, r"norm_in \(vision_model.pre_layrnorm"),
        (wrong_last_eps, r"norm_out \(vision_model.post_layernorm"),
    ],
)
def test_parity_can_fail_and_names_the_module(spoil: Spoil, module: str) -> None:
    with pytest.raises(AssertionError, match=f"first divergence: {module}"):
        compare_all(torch.float64, EXACT, spoil)


@torch.no_grad()
def test_scripts_for_the_reference_find_what_they_read() -> None:
    ours, _ = pair("image_encoder", torch.float32)
    images = pixels(dtype=torch.float32)
    output = ours(pixel_values=images)
    assert output.hidden_states is None
    assert output.image_embeds.shape == (2, SMALL_CLIP.projection_dim)
    with_states = ours(images, output_hidden_states=True)
    assert with_states.hidden_states[-2].shape == (2, SMALL_CLIP.tokens, SMALL_CLIP.hidden_size)
    assert torch.equal(with_states.hidden_states[-1], output.last_hidden_state)
    half = ours.to(torch.bfloat16)
    assert half.penultimate(images).dtype == torch.bfloat16, (
        "pixels take the model's dtype, as in transformers"
    )


@torch.no_grad()
def test_penultimate_does_not_compute_the_last_layer() -> None:
    ours, _ = pair("image_encoder", torch.float64)
    before = ours.penultimate(pixels())
    for part in (ours.layers[-1], ours.norm_out, ours.projection):
        for parameter in part.parameters():
            parameter.fill_(float("nan"))
    assert torch.equal(ours.penultimate(pixels()), before)


@pytest.mark.parametrize("shape", [(2, 3, 28, 35), (2, 1, 28, 28), (3, 28, 28), (1, 3, 336, 336)])
@pytest.mark.exact
def test_pixels_of_another_shape_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \[B, 3, 28, 28\], got \[" + ", ".join(map(str, shape))):
        CLIPVision(SMALL_CLIP).penultimate(torch.zeros(shape))


@pytest.mark.exact
def test_public_and_back() -> None:
    for config in (CLIPVisionConfig(), SMALL_CLIP):
        assert CLIPVisionConfig.from_public(config.to_public()) == config
    assert CLIPVisionConfig().tokens == 577


@pytest.mark.parametrize("public", configs(IMAGE_ENCODER, IMAGE_ENCODER_CONFIG))
@pytest.mark.exact
def test_the_real_config_is_the_default(public: dict[str, Any]) -> None:
    assert CLIPVisionConfig.from_public(public) == CLIPVisionConfig()
    assert public.items() >= IMAGE_ENCODER_CONFIG.items()


def test_what_the_reference_saves_is_read(tmp_path: Path) -> None:
    theirs = reference_clip(SMALL_CLIP)
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert CLIPVisionConfig.from_public(saved) == SMALL_CLIP
    full = json.loads(theirs.config.to_json_string(use_diff=False))
    assert CLIPVisionConfig.from_public(full) == SMALL_CLIP
    weights = load_file(tmp_path / "model.safetensors")
    assert detect_component(weights, "here") == (TABLES["image_encoder"], False)
    ours = CLIPVision(SMALL_CLIP)
    transfer(theirs, ours, "image_encoder")
    table = TABLES["image_encoder"]
    assert all(torch.equal(ours.state_dict()[table.to_ours(name)], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'quick_gelu'"),
        ({"model_type": "siglip_vision_model"}, "model_type is 'siglip_vision_model', expected 'clip_vision"),
        ({"model_type": "clip"}, "vision_config: the field image_size is missing"),
        (
            {"model_type": "clip", "vision_config": 3},
            "vision_config is 3, expected the fields of the image enc",
        ),
        ({"num_channels": 1}, "num_channels is 1, expected 3"),
        ({"image_size": [336, 336]}, r"image_size is \[336, 336\], expected a positive whole number"),
        ({"patch_size": 337}, "patch_size is 337, expected a positive whole number up to 336"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a positive whole number"),
        ({"num_attention_heads": 15}, "hidden_size is 1024, expected a multiple of the 15 heads"),
        ({"layer_norm_eps": None}, "layer_norm_eps is None, expected a positive number"),
        ({"use_head": True}, "use_head is True, expected no such field"),
    ],
    ids=str,
)
@pytest.mark.exact
def test_another_image_encoder_is_refused_by_its_field(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"image_encoder/config.json: {message}"):
        CLIPVisionConfig.from_public(CLIPVisionConfig().to_public() | change)


@pytest.mark.exact
def test_a_size_left_out_is_demanded_and_what_both_take_alike_is_not() -> None:
    public = CLIPVisionConfig().to_public()
    alike = {"architectures", "model_type", "hidden_act", "num_channels", "layer_norm_eps"}
    assert (
        CLIPVisionConfig.from_public({k: v for k, v in public.items() if k not in alike})
        == CLIPVisionConfig()
    )
    for missing in public.keys() - alike:
        with pytest.raises(ValueError, match=f"the field {missing} is missing"):
            CLIPVisionConfig.from_public({k: v for k, v in public.items() if k != missing})


def test_of_a_whole_clip_the_image_encoder_is_read(tmp_path: Path) -> None:
    """As the reference does: the text's half is dropped, with a reason."""
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=SMALL_CLIP.to_public(), projection_dim=48))
    randomise(whole)
    whole.save_pretrained(tmp_path)
    theirs = CLIPVisionModelWithProjection.from_pretrained(tmp_path).eval()
    ours = kolors_core.CLIPVisionModelWithProjection.from_pretrained(tmp_path)
    images = pixels(dtype=torch.float32)
    with torch.no_grad():
        other = theirs(images, output_hidden_states=True)
        assert relative_error(ours(images).image_embeds, other.image_embeds) < FLOAT32
        assert relative_error(ours.penultimate(images), other.hidden_states[-2]) < FLOAT32
    report = convert(tmp_path / "model.safetensors", tmp_path / "converted.safetensors")
    assert any("text_model.embeddings" in line and "reads prompts with ChatGLM" in line for line in report)
    convert(tmp_path / "converted.safetensors", tmp_path / "back.safetensors", to_public=True)
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "back.safetensors").read_bytes()


@pytest.mark.exact
def test_one_without_projection_is_named() -> None:
    names = [name for name in reference_clip(SMALL_CLIP).state_dict() if name.startswith("vision_model.")]
    with pytest.raises(ValueError, match="visual_projection.weight is missing .it makes image_embeds"):
        detect_component(names, "here")


@pytest.mark.exact
def test_position_numbers_of_older_files_are_dropped_with_a_reason() -> None:
    name = "vision_model.embeddings.position_ids"
    table, theirs = TABLES["image_encoder"], reference_clip(SMALL_CLIP)
    theirs.vision_model.embeddings.register_buffer(
        "position_ids", torch.arange(SMALL_CLIP.tokens)[None], persistent=True
    )
    assert name in theirs.state_dict() and table.to_ours(name) == f"unused.{name}" and table.dropped[name]
    ours = CLIPVision(SMALL_CLIP)
    transfer(theirs, ours, "image_encoder")
    with torch.no_grad():
        images = pixels(dtype=torch.float32)
        assert relative_error(ours(images).image_embeds, theirs(images).image_embeds) <= FLOAT32
    assert not list(ours.buffers()), "a buffer would stay on the meta device"
