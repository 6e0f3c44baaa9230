"""What is on the accelerator, unit by unit: copied ahead, waited for, written back, dropped."""

from contextlib import nullcontext
from itertools import pairwise
from unittest.mock import Mock, call, create_autospec

import pytest
import torch
from torch import Tensor, nn

from kolors_core.adapters.ip_adapter import IPAdapter, IPAdapterConfig
from kolors_core.chatglm import ChatGLM
from kolors_core.config import KOLORS
from kolors_core.performance.offload import Offload, TransferStream, blocks_of, bytes_of
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from tests.support.offloads import ACCELERATOR, LateTransfers

Stages = dict[str, list[nn.Module]]


def stages(**widths: int) -> Stages:
    """Models of 4 bytes times each width."""
    return {name: [nn.Linear(width, 1, bias=False)] for name, width in widths.items()}


def started(models: Stages, by_block: bool = False) -> Offload:
    offload = Offload()
    offload.start(ACCELERATOR, by_block)
    offload.transfers = LateTransfers()
    offload.enter(None, models)
    return offload


def weight(models: Stages, name: str) -> Tensor:
    return models[name][0].weight  # pyright: ignore[reportReturnType]


def visited(offload: Offload, models: Stages, *names: str | None) -> list[int]:
    """Bytes of weights on the accelerator, in each stage of a run."""
    found = []
    for name in names:
        offload.enter(name, models)
        found.append(offload.bytes_on_device // 4)
        if name is not None:
            assert torch.isfinite(weight(models, name)).all(), "its copy was not waited for"
    return found


def test_the_next_model_comes_early_if_there_is_room_for_both() -> None:
    """As in Kolors: never the UNet beside the text encoder; CLIP and UNet, and UNet and VAE."""
    models = stages(text_encoder=120, image_encoder=6, unet=52, vae=3)
    offload, run = started(models), ("text_encoder", "image_encoder", "unet", "vae", None)
    assert visited(offload, models, *run) == [120, 58, 55, 3, 0]
    assert offload.peak_bytes == 4 * 120
    models["unet"] = [nn.Linear(119, 1)]  # with its bias 120: there is no more room beside it
    assert visited(offload, models, *run) == [120, 6, 120, 3, 0]


def test_what_came_next_last_time_is_what_comes_early() -> None:
    models = stages(text_encoder=120, unet=52, vae=3)
    offload, run = started(models), ("vae", "text_encoder", "unet", "unet", "vae", None)  # image to image
    assert visited(offload, models, *run) == [3, 120, 55, 55, 3, 0]
    known = ("vae", "unet", "vae", None)  # the prompt is known already
    assert visited(offload, models, *known) == [3, 55, 3, 0]
    assert visited(offload, models, *known) == [55, 55, 3, 0]
    assert visited(offload, models, *run) == [55, 120, 55, 55, 3, 0], "the UNet's early copy is dropped"
    assert offload.peak_bytes == 4 * 120


def test_early_copies_of_what_was_written_or_replaced_since_are_not_used() -> None:
    models = stages(text_encoder=120, unet=52, vae=3)
    offload, vae = started(models), weight(models, "vae")
    offload.enter("unet", models)
    with torch.no_grad():
        vae.fill_(7.0)
    assert visited(offload, models, "vae", None) == [3, 0] and (vae == 7).all()
    offload.enter("unet", models)
    vae.data = torch.full_like(vae, 8.0)
    assert visited(offload, models, "vae", None) == [3, 0] and (vae == 8).all()
    offload.enter("unet", models)
    models["vae"] = [nn.Linear(5, 1, bias=False)]
    assert visited(offload, models, "vae", None) == [5, 0]


def test_what_is_written_on_the_accelerator_comes_home() -> None:
    models = stages(unet=52)
    offload, unet = started(models), weight(models, "unet")
    home = unet.data_ptr()
    offload.enter("unet", models)
    assert unet.data_ptr() != home
    offload.enter(None, models)
    assert unet.data_ptr() == home, "unwritten, it has its home's memory again"
    for write in (
        lambda: unet.detach().add_(1.0),
        lambda: setattr(unet, "data", unet.data + 1.0),
        lambda: models["unet"][0].to(torch.float64),
    ):
        offload.enter("unet", models)
        write()
        written = unet.detach().clone()
        offload.enter(None, models)
        assert torch.equal(unet, written) and offload.bytes_on_device == 0


def test_a_model_moves_in_inference_mode_and_stays_trainable() -> None:
    models = stages(unet=52)
    offload, unet = started(models), weight(models, "unet")
    version = unet._version
    with torch.inference_mode():
        visited(offload, models, "unet", None)
    assert not unet.is_inference() and unet._version == version
    models["unet"][0](torch.ones(52)).backward()
    assert unet.grad is not None


def test_weights_that_two_units_share() -> None:
    models = stages(text_encoder=9, unet=9, vae=2)
    models["unet"][0].weight = models["text_encoder"][0].weight
    offload = started(models)
    assert visited(offload, models, "text_encoder", "unet", "vae", None)[:2] == [9, 9]


class Gated(nn.Module):
    """Reads a child's weight without calling the child, and has a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.inner = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner.weight * self.gate


def test_by_block_a_module_with_parameters_is_one_with_what_is_below_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), Gated()), nn.Linear(4, 4))
    assert list(blocks_of(model)) == ["0", "1.1", "2"]
    x = torch.randn(3, 4)
    expected, offload = model(x), started({"unet": [model]}, by_block=True)
    for _ in range(2):
        assert torch.equal(model(x), expected)
        assert offload.peak_bytes == 2 * 20 * 4 + 16, "a gated linear, and one more"
    offload.end()
    assert offload.bytes_on_device == 0 and not any(part._forward_pre_hooks for part in model.modules())


def test_a_copy_that_is_not_waited_for_would_be_seen() -> None:
    models = stages(unet=3)
    offload = started(models)
    offload.transfers.wait = lambda event: None
    with pytest.raises(AssertionError, match="was not waited for"):
        visited(offload, models, "unet")


def test_a_pipeline_that_is_gone_leaves_models_as_they_were() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer)
    offload, home = started({"unet": [model]}, by_block=True), layer.weight.data_ptr()
    del offload
    model(torch.ones(4))
    assert layer.weight.data_ptr() == home


def neighbours(model: nn.Module) -> int:
    """Bytes in float16 of the two blocks in a row that take most."""
    sizes = [bytes_of(((model, path),)) for path in blocks_of(model)]
    return max(sum(pair) for pair in pairwise(sizes)) * 2 // next(model.parameters()).element_size()


def test_kolors_by_block_takes_little_memory() -> None:
    """ChatGLM's embedding is 0.53 GB and each layer 0.41 GB."""
    with torch.device("meta"):
        text, unet, vae = ChatGLM(KOLORS.text_encoder), UNet(KOLORS.unet), VAE(KOLORS.vae)
        adapter = IPAdapter(IPAdapterConfig())
    assert neighbours(text) < 1e9 and list(blocks_of(text))[:2] == ["embedding", "layers.0"]
    assert neighbours(unet) < 0.2e9 and neighbours(vae) < 0.1e9
    assert blocks_of(adapter)["resampler"] is adapter.resampler and neighbours(adapter) < 0.5e9
    for model in (text, unet, vae, adapter):
        assert sum(bytes_of(((model, path),)) for path in blocks_of(model)) == bytes_of(((model, ""),))
        assert "" not in blocks_of(model), "a hook on the model itself would say it is changed"


def test_the_lane_writes_after_the_computation_and_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls on CUDA's streams, in their order; what they do is CUDA's."""
    calls = Mock()
    calls.side, calls.compute = (create_autospec(torch.cuda.Stream, instance=True) for _ in range(2))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: calls.side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: calls.compute)
    monkeypatch.setattr(torch.cuda, "stream", calls.use)
    calls.use.return_value = nullcontext()
    transfers = TransferStream(torch.device("cuda"))
    transfers.device = ACCELERATOR
    (copy,), event = transfers.copy_to_device([torch.ones(3)])
    transfers.wait(event)
    assert torch.equal(copy, torch.ones(3))
    assert calls.mock_calls == [
        call.side.wait_stream(calls.compute), call.use(calls.side), call.side.record_event(),
        call.compute.wait_event(event),
    ]  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_homes_are_page_locked_and_copies_wait() -> None:
    transfers = TransferStream(torch.device("cuda"))
    home = torch.randn(1 << 22)
    transfers.move_to_cpu([home])
    place = home.data_ptr()
    transfers.move_to_cpu([home])
    assert home.is_pinned() and home.data_ptr() == place
    for _ in range(20):
        (copy,), event = transfers.copy_to_device([home])
        transfers.wait(event)
        assert torch.equal((copy + 0).cpu(), home)
