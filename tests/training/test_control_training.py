"""Training a ControlNet beside a frozen UNet: the objective against the reference, and a killed run."""

from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from kolors_core import KolorsControlNet, canny
from kolors_core.chatglm import ChatGLM, TextEmbedding
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.tokenizer import Tokenizer
from kolors_core.training.data import Batch, Batches, LatentDataset, read_folder
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import Trainer, TrainingConfig
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from tests.support.controlnets import NET, net_pair, reference_residuals
from tests.support.parity import pair
from tests.support.pipelines import picture
from tests.support.reference_folder import KOLORS_SCHEDULER
from tests.support.small import SMALL, randomise
from weights_convert import TABLES

CONFIG = TrainingConfig(steps=6, batch_size=2, learning_rate=1e-3, warmup=2, max_tokens=12, save_every=3)


def test_loss_and_gradients_equal_the_reference() -> None:
    ours, theirs = pair("unet", torch.float64)
    net, other = net_pair(4, torch.float64)
    ours.requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 4, 8, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    tokens = torch.randn(2, 5, SMALL.unet.text_dim, generator=draw, dtype=torch.float64)
    image = torch.rand(2, 3, 64, 64, generator=draw, dtype=torch.float64)
    timesteps, ids = torch.tensor([7, 901]), torch.full((2, 6), 64.0)
    batch = Batch(latents, TextEmbedding(tokens, tokens[:, -1]), ids, timesteps, noise, image)
    table = EulerDiscreteScheduler().training_sigmas().double()
    loss = DiffusionLoss(ours, None, table, CONFIG, net)(batch)
    kept = {name: KOLORS_SCHEDULER[name] for name in ("num_train_timesteps", "beta_start", "beta_end")}
    scheduler = diffusers.DDPMScheduler(**kept, beta_schedule="scaled_linear")
    sigma = table[timesteps][:, None, None, None]
    noisy = (latents + sigma * noise) / (sigma**2 + 1).sqrt()
    wanted = scheduler.add_noise(latents, noise, timesteps)
    assert torch.allclose(noisy, wanted, atol=1e-4), "the same but for the scheduler's own float32"
    given = {
        "latents": noisy, "timestep": timesteps, "text_tokens": tokens, "pooled_text": tokens[:, -1],
        "size_ids": ids,
    }  # fmt: skip
    *skips, mid = reference_residuals(other, given, image)
    predicted = theirs(
        noisy, timesteps, encoder_hidden_states=tokens,
        added_cond_kwargs={"text_embeds": tokens[:, -1], "time_ids": ids},
        down_block_additional_residuals=skips, mid_block_additional_residual=mid,
    ).sample  # fmt: skip
    expected = F.mse_loss(predicted, noise)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # ours sums up in float32
    loss.backward()
    expected.backward()
    gradients = {TABLES["controlnet"].to_ours(name): p.grad for name, p in other.named_parameters()}
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad - gradients[name]).abs().max() < 1e-6 * largest, name  # float32's, as the loss
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_a_net_without_images_and_images_without_a_net_are_refused() -> None:
    unet, net = UNet(SMALL.unet), KolorsControlNet(NET)
    latents, tokens = torch.zeros(1, 4, 8, 8), torch.zeros(1, 2, SMALL.unet.text_dim)
    text, ids = TextEmbedding(tokens, tokens[:, -1]), torch.zeros(1, 6)
    table = EulerDiscreteScheduler().training_sigmas()
    for one, image in ((net, None), (None, torch.zeros(1, 3, 64, 64))):
        batch = Batch(latents, text, ids, torch.tensor([5]), latents, image)
        with pytest.raises(ValueError, match="need each other"):
            DiffusionLoss(unet, None, table, CONFIG, one)(batch)


def make(folder: Path, pictures: Path, tokenizer: Path, config: TrainingConfig = CONFIG) -> Trainer:
    unet, vae, text = UNet(SMALL.unet), VAE(SMALL.vae), ChatGLM(SMALL.text_encoder)
    for seed, model in enumerate((unet, vae, text)):
        randomise(model, seed)
    unet.requires_grad_(False)
    torch.manual_seed(0)
    net = KolorsControlNet.from_unet(unet, NET.conditioning_widths)
    examples = read_folder(pictures)
    batches = Batches(examples, [(64, 64)], config.batch_size, config.seed)
    data = LatentDataset(examples, batches, vae, Tokenizer(tokenizer), config, text, control=canny)
    objective = DiffusionLoss(unet, None, EulerDiscreteScheduler().training_sigmas(), config, net)
    return Trainer(objective, data, config, folder)


def test_only_the_controlnet_is_trained_and_a_run_goes_on_where_it_was(
    tmp_path: Path, small_tokenizer: Path
) -> None:
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        page = Image.new("RGB", (64, 64), "white")
        page.paste(picture(i, 30, 30), (10 * i, 8))
        page.save(tmp_path / "pictures" / f"{i}.png")
        (tmp_path / "pictures" / f"{i}.txt").write_text("cat\n")
    whole = make(tmp_path / "whole", tmp_path / "pictures", small_tokenizer)
    data = whole.data
    assert isinstance(data, LatentDataset) and set(data.controls) == {0, 1, 2}
    assert data.controls[1].dtype == torch.uint8 and set(data.controls[1].unique().tolist()) == {0, 255}
    batch = data.batch(0, slice(0, 2), torch.device("cpu"))
    assert batch.control is not None and batch.control.shape == (2, 3, 64, 64) and batch.control.max() == 1
    losses = whole.fit()
    assert all(name.startswith("controlnet.") for name in whole.named)
    assert whole.loss.controlnet.to_mid.weight.any(), "zero convolutions have moved"
    first = make(tmp_path / "parts", tmp_path / "pictures", small_tokenizer, replace(CONFIG, steps=3)).fit()
    rest = make(tmp_path / "parts", tmp_path / "pictures", small_tokenizer).fit()
    assert first + rest == losses
