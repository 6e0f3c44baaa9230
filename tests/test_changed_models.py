"""A changed model is saved and loaded again, and whoever loads it by another class is told which to take."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from kolors_core import KolorsPipeline
from kolors_core.adapters.controlnet import ControlNet, ControlNetConfig
from kolors_core.checkpoint import EMBEDDED, ModelSpec, load_component, load_modified, save_component
from kolors_core.compat import configs
from kolors_core.compat.models import UNet2DConditionModel
from kolors_core.config import TINY, ChatGLMConfig, UNetConfig
from kolors_core.loading import zero_padded, zeros
from kolors_core.unet import FeedForward, UNet
from kolors_core.vae import VAE
from tests.support.controlnets import NET
from tests.support.small import SMALL

HERE = __name__


@dataclass(frozen=True, kw_only=True)
class GatedConfig(UNetConfig):
    gates: int = 3
    where: tuple[tuple[int, ...], ...] = ((0, 1), (2,))
    note: str | None = None


class GatedUNet(UNet):
    def __init__(self, config: GatedConfig) -> None:
        super().__init__(config)
        self.gate = nn.Linear(config.gates, 2)


class LouderUNet(UNet):
    """The same tensors, another result."""

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        return 2 * super().forward(*inputs, **named)


class OwnNames(UNet2DConditionModel):
    config_type = GatedConfig


class Louder(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


GATED = ModelSpec(GatedConfig, GatedUNet)
EIGHT = replace(TINY.vae, latent_channels=8)
CONFIG = GatedConfig(**vars(SMALL.unet), gates=5, where=((4,), ()), note="mine")


def record(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text()).get("_kolors_core")


def test_a_class_with_a_config_of_its_own_comes_back(tmp_path: Path) -> None:
    unet = GatedUNet(CONFIG)
    save_component(unet, tmp_path, "unet", max_shard_size="1MB")
    assert record(tmp_path / "unet") == {
        "class": f"{HERE}.GatedUNet", "config": f"{HERE}.GatedConfig",
        "fields": {"gates": 5, "where": [[4], []], "note": "mine"},
    }  # fmt: skip
    modified, report = load_modified(tmp_path, "unet", GATED, {})
    assert not report.missing and not report.unexpected
    for again in (load_component(tmp_path, "unet", kind=GATED), modified):
        assert type(again) is GatedUNet and again.config == CONFIG and hash(again.config) == hash(CONFIG)
        assert all(map(torch.equal, again.state_dict().values(), unet.state_dict().values()))


def test_every_other_way_to_load_it_names_the_class_and_the_way(tmp_path: Path) -> None:
    save_component(GatedUNet(CONFIG), tmp_path, "unet")
    spec = rf"ModelSpec\({HERE}.GatedConfig, {HERE}.GatedUNet\)"
    way = rf"of {HERE}.GatedUNet: load it by load_component\(FOLDER, 'unet', kind={spec}\), "
    way += r"and pass it to KolorsPipeline.from_pretrained\(FOLDER, unet=...\)$"
    with pytest.raises(ValueError, match=way):
        load_component(tmp_path, "unet")
    with pytest.raises(ValueError, match=way):
        UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    lacks = f"has the field 'gates' of {HERE}.GatedConfig, which kolors_core.config.UNetConfig lacks"
    with pytest.raises(ValueError, match=lacks):
        load_modified(tmp_path, "unet", GatedUNet, {})  # its config would lose fields
    with pytest.raises(ValueError, match=lacks):
        load_component(tmp_path, "unet", kind=ModelSpec(UNetConfig, lambda config: UNet(config)))


def test_a_pipeline_with_it_is_saved_and_loaded(tmp_path: Path) -> None:
    unet, _ = load_modified(EMBEDDED, "unet", GATED, {"gate.*": zeros})
    KolorsPipeline.from_pretrained("tiny", unet=unet).save_pretrained(tmp_path / "mine")
    with pytest.raises(ValueError, match=rf"unexpected: gate.bias.*{HERE}.GatedUNet|lacks.*{HERE}.GatedUNet"):
        KolorsPipeline.from_pretrained(tmp_path / "mine")
    again = load_component(tmp_path / "mine", "unet", kind=GATED)
    assert KolorsPipeline.from_pretrained(tmp_path / "mine", unet=again).unet is again
    assert again.config == unet.config


def test_one_with_the_same_tensors_is_not_taken_for_the_plain_model(tmp_path: Path) -> None:
    """It would draw another image without a word."""
    save_component(LouderUNet(SMALL.unet), tmp_path, "unet")
    assert record(tmp_path / "unet") == {
        "class": f"{HERE}.LouderUNet", "config": "kolors_core.config.UNetConfig", "fields": {},
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"config.json: it is a changed model's, of {HERE}.LouderUNet: load"):
        load_component(tmp_path, "unet")
    again = load_component(tmp_path, "unet", kind=ModelSpec(UNetConfig, LouderUNet))
    assert type(again) is LouderUNet
    plain, report = load_modified(tmp_path, "unet", UNet, {})  # on request, with a report
    assert type(plain) is UNet and not report.unexpected
    assert diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet").num_parameters()


def test_a_changed_block_is_named_too(tmp_path: Path) -> None:
    def build(config: UNetConfig) -> UNet:
        unet = UNet(config)
        vars(unet.mid.attentions[0].blocks[0])["_modules"]["feed_forward"] = Louder(128)
        return unet

    save_component(build(SMALL.unet), tmp_path, "unet")
    with pytest.raises(ValueError, match=f"changed model's, of {HERE}.Louder: load it by"):
        load_component(tmp_path, "unet")
    again = load_component(tmp_path, "unet", kind=ModelSpec(UNetConfig, build))
    assert type(again.mid.attentions[0].blocks[0].feed_forward) is Louder


def test_models_of_the_library_carry_no_record(tmp_path: Path) -> None:
    models = {
        "unet": UNet(SMALL.unet), "controlnet": ControlNet(NET),
        "compat": UNet2DConditionModel(SMALL.unet),
    }  # fmt: skip
    adapter = nn.Module()
    adapter.is_adapter, adapter.louder = True, Louder(8)
    models["unet"].adapter = adapter  # a user's own, which is not saved
    for name, model in models.items():
        component = "controlnet" if name == "controlnet" else "unet"
        save_component(model, tmp_path / name, component)
        assert record(tmp_path / name / component) is None


def test_a_subclass_of_the_references_class_loads_itself(tmp_path: Path) -> None:
    unet = OwnNames(CONFIG)
    unet.save_pretrained(tmp_path / "mine")
    again = OwnNames.from_pretrained(tmp_path / "mine")
    assert type(again) is OwnNames and again.config == CONFIG
    with pytest.raises(ValueError, match=f"of {HERE}.OwnNames: load it by"):
        UNet2DConditionModel.from_pretrained(tmp_path / "mine")


def test_a_config_that_writes_and_reads_its_fields_itself_does_so(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Own(UNetConfig):
        kind: Any = torch.float32  # no JSON

        @classmethod
        def from_public(cls, public: Any, where: str = "config") -> "Own":
            rest = {name: value for name, value in public.items() if name != "kind"}
            return replace(super().from_public(rest, where), kind=getattr(torch, public["kind"]))

        def to_public(self) -> dict[str, Any]:
            return super().to_public() | {"kind": str(self.kind).removeprefix("torch.")}

    config = Own(**vars(SMALL.unet), kind=torch.float16)
    save_component(UNet(config), tmp_path, "unet")
    assert record(tmp_path / "unet")["fields"] == {}
    assert load_component(tmp_path, "unet", kind=ModelSpec(Own, UNet2DConditionModel)).config == config


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class NoDefault(UNetConfig):
        gates: int

    @dataclass(frozen=True, kw_only=True)
    class NoJSON(UNetConfig):
        kind: Any = field(default=torch.float32)

    for number, config in enumerate((
        NoDefault(**vars(SMALL.unet), gates=1), NoJSON(**vars(SMALL.unet), kind=torch.half),
    )):  # fmt: skip
        with pytest.raises(
            ValueError, match=r"cannot be written and read again: .*: give its new fields JSON"
        ):
            save_component(UNet(config), tmp_path / str(number), "unet")
        assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"fields": {"channels": [1]}}, "has the field 'channels' of an unknown class"),
        ({"fields": {"gates": 1, "no\x1b[31m": 1}, "config": "a.B"}, r"has the field 'no\\x1b\[31m' of a.B"),
        ({"fields": [1]}, "the fields of _kolors_core must be names with values"),
    ],
    ids=["a field of the library's", "an unknown field", "a list"],
)
def test_a_strange_record_is_refused(written: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_component(GatedUNet(CONFIG), tmp_path, "unet")
    file = tmp_path / "unet" / "config.json"
    public = json.loads(file.read_text())
    file.write_text(json.dumps(public | {"_kolors_core": written}))
    with pytest.raises(ValueError, match=message):
        load_component(tmp_path, "unet", kind=GATED)
    file.write_text(json.dumps(public | {"_kolors_core": {"class": "\x1b[31mred"}}))
    with pytest.raises(ValueError, match="a changed model's, of an unknown class: load it by"):
        load_component(tmp_path, "unet")


def test_a_config_of_the_references_names_may_have_more_fields_too(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Mine(configs.UNetConfig):
        extra: int = 1

    config = Mine(**asdict(TINY.unet), extra=7)
    save_component(UNet2DConditionModel(config), tmp_path, "unet")
    again = load_component(tmp_path, "unet", kind=ModelSpec(Mine, UNet2DConditionModel))
    assert again.config == config and again.config.extra == 7 and again.config.cross_attention_dim == 192
    assert isinstance(ControlNetConfig(), UNetConfig) and not isinstance(ChatGLMConfig(), UNetConfig)


def test_latents_of_eight_channels_are_drawn_and_saved(tmp_path: Path) -> None:
    unet, report = load_modified(
        "tiny", "unet", lambda config: UNet(replace(config, in_channels=8, out_channels=8)),
        {"conv_in.weight": zero_padded, "conv_out.*": zero_padded},
    )  # fmt: skip
    assert report.misshapen == ["conv_in.weight", "conv_out.bias", "conv_out.weight"] and not report.missing
    pipe = KolorsPipeline.from_pretrained("tiny", vae=VAE(EIGHT).eval(), unet=unet)
    pipe.save_pretrained(tmp_path)
    latents, others = (
        each("a fox", num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="latent")
        for each in (pipe, KolorsPipeline.from_pretrained(tmp_path))
    )
    assert latents.images.shape == (1, 8, 16, 16) and torch.equal(latents.images, others.images)
    assert pipe("a fox", num_inference_steps=1).images[0].size == (128, 128)
