"""Models under the reference's names: called as the reference's are, they return what the reference's do."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from kolors_core import KolorsPipeline
from kolors_core.adapters.controlnet import ControlNet
from kolors_core.attention import forced_kernel
from kolors_core.chatglm import ChatGLM
from kolors_core.checkpoint import EMBEDDED, load_component
from kolors_core.compat import configs
from kolors_core.compat.models import (
    MODEL_SPECS,
    AutoencoderKL,
    ChatGLMModel,
    ControlNetModel,
    UNet2DConditionModel,
)
from kolors_core.config import TINY, UNetConfig
from kolors_core.performance.prompt_cache import Key
from kolors_core.pipelines.adapter_methods import MODELS
from kolors_core.precompute import has_default_forward
from kolors_core.tokenizer import Tokenizer
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from tests.support.controlnets import NET, net_pair
from tests.support.parity import assert_parity, pair
from tests.support.small import EXACT, SHALLOW, SMALL, randomise

pytestmark = pytest.mark.numerical
F64 = torch.float64
KINDS: dict[str, Any] = {
    "unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": ChatGLMModel,
    "controlnet": ControlNetModel,
}  # fmt: skip
CONFIGS: dict[str, Any] = {**vars(SMALL), "controlnet": NET}
PLAIN: dict[str, Any] = {"unet": UNet, "vae": VAE, "text_encoder": ChatGLM, "controlnet": ControlNet}


@cache
def both(component: str) -> tuple[Any, Any]:
    """Ours under the reference's name, and the reference's, with the same random weights."""
    ours, theirs = net_pair(1, F64) if component == "controlnet" else pair(component, F64)
    model = KINDS[component](ours.config).to(F64).eval()
    model.load_state_dict(ours.state_dict())
    return model, theirs


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


SAMPLE, TEXT = drawn(2, 4, 8, 12), drawn(2, 7, 64, seed=1)
ADDED = {
    "text_embeds": drawn(2, 64, seed=2),
    "time_ids": torch.tensor([[64.0, 96, 0, 0, 64, 96], [640, 960, 8, 16, 640, 960]], dtype=F64),
}
IMAGE = drawn(2, 3, 64, 96, seed=3).sigmoid()


@torch.no_grad()
@pytest.mark.parametrize("timestep", [7, 7.5, torch.tensor(981), torch.tensor([3, 900])], ids=str)
def test_the_unet_called_as_the_references(timestep: Any) -> None:
    ours, theirs = both("unet")
    expected = theirs(SAMPLE, timestep, encoder_hidden_states=TEXT, added_cond_kwargs=ADDED)
    made = ours(SAMPLE, timestep, encoder_hidden_states=TEXT, added_cond_kwargs=ADDED)
    assert_parity(made.sample, expected.sample, EXACT)
    assert made["sample"] is made[0] is made.to_tuple()[0] is made.sample and list(made) == ["sample"]
    (alone,) = ours(SAMPLE, timestep, TEXT, added_cond_kwargs=ADDED, return_dict=False)
    assert torch.equal(alone, made.sample)


@torch.no_grad()
def test_the_unet_reads_masks_and_residuals_as_the_references() -> None:
    (ours, theirs), (net, their_net) = both("unet"), both("controlnet")
    mask = torch.ones(2, 7)
    mask[0, :3] = 0
    call: Callable[..., Any] = lambda model, **more: model(SAMPLE, 7, TEXT, added_cond_kwargs=ADDED, **more)  # noqa: E731
    masked = call(ours, encoder_attention_mask=mask)
    assert_parity(masked.sample, call(theirs, encoder_attention_mask=mask.to(F64)).sample, EXACT)
    assert not torch.equal(masked.sample, call(ours).sample)
    for guess in (False, True):
        text = their_net.encoder_hid_proj(TEXT)  # which the reference leaves to its caller
        more = {"added_cond_kwargs": ADDED, "guess_mode": guess}
        down, mid = their_net(SAMPLE, 7, text, IMAGE, 0.7, return_dict=False, **more)
        for tokens in (TEXT, text):
            given = {"encoder_hidden_states": tokens, "controlnet_cond": IMAGE, "conditioning_scale": 0.7}
            made = net(SAMPLE, 7, **given, **more)
            assert_parity(made.mid_block_res_sample, mid, EXACT)
            for one, other in zip(made.down_block_res_samples, down, strict=True):
                assert_parity(one, other, EXACT)
    added = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    assert_parity(call(ours, **added).sample, call(theirs, **added).sample, EXACT)
    with pytest.raises(ValueError, match="residuals of both the down blocks and the middle"):
        call(ours, mid_block_additional_residual=mid)


@torch.no_grad()
def test_the_vae_does_not_scale() -> None:
    ours, theirs = both("vae")
    images = IMAGE * 2 - 1
    mine, other = ours.encode(images).latent_dist, theirs.encode(images).latent_dist
    for name in ("mean", "std", "logvar", "var"):
        assert_parity(getattr(mine, name), getattr(other, name), EXACT)
    seeded = [torch.Generator().manual_seed(0) for _ in range(4)]
    assert_parity(mine.sample(seeded[0]), other.sample(seeded[1]), EXACT)
    assert_parity(mine.kl(), other.kl(), EXACT)
    halves = ours.encode(images / 2, return_dict=False)[0], theirs.encode(images / 2, return_dict=False)[0]
    assert_parity(mine.kl(halves[0]), other.kl(halves[1]), EXACT)
    assert_parity(ours.decode(mine.mode()).sample, theirs.decode(other.mode()).sample, EXACT)
    (whole,) = ours(images, True, generator=seeded[2], return_dict=False)
    assert_parity(whole, theirs(images, True, generator=seeded[3]).sample, EXACT)
    factor = ours.config.scaling_factor
    assert_parity(ours.encode_images(images).mean, mine.mean * factor, EXACT)
    assert_parity(ours.decode_latents(mine.mean * factor), ours.decode(mine.mean).sample, EXACT)
    assert mine.sample().shape == mine.mean.shape and not torch.equal(mine.sample(), mine.sample())


@torch.no_grad()
def test_tiles_and_slices_of_the_vae() -> None:
    vae = copy.deepcopy(both("vae")[0])
    whole = vae.decode(SAMPLE).sample
    vae.enable_slicing()
    vae.enable_tiling()
    assert vae.run_coder.use_tiling and vae.run_coder.use_slicing
    assert_parity(vae.decode(SAMPLE).sample, whole, EXACT)
    vae.disable_slicing()
    vae.disable_tiling()
    assert not vae.run_coder.use_tiling and not vae.run_coder.use_slicing


@torch.no_grad()
def test_the_text_encoder_called_as_the_references() -> None:
    ours, theirs = both("text_encoder")
    ids = torch.randint(0, 640, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for more in ({"attention_mask": mask, "position_ids": positions}, {}):
        made = ours(input_ids=ids, output_hidden_states=True, **more)
        expected = theirs(input_ids=ids, output_hidden_states=True, return_dict=True, **more).hidden_states
        assert len(made.hidden_states) == len(expected) == 4
        for one, other in zip(made.hidden_states, expected, strict=True):
            assert one.shape == (9, 2, 64)
            assert_parity(one, other, EXACT)
    assert torch.equal(ours(ids, return_dict=False)[0][2], made.hidden_states[2])
    with pytest.raises(AttributeError, match=r"final norm is not loaded, use hidden_states\[-1\]"):
        _ = made.last_hidden_state
    with pytest.raises(ValueError, match="leaves nothing to return"):
        ours(ids, output_hidden_states=False)


@torch.no_grad()
def test_our_own_calls_and_forwards_are_as_they_were() -> None:
    inputs = SAMPLE, torch.tensor(7), TEXT, *ADDED.values()
    unet, net, encoder = (both(name)[0] for name in ("unet", "controlnet", "text_encoder"))
    assert torch.equal(unet(*inputs), unet(*inputs[:2], TEXT, added_cond_kwargs=ADDED).sample)
    assert torch.equal(unet(*inputs), UNet.forward(unet, *inputs))
    residuals = net(*inputs, IMAGE)
    assert all(map(torch.equal, residuals, ControlNet.forward(net, *inputs, IMAGE)))
    tokens = Tokenizer(EMBEDDED / "tokenizer")(["cat"], 8)
    tokens = replace(tokens, ids=tokens.ids % 640)
    states = encoder(tokens.ids, attention_mask=tokens.mask, position_ids=tokens.positions).hidden_states
    assert_parity(encoder(batch=tokens).tokens, states[-2].transpose(0, 1), EXACT)
    assert_parity(encoder(tokens).pooled, states[-1][-1], EXACT)
    for component, kind in KINDS.items():
        model = kind(CONFIGS[component])
        assert isinstance(model, PLAIN[component])
        if component in ("unet", "controlnet"):
            assert has_default_forward(model, PLAIN[component])
        elif component == "text_encoder":
            assert kind.forward is ChatGLM.forward


def test_a_whole_unet_compiles_and_hooks_see_both_calls() -> None:
    unet = UNet2DConditionModel(replace(SHALLOW.unet, channels=(32,), heads=(2,), depths=(1,)))
    randomise(unet)
    text, *added = (tensor.float() for tensor in (TEXT, *ADDED.values()))
    given = SAMPLE.float(), torch.tensor(7), text
    seen = list[nn.Module]()
    handle = unet.register_forward_hook(lambda module, *_: seen.append(module))
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = unet(*given, *added)
        unet(*given, added_cond_kwargs=dict(zip(ADDED, added, strict=True)))
        handle.remove()
        made = compiled(*given, added_cond_kwargs=dict(zip(ADDED, added, strict=True)), return_dict=False)
    assert len(seen) == 2
    assert_parity(made[0], expected, 1e-6)


@pytest.mark.parametrize("component", KINDS)
@pytest.mark.exact
def test_a_config_has_both_names_and_equals_the_plain_one(component: str) -> None:
    plain, config = CONFIGS[component], KINDS[component](CONFIGS[component]).config
    assert config == plain and plain == config and hash(config) == hash(plain) and repr(config) == repr(plain)
    assert {config: 1}[plain] == 1 and config != SMALL.vae if component != "vae" else True
    public = plain.to_public()
    assert dict(config) == {**config} == public and len(config) == len(public)
    for name, value in public.items():
        assert name in config and config[name] == config.get(name) == getattr(config, name) == value
    for other in (copy.deepcopy(config), copy.copy(config), pickle.loads(pickle.dumps(config))):
        assert other == config and type(other) is type(config) and dict(other) == public
    assert config.get("no_such", 5) == 5 and "no_such" not in config
    with pytest.raises(AttributeError, match="the config has no field 'no_such'"):
        _ = config.no_such
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.norm_eps = 1
    field = dataclasses.fields(config)[0].name
    changed = replace(config, **{field: 77})
    assert type(changed) is type(config) and changed != config and getattr(changed, field) == 77
    for given in (config, public, plain):
        model = KINDS[component].from_config(given)
        assert isinstance(model, KINDS[component]) and dict(model.config) == public


@pytest.mark.exact
def test_the_names_that_scripts_read() -> None:
    unet, vae = UNet2DConditionModel(SMALL.unet).config, AutoencoderKL(SMALL.vae).config
    assert (unet.cross_attention_dim, unet.in_channels, unet.sample_size) == (48, 4, 16)
    assert unet.addition_time_embed_dim == 12 and unet.time_cond_proj_dim is None
    assert vae.force_upcast and vae.scaling_factor == 0.13025 and len(vae.block_out_channels) == 4
    assert vae["latent_channels"] == 4 and vae.shift_factor is None


@pytest.mark.parametrize("component", KINDS)
def test_a_model_is_loaded_saved_over_itself_and_read_by_the_reference(
    component: str, tmp_path: Path
) -> None:
    kind: Any = KINDS[component]
    model = kind.from_pretrained("tiny", torch_dtype="torch.bfloat16", low_cpu_mem_usage=False)
    again = kind.from_pretrained(
        EMBEDDED, subfolder=component, dtype="bfloat16", device_map={"": "cpu"}, force_download=True
    )
    assert model.dtype == torch.bfloat16 and model.device == torch.device("cpu")
    assert type(model) is kind and not model.training and model.name_or_path == "tiny"
    folder = tmp_path / "saved"
    model.save_pretrained(save_directory=folder, max_shard_size="1MB")
    assert sum(".index." in file.name for file in folder.iterdir()) == 1
    model.save_pretrained(folder, variant="fp16", safe_serialization=True)
    assert sorted(file.name.split(".", 1)[1] for file in folder.iterdir()) == ["fp16.safetensors", "json"]
    other = kind.from_pretrained(folder, variant="fp16", torch_dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]) and torch.equal(tensor, other.state_dict()[name])
    assert dict(other.config) == dict(model.config) and other.config == model.config
    if component != "text_encoder":
        theirs = getattr(diffusers, kind.__name__).from_pretrained(folder, variant="fp16")
        assert theirs.num_parameters() == model.num_parameters()


@pytest.mark.exact
def test_what_loading_and_saving_refuse(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vae = AutoencoderKL.from_pretrained("tiny", torch_dtype=torch.float16)
    assert vae.dtype == torch.float32 and "the VAE is loaded in torch.float32" in caplog.text
    assert vae.decode(SAMPLE.half()).sample.dtype == torch.float32
    with pytest.raises(ValueError, match="torch_dtype must be a dtype or its name.*, got 'float17'"):
        AutoencoderKL.from_pretrained("tiny", torch_dtype="float17")
    with pytest.raises(ValueError, match="is a whole Kolors, expected a subfolder, such as 'vae'"):
        AutoencoderKL.from_pretrained(EMBEDDED)
    with pytest.raises(ValueError, match="device_map must be a device, such as 'cuda', got {'a': 0, 'b': 1}"):
        AutoencoderKL.from_pretrained("tiny", device_map={"a": 0, "b": 1})
    with pytest.raises(ValueError, match="two names of one argument"):
        AutoencoderKL.from_pretrained("tiny", device_map="cpu", device="cpu")
    with pytest.raises(ValueError, match="pickles can run code"):
        AutoencoderKL.from_pretrained("tiny", use_safetensors=False)
    with pytest.raises(ValueError, match="safe_serialization=False would write a pickle"):
        vae.save_pretrained(tmp_path / "a", safe_serialization=False)
    vae.save_pretrained(tmp_path / "a", is_main_process=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        vae.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_pipelines_take_these_models_and_draw_the_same_bits() -> None:
    assert MODEL_SPECS.keys() == MODELS.keys()
    plain = {name: load_component(EMBEDDED, name) for name in ("unet", "vae", "text_encoder")}
    ours = {name: KINDS[name].from_pretrained("tiny") for name in plain}
    images = []
    for parts in (plain, ours):
        pipe = KolorsPipeline.from_pretrained("tiny", **parts)
        pipe.set_progress_bar_config(disable=True)
        images.append(
            pipe("cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
        )
    assert images[0].tobytes() == images[1].tobytes()


def test_blocks_are_recomputed_in_the_backward_pass_and_give_the_same_gradients() -> None:
    unet = UNet2DConditionModel(SHALLOW.unet)
    randomise(unet)
    given = [tensor.float() for tensor in (SAMPLE, torch.tensor(7), TEXT, *ADDED.values())]
    blocks = [module for module in unet.modules() if getattr(module, "is_block", False)]

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(unet(*given).square().sum(), list(unet.parameters())))

    calls = list[nn.Module]()
    before = gradients()
    blocks[0].conv1.register_forward_hook(lambda module, *_: calls.append(module))
    assert not unet.is_gradient_checkpointing
    unet.enable_gradient_checkpointing()
    unet.enable_gradient_checkpointing()
    assert unet.is_gradient_checkpointing
    assert all(map(torch.equal, gradients(), before)) and len(calls) == 2, "once more, and not twice"
    with torch.no_grad():
        unet(*given)
    unet.disable_gradient_checkpointing()
    assert not unet.is_gradient_checkpointing and not any("forward" in vars(block) for block in blocks)


def test_kernels_and_compilation_by_the_references_names(caplog: pytest.LogCaptureFixture) -> None:
    unet = UNet2DConditionModel(SHALLOW.unet)
    try:
        unet.set_attention_backend("_native_efficient")
        assert forced_kernel() == "efficient"
        unet.set_attention_backend("matmul")
        assert forced_kernel() == "matmul"
        with pytest.raises(ValueError, match="attention kernel 'sage' is not one of sdpa, "):
            unet.set_attention_backend("sage")
        unet.set_attention_backend("native")
        assert forced_kernel() is None
        unet.set_attention_backend("matmul")
    finally:
        unet.reset_attention_backend()
    assert forced_kernel() is None
    unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert not caplog.text and any(module._compiled_call_impl for module in unet.modules())
    unet.compile_repeated_blocks(dynamic=True, backend="eager")
    unet.enable_xformers_memory_efficient_attention()
    unet.fuse_qkv_projections()
    unet.disable_xformers_memory_efficient_attention()
    assert any(type(module).__name__ == "FusedAttention" for module in unet.modules())
    unet.unfuse_qkv_projections()
    said = [record.message.split()[0] for record in caplog.records]
    assert said == ["fullgraph", "enable_xformers_memory_efficient_attention"]
    for use in (lambda: unet.set_attn_processor(None), lambda: unet.attn_processors):
        with pytest.raises(NotImplementedError, match=r"record_attention, .* set_attention_backend"):
            use()


@pytest.mark.exact
def test_parameters_are_counted_as_by_the_reference() -> None:
    ours, theirs = copy.deepcopy(both("unet"))
    assert ours.num_parameters() == theirs.num_parameters() and ours.half().dtype == torch.float16
    for part in (ours.conv_in, theirs.conv_in):
        part.requires_grad_(False)
    assert ours.num_parameters(only_trainable=True) == theirs.num_parameters(only_trainable=True)
    encoder = ChatGLMModel(SMALL.text_encoder)
    embedding = encoder.embedding.weight.numel()
    assert encoder.num_parameters(exclude_embeddings=True) == encoder.num_parameters() - embedding


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"added_cond_kwargs": {"text_embeds": TEXT}}, "must be text_embeds and time_ids, got text_embeds"),
        ({"added_cond_kwargs": {**ADDED, "image_embeds": TEXT}}, "got text_embeds, time_ids, image_embeds"),
        ({"timestep_cond": TEXT}, "timestep_cond has no place in this call"),
        ({"attention_mask": TEXT}, "attention_mask has no place in this call"),
        ({"cross_attention_kwargs": {"scale": 0.5}}, r"cross_attention_kwargs\['scale'\] has no place"),
    ],
    ids=["too few", "too many", "timestep_cond", "attention_mask", "scale"],
)  # fmt: skip
@pytest.mark.exact
def test_what_would_change_the_result_is_refused(more: dict[str, Any], message: str) -> None:
    given = {"encoder_hidden_states": TEXT, "added_cond_kwargs": ADDED} | more
    for component in ("unet", "controlnet"):
        image = {"controlnet_cond": IMAGE} if component == "controlnet" else {}
        with pytest.raises(ValueError, match=message):
            both(component)[0](SAMPLE, 7, **given, **image)


def test_cached_prompts_are_shared_with_the_plain_encoder() -> None:
    encoders = [load_component(EMBEDDED, "text_encoder"), ChatGLMModel.from_pretrained("tiny")]
    tokens = Tokenizer(EMBEDDED / "tokenizer")(["cat"])
    plain, named = (Key.of(encoder, tokens) for encoder in encoders)
    assert plain.name == named.name and plain.is_persistable and named.is_persistable


def test_a_users_config_is_kept() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(configs.UNetConfig):
        extra: int = 1

    config = Mine(**vars(TINY.unet), extra=3)
    assert UNet2DConditionModel(config).config is config and config.cross_attention_dim == 192
    assert isinstance(config, UNetConfig)
