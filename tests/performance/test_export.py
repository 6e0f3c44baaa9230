"""Programs of torch.export, ONNX and AOTInductor give the models' outputs at every size."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._inductor import aoti_load_package, config

from kolors_core.adapters.lora import attach, fuse, unload
from kolors_core.chatglm import ChatGLM
from kolors_core.performance.export import (
    Program,
    check_can_export,
    check_program,
    read_program,
    text_program,
    trace,
    unet_programs,
    vae_programs,
    write_program,
)
from kolors_core.performance.quantize import quantize
from kolors_core.tokenizer import TokenBatch
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from tests.support.small import EXACT, SHALLOW, SMALL, randomise, relative_error
from tests.support.versions import exports_programs

ROOT = Path(__file__).parents[2]
SIZES = {"B": 2, "S": 9, "N": 3, "H": 7, "W": 10}
LEVEL = replace(SHALLOW.unet, channels=(32,), heads=(2,), depths=(1,))
no_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler, g++")


def small_unet(config: object = LEVEL, dtype: torch.dtype = torch.float64) -> UNet:
    unet = UNet(config).to(dtype).eval()  # type: ignore[arg-type]
    randomise(unet)
    return unet


@torch.no_grad()
def test_two_programs_are_the_unet_and_share_no_weight() -> None:
    unet = small_unet(SMALL.unet)
    programs = unet_programs(unet)
    latents, _, *text, counts = programs["unet"].examples(SIZES)
    timesteps = torch.tensor([1000.0, 300.5])
    keys_values, shifts = programs["unet_context"](*text, timesteps)
    for timestep, shift in zip(timesteps, shifts, strict=True):
        expected = unet(latents, timestep, *text, counts)
        assert torch.equal(programs["unet"](latents, timestep, *text, counts)[0], expected)
        [noise] = programs["unet_step"](latents, shift, keys_values, counts)
        assert relative_error(noise, expected) < EXACT
    assert_partition(unet, programs["unet_context"], programs["unet_step"])


@torch.no_grad()
def test_the_other_programs_are_methods_of_the_models() -> None:
    vae, text_encoder = VAE(SMALL.vae).double(), ChatGLM(SMALL.text_encoder).double()
    randomise(vae), randomise(text_encoder)
    programs = vae_programs(vae) | text_program(text_encoder)
    [images], [latents] = (programs[name].examples(SIZES) for name in ("vae_encoder", "vae_decoder"))
    found = vae.encode_images(images)
    assert list(images.shape) == [2, 3, 56, 80] and list(latents.shape) == [2, 4, 7, 10]
    assert_equal(programs["vae_encoder"](images), (found.mean, found.std))
    assert_equal(programs["vae_decoder"](latents), (vae.decode_latents(latents),))
    tokens = programs["text_encoder"].examples(SIZES)
    text = text_encoder(TokenBatch(*tokens))
    assert_equal(programs["text_encoder"](*tokens), (text.tokens, text.pooled))
    assert_partition(vae, programs["vae_encoder"], programs["vae_decoder"])


@exports_programs
@torch.no_grad()
@pytest.mark.parametrize("name", ["unet_context"])
def test_a_program_serves_every_size_and_takes_other_weights_by_name(name: str, tmp_path: Path) -> None:
    unet = small_unet()
    program = unet_programs(unet)[name]
    traced, file = trace(program), tmp_path / "program.pt2"
    ranges = {(int(each.lower), each.upper > 2**60) for each in traced.range_constraints.values()}
    assert ranges == ({(1, True)} if name == "unet_context" else {(1, True), (2, True)})
    write_program(program, traced, file, "torch")
    assert check_program(program, file, "torch") < EXACT
    assert str(ROOT).encode() not in file.read_bytes(), "a folder of this machine"

    randomise(unet, seed=1)
    with pytest.raises(ValueError, match=r"program.pt2: differs by .* from the model, expected 1e-10 at"):
        check_program(program, file, "torch")
    written = read_program(file, "torch")
    state = {f"model.{key}": value for key, value in unet.state_dict().items()}
    own = written.state_dict()  # type: ignore[attr-defined]
    written.load_state_dict({key: state[key] for key in own})  # type: ignore[attr-defined]
    tensors = program.examples(SIZES)
    for one, other in zip(written(*tensors), program(*tensors), strict=True):
        assert relative_error(one, other) < EXACT


@exports_programs
@no_compiler
@config.patch({"aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"})
def test_a_compiled_program_serves_every_size_and_takes_other_weights(tmp_path: Path) -> None:
    """With the compiler's settings that compile fastest."""
    unet = small_unet(dtype=torch.float32)
    program = unet_programs(unet)["unet_context"]
    write_program(program, trace(program), file := tmp_path / "program.pt2", "aot")
    assert check_program(program, file, "aot") < 1e-5

    package, tensors = aoti_load_package(str(file)), program.examples(SIZES)
    randomise(unet, seed=1)
    assert relative_error(package(*tensors)[0], program(*tensors)[0]) > 0.1
    state = {f"model.{name}": value for name, value in program.model.state_dict().items()}
    package.load_constants(state, check_full_update=True)
    assert relative_error(package(*tensors)[0], program(*tensors)[0]) < 1e-5


def test_what_cannot_be_exported_is_named() -> None:
    with pytest.raises(ValueError, match="format must be one of torch, onnx, aot, got 'tensorrt'"):
        check_can_export("tensorrt")
    unet = small_unet(dtype=torch.float32)
    attach(unet, rank=2, name="zorp")
    with pytest.raises(ValueError, match="this UNet has adapters: fuse LoRAs, unload all, then export"):
        unet_programs(unet)
    fuse(unet, ["zorp"])
    unload(unet)
    assert unet_programs(unet)
    quantize(unet, 8)
    with pytest.raises(ValueError, match="this UNet is quantized: cannot export it"):
        unet_programs(unet)


def assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def assert_partition(model: torch.nn.Module, *programs: Program) -> None:
    """Each of the model's tensors is in one of the programs, itself and not a copy."""
    found = [each for program in programs for each in program.model.named_parameters()]
    names = [name for name, _ in found]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(parameter is model.get_parameter(name) for name, parameter in found)
