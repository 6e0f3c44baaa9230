"""Training to inpaint: masks of a step alone, what the UNet reads, and nine channels that begin as four."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kolors_core.chatglm import ChatGLM, TextEmbedding
from kolors_core.loading import load, zero_padded
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.tokenizer import Tokenizer
from kolors_core.training.data import (
    Batches,
    LatentDataset,
    MaskedLatentDataset,
    load_pixels,
    random_masks,
    read_folder,
)
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import Trainer
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from tests.support.parity import pair
from tests.support.small import SHALLOW, SMALL, randomise, relative_error
from tests.support.train_worker import CONFIG
from tests.training.test_data import write_pictures
from weights_convert.safetensors_files import Tensors

CPU = torch.device("cpu")
TABLE = EulerDiscreteScheduler().training_sigmas()


def make_data(kind: type[LatentDataset], folder: Path, tokenizer: Path) -> LatentDataset:
    """Data of a few images; weights are the same for every call."""
    if not folder.exists():
        folder.mkdir()
        write_pictures(folder)
    vae, text = VAE(SMALL.vae), ChatGLM(SMALL.text_encoder)
    for seed, model in enumerate((vae, text)):
        randomise(model, seed)
    examples = read_folder(folder)
    batches = Batches(examples, [(64, 64), (32, 64)], CONFIG.batch_size, CONFIG.seed)
    return kind(examples, batches, vae, Tokenizer(tokenizer), CONFIG, text)


def test_masks_are_boxes_or_everything() -> None:
    masks = random_masks(400, 32, 48, torch.Generator().manual_seed(0))
    assert masks.shape == (400, 1, 32, 48) and set(masks.unique().tolist()) == {0, 1}
    parts = masks.mean((1, 2, 3))
    assert 0.12 < (parts == 1).float().mean() < 0.3 and parts.min() > 0.03
    assert len(parts.unique()) > 200 and (masks[:, :, 0, 0] == 1).float().mean() < 0.6


def test_a_batch_is_of_its_step_alone_and_a_part_is_the_wholes(tmp_path: Path, small_tokenizer: Path) -> None:
    data = make_data(MaskedLatentDataset, tmp_path / "p", small_tokenizer)
    whole, plain = (
        made.batch(5, slice(0, 4), CPU)
        for made in (data, make_data(LatentDataset, tmp_path / "p", small_tokenizer))
    )
    part = data.batch(5, slice(1, 3), CPU)
    assert whole.extra is not None and part.extra is not None and plain.extra is None
    assert relative_error(part.extra, whole.extra[1:3]) < 1e-5
    assert torch.equal(whole.noise, plain.noise) and torch.equal(whole.latents, plain.latents)
    other = data.batch(6, slice(0, 4), CPU).extra
    assert other is not None and other.shape[1] == 5
    assert other.shape != whole.extra.shape or not torch.equal(other[:, :1], whole.extra[:, :1])


def test_the_unet_sees_what_the_mask_leaves(
    tmp_path: Path, small_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(MaskedLatentDataset, tmp_path / "p", small_tokenizer)
    assert isinstance(data, MaskedLatentDataset)
    seen: list[torch.Tensor] = []
    data.vae.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    extra = data.batch(0, slice(0, 4), CPU).extra
    size, samples = data.batches.samples(0)
    assert extra is not None and len(seen) == 1
    for pixels, (i, _), mask in zip(seen[0], samples, extra[:, :1], strict=True):
        given = load_pixels(data.examples[i], size)[0]
        stays = (pixels == given).all(0)
        assert ((pixels == 0).all(0) | stays).all(), "the image, or grey"
        assert torch.equal(F.interpolate((~stays).float()[None, None], size=mask.shape[-2:])[0], mask)


def test_the_objective_reads_extra_behind_the_noisy_latents(tmp_path: Path, small_tokenizer: Path) -> None:
    batch = make_data(MaskedLatentDataset, tmp_path / "p", small_tokenizer).batch(0, slice(0, 4), CPU)
    ours, theirs = pair("unet", torch.float64, replace(SMALL, unet=replace(SMALL.unet, in_channels=9)))
    assert batch.extra is not None and isinstance(batch.text, TextEmbedding)
    text = batch.text.expand_padding()
    text = TextEmbedding(text.tokens.double(), text.pooled.double())
    batch = replace(batch, text=text, latents=batch.latents.double(), noise=batch.noise.double())
    sigma = TABLE.double()[batch.timesteps][:, None, None, None]
    noisy = (batch.latents + sigma * batch.noise) / (sigma**2 + 1).sqrt()
    predicted = theirs(
        torch.cat([noisy, batch.extra.double()], 1), batch.timesteps, encoder_hidden_states=text.tokens,
        added_cond_kwargs={"text_embeds": text.pooled, "time_ids": batch.size_ids},
    ).sample  # fmt: skip
    loss = DiffusionLoss(ours, None, TABLE.double(), CONFIG)(batch)
    assert abs(loss.item() / F.mse_loss(predicted, batch.noise).item() - 1) < 1e-7, "of float32 predictions"


def test_nine_channels_begin_as_four_and_learn_more(tmp_path: Path, small_tokenizer: Path) -> None:
    plain, nine = UNet(SHALLOW.unet), UNet(replace(SHALLOW.unet, in_channels=9))
    randomise(plain)
    source = Tensors({name: tensor.clone() for name, tensor in plain.state_dict().items()}, "four channels")
    load(nine, source, "unet", partial={"conv_in.weight": zero_padded})
    runs = {}
    for unet, kind in ((plain, LatentDataset), (nine, MaskedLatentDataset)):
        data = make_data(kind, tmp_path / "p", small_tokenizer)
        objective = DiffusionLoss(unet, None, TABLE, CONFIG)
        runs[kind] = Trainer(objective, data, CONFIG, tmp_path / kind.__name__).fit()
    assert abs(runs[MaskedLatentDataset][0] / runs[LatentDataset][0] - 1) < 1e-5
    assert abs(runs[MaskedLatentDataset][-1] / runs[LatentDataset][-1] - 1) > 1e-5
    assert (nine.conv_in.weight[:, 4:] != 0).all()
