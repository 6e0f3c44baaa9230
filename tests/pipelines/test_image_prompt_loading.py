"""Adapters that come and leave a pipeline: without a trace, wherever its UNet is, or not at all."""

import inspect
from copy import deepcopy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kolors_core import (
    KolorsImg2ImgPipeline,
    KolorsPipeline,
    SDXLCFGCutoffCallback,
)
from kolors_core.adapters.clip_vision import CLIPVision
from kolors_core.adapters.ip_adapter import attached
from kolors_core.adapters.lora import attach as attach_lora
from kolors_core.devices import unwrap_compiled
from tests.support.ip_adapters import Both, adapter_config, guided_steps, load_both, write_adapter
from tests.support.parity import pair
from tests.support.pipelines import Pair, picture, steps_of
from tests.support.small import EXACT, FLOAT32, relative_error

LORA = "pytorch_lora_weights.safetensors"


def test_it_comes_and_leaves_without_a_trace(both: Both, adapters: list[Path]) -> None:
    """In the reference, loading again after unloading breaks the text projection."""
    ours, theirs = both
    before, state = steps_of(ours, prompt="cat")[-1], deepcopy(ours.unet.state_dict())
    load_both(both, adapters[0])
    first = guided_steps(ours)
    ours.set_ip_adapter_scale(0.0)
    assert torch.equal(guided_steps(ours, num_inference_steps=4)[-1], before), "scale 0 is no adapter"
    for pipe in both:
        pipe.unload_ip_adapter()
    assert torch.equal(steps_of(ours, prompt="cat")[-1], before)
    after = ours.unet.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], state[name]) for name in state)
    load_both(both, adapters[0])
    assert all(torch.equal(a, b) for a, b in zip(guided_steps(ours), first, strict=True))
    embeds = ours.prepare_ip_adapter_image_embeds(picture(3))
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        guided_steps(theirs, ip_adapter_image=None, ip_adapter_image_embeds=embeds)
    load_both((ours,), adapters[1])
    assert len(attached(ours.unet)) == 1, "loading replaces"
    assert relative_error(guided_steps(ours)[0], first[0]) > 1e-4


def test_saving_with_an_adapter_keeps_the_text_projection(
    both: Both, adapters: list[Path], tmp_path: Path
) -> None:
    """The reference writes a folder that nobody can load: its text projection has become the resampler."""
    ours, theirs = both
    load_both(both, adapters[0])
    ours.save_pretrained(tmp_path / "ours")
    public = load_file(tmp_path / "ours" / "unet" / "diffusion_pytorch_model.safetensors")
    assert "encoder_hid_proj.weight" in public and not [n for n in public if "image" in n or "_ip" in n]
    saved = KolorsPipeline.from_pretrained(tmp_path / "ours", dtype=torch.float64)
    assert isinstance(saved.image_encoder, CLIPVision)
    load_both((saved,), adapters[0])
    saved.set_progress_bar_config(disable=True)
    assert torch.equal(guided_steps(saved)[0], guided_steps(ours)[0])
    theirs.unet.save_pretrained(tmp_path / "theirs")
    names = load_file(tmp_path / "theirs" / "diffusion_pytorch_model.safetensors")
    assert "encoder_hid_proj.weight" not in names
    again = diffusers.KolorsPipeline.from_pretrained(tmp_path / "ours")
    assert again.image_encoder is not None


def test_an_encoder_that_came_with_the_adapter_leaves_with_it(pipes: Pair, tmp_path: Path) -> None:
    write_adapter(tmp_path / "repo" / "sub" / "plus.safetensors")
    theirs = pair("image_encoder", torch.float32)[1]
    theirs.save_pretrained(tmp_path / "repo" / "sub" / "image_encoder")
    theirs.save_pretrained(tmp_path / "repo" / "models" / "clip")
    pipe = KolorsPipeline.from_pipe(pipes[0], unet=deepcopy(pipes[0].unet))
    for folder in ("image_encoder", "models/clip"):
        pipe.load_ip_adapter(tmp_path / "repo", subfolder="sub", image_encoder_folder=folder)
        assert pipe.image_encoder is not None and pipe.image_encoder.projection.weight.dtype == torch.float64
        made = KolorsImg2ImgPipeline.from_pipe(pipe)
        assert attached(made.unet) == attached(pipe.unet) and made.image_encoder is pipe.image_encoder
        pipe.unload_ip_adapter()
        assert pipe.image_encoder is None
    pipe.load_ip_adapter(tmp_path / "repo" / "sub" / "plus.safetensors", image_encoder_folder=None)
    with pytest.raises(ValueError, match="no image encoder: give CLIP's states as ip_adapter_image_embeds"):
        guided_steps(pipe)


def test_the_adapter_is_where_the_unet_is(both: Both, adapters: list[Path], tmp_path: Path) -> None:
    """Pipelines that share a UNet share its adapters, whichever loads and unloads them."""
    first, _ = both
    made = KolorsImg2ImgPipeline.from_pipe(first)
    again = KolorsPipeline(**{**first.components, "image_encoder": None})
    pair("image_encoder", torch.float32)[1].save_pretrained(tmp_path / "image_encoder")
    (tmp_path / "plus.safetensors").write_bytes(adapters[0].read_bytes())
    again.load_ip_adapter(tmp_path / "plus.safetensors")
    again.set_progress_bar_config(disable=True)
    assert again.image_encoder is not None and first.image_encoder is not again.image_encoder
    expected = guided_steps(first)
    assert all(relative_error(a, b) < FLOAT32 for a, b in zip(guided_steps(again), expected, strict=True))
    assert len(guided_steps(made, image=picture(), strength=1.0)) == 3
    first.unload_ip_adapter()
    assert again.image_encoder is None and first.image_encoder is not None
    with pytest.raises(ValueError, match="no IP-Adapter is loaded"):
        guided_steps(made, image=picture(), strength=1.0)
    copied = deepcopy(first.unet)
    first.load_ip_adapter(adapters[0].parent, image_encoder_folder=None)
    assert attached(first.unet) and not attached(copied)


def test_guidance_may_be_cut_off(loaded: Both) -> None:
    cutoff = {"callback_on_step_end": SDXLCFGCutoffCallback(cutoff_step_index=1)}
    arguments = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    given = {"prompt": ["cat", "red"], "ip_adapter_image": picture(3), "height": 64, "width": 72}
    whole = loaded[0](**given, **arguments | {"generator": torch.Generator().manual_seed(0)}).images
    cut = loaded[0](**given, **arguments, **cutoff).images
    assert cut.shape == whole.shape and relative_error(cut, whole) > 1e-4


def test_a_dict_of_tensors_loads_too(both: Both, adapters: list[Path]) -> None:
    ours, theirs = both
    flat = load_file(adapters[0])
    nested: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in flat.items():
        nested[name.partition(".")[0]][name.partition(".")[2]] = tensor
    theirs.load_ip_adapter(nested, subfolder="", weight_name="", image_encoder_folder=None)
    for source in (nested, flat):
        ours.load_ip_adapter(source, image_encoder_folder=None)
        assert relative_error(guided_steps(ours)[0], guided_steps(theirs)[0]) < FLOAT32


def test_the_signature_is_the_references() -> None:
    mine = inspect.signature(KolorsPipeline.load_ip_adapter).parameters
    other = inspect.signature(diffusers.KolorsPipeline.load_ip_adapter).parameters
    assert list(mine)[:5] == list(other)[:5]
    for name in ("set_ip_adapter_scale", "unload_ip_adapter"):
        both = [inspect.signature(getattr(kind, name)) for kind in (KolorsPipeline, diffusers.KolorsPipeline)]
        assert list(both[0].parameters) == list(both[1].parameters)


@torch.no_grad()
def test_a_compiled_unet_takes_adapters(both: Both, adapters: list[Path], tmp_path: Path) -> None:
    """`pipe.unet = torch.compile(pipe.unet)`, as everywhere."""
    ours, _ = both
    load_both((ours,), adapters[0])
    expected = guided_steps(ours)
    ours.unload_ip_adapter()
    ours.unet = torch.compile(ours.unet, backend="eager")
    load_both((ours,), adapters[0])
    ours.set_ip_adapter_scale({"down": 1.0, "mid": 1.0, "up": 1.0})
    mine = guided_steps(ours)  # as a whole, which multiplies matrices of other heights
    assert all(relative_error(a, b) < EXACT for a, b in zip(mine, expected, strict=True))
    lora = attach_lora(unwrap_compiled(ours.unet), rank=2, name="a")
    ours.set_adapters("a", {"unet": {"down": 0.5}})
    ours.save_lora_weights(tmp_path)
    assert all(name.startswith("unet.down") or "_orig" not in name for name in load_file(tmp_path / LORA))
    lora.detach()
    KolorsImg2ImgPipeline.from_pipe(ours).save_pretrained(tmp_path / "saved")
    assert KolorsPipeline.from_pretrained(tmp_path / "saved").unet is not None
    torch.compiler.reset()


def test_the_resampler_follows_the_unet(both: Both, adapters: list[Path]) -> None:
    ours, _ = both
    load_both((ours,), adapters[0])
    ours.unet.to(torch.float32)
    assert torch.isfinite(guided_steps(ours)[-1]).all()
    assert attached(ours.unet)[0].adapter.resampler.proj_in.weight.dtype == torch.float32


def test_weights_set_within_a_run_stay(both: Both) -> None:
    ours, _ = both
    lora = attach_lora(ours.unet, rank=2, name="a")

    def change(pipe: Any, i: int, t: Any, tensors: dict) -> dict:
        pipe.set_adapters("a", 0.25)
        return {}

    given = {"cross_attention_kwargs": {"scale": 0.5}, "callback_on_step_end": change}
    ours("cat", height=64, width=64, num_inference_steps=1, **given)
    part = next(iter(lora.parts().values()))
    assert (part.strength, part.call_scale) == (0.25, 1.0)
    for scale in (float("nan"), float("inf"), "1", None, [1.0]):
        with pytest.raises(ValueError, match="lora_scale must be a number, got"):
            ours.fuse_lora(lora_scale=scale)
        assert not ours.fused_loras
    for wrong in ({"scale": float("nan")}, {"scale": "1"}):
        with pytest.raises(ValueError, match="the scale of LoRAs must be a number, got"):
            ours("cat", height=64, width=64, num_inference_steps=1, cross_attention_kwargs=wrong)
    with pytest.raises(ValueError, match="the scale of an adapter must be a number, got nan"):
        ours.set_adapters("a", float("nan"))
    lora.detach()


def test_a_file_that_does_not_fit_changes_nothing(both: Both, adapters: list[Path], tmp_path: Path) -> None:
    ours, _ = both
    load_both((ours,), adapters[0])
    before, handle = guided_steps(ours)[-1], attached(ours.unet)[0]
    tensors = load_file(adapters[1])
    less = {name: tensor for name, tensor in tensors.items() if not name.startswith("ip_adapter.5.")}
    narrow = {**tensors, "ip_adapter.1.to_k_ip.weight": torch.zeros(64, 47)}
    plain = {name.replace("image_proj.latents", "image_proj.proj.weight"): t for name, t in tensors.items()}
    write_adapter(tmp_path / "wide.safetensors", config=adapter_config(image_dim=60))
    for name, state in {"less": less, "narrow": narrow, "plain": plain}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    (tmp_path / "plus.bin").write_bytes(b"a pickle")
    for name, message in {
        "less.safetensors": "unexpected: branches.33.to_k.weight",
        "narrow.safetensors": r"misshapen: branches.1.to_k.weight is \[64, 47\], the model wants \[64, 48\]",
        "plain.safetensors": r"image_proj.latents is missing \(they are the resampler's queries; a plain",
        "wide.safetensors": "the image encoder is 64 wide, and the IP-Adapter reads 60",
        "plus.bin": "plus.bin: a pickle can run code and is never opened. Convert it where you trust it",
        "none.safetensors": "expected none.safetensors, found less.safetensors, narrow.safetensors, plain",
        None: "expected one .safetensors file, or a weight_name, found less.safetensors, narrow.safetensors",
    }.items():  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            ours.load_ip_adapter(tmp_path, weight_name=name, image_encoder_folder=None)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ours.load_ip_adapter(tmp_path, subfolder="sub", image_encoder_folder=None)
    with pytest.raises(ValueError, match="is a file: subfolder and weight_name have no effect on it"):
        ours.load_ip_adapter(adapters[0], weight_name="x.safetensors", image_encoder_folder=None)
    with pytest.raises(ValueError, match="expected as many weight_name as IP-Adapters"):
        ours.load_ip_adapter([tmp_path] * 3, weight_name=["a", "b"], image_encoder_folder=None)
    with pytest.raises(ValueError, match="reads 60|the UNet has"):
        two = {"weight_name": ["ip_adapter.safetensors", "wide.safetensors"], "image_encoder_folder": None}
        ours.load_ip_adapter([adapters[0].parent, tmp_path], **two)
    with pytest.raises(ValueError, match="a scale must be a number, got 'x'"):
        ours.set_ip_adapter_scale("x")
    assert attached(ours.unet) == [handle] and torch.equal(guided_steps(ours)[-1], before)
