"""IP-Adapter-Plus against the reference: the resampler, the branches in the UNet, the table at full size."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kolors_core.adapters.ip_adapter import IPAdapter, IPAdapterConfig, attach, attached, cross_attentions
from kolors_core.config import KOLORS
from kolors_core.context import ImagePrompt
from kolors_core.unet import UNet
from tests.support.ip_adapters import Both, adapter_config, guided_steps, load_both
from tests.support.parity import reference_unet
from tests.support.small import EXACT, SMALL, SMALL_CLIP, randomise, relative_error
from tests.support.versions import traces_whole
from tests.test_unet import inputs
from weights_convert import TABLES
from weights_convert.__main__ import convert
from weights_convert.key_mapping import compare


@pytest.mark.numerical
def test_the_resampler_equals_the_reference(loaded: Both) -> None:
    ours, theirs = loaded
    states = torch.randn(2, 17, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mine = attached(ours.unet)[0].adapter.resampler(states)
        other = theirs.unet.encoder_hid_proj.image_projection_layers[0](states)
    assert mine.shape == (2, 5, SMALL.unet.context_dim)
    assert relative_error(mine, other) < EXACT


@pytest.mark.numerical
def test_the_unet_with_two_adapters_equals_the_reference(both: Both, adapters: list[Path]) -> None:
    ours, theirs = both
    load_both(both, *adapters)
    given = inputs(2, 9, 7, torch.float64)
    generator = torch.Generator().manual_seed(2)
    states = [torch.randn(2, n, 17, 64, dtype=torch.float64, generator=generator) for n in (1, 3)]
    with torch.no_grad():
        prompts = [ImagePrompt(a.adapter.tokens(s)) for a, s in zip(attached(ours.unet), states, strict=True)]
        mine = ours.unet(**given, image_prompts=prompts)
        added = {"text_embeds": given["pooled_text"], "time_ids": given["size_ids"], "image_embeds": states}
        other = theirs.unet(
            given["latents"], given["timestep"], encoder_hidden_states=given["text_tokens"],
            added_cond_kwargs=added,
        ).sample  # fmt: skip
    assert relative_error(mine, other) < EXACT


@traces_whole
@torch.no_grad()
def test_it_compiles_whole(both: Both, adapters: list[Path]) -> None:
    """No graph break with two adapters, masks, a scale for each image and scales by block."""
    ours, _ = both
    load_both((ours,), *adapters)
    generator = torch.Generator().manual_seed(2)
    tokens = [torch.randn(1, n, 5, 48, dtype=torch.float64, generator=generator) for n in (2, 1)]
    prompts = [ImagePrompt(tokens[0], torch.rand(1, 2, 16, 16, generator=generator)), ImagePrompt(tokens[1])]
    compiled = torch.compile(ours.unet, backend="eager", fullgraph=True)
    given = inputs(1, 8, 8, torch.float64)
    ours.set_ip_adapter_scale([[0.5, 0.2], {"up": 0.4}])
    plain = ours.unet(**given, image_prompts=prompts)
    assert torch.equal(compiled(**given, image_prompts=prompts), plain)
    torch.compiler.reset()


@pytest.mark.numerical
def test_branches_swapped_are_noticed(both: Both, adapters: list[Path]) -> None:
    """The parity test can fail: the order down, up, mid matters though widths are equal."""
    ours, theirs = both
    load_both(both, adapters[0])
    handle = attached(ours.unet)[0]
    paths = [path for path, branch in handle.branches.items() if branch.to_k.out_features == 64]
    up, mid = (next(path for path in paths if path.startswith(way)) for way in ("up", "mid"))
    for part in ("to_k", "to_v"):
        a, b = (getattr(handle.branches[path], part) for path in (up, mid))
        a.weight.data, b.weight.data = b.weight.data, a.weight.data
    mine, other = (guided_steps(pipe)[0] for pipe in (ours, theirs))
    assert relative_error(mine, other) > 1e-4


def test_the_map_is_closed_at_full_size_both_ways() -> None:
    """70 pairs of keys and values, in the order down 24, up 36, mid 10."""
    with torch.device("meta"):
        adapter, unet = IPAdapter(IPAdapterConfig()), UNet(KOLORS.unet)
    handle = attach(unet, adapter)
    ways = [path.split(".")[0] for path in handle.branches]
    assert [ways.count(way) for way in ("down", "up", "mid")] == [24, 36, 10]
    assert ways == sorted(ways, key=["down", "up", "mid"].index) and len(ways) == 70
    table = TABLES["ip_adapter"]
    ours = {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}
    public = {table.to_public(name): shape for name, shape in ours.items()}
    names = set(public)
    for i in range(70):
        names -= {f"ip_adapter.{2 * i + 1}.to_k_ip.weight", f"ip_adapter.{2 * i + 1}.to_v_ip.weight"}
    assert all(name.startswith("image_proj.") for name in names) and len(names) == 7 + 4 * 11
    assert table.faults(public) == [] and table.unused_rules(public) == []
    assert not compare(table, {table.to_ours(name): shape for name, shape in public.items()}, ours)
    assert IPAdapterConfig.from_shapes(ours, "here") == IPAdapterConfig()
    del public["ip_adapter.5.to_k_ip.weight"], public["ip_adapter.5.to_v_ip.weight"]
    assert table.faults(public) == ["ip_adapter.5 is missing"]


def test_the_reference_takes_the_same_names_and_shapes_at_full_size() -> None:
    """Its own loader, strict, on the meta device; each pair arrives in the attention that ours has it in."""
    table = TABLES["ip_adapter"]
    with torch.device("meta"):
        adapter, theirs = IPAdapter(IPAdapterConfig()), reference_unet(KOLORS.unet)
        handle = attach(UNet(KOLORS.unet), adapter)
        public: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        for name, tensor in adapter.state_dict().items():
            part, _, rest = table.to_public(name).partition(".")
            public[part][rest] = tensor
        theirs._load_ip_adapter_weights([public])
    for path, branch in handle.branches.items():
        place = theirs.get_submodule(TABLES["unet"].to_public(path))
        assert place.processor.to_k_ip[0].weight.shape == branch.to_k.weight.shape
    assert len([n for n, _ in theirs.named_modules() if n.endswith("to_k_ip.0")]) == 70


def test_round_trip_of_a_file_is_byte_equal(adapters: list[Path], tmp_path: Path) -> None:
    convert(adapters[0], tmp_path / "ours.safetensors")
    convert(tmp_path / "ours.safetensors", tmp_path / "back.safetensors", to_public=True)
    assert adapters[0].read_bytes() == (tmp_path / "back.safetensors").read_bytes()
    assert "branches.1.to_k.weight" in load_file(tmp_path / "ours.safetensors")


def test_an_adapter_for_another_unet_is_refused() -> None:
    unet = UNet(SMALL.unet)
    adapter = IPAdapter(adapter_config())
    randomise(adapter)
    unet.mid.attentions[0].blocks = unet.mid.attentions[0].blocks[:1]
    with pytest.raises(ValueError, match=r"for 17 attentions \[32, 64\] wide.* the UNet has 16"):
        attach(unet, adapter)
    assert all(not place.image_branches for place in cross_attentions(unet).values())
    assert SMALL_CLIP.hidden_size == adapter.config.image_dim
