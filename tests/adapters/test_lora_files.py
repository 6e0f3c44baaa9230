"""LoRA files in every spelling: their names at full size, and the weights that they make."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kolors_core import KolorsPipeline
from kolors_core.adapters.lora import supported_layers
from kolors_core.adapters.lora_files import METADATA
from kolors_core.chatglm import ChatGLM
from kolors_core.config import KOLORS
from kolors_core.unet import UNet
from tests.support.loras import (
    ALPHA,
    ATTENTION,
    BLOCK,
    CONV,
    LINEAR,
    TEXT,
    Factors,
    Models,
    assert_weights,
    factors,
    fused,
    peft_names,
    to_ours,
    weights,
    with_deltas,
)
from tests.support.parity import pair, reference_unet
from tests.support.small import EXACT, SMALL
from weights_convert import TABLES
from weights_convert.lora import parse_keys, spellings
from weights_convert.sgm import sgm_blocks, to_sgm


@pytest.fixture(scope="module")
def both() -> tuple[Models, nn.Module]:
    """Our models and the reference's UNet of the same weights, in float64."""
    unet, theirs = pair("unet", torch.float64)
    text_encoder, _ = pair("text_encoder", torch.float64)
    return Models(unet, text_encoder), theirs


@pytest.fixture
def models(both: tuple[Models, nn.Module]) -> Models:
    """Our models, without adapters."""
    both[0].unload_lora_weights()
    return both[0]


# Names at full size.


@pytest.fixture(scope="module")
def modules() -> dict[str, list[str]]:
    """Our paths of every linear layer and convolution of the released models."""
    with torch.device("meta"):
        built = {"unet": UNet(KOLORS.unet), "text_encoder": ChatGLM(KOLORS.text_encoder)}
    return {component: list(supported_layers(model)) for component, model in built.items()}


def test_every_module_of_full_size_is_named_one_to_one(modules: dict[str, list[str]]) -> None:
    """Public, kohya's and SGM's names come back to the module, and no name is two modules."""
    assert {component: len(paths) for component, paths in modules.items()} == {
        "unet": 795,
        "text_encoder": 112,
    }
    public = {path: TABLES["unet"].to_public(path) for path in modules["unet"]}
    blocks = sgm_blocks(public.values())
    ways: list[Callable[[str], str]] = [
        lambda name: f"unet.{name}",
        lambda name: f"lora_unet_{name.replace('.', '_')}",
        lambda name: f"lora_unet_{to_sgm(name, blocks).replace('.', '_')}",
        lambda name: f"diffusion_model.{to_sgm(name, blocks)}",
    ]
    assert [to_ours("unet", name) for name in public.values()] == list(public)
    for way in ways:
        names = {f"{way(name)}.lora_up.weight": path for path, name in public.items()}
        assert len(names) == 795
        places, unmatched = parse_keys(names, modules)
        assert not unmatched and all(names[name] == place.module for place, name in places.items())
    for way in ("text_encoder.", "base_model.model.transformer.", "lora_te_"):
        join = "_" if way.endswith("_") else "."
        names = {
            f"{way}{TABLES['text_encoder'].to_public(path).replace('.', join)}.lora_up.weight": path
            for path in modules["text_encoder"]
        }
        places, unmatched = parse_keys(names, modules)
        assert len(names) == 112 and not unmatched
        assert all(names[name] == place.module for place, name in places.items())


def test_sgm_names_are_the_reference_s(modules: dict[str, list[str]]) -> None:
    """Its own conversion, which its Kolors pipelines do not call, leads each back to the same module."""
    public = [TABLES["unet"].to_public(path) for path in modules["unet"]]
    public.remove("encoder_hid_proj")  # Kolors' own, which SGM does not have
    blocks, state = sgm_blocks(public), {}
    for i, name in enumerate(public):
        for kind in ("down", "up"):
            state[f"lora_unet_{to_sgm(name, blocks).replace('.', '_')}.lora_{kind}.weight"] = torch.tensor(i)
    converted = _maybe_map_sgm_blocks_to_diffusers(state, SimpleNamespace(layers_per_block=2))
    found = convert_unet_state_dict_to_peft(_convert_non_diffusers_lora_to_diffusers(converted)[0])
    assert len(found) == 2 * 794
    for name, i in found.items():
        assert name.startswith(f"unet.{public[int(i)]}.lora_")


def test_no_two_modules_share_a_spelling(modules: dict[str, list[str]]) -> None:
    found = spellings(modules)
    assert not found["unet"].keys() & found["text_encoder"].keys()
    with pytest.raises(ValueError, match="a_b is both a.b and a_b"):
        spellings({"unet": ["a.b", "a_b"]})


def test_two_spellings_in_one_file_are_an_error(modules: dict[str, list[str]]) -> None:
    names = [f"unet.{BLOCK}.attn1.to_q.lora_A.weight", f"{BLOCK}.attn1.to_q.lora_down.weight"]
    with pytest.raises(ValueError, match="are two spellings of the same tensor"):
        parse_keys(names, modules)


# The spellings, written out here by hand; each reads as `W + scale * up @ down`.

SGM = {
    "down_blocks.1.attentions.1": "input_blocks.5.1", "mid_block.attentions.0": "middle_block.1",
    "up_blocks.0.attentions.2": "output_blocks.2.1", "down_blocks.1.attentions.0": "input_blocks.4.1",
    "up_blocks.1.attentions.0": "output_blocks.3.1", "down_blocks.2.resnets.0.time_emb_proj":
    "input_blocks.7.0.emb_layers.1", "time_embedding.linear_1": "time_embed.0", "add_embedding.linear_2":
    "label_emb.0.2", "conv_in": "input_blocks.0.0", "conv_out": "out.2", "down_blocks.0.downsamplers.0.conv":
    "input_blocks.3.0.op", "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3", "up_blocks.2.resnets.1.conv_shortcut":
    "output_blocks.7.0.skip_connection",
}  # fmt: skip


def sgm(name: str) -> str:
    old = next(old for old in SGM if name == old or name.startswith(f"{old}."))
    return SGM[old] + name.removeprefix(old)


def older(name: str) -> str:
    return name.replace(".to_out.0", ".to_out").replace(".to_", ".processor.to_") + "_lora"


ALL = (*ATTENTION, *LINEAR, *CONV)
# Prefix, module, names of down and up, modules, whether alpha is written.
SPELLINGS: dict[str, tuple[str, Callable[[str], str], str, str, tuple[str, ...], bool]] = {
    "diffusers, PEFT": ("unet.", str, "lora_A.weight", "lora_B.weight", ALL, False),
    "diffusers, PEFT, with alpha": ("unet.", str, "lora_A.weight", "lora_B.weight", ALL, True),
    "PEFT with the adapter's name": ("unet.", str, "lora_A.style.weight", "lora_B.style.weight", ALL, False),
    "diffusers' layers": ("unet.", str, "lora.down.weight", "lora.up.weight", ALL, False),
    "older diffusers": ("unet.", older, "down.weight", "up.weight", ATTENTION, False),
    "kohya, diffusers' names": (
        "lora_unet_", lambda n: n.replace(".", "_"), "lora_down.weight", "lora_up.weight", ALL, True
    ),
    "kohya, SGM's names": (
        "lora_unet_", lambda n: sgm(n).replace(".", "_"), "lora_down.weight", "lora_up.weight", ALL, True
    ),
    "SGM's names with dots": ("diffusion_model.", sgm, "lora_down.weight", "lora_up.weight", ALL, True),
    "bare": ("", str, "lora_A.weight", "lora_B.weight", ALL, False),
    "base_model.": ("base_model.model.", str, "lora_A.weight", "lora_B.weight", ALL, False),
}  # fmt: skip


def written(spelling: str, made: dict[str, Factors]) -> dict[str, Tensor]:
    prefix, module, down, up, _, has_alpha = SPELLINGS[spelling]
    state = {}
    for name, one in made.items():
        path = prefix + module(name)
        state |= {f"{path}.{down}": one.down, f"{path}.{up}": one.up}
        if has_alpha:
            state[f"{path}.alpha"] = torch.tensor(ALPHA)
    return state


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_each_spelling_is_the_written_out_sum(spelling: str, models: Models, tmp_path: Path) -> None:
    *_, names, has_alpha = SPELLINGS[spelling]
    base, made = weights(models.unet), factors(models.unet, "unet", names)
    state = written(spelling, made)
    save_file(state, tmp_path / "lora.safetensors")
    report = models.load_lora_weights(tmp_path / "lora.safetensors")
    assert (set(report.matched), report.layers) == (set(state), len(names))
    scale = ALPHA / 2 if has_alpha else 1.0
    wanted = with_deltas(base, "unet", made, lambda one: one.delta(scale))
    assert_weights(fused(models), wanted, EXACT)
    models.unload_lora_weights()
    assert all(torch.equal(tensor, base[name]) for name, tensor in weights(models.unet).items())


@pytest.mark.parametrize(
    "prefix",
    ["text_encoder.", "text_encoder.base_model.model.", "base_model.model.transformer.", "transformer.", ""],
)
def test_chatglm_in_each_spelling(prefix: str, models: Models) -> None:
    base, made = weights(models.text_encoder), factors(models.text_encoder, "text_encoder", TEXT)
    models.load_lora_weights(peft_names("text_encoder", made, prefix))
    assert models.get_list_adapters() == {"text_encoder": ["default_0"]}
    wanted = with_deltas(base, "text_encoder", made, Factors.delta)
    assert_weights(fused(models, "text_encoder"), wanted, EXACT)


@pytest.mark.parametrize("prefix", ["lora_te_", "lora_te1_"])
def test_chatglm_as_kohya_writes_it(prefix: str, models: Models) -> None:
    base, made = weights(models.text_encoder), factors(models.text_encoder, "text_encoder", TEXT)
    state = {}
    for name, one in made.items():
        path = prefix + name.replace(".", "_")
        state |= {f"{path}.lora_down.weight": one.down, f"{path}.lora_up.weight": one.up}
        state[f"{path}.alpha"] = torch.tensor(ALPHA)
    models.load_lora_weights(state)
    wanted = with_deltas(base, "text_encoder", made, lambda one: one.delta(ALPHA / 2))
    assert_weights(fused(models, "text_encoder"), wanted, EXACT)


# Forms: what peft itself merges.


def trained(config: Any, theirs: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A copy of the reference's UNet with one of peft's adapters, random."""
    torch.manual_seed(11)
    copy = reference_unet(SMALL.unet).to(dtype)
    copy.load_state_dict(theirs.state_dict())
    model = get_peft_model(copy, config)
    for name, parameter in model.named_parameters():
        if ".weight" in name and "base_layer" in name or not parameter.requires_grad:
            continue
        parameter.data = parameter.data.to(dtype) * (1 + 0.2 * torch.rand(parameter.shape, dtype=dtype))
    return model


TARGETS = ["attn1.to_q", "attn2.to_out.0", "ff.net.2", "conv1", "conv_shortcut", "downsamplers.0.conv"]
FORMS = {
    "LoRA": LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, init_lora_weights=False),
    "LoRA, a rank and an alpha for each layer": LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False,
        rank_pattern={"attn1.to_q": 2, "mid_block.resnets.0.conv1": 3}, alpha_pattern={"ff.net.2": 1.5},
    ),
    "LoRA, rank-stabilised": LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False, use_rslora=True
    ),
    "LoRA with biases": LoraConfig(
        r=2, lora_alpha=3, target_modules=["ff.net.2", "conv1"], init_lora_weights=False, lora_bias=True
    ),
    "DoRA": LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, init_lora_weights=False, use_dora=True),
    # Of LoHa, peft rounds alpha / rank to float32: here it is exact there too.
    "LoHa": LoHaConfig(r=3, alpha=4.5, target_modules=TARGETS, init_weights=False),
    "LoHa, Tucker": LoHaConfig(
        r=3, alpha=4.5, target_modules=TARGETS, init_weights=False, use_effective_conv2d=True
    ),
    "LoKr": LoKrConfig(r=2, alpha=5, target_modules=TARGETS, init_weights=False),
    "LoKr, both factored": LoKrConfig(
        r=2, alpha=5, target_modules=TARGETS, init_weights=False, decompose_both=True, decompose_factor=8
    ),
    "LoKr, Tucker": LoKrConfig(
        r=2, alpha=5, target_modules=TARGETS, init_weights=False, use_effective_conv2d=True
    ),
    "LoKr, whole": LoKrConfig(r=64, alpha=5, target_modules=["attn1.to_q"], init_weights=False),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # biases have another shape, peft says
@pytest.mark.parametrize("form", FORMS)
def test_a_folder_that_peft_saves_is_what_peft_merges(
    form: str, both: tuple[Models, nn.Module], models: Models, tmp_path: Path
) -> None:
    model = trained(FORMS[form], both[1])
    model.save_pretrained(tmp_path / "adapter")
    report = models.load_lora_weights(tmp_path / "adapter")
    assert not report.unmatched and not report.misshapen
    merged = model.merge_and_unload()
    base = weights(models.unet)
    wanted = {TABLES["unet"].to_ours(name): tensor for name, tensor in merged.state_dict().items()}
    wanted = {name: tensor for name, tensor in wanted.items() if name in base}
    assert_weights(fused(models), wanted, EXACT)
    changed = {name.rpartition(".")[0] for name in base if not torch.equal(base[name], wanted[name])}
    assert len(changed) == report.layers


# Forms as LyCORIS and kohya write them, written out. `hada_w1_a` is [O, R], `hada_w1_b` [R, I * K].


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64) / 4


LINEAR_LAYER, CONV_LAYER = f"{BLOCK}.ff.net.2", "mid_block.resnets.0.conv1"  # [32, 128], [64, 64, 3, 3]
O1, I1, O2, I2 = 4, 8, 8, 16  # of the Kronecker product for the linear layer
LYCORIS: dict[str, tuple[str, dict[str, Tensor], Callable[[dict[str, Tensor], Tensor], Tensor]]] = {
    "LoHa": (
        LINEAR_LAYER,
        {"hada_w1_a": noise(32, 3), "hada_w1_b": noise(3, 128), "hada_w2_a": noise(32, 3) * 2,
         "hada_w2_b": noise(3, 128) * 3, "alpha": torch.tensor(6.0)},
        lambda t, w: w + 2.0 * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]),
    ),
    "LoKr, w2 of factors": (
        LINEAR_LAYER,
        {"lokr_w1": noise(O1, I1), "lokr_w2_a": noise(O2, 4), "lokr_w2_b": noise(4, I2),
         "alpha": torch.tensor(6.0)},
        lambda t, w: w + 1.5 * torch.einsum(
            "ab, cd -> acbd", t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"]
        ).reshape(w.shape),
    ),
    "LoKr, both whole, where alpha says nothing": (
        LINEAR_LAYER,
        {"lokr_w1": noise(O1, I1), "lokr_w2": noise(O2, I2), "alpha": torch.tensor(6.0)},
        lambda t, w: w + torch.einsum("ab, cd -> acbd", t["lokr_w1"], t["lokr_w2"]).reshape(w.shape),
    ),
    "LoKr of a convolution": (
        CONV_LAYER,
        {"lokr_w1": noise(4, 8), "lokr_w2_a": noise(16, 2), "lokr_w2_b": noise(2, 8 * 9)},
        lambda t, w: w + torch.einsum(
            "ab, cdk -> acbdk", t["lokr_w1"], (t["lokr_w2_a"] @ t["lokr_w2_b"]).unflatten(1, (8, 9))
        ).reshape(w.shape),
    ),
    "LoCon with a factor in the middle": (
        CONV_LAYER,
        {"lora_down.weight": noise(2, 64, 1, 1), "lora_mid.weight": noise(2, 2, 3, 3),
         "lora_up.weight": noise(64, 2, 1, 1), "alpha": torch.tensor(1.0)},
        lambda t, w: w + 0.5 * torch.einsum(
            "or, rskl, si -> oikl", t["lora_up.weight"].flatten(1), t["lora_mid.weight"],
            t["lora_down.weight"].flatten(1),
        ),
    ),
    "a linear layer's factors as 1x1 convolutions": (
        LINEAR_LAYER,
        {"lora_down.weight": noise(2, 128, 1, 1), "lora_up.weight": noise(32, 2, 1, 1)},
        lambda t, w: w + t["lora_up.weight"].flatten(1) @ t["lora_down.weight"].flatten(1),
    ),
    "DoRA of rows": (
        LINEAR_LAYER,
        {"lora_down.weight": noise(2, 128), "lora_up.weight": noise(32, 2), "dora_scale": noise(32, 1),
         "alpha": torch.tensor(1.0)},
        lambda t, w: dora(w + 0.5 * t["lora_up.weight"] @ t["lora_down.weight"], t["dora_scale"], (1,)),
    ),
    "DoRA of columns": (
        CONV_LAYER,
        {"lora_down.weight": noise(2, 64, 3, 3), "lora_up.weight": noise(64, 2, 1, 1),
         "dora_scale": noise(1, 64, 1, 1)},
        lambda t, w: dora(
            w + torch.einsum("or, rikl -> oikl", t["lora_up.weight"].flatten(1), t["lora_down.weight"]),
            t["dora_scale"], (0, 2, 3),
        ),
    ),
    "the whole difference": (
        CONV_LAYER, {"diff": noise(64, 64, 3, 3), "alpha": torch.tensor(3.0)}, lambda t, w: w + t["diff"]
    ),
}  # fmt: skip


def dora(weight: Tensor, magnitude: Tensor, axes: tuple[int, ...]) -> Tensor:
    return magnitude * weight / weight.square().sum(axes, keepdim=True).sqrt()


@pytest.mark.parametrize("form", LYCORIS)
def test_each_form_of_lycoris_is_the_written_out_sum(form: str, models: Models) -> None:
    name, tensors, sum_of = LYCORIS[form]
    base, ours = weights(models.unet), f"{to_ours('unet', name)}.weight"
    state = {f"lora_unet_{name.replace('.', '_')}.{role}": tensor for role, tensor in tensors.items()}
    models.load_lora_weights(state)
    assert_weights(fused(models), base | {ours: sum_of(tensors, base[ours])}, EXACT)


def test_settings_that_are_sets_are_written_in_order(tmp_path: Path) -> None:
    """PEFT's target_modules, say: a set's own order is another one in every process."""
    names = [f"to_{i}" for i in range(30)]
    layers = {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 2)}
    settings = {"target_modules": set(names)}
    KolorsPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=settings)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as opened:
        written = json.loads(opened.metadata()[METADATA])
    assert written["unet.target_modules"] == sorted(names)
