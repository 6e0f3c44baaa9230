"""Classes of one's own in checkpoints: registered, saved, read again as strictly as the library's; and what
could not be read again, which is refused before anything is written."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kolors_core import EulerDiscreteScheduler, KolorsPipeline, registry
from kolors_core.checkpoint import load_component, load_modified, save_component
from kolors_core.guidance import guided
from kolors_core.loading import zeros
from kolors_core.pipelines import text_to_image
from kolors_core.registry import register
from kolors_core.sampling import euler
from kolors_core.schedulers import EulerDiscreteScheduler as PlainEuler
from kolors_core.tokenizer import TokenBatch
from kolors_core.training.data import Batch
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import Trainer, TrainingConfig
from kolors_core.unet import UNet
from tests.examples.models.bidirectional import Reader, ReaderConfig
from tests.examples.models.dit import DiT, DiTConfig
from tests.support.own_models import drawn, make_dit, own_pipeline
from tests.support.small import SMALL
from weights_convert.key_mapping import Table
from weights_convert.safetensors_files import Source, save_tensors


@pytest.fixture(scope="module")
def base() -> KolorsPipeline:
    return KolorsPipeline.from_pretrained("tiny")


@pytest.fixture(scope="module")
def saved(base: KolorsPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "own"
    own_pipeline(base).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten."""
    for name in ("_models", "_described"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    known = list(registry.KNOWN)
    yield
    registry.KNOWN[:] = known


class WithoutResiduals(nn.Module):
    """The denoiser for a loss that passes residuals, none, also without a ControlNet."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Tensor, residuals: tuple[()] = ()) -> Tensor:
        assert not residuals
        return self.net(*inputs)


class Pairs:
    """Batches of two captions, each with its own latents."""

    def __init__(self, tokens: TokenBatch) -> None:
        self.tokens = tokens

    def batch(self, step: int, rows: slice, device: torch.device) -> Batch:
        draw = torch.Generator().manual_seed(step % 4)
        noise, at = torch.randn(4, 4, 4, 6, generator=draw), torch.randint(200, 900, (4,), generator=draw)
        latents = torch.tensor([-1.0, 1.0, -1.0, 1.0])[:, None, None, None].expand(4, 4, 4, 6)
        tokens = TokenBatch(*(part.repeat(2, 1) for part in list(vars(self.tokens).values())[:3]))
        return Batch(latents, tokens, torch.zeros(4, 6), at, noise)

    def record(self) -> dict[str, Any]:
        return {}


def test_a_denoiser_and_an_encoder_of_ones_own_train_draw_and_come_back(
    base: KolorsPipeline, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net, encoder = DiT(DiTConfig(width=32)), Reader(ReaderConfig(layers=1))
    pipe = own_pipeline(base, unet=net, text_encoder=encoder)
    tokens = base.tokenizer(["a red apple", "a blue car"], max_length=8)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    config = TrainingConfig(
        steps=16, batch_size=4, learning_rate=3e-3, warmup=1, prediction_type="v_prediction",
        checkpoint_blocks=True,
    )  # fmt: skip
    loss = DiffusionLoss(WithoutResiduals(net), encoder, base.scheduler.training_sigmas(), config)
    trainer = Trainer(loss, Pairs(tokens), config, tmp_path / "run")
    assert len(trainer.blocks) == 3  # of both
    losses = trainer.fit(progress=False)
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert all(not torch.equal(t, before[name]) for name, t in encoder.state_dict().items() if "norm" in name)

    net.prediction_type = "v_prediction"
    with pytest.raises(ValueError, match="DiT has learned 'v_prediction' .*scheduler converts 'epsilon'"):
        drawn(pipe)
    with pytest.raises(
        ValueError, match=r"from_config\(pipe.scheduler.config, prediction_type='v_prediction'\)"
    ):
        pipe.save_pretrained(tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    latents = drawn(pipe)
    pipe.save_pretrained(tmp_path / "right", max_shard_size="100KB")
    for kind in (KolorsPipeline, text_to_image.KolorsPipeline):
        again = kind.from_pretrained(tmp_path / "right")
        again.set_progress_bar_config(disable=True)
        assert type(again.unet) is DiT and type(again.text_encoder) is Reader
        assert again.unet.config == net.config and again.scheduler.prediction_type == "v_prediction"
        assert torch.equal(drawn(again), latents)


def test_functions_are_not_saved_and_a_warning_says_so(
    base: KolorsPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = own_pipeline(base)
    pipe.guided, pipe.sampler = partial(guided, rescale=0.7), euler
    pipe.save_pretrained(tmp_path / "own")
    assert [r.getMessage().partition(" is")[0] for r in caplog.records] == ["pipe.guided", "pipe.sampler"]


def test_files_name_the_class_and_reading_needs_it(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = json.loads((saved / "model_index.json").read_text())
    assert index["unet"] == [DiT.__module__, "DiT"] and index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["text_encoder"] == [Reader.__module__, "Reader"]
    config = json.loads((saved / "unet" / "config.json").read_text())
    assert config["_class_name"] == "DiT" and config["width"] == 32
    assert set(Source([saved / "unet" / "diffusion_pytorch_model.safetensors"])) == set(
        make_dit().state_dict()
    )

    unet, report = load_modified(
        saved, "unet", lambda config: DiT(replace(config, depth=3)), {"blocks.2.*": zeros}
    )
    assert len(unet.blocks) == 3 and all(name.startswith("blocks.2.") for name in report.missing)
    monkeypatch.delitem(registry._models, ("unet", "DiT"))
    where = DiT.__module__
    how = rf"register it first, registry.register\('unet', 'DiT', {where}.DiTConfig, {where}.DiT\)"
    for load in (KolorsPipeline.from_pretrained, lambda folder: load_component(folder, "unet")):
        with pytest.raises(ValueError, match=how):
            load(saved)


def damage_name(folder: Path) -> str:
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = dict(Source([file]))
    tensors["blocks.0.extra"] = tensors.pop("blocks.0.to_q.weight")
    save_tensors(tensors, file)
    return "1 missing: blocks.0.to_q.weight; 1 unexpected: blocks.0.extra"


def damage_shape(folder: Path) -> str:
    edit(folder, width=64)
    return r"misshapen: blocks.0.mlp.0.bias is \[128\], the model wants \[256\]"


def damage_dtype(folder: Path) -> str:
    file = folder / "diffusion_pytorch_model.safetensors"
    save_tensors(dict(Source([file])) | {"out.bias": torch.zeros(16, dtype=torch.int32)}, file)
    return "out.bias holds torch.int32, expected floating-point weights"


def damage_field(folder: Path) -> str:
    edit(folder, deep=3)
    return "config.json: DiTConfig has no field 'deep'"


def edit(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("damage", [damage_name, damage_shape, damage_dtype, damage_field])
def test_it_is_read_as_strictly_as_the_librarys(damage: Any, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "unet", tmp_path / "unet")
    load_component(tmp_path, "unet")
    with pytest.raises(ValueError, match=damage(tmp_path / "unet")):
        load_component(tmp_path, "unet")


def test_a_table_has_the_files_names(tmp_path: Path) -> None:
    register("unet", "DiT", DiTConfig, DiT, Table(component="unet", blocks=(), rules=(("layers", "blocks"),)))
    net = make_dit()
    save_component(net, tmp_path, "unet")
    names = set(Source([tmp_path / "unet" / "diffusion_pytorch_model.safetensors"]))
    assert "layers.0.to_q.weight" in names and not any(name.startswith("blocks") for name in names)
    again = load_component(tmp_path, "unet").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in net.state_dict().items())


@dataclass(frozen=True, kw_only=True)
class Halved(PlainEuler):
    """Euler's method over the lower noise levels alone."""

    highest: float = 5.0

    def schedule(self, *given: Any, **named: Any) -> Any:
        whole = super().schedule(*given, **named)
        return whole.keep_last(int((whole.sigmas[:-1] <= self.highest).sum()))


@dataclass(frozen=True)
class Letters:
    """A tokenizer of letters, padded on the left."""

    length: int = 16
    size: int = field(default=2048, init=False)

    def __call__(self, prompts: list[str], max_length: int = 256) -> TokenBatch:
        rows = [[ord(letter) % 2048 for letter in text[: self.length]] for text in prompts]
        ids = torch.tensor([[0] * (self.length - len(row)) + row for row in rows])
        mask = torch.tensor([[False] * (self.length - len(row)) + [True] * len(row) for row in rows])
        return TokenBatch(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))


def test_a_scheduler_and_a_tokenizer_of_ones_own_come_back(base: KolorsPipeline, tmp_path: Path) -> None:
    pipe = own_pipeline(base, scheduler=Halved(highest=3.0), tokenizer=Letters(length=12))
    latents = drawn(pipe, num_inference_steps=8, negative_prompt="x")
    for component, name in (("scheduler", "Halved"), ("tokenizer", "Letters")):
        found = rf"is a {__name__}.{name}, which .*register\('{component}', '{name}', {name}\)"
        with pytest.raises(ValueError, match=found):
            pipe.save_pretrained(tmp_path / "own")
        assert not (tmp_path / "own").exists()
        register(component, name, {"Halved": Halved, "Letters": Letters}[name])
    pipe.save_pretrained(tmp_path / "own")
    assert json.loads((tmp_path / "own" / "model_index.json").read_text())["scheduler"] == [
        __name__,
        "Halved",
    ]
    again = KolorsPipeline.from_pretrained(tmp_path / "own")
    again.set_progress_bar_config(disable=True)
    assert again.scheduler == Halved(highest=3.0) and again.tokenizer == Letters(length=12)
    assert torch.equal(drawn(again, num_inference_steps=8, negative_prompt="x"), latents)
    assert PlainEuler.from_config(again.scheduler.config) == PlainEuler()  # ignores the other's field
    registry._described.clear()
    with pytest.raises(FileNotFoundError, match=r"if Letters is a class of your own, register it first"):
        KolorsPipeline.from_pretrained(tmp_path / "own", scheduler=None)
    with pytest.raises(ValueError, match=r"_class_name is 'Halved'.*registered first: .*'scheduler'"):
        KolorsPipeline.from_pretrained(tmp_path / "own", tokenizer=None)


@dataclass(frozen=True, kw_only=True)
class SetConfig(DiTConfig):
    kinds: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class CountedConfig(DiTConfig):
    pass


class WithCounter(DiT):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))


class EulerAgain(PlainEuler):
    pass


EulerAgain.__name__ = "EulerDiscreteScheduler"


class Mine(DiT):
    pass


def with_a_layer() -> dict[str, Any]:
    unet = UNet(replace(SMALL.unet, text_dim=192))
    unet.gates = nn.Linear(3, 3)
    return {"unet": unet}


def with_integers() -> dict[str, Any]:
    register("unet", "WithCounter", CountedConfig, WithCounter)
    return {"unet": WithCounter(CountedConfig())}


REFUSED: dict[str, tuple[Any, str]] = {
    "a layer more": (with_a_layer, "the unet could not be read again .*unexpected: gates.bias"),
    "integers": (with_integers, "the unet has seen of torch.int64, expected floating-point tensors alone"),
    "another class": (lambda: {"unet": Mine(SetConfig())}, r"register\('unet', 'Mine', SetConfig, Mine\)"),
    "a scheduler's name": (lambda: {"scheduler": EulerAgain()}, "the scheduler is a .*EulerAgain, which"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_not_be_read_again_is_not_written(case: str, base: KolorsPipeline, tmp_path: Path) -> None:
    make, found = REFUSED[case]
    pipe = own_pipeline(base, **{"text_encoder": base.text_encoder} | make())
    with pytest.raises(ValueError, match=found):
        pipe.save_pretrained(tmp_path / "own")
    assert not (tmp_path / "own").exists()


WRONG: list[tuple[tuple[Any, ...], str]] = [
    (
        ("denoiser", "A", DiTConfig, DiT),
        "component must be one of text_encoder, unet, vae, scheduler, tokenizer",
    ),
    (("unet", "a name", DiTConfig, DiT), "name must be that of a class, got 'a name'"),
    (("unet", "UNet2DConditionModel", DiTConfig, DiT), "name must be another than the library's own classes"),
    (("unet", "A", dict, DiT), "config_class must be a dataclass, got <class 'dict'>"),
    (("unet", "A", DiTConfig, DiT), "config_class DiTConfig is that of 'DiT' already"),
    (("unet", "A", SetConfig), "build of a unet must be a function of a config, got None"),
    (("scheduler", "A", Halved, Halved), "build of a scheduler must be None, since it is its own config"),
    (("scheduler", "A", Letters), "a scheduler's class must be a subclass of kolors_core.schedule.Scheduler"),
]


@pytest.mark.parametrize(("arguments", "found"), WRONG)
def test_a_wrong_registration_is_an_error(arguments: tuple[Any, ...], found: str) -> None:
    with pytest.raises((ValueError, TypeError), match=found):
        register(*arguments)


def test_a_config_that_json_changes_is_refused(tmp_path: Path) -> None:
    register("unet", "Sets", SetConfig, DiT)
    with pytest.raises((ValueError, TypeError), match="frozenset"):
        save_component(DiT(SetConfig(kinds=frozenset("a"))), tmp_path, "unet")
