"""LoRA on pipelines: the methods beside the reference's, reports, all or nothing."""

import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoHaConfig, LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from kolors_core import KolorsPipeline
from kolors_core.adapters.lora import attach
from tests.adapters.test_lora_files import trained, written
from tests.support.loras import (
    ATTENTION,
    CONV,
    LINEAR,
    TEXT,
    Models,
    assert_weights,
    factors,
    fused,
    peft_names,
    weights,
)
from tests.support.parity import pair, reference_unet
from tests.support.pipelines import Pair, steps_of
from tests.support.small import EXACT, FLOAT32, SMALL, relative_error
from tests.test_unet import inputs, run_reference
from weights_convert import TABLES

pytestmark = pytest.mark.numerical


@pytest.fixture
def both(pipes: Pair) -> Iterator[Pair]:
    """Both in float64, without adapters before and after."""
    ours, theirs = pipes
    before = weights(ours.unet)
    yield ours, theirs
    ours.unfuse_lora()
    ours.unload_lora_weights()
    theirs.unfuse_lora()
    theirs.unload_lora_weights()
    after = weights(ours.unet)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items()), "it left a trace"


def lora(pipe: Any, seed: int = 3, names: tuple[str, ...] = ATTENTION) -> dict[str, Tensor]:
    """A LoRA of the UNet in diffusers' names."""
    return peft_names("unet", factors(pipe.unet, "unet", names, seed), "unet.")


def unets(both: Pair) -> tuple[Tensor, Tensor]:
    """What the two UNets predict now."""
    given = inputs(1, 8, 8)
    with torch.no_grad():
        return both[0].unet(**given), run_reference(both[1].unet, given)


def assert_same(both: Pair) -> None:
    """The two UNets predict the same."""
    assert relative_error(*unets(both)) < EXACT


# Beside the reference.


@pytest.mark.parametrize("spelling", ["diffusers, PEFT", "diffusers' layers", "older diffusers"])
def test_the_reference_reads_the_same_of_a_file(spelling: str, both: Any) -> None:
    state = written(spelling, factors(both[0].unet, "unet", ATTENTION))
    base = unets(both)[0]
    for pipe in both:
        pipe.load_lora_weights(dict(state))
    assert_same(both)
    assert relative_error(unets(both)[0], base) > 1e-3


def test_the_reference_reads_the_same_of_kohya_s_alpha(both: Any) -> None:
    state = written("kohya, diffusers' names", factors(both[0].unet, "unet", (*ATTENTION, *LINEAR[:3])))
    for pipe in both:
        pipe.load_lora_weights(dict(state))
    assert_same(both)


@pytest.mark.parametrize("config", [
    LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "conv1"], init_lora_weights=False),
    LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "conv1"], init_lora_weights=False, use_dora=True),
    LoraConfig(r=4, lora_alpha=5, target_modules=["to_q", "ff.net.2"], init_lora_weights=False,
               use_rslora=True, rank_pattern={"attn2.to_q": 2}, alpha_pattern={"attn1.to_q": 7}),
], ids=["LoRA", "DoRA", "rank-stabilised with patterns"])  # fmt: skip
def test_files_of_the_reference_s_own_savers(config: LoraConfig, both: Any, tmp_path: Path) -> None:
    """With PEFT's settings in the file, of the pipeline's and of the UNet's method; and at another weight."""
    unet = reference_unet(SMALL.unet).double()
    unet.load_state_dict(both[1].unet.state_dict())
    torch.manual_seed(3)
    unet.add_adapter(copy.deepcopy(config))
    unet.double()
    settings = {name: value for name, value in config.to_dict().items() if value is not None}
    settings |= {"target_modules": sorted(config.target_modules), "peft_type": "LORA"}
    diffusers.KolorsPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(unet), unet_lora_adapter_metadata=settings
    )
    unet.save_lora_adapter(tmp_path, weight_name="unet.safetensors")
    both[1].load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors", adapter_name="a")
    both[0].load_lora_weights(tmp_path, adapter_name="a")
    assert_same(both)
    for pipe in both:
        pipe.set_adapters("a", 0.6)
    assert_same(both)
    attached = unets(both)[0]
    both[0].fuse_lora()
    assert relative_error(unets(both)[0], attached) < EXACT
    both[0].unfuse_lora()
    both[0].unload_lora_weights()
    both[0].load_lora_weights(tmp_path / "unet.safetensors")
    both[0].set_adapters("default_0", 0.6)
    assert torch.equal(unets(both)[0], attached)


def test_kohya_files_of_the_reference_s_converter(both: Any) -> None:
    unet = reference_unet(SMALL.unet)
    unet.add_adapter(LoraConfig(r=3, target_modules=["to_q", "to_out.0"], init_lora_weights=False))
    state = get_peft_model_state_dict(unet)
    kohya = convert_state_dict_to_kohya({f"unet.{name}": tensor for name, tensor in state.items()})
    assert next(iter(kohya)).startswith("lora_unet_down_blocks_1_")
    report = both[0].load_lora_weights(kohya)
    assert not report.unmatched
    both[1].load_lora_weights({f"unet.{name}": tensor for name, tensor in state.items()})
    assert_same(both)


def test_several_adapters_with_weights_draw_what_the_reference_draws(both: Any) -> None:
    ours, theirs = both
    for pipe in both:
        pipe.load_lora_weights(lora(ours, 3), adapter_name="one")
        pipe.load_lora_weights(lora(ours, 4, (*ATTENTION[:6], *LINEAR)), adapter_name="two")
        assert pipe.get_active_adapters() == ["two"]
        assert pipe.get_list_adapters() == {"unet": ["one", "two"]}
    assert_same((ours, theirs))
    for pipe in both:
        pipe.set_adapters(["one", "two"], [0.7, -0.4])
    assert ours.get_active_adapters() == ["one", "two"]
    mine, other = (steps_of(pipe, prompt="cat", num_inference_steps=2) for pipe in both)
    assert relative_error(mine[0], other[0]) < FLOAT32
    assert_same((ours, theirs))
    for pipe in both:
        pipe.disable_lora()
    assert_same((ours, theirs))
    for pipe in both:
        pipe.enable_lora()
        pipe.delete_adapters("two")
        pipe.set_adapters("one")
    assert_same((ours, theirs))


@pytest.mark.parametrize("weight", [
    {"unet": {"down": 0.5, "mid": 2.0, "up": {"block_0": [0.0, 1.0, 0.25], "block_1": 3.0}}},
    {"unet": {"up": {"block_1": [0.5]}}},
    {"unet": 0.3},
    None,
], ids=str)  # fmt: skip
def test_weights_by_block_are_the_reference_s(weight: Any, both: Any) -> None:
    """Also on resnets and samplers, which go with the transformer of their number."""
    state = lora(both[0], 3, (*ATTENTION, *LINEAR[:4], "up_blocks.0.resnets.1.conv1", *CONV[2:5]))
    for pipe in both:
        pipe.load_lora_weights(dict(state))
        pipe.set_adapters("default_0", copy.deepcopy(weight))
    assert_same(both)


def test_a_call_may_scale_its_adapters(both: Any) -> None:
    ours, theirs = both
    for pipe in both:
        pipe.load_lora_weights(lora(ours))
        pipe.set_adapters("default_0", 0.8)
    call = {"prompt": "cat", "num_inference_steps": 2, "cross_attention_kwargs": {"scale": 0.4}}
    mine, other = (steps_of(pipe, **call)[0] for pipe in both)
    assert relative_error(mine, other) < FLOAT32
    assert relative_error(mine, steps_of(ours, prompt="cat", num_inference_steps=2)[0]) > 1e-4
    with pytest.raises(KeyError), ours.lora_scaled(0.4):
        raise KeyError
    assert_same(both)
    ours.fuse_lora()
    with pytest.raises(ValueError, match="cannot scale adapters while default_0 is fused"):
        steps_of(ours, **call)
    ours.unfuse_lora()
    ours.unload_lora_weights()
    assert torch.equal(steps_of(ours, **call)[0], steps_of(ours, prompt="cat", num_inference_steps=2)[0])


def test_fused_weights_are_the_reference_s(both: Any) -> None:
    ours, theirs = both
    for pipe in both:
        pipe.load_lora_weights(lora(ours, 3), adapter_name="one")
        pipe.load_lora_weights(lora(ours, 4), adapter_name="two")
        pipe.set_adapters(["one", "two"], [0.7, 0.4])
        pipe.fuse_lora(lora_scale=0.5)
        assert (pipe.num_fused_loras, pipe.fused_loras) == (2, {"one", "two"})
    state = {
        TABLES["unet"].to_ours(name.replace(".base_layer", "")): tensor
        for name, tensor in theirs.unet.state_dict().items()
    }
    mine = weights(ours.unet)
    assert_weights(mine, {name: state[name] for name in mine}, EXACT)


@pytest.mark.parametrize("form", ["LoRA", "DoRA"])
def test_what_we_save_the_reference_loads(form: str, both: Any, tmp_path: Path) -> None:
    ours, theirs = both
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "conv1"], init_lora_weights=False,
                        use_dora=form == "DoRA")  # fmt: skip
    trained(config, theirs.unet).save_pretrained(tmp_path / "peft")
    ours.load_lora_weights(tmp_path / "peft")
    ours.save_lora_weights(tmp_path)
    theirs.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")
    assert_same(both)
    attached = unets(both)[0]
    ours.unload_lora_weights()
    ours.load_lora_weights(tmp_path)
    assert relative_error(unets(both)[0], attached) < EXACT


def test_layers_are_saved_as_the_reference_saves_them(both: Any, tmp_path: Path) -> None:
    """Its spelling for trainers: tensors by the names of their model, on the class."""
    layers = {name.removeprefix("unet."): tensor for name, tensor in lora(both[0]).items()}
    settings = {"r": 2, "lora_alpha": 3, "target_modules": sorted({n.split(".lora_")[0] for n in layers})}
    for i, pipe in enumerate((KolorsPipeline, diffusers.KolorsPipeline)):
        pipe.save_lora_weights(
            save_directory=tmp_path / str(i), unet_lora_layers=layers, unet_lora_adapter_metadata=settings
        )
    mine, other = (load_file(tmp_path / str(i) / "pytorch_lora_weights.safetensors") for i in (0, 1))
    assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)
    both[0].load_lora_weights(tmp_path / "0")
    both[1].load_lora_weights(str(tmp_path / "1"))
    assert_same(both)


# Ours alone.


@pytest.fixture(scope="module")
def small() -> Models:
    return Models(pair("unet", torch.float32)[0], pair("text_encoder", torch.float32)[0])


@pytest.fixture
def models(small: Models) -> Models:
    """Both models, in float32, without adapters."""
    small.unload_lora_weights()
    return small


def text_lora(models: Models, seed: int = 3) -> dict[str, Tensor]:
    made = factors(models.text_encoder, "text_encoder", TEXT, seed)
    return peft_names("text_encoder", made, "text_encoder.")


def test_one_file_for_both_models(models: Models, tmp_path: Path, caplog: Any) -> None:
    report = models.load_lora_weights(lora(models) | text_lora(models), adapter_name="style")
    assert models.get_list_adapters() == {"unet": ["style"], "text_encoder": ["style"]}
    assert str(report) == "style: 52 of 52 tensors matched, on 26 layers"
    models.set_adapters("style", {"text_encoder": 0.0, "unet": {"mid": 0.5}})
    parts = models.unet.get_submodule("mid.attentions.0.blocks.0.self_attention.to_q").parts()
    assert parts["style"].strength == 0.5
    models.save_lora_weights(tmp_path, weight_name="both.safetensors")
    saved = load_file(tmp_path / "both.safetensors")
    assert saved.keys() == set(report.matched)
    models.load_lora_weights(lora(models, 4))
    assert models.get_list_adapters() == {"unet": ["style", "default_1"], "text_encoder": ["style"]}
    assert models.get_active_adapters() == ["default_1"]
    with pytest.raises(ValueError, match="which adapter. There are style, default_1: give adapter_name"):
        models.save_lora_weights(tmp_path)
    models.set_adapters("default_1", {"text_encoder": 1.0, "text_encoder_2": 1.0})
    for component in ("text_encoder", "text_encoder_2"):
        assert f"'{component}' have no effect: adapter 'default_1' has parts in unet only" in caplog.text
    models.delete_adapters(["style", "default_1"])
    assert models.get_list_adapters() == {} and models.get_active_adapters() == []


def test_if_one_model_cannot_be_fused_none_is(models: Models) -> None:
    models.load_lora_weights(lora(models) | text_lora(models))
    models.set_adapters("default_0", {"text_encoder": 3e38})
    with pytest.raises(ValueError, match="not finite: nothing is fused"):
        models.fuse_lora(lora_scale=2.0)
    assert not models.fused_loras


def test_a_trained_adapter_is_saved_too(models: Models, tmp_path: Path) -> None:
    adapter = attach(models.unet, rank=2, alpha=4.0)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"what an earlier run left")
    models.save_lora_weights(tmp_path, adapter_name="default")
    wanted = fused(models)
    models.unload_lora_weights()
    models.load_lora_weights(tmp_path)
    assert_weights(fused(models), wanted, FLOAT32)
    assert [file.name for file in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]


def test_deltas_act_and_are_not_saved_as_factors(models: Models, tmp_path: Path) -> None:
    config = LoHaConfig(r=2, alpha=3, target_modules=["attn1.to_q", "conv1"], init_weights=False)
    theirs = reference_unet(SMALL.unet)
    trained(config, theirs, torch.float32).save_pretrained(tmp_path / "peft")
    models.load_lora_weights(tmp_path / "peft")
    given = inputs(1, 8, 8, torch.float32)
    with torch.no_grad():
        attached = models.unet(**given)
        models.set_adapters("default_0", 0.0)
        assert relative_error(models.unet(**given), attached) > 1e-3
        models.set_adapters("default_0")
        models.fuse_lora()
        assert relative_error(models.unet(**given), attached) < FLOAT32
    models.unfuse_lora()
    with pytest.raises(ValueError, match="adapter 'default_0' is a delta there .LoHa, LoKr., not factors"):
        models.save_lora_weights(tmp_path / "none")
    assert not list(tmp_path.glob("none/*"))


def test_the_report_of_what_does_not_fit(models: Models) -> None:
    good = lora(models)
    name = next(iter(good))
    shapes = good | {name: torch.zeros(2, 7)}
    bad = shapes | {"unet.nowhere.to_q.lora_A.weight": torch.zeros(2, 64), "step": torch.zeros(1)}
    before, modules = weights(models.unet), list(models.unet.modules())
    with pytest.raises(ValueError, match=r"46 of 50 tensors matched, on 23 layers; 2 unmatched: unet.nowhere."
                       r"to_q.lora_A.weight, step; 2 of the wrong shape: .*down is \[2, 7\], expected "
                       r"\[2, 32\].*allow_partial=True takes what matches"):  # fmt: skip
        models.load_lora_weights(bad)
    assert all(a is b for a, b in zip(models.unet.modules(), modules, strict=True)), "it is untouched"
    report = models.load_lora_weights(bad, allow_partial=True)
    assert (len(report.matched), report.unmatched) == (46, ("unet.nowhere.to_q.lora_A.weight", "step"))
    assert report.layers == 23 and len(report.misshapen) == 2 and report.misshapen[0].startswith(name)
    assert not torch.equal(fused(models)["mid.attentions.0.blocks.0.self_attention.to_q.weight"],
                           before["mid.attentions.0.blocks.0.self_attention.to_q.weight"])  # fmt: skip


@pytest.mark.parametrize(("change", "fault"), [
    (lambda s: {}, "none of its 0 tensors fits this pipeline's unet and text_encoder, for example it is"),
    (lambda s: {"a.b": torch.zeros(1)}, r"for example a.b. Known spellings: unet.<module>.lora_A.weight"),
    (lambda s: dict(list(s.items())[1:]), r"its layer's down is missing"),
    (lambda s: s | {list(s)[0].replace("lora_A", "lora_C"): torch.zeros(1)}, "1 unmatched"),
    (lambda s: {k: v.to(torch.int8) for k, v in s.items()}, "floating-point numbers, got torch.int8"),
    (lambda s: s | {"unet.conv_in.hada_w1_a": torch.zeros(1, 1)}, "hada_w1_b, hada_w2_a, hada_w2_b is"),
    (lambda s: s | {"unet.conv_in.alpha": torch.zeros(1)}, "alpha make no form of adapter that is known"),
    (lambda s: s | {"unet.conv_in.diff": torch.zeros(3, 3)}, r"its delta is \[3, 3\]"),
    (lambda s: s | {list(s)[0].replace("lora_A.weight", "lora_B.bias"): torch.zeros(9)}, "layer has none"),
    (lambda s: s | {list(s)[0].replace("lora_A.weight", "dora_scale"): torch.zeros(3)}, "magnitudes are"),
    (lambda s: {k: v[:0] if "lora_A" in k else v[:, :0] for k, v in s.items()}, "its rank is 0"),
    (lambda s: s | {"x": "y"}, "x is str, expected a tensor"),
])  # fmt: skip
def test_what_is_no_lora_is_an_error(change: Any, fault: str, models: Models) -> None:
    with pytest.raises(ValueError, match=fault):
        models.load_lora_weights(change(lora(models)))
    assert models.get_list_adapters() == {}


def test_names_and_switches_that_are_not_there(models: Models) -> None:
    models.load_lora_weights(lora(models), adapter_name="one")
    for wish, fault in (
        (lambda: models.load_lora_weights(lora(models), adapter_name="one"), "'one' is attached already"),
        (lambda: models.load_lora_weights(lora(models), adapter_name="a\nb"), "name must be some printable"),
        (lambda: models.set_adapters(["one", "two"]), "no adapter is named 'two'; attached: one"),
        (lambda: models.set_adapters("one", [1.0, 2.0]), "expected a weight for each of 1 adapters, got 2"),
        (lambda: models.set_adapters("one", {"down": 1.0}), "into unet and text_encoder, not 'down'"),
        (lambda: models.set_adapters("one", {"unet": {"left": 1.0}}), "no transformers in left"),
        (lambda: models.delete_adapters("two"), "no adapter is named 'two'"),
        (lambda: models.fuse_lora(components=["vae"]), "into unet and text_encoder, not into 'vae'"),
        (lambda: models.fuse_lora(components=["text_encoder"]), "no active adapter to fuse in text_encoder"),
        (lambda: models.fuse_lora(adapter_names=["two"]), "no adapter is named 'two'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=fault):
            wish()
    models.fuse_lora()
    for wish in (
        lambda: models.fuse_lora(), lambda: models.set_adapters("one", 0.5), lambda: models.disable_lora(),
        lambda: models.load_lora_weights(lora(models)), lambda: models.delete_adapters("one"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="while one is fused: unfuse first"):
            wish()
    models.unfuse_lora()


def test_the_signatures_are_the_references() -> None:
    """What is positional there is so here; ours may take more by keyword."""
    for name in ("load_lora_weights", "set_adapters", "fuse_lora", "unfuse_lora", "delete_adapters",
                 "unload_lora_weights", "enable_lora", "disable_lora", "get_active_adapters"):  # fmt: skip
        mine, other = (
            inspect.signature(getattr(kind, name)).parameters.values()
            for kind in (KolorsPipeline, diffusers.KolorsPipeline)
        )
        positional = [p.name for p in mine if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == [p.name for p in other][: len(positional)], name
