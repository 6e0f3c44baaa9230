"""UNet against the reference: outputs, gradients, odd sizes, and mutations that must be detected."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core.attention import attention_kernel
from kolors_core.unet import TransformerBlock, UNet
from tests.support.parity import assert_parity, first_divergence, pair
from tests.support.small import EXACT, SHALLOW, SMALL, relative_error

pytestmark = pytest.mark.numerical

CONFIG = SMALL.unet
Size = TypeVar("Size")


def inputs(batch: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Arguments of our forward."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "latents": noise(batch, CONFIG.in_channels, height, width),
        "timestep": torch.tensor(741.0),
        "text_tokens": noise(batch, 12, CONFIG.text_dim),
        "pooled_text": noise(batch, CONFIG.text_dim),
        "size_ids": torch.tensor([[1024.0, 1023.0, 0.0, 17.0, 512.0, 640.0]]).expand(batch, -1),
    }


def run_reference(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    return model(
        given["latents"], given["timestep"], encoder_hidden_states=given["text_tokens"],
        added_cond_kwargs={"text_embeds": given["pooled_text"], "time_ids": given["size_ids"]},
    ).sample  # fmt: skip


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 16, 16), (2, 8, 24), (2, 9, 13), (1, 5, 16)])
def test_output_equals_the_reference(batch: int, height: int, width: int) -> None:
    ours, theirs = pair("unet", torch.float64)
    given = inputs(batch, height, width)
    with torch.no_grad():
        mine, other = ours(**given), run_reference(theirs, given)
    assert_parity(
        mine, other, EXACT,
        lambda: first_divergence(
            ours, theirs, "unet", lambda: ours(**given), lambda: run_reference(theirs, given), EXACT
        ),
    )  # fmt: skip


def test_a_timestep_for_each_picture_equals_the_reference() -> None:
    ours, theirs = pair("unet", torch.float64)
    given = inputs(2, 8, 8) | {"timestep": torch.tensor([3.0, 1079.0])}
    runs = (lambda: ours(**given)), (lambda: run_reference(theirs, given))
    with torch.no_grad():
        mine, other = (run() for run in runs)
    assert_parity(mine, other, EXACT, lambda: first_divergence(ours, theirs, "unet", *runs, EXACT))


def test_gradients_equal_the_reference() -> None:
    from weights_convert import TABLES

    ours, theirs = pair("unet", torch.float64)
    ours.requires_grad_(True)
    mine, other = inputs(2, 8, 9), inputs(2, 8, 9)
    for given in (mine, other):
        for name in ("latents", "text_tokens", "pooled_text"):
            given[name].requires_grad_(True)
    target = torch.randn(2, 4, 8, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    F.mse_loss(ours(**mine), target).backward()
    F.mse_loss(run_reference(theirs, other), target).backward()
    for name in ("latents", "text_tokens", "pooled_text"):
        assert_parity(mine[name].grad, other[name].grad, EXACT)
    their_gradients = {TABLES["unet"].to_ours(name): p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert_parity(parameter.grad, their_gradients[name], EXACT, lambda name=name: f"gradient of {name}")


def wrong_layer_norm(model: UNet) -> None:
    model.down[1].attentions[0].blocks[0].norm2.eps = 1e-6


def wrong_group_norm(model: UNet) -> None:
    model.up[0].resnets[1].norm1.eps = 1e-6


def swapped_norms(model: UNet) -> None:
    block = model.mid.attentions[0].blocks[0]
    block.norm1, block.norm2 = block.norm2, block.norm1


def swapped_skips(model: UNet) -> None:
    model.up[2].resnets[1], model.up[2].resnets[2] = model.up[2].resnets[2], model.up[2].resnets[1]


def swapped_gate(model: UNet) -> None:
    feed_forward = model.down[2].attentions[1].blocks[1].feed_forward
    feed_forward.proj_in.weight.data = feed_forward.proj_in.weight.data.roll(
        len(feed_forward.proj_in.weight) // 2, 0
    )


SPOILED = {
    wrong_layer_norm: "down.1.attentions.0.blocks.0.norm2",
    wrong_group_norm: "up.0.resnets.1.norm1",
    swapped_norms: "mid.attentions.0.blocks.0.norm1",
    swapped_skips: "up.2.resnets.1.norm1",
    swapped_gate: "down.2.attentions.1.blocks.1.feed_forward.proj_in",
}


@pytest.mark.parametrize("spoil", SPOILED)
def test_parity_fails_and_names_the_first_module_that_differs(spoil: Callable[[UNet], None]) -> None:
    ours, theirs = pair("unet", torch.float64)
    spoil(ours)
    given = inputs(1, 8, 8)
    with torch.no_grad():
        mine, other = ours(**given), run_reference(theirs, given)
    with pytest.raises(AssertionError, match=f"first divergence: {SPOILED[spoil]} "):
        assert_parity(
            mine, other, EXACT,
            lambda: first_divergence(
                ours, theirs, "unet", lambda: ours(**given), lambda: run_reference(theirs, given), EXACT
            ),
        )  # fmt: skip


@pytest.mark.parametrize("name", ["latents", "timestep", "text_tokens", "pooled_text", "size_ids"])
def test_every_input_matters(name: str) -> None:
    ours, _ = pair("unet", torch.float64)
    given = inputs(1, 8, 8)
    with torch.no_grad():
        changed = given | {name: given[name] + 1}
        assert relative_error(ours(**changed), ours(**given)) > 1e-6


def test_size_ids_keep_their_precision_in_bfloat16() -> None:
    ours, _ = pair("unet", torch.bfloat16)
    given = inputs(1, 8, 8, torch.bfloat16)
    other = given | {"size_ids": torch.tensor([[1024.0, 1024.0, 0.0, 17.0, 512.0, 640.0]])}
    with torch.no_grad():
        conditions = [ours.added_embedding(g["pooled_text"], g["size_ids"]) for g in (given, other)]
    assert not torch.equal(*conditions), "1023 and 1024 must not be one size"


def test_a_forced_attention_kernel_reaches_the_unet() -> None:
    """The reference's set_attention_backend does nothing on this UNet."""
    ours, _ = pair("unet", torch.float64)
    given = inputs(1, 8, 8)
    with torch.no_grad():
        usual = ours(**given)
        with attention_kernel("matmul"):
            assert_parity(ours(**given), usual, EXACT)
        with (
            attention_kernel("cudnn"),
            pytest.raises(RuntimeError, match="forced attention kernel 'cudnn' cannot run"),
        ):
            ours(**given)


def test_counted_tokens_stand_for_repeated_ones() -> None:
    """Twelve tokens with multiplicities seven and zero among them, against repeated tokens."""
    ours, _ = pair("unet", torch.float64)
    given = inputs(2, 8, 8)
    tokens = given["text_tokens"]
    counts = torch.ones(2, 12)
    counts[:, 0], counts[:, 3] = 7.0, 0.0
    written_out = torch.cat([tokens[:, :1].expand(-1, 7, -1), tokens[:, 1:3], tokens[:, 4:]], dim=1)
    with torch.no_grad():
        mine = ours(**given, text_counts=counts)
        assert_parity(mine, ours(**given | {"text_tokens": written_out}), EXACT)
        assert relative_error(mine, ours(**given)) > 1e-3


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.exact
def test_perturbed_rows_must_be_given_for_every_transformer_block(count: int) -> None:
    """Regression: fewer numbers than blocks silently skipped the last blocks."""
    ours, _ = pair("unet", torch.float64, SHALLOW)
    blocks = sum(isinstance(module, TransformerBlock) for module in ours.modules())
    given = inputs(2, 8, 8)
    wanted = f"perturbed: expected {blocks}, one a transformer block, got {count}"
    with torch.no_grad():
        with pytest.raises(ValueError, match=wanted):
            ours(**given, perturbed=[1] * count)
        assert torch.equal(ours(**given, perturbed=[0] * blocks), ours(**given))
        contexts = [ours.context(given["text_tokens"], None, ())] * (blocks - 1)
        time = ours.embed_time(given["timestep"].expand(2))
        with pytest.raises(ValueError, match="expected a context for each transformer block, got fewer"):
            ours.forward_precomputed(given["latents"], [time] * 99, contexts)


def test_a_unet_takes_a_second_base() -> None:
    """An interface, a protocol or a generic type as second base: a metaclass would forbid two of them."""

    class Named(Protocol):
        def name(self) -> str: ...

    class Abstract(UNet, ABC):
        @abstractmethod
        def name(self) -> str: ...

    class Concrete(Abstract):
        def name(self) -> str:
            return "mine"

    class Structural(UNet, Named):
        def name(self) -> str:
            return "mine"

    class Sized(UNet, Generic[Size]):
        def name(self) -> str:
            return "mine"

    ours, _ = pair("unet", torch.float64, SHALLOW)
    given = inputs(1, 8, 8)
    with pytest.raises(TypeError, match="abstract"):
        Abstract(SHALLOW.unet)  # pyright: ignore[reportAbstractUsage]
    for kind in (Concrete, Structural, Sized[int]):
        other = kind(SHALLOW.unet).double().eval()
        other.load_state_dict(ours.state_dict())
        with torch.no_grad():
            assert torch.equal(other(**given), ours(**given)) and other.name() == "mine"
