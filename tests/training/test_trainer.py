"""Training: the reference's objective, runs that resume and spread over processes to the same losses."""

from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from kolors_core.adapters.lora import attach
from kolors_core.chatglm import TextEmbedding
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.training.data import Batch
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import Trainer, TrainingConfig
from tests.support.parity import pair
from tests.support.reference_folder import KOLORS_SCHEDULER
from tests.support.small import EXACT, SMALL, relative_error
from tests.support.train_worker import CONFIG, Killed, kill, make_trainer, train_killed_and_resumed
from tests.support.two_processes import start_two
from tests.support.versions import shards_on_cpu
from tests.training.test_data import write_pictures
from weights_convert.safetensors_files import Source, save_tensors


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def whole(pictures: Path, small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run of CONFIG that nothing disturbed, which others are compared with."""
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), pictures, small_tokenizer)
    trainer.fit()
    return trainer


def test_the_objective_is_the_references() -> None:
    """Its DDPM scheduler's noising on the 1,100-step table, its UNet, mean squared error."""
    ours, theirs = pair("unet", torch.float64)
    draw = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(3, 4, 8, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    tokens = torch.randn(3, 5, SMALL.unet.text_dim, generator=draw, dtype=torch.float64)
    timesteps = torch.tensor([0, 444, 1099])
    ids = torch.full((3, 6), 64.0)
    batch = Batch(latents, TextEmbedding(tokens, tokens[:, -1]), ids, timesteps, noise)
    kept = {
        name: KOLORS_SCHEDULER[name]
        for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    }
    scheduler = diffusers.DDPMScheduler(**kept)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    added = {"text_embeds": tokens[:, -1], "time_ids": ids}
    noisy = scheduler.add_noise(latents, noise, timesteps)
    predicted = theirs(noisy, timesteps, encoder_hidden_states=tokens, added_cond_kwargs=added).sample
    table = EulerDiscreteScheduler().training_sigmas().double()
    loss = DiffusionLoss(ours, None, table, CONFIG)(batch)
    assert loss.item() == pytest.approx(F.mse_loss(predicted, noise).item(), rel=1e-5)  # the table is float32

    gamma = replace(CONFIG, min_snr_gamma=5.0)
    snr = table[timesteps] ** -2
    weights = snr.clamp(max=5.0) / snr
    each = (predicted - noise).square().mean(dim=(1, 2, 3))
    weighed = DiffusionLoss(ours, None, table, gamma)(batch)
    assert weighed.item() == pytest.approx((weights * each).mean().item(), rel=1e-5)
    assert weighed < 0.9 * loss


def test_noise_offset_shifts_each_channel_as_a_whole(
    pictures: Path, tmp_path: Path, small_tokenizer: Path
) -> None:
    plain = make_trainer(tmp_path / "a", pictures, small_tokenizer).data
    offset = make_trainer(tmp_path / "b", pictures, small_tokenizer, replace(CONFIG, noise_offset=0.1)).data
    shift = (
        batch.noise for batch in (data.batch(0, slice(0, 4), torch.device("cpu")) for data in (offset, plain))
    )
    difference = next(shift) - next(shift)  # [B, 4, H/8, W/8]
    assert difference.std((2, 3)).max() < 1e-6 and 0.03 < difference.mean((2, 3)).std() < 0.3


def test_second_moments_decay_as_told(pictures: Path, tmp_path: Path, small_tokenizer: Path) -> None:
    config = replace(CONFIG, adam_beta2=0.9)
    trainer = make_trainer(tmp_path, pictures, small_tokenizer, config)
    moments = {name: torch.zeros_like(parameter) for name, parameter in trainer.named.items()}

    def average(*_: object) -> None:
        for name, parameter in trainer.named.items():
            moments[name].lerp_(parameter.grad.square(), 0.1)

    trainer.optimizer.register_step_pre_hook(average)
    trainer.fit()
    for name, parameter in trainer.named.items():
        assert relative_error(trainer.optimizer.state[parameter]["exp_avg_sq"], moments[name]) < 1e-5, name


def test_a_killed_run_goes_on_to_the_same_losses(
    whole: Trainer, pictures: Path, tmp_path: Path, small_tokenizer: Path
) -> None:
    expected = list(whole.losses)
    first = make_trainer(tmp_path / "parts", pictures, small_tokenizer)
    first.on_step = kill
    with pytest.raises(Killed):
        first.fit()
    second = make_trainer(tmp_path / "parts", pictures, small_tokenizer)
    assert second.fit() == expected[3:], "from the state saved after three steps"
    for name, parameter in whole.named.items():
        assert torch.equal(parameter, second.named[name]), name
        assert torch.equal(whole.ema[name], second.ema[name]), name
    assert len(set(expected)) == len(expected) == 6


def test_equal_runs_write_equal_states(pictures: Path, tmp_path: Path, small_tokenizer: Path) -> None:
    """Each has two metadata, whose order the library draws: of eight, all agree by chance in 1 of 128."""
    for run in "ab":
        trainer = make_trainer(
            tmp_path / run, pictures, small_tokenizer, replace(CONFIG, steps=4, save_every=4)
        )
        trainer.fit()
    first, second = ((tmp_path / run / "state.safetensors").read_bytes() for run in "ab")
    assert first == second
    for _ in range(6):
        trainer.save()
        assert (tmp_path / "b" / "state.safetensors").read_bytes() == first


def test_a_damaged_state_is_refused_by_name(pictures: Path, tmp_path: Path, small_tokenizer: Path) -> None:
    one = replace(CONFIG, steps=1)
    make_trainer(tmp_path, pictures, small_tokenizer, one).fit()
    file = tmp_path / "state.safetensors"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "log.csv", file.name]
    whole, state = file.read_bytes(), load_file(file)
    save_tensors(state, file)
    with pytest.raises(
        ValueError, match="state.safetensors: its metadata give step '', expected a whole number"
    ):
        make_trainer(tmp_path, pictures, small_tokenizer, one).fit()
    name = "exp_avg.unet.conv_in.weight"
    cut = state | {name: state[name][:1].clone()}
    (tmp_path / "whole").write_bytes(whole)
    metadata = Source([file]).metadata(tmp_path / "whole") or {}
    save_tensors(cut, file, metadata)
    with pytest.raises(ValueError, match=r"another run: exp_avg.unet.conv_in.weight is \[1, .* expected \["):
        make_trainer(tmp_path, pictures, small_tokenizer, one).fit()
    save_tensors({name: tensor for name, tensor in state.items() if "ema." not in name}, file, metadata)
    with pytest.raises(ValueError, match="state.safetensors: is of another run: it has no ema.unet"):
        make_trainer(tmp_path, pictures, small_tokenizer, one).fit()
    file.write_bytes(whole[:-100])
    with pytest.raises(
        ValueError, match="state.safetensors: not a whole safetensors file: its tensors end at"
    ):
        make_trainer(tmp_path, pictures, small_tokenizer, one).fit()


def test_the_loss_falls_and_the_average_follows(
    pictures: Path, tmp_path: Path, small_tokenizer: Path
) -> None:
    config = replace(CONFIG, steps=60, batch_size=8, schedule="constant", learning_rate=2e-3, save_every=60)
    trainer = make_trainer(tmp_path, pictures, small_tokenizer, config)
    losses = trainer.fit()
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    name = "unet.conv_out.weight"
    before = trainer.named[name].detach().clone()
    assert 0 < relative_error(trainer.ema[name], before) < 0.5
    trainer.load_ema_weights()
    assert torch.equal(trainer.named[name], trainer.ema[name])
    trainer.ema.clear()
    with pytest.raises(ValueError, match="no moving average to load"):
        trainer.load_ema_weights()


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"gradient_accumulation_steps": 2}, 1e-5),
        ({"checkpoint_blocks": True}, 1e-6),
        ({"dtype": torch.bfloat16}, 0.05),
    ],
    ids=lambda value: str(value),
)
def test_other_ways_to_compute_the_same(
    changes: dict, tolerance: float, whole: Trainer, pictures: Path, tmp_path: Path, small_tokenizer: Path
) -> None:
    losses = make_trainer(tmp_path, pictures, small_tokenizer, replace(CONFIG, **changes)).fit()
    assert len(losses) == 6 and losses == pytest.approx(list(whole.losses), rel=tolerance)


def test_the_text_encoder_can_be_trained_too(pictures: Path, tmp_path: Path, small_tokenizer: Path) -> None:
    trainer = make_trainer(tmp_path, pictures, small_tokenizer, train_text=True)
    before = trainer.named["text_encoder.embedding.weight"].detach().clone()
    trainer.fit()
    assert not torch.equal(trainer.named["text_encoder.embedding.weight"], before)


@pytest.mark.parametrize("way", ["ddp", pytest.param("fsdp", marks=shards_on_cpu)])
def test_two_processes_train_as_one_does(
    way: str, whole: Trainer, pictures: Path, tmp_path: Path, small_tokenizer: Path
) -> None:
    log = tmp_path / "log"
    work = way == "fsdp", pictures, small_tokenizer, tmp_path / "two"
    for process in start_two(train_killed_and_resumed, log, *work):
        process.join(120)
        assert process.exitcode == 0, log.read_text()[-3000:]
    losses = [float(line) for line in (tmp_path / "two" / "losses.txt").read_text().splitlines()]
    assert losses == pytest.approx(list(whole.losses)[3:], rel=1e-5), "killed, resumed, and on two processes"


def test_lora_trains_by_the_same_loop_and_leaves_no_trace(
    pictures: Path, tmp_path: Path, small_tokenizer: Path
) -> None:
    trainer = make_trainer(tmp_path / "base", pictures, small_tokenizer)
    unet = trainer.loss.unet
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    unet.requires_grad_(False)
    adapter = attach(unet, rank=4)
    lora = Trainer(trainer.loss, trainer.data, replace(CONFIG, learning_rate=1e-2), tmp_path / "lora")
    losses = lora.fit()
    assert len(losses) == 6 and all(".lora.default." in name for name in lora.named)
    assert any(part.up.any() for part in adapter.parts().values())
    assert all(torch.equal(unet.state_dict()[name], tensor) for name, tensor in before.items())
    adapter.detach()
    assert unet.state_dict().keys() == before.keys()


def test_bad_settings_are_named(pictures: Path, tmp_path: Path, small_tokenizer: Path) -> None:
    for changes, message in (
        ({"steps": 0}, "steps must be a positive whole number, got 0"),
        ({"adam_beta2": 1.0}, "adam_beta2 must be below 1"),
        ({"schedule": "linear"}, "schedule must be 'constant' or 'cosine'"),
        ({"dtype": torch.float16}, "dtype must be torch.float32 or torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(CONFIG, **changes)
    with pytest.raises(
        ValueError,
        match="batch_size must be a multiple of 1 processes times gradient_accumulation_steps 3, got 4",
    ):
        make_trainer(tmp_path, pictures, small_tokenizer, replace(CONFIG, gradient_accumulation_steps=3))
    trainer = make_trainer(tmp_path, pictures, small_tokenizer)
    trainer.loss.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        Trainer(trainer.loss, trainer.data, CONFIG, tmp_path)


def test_learning_rate_warms_up_and_falls() -> None:
    config = TrainingConfig(steps=100, learning_rate=1.0, warmup=10, schedule="cosine")
    rates = [config.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(rates[10]) == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5, abs=0.01) and rates[-1] < 0.01
    assert relative_error(torch.tensor(rates[:10]), torch.linspace(0.1, 1.0, 10)) < EXACT + 1e-6
