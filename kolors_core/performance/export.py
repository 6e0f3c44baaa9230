"""Export of the models as programs for other runtimes: torch.export, ONNX, and AOTInductor's packages.

A program maps tensors to tensors, and all their sizes but the channels stay open:

    text_encoder   ids, mask, positions, counts [B, S] -> tokens [B, S, C], pooled [B, C]
    unet           latents [B, 4, H, W], timestep [], text_tokens [B, S, C], pooled_text [B, C],
                   size_ids [B, 6], text_counts [B, S] -> noise [B, 4, H, W]
    unet_context   text_tokens, pooled_text, size_ids, timesteps [N] -> keys_values [B, S, K],
                   shifts [N, B, T]
    unet_step      latents, shifts [B, T], keys_values, text_counts -> noise
    vae_encoder    images [B, 3, 8H, 8W] -> mean, std [B, 4, H, W]
    vae_decoder    latents -> images

`unet` is also `unet_context`, called once a run, and `unet_step`, called once a step (precompute.py). The two
share no weight.
Shapes: B rows, S text tokens, C their width, N steps, H and W of the latents, K width of all keys and values,
T that of all time shifts.
"""

import copy
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.torch_version import TorchVersion

from kolors_core.attention import attention_kernel, log_multiplicity_bias, split_heads
from kolors_core.chatglm import ChatGLM
from kolors_core.context import KeysValues
from kolors_core.denoiser import require_unet
from kolors_core.module import require_plain
from kolors_core.tokenizer import TokenBatch
from kolors_core.unet import ResBlock, TimeShift, TransformerBlock, UNet
from kolors_core.vae import VAE, call

SUFFIXES = {"torch": ".pt2", "onnx": ".onnx", "aot": ".pt2"}  # by format
EXTRA = {"onnx": ("onnx", "onnxscript", "onnxruntime")}  # packages of the extra `export` that a format needs
FIRST_TORCH = "2.13"  # before, sizes in group_norm and in ChatGLM's strides cannot be left open
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
ONCE_A_RUN = r"(time_embedding|add_embedding|text_proj)\b.*|.*\.(time_proj|cross_attention\.to_[kv])"

Size = int | str  # a number, or an open size: "H", or "8H" for 8 times it
Call = Callable[..., tuple[Tensor, ...]]


class Input(NamedTuple):
    """Input of a program: its shape, its dtype, and of one of whole numbers those that it may hold."""

    shape: tuple[Size, ...]
    dtype: torch.dtype
    values: range | None = None

    def open_sizes(self) -> dict[int, tuple[int, str]]:
        """Return axis -> (factor, name) of the sizes that stay open."""
        named = ((axis, size) for axis, size in enumerate(self.shape) if isinstance(size, str))
        return {axis: (int(size[:-1] or 1), size[-1]) for axis, size in named}

    def example(self, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
        """Draw a tensor for sizes by name."""
        shape: list[Any] = list(self.shape)
        for axis, (factor, name) in self.open_sizes().items():
            shape[axis] = factor * sizes[name]
        if self.values is None:
            return torch.randn(shape, generator=generator).to(self.dtype)
        return torch.randint(self.values.start, self.values.stop, shape, generator=generator).to(self.dtype)


class Program(nn.Module):
    """Program of a model: call(model, *tensors) as a function of tensors alone, and their names.

    least: the least height and width of latents, since torch takes a size of 1 for a constant.
    """

    def __init__(
        self, model: nn.Module, call: Call, inputs: dict[str, Input], outputs: Sequence[str], least: int = 2
    ) -> None:
        super().__init__()
        self.model, self.call, self.inputs, self.outputs, self.least = model, call, inputs, outputs, least

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Map the inputs to the outputs, each in the order of their names."""
        return self.call(self.model, *tensors)

    def examples(self, sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
        """Draw inputs of these sizes, on the model's device."""
        generator, device = torch.Generator().manual_seed(0), next(self.parameters()).device
        return tuple(each.example(sizes, generator).to(device) for each in self.inputs.values())


def text_program(text_encoder: ChatGLM) -> dict[str, Program]:
    """Return `text_encoder`; ValueError as of `unet_programs`."""
    _check_exportable(text_encoder)
    ids = range(text_encoder.config.vocab_size)
    inputs = {
        "ids": Input(("B", "S"), torch.int64, ids), "mask": Input(("B", "S"), torch.bool, range(2)),
        "positions": Input(("B", "S"), torch.int64, range(256)), "counts": _COUNTS,
    }  # fmt: skip
    return {"text_encoder": Program(text_encoder, _encode_text, inputs, ("tokens", "pooled"))}


def unet_programs(unet: UNet) -> dict[str, Program]:
    """Return `unet`, `unet_context` and `unet_step`, which share the UNet's tensors.

    ValueError for a quantized model, and for one with adapters: fuse LoRAs, then unload them.
    """
    require_unet(unet, "exporting the UNet's programs")
    _check_exportable(unet)
    config, dtype, timesteps = unet.config, unet.conv_in.weight.dtype, range(1100)
    least = 2 ** (len(config.channels) - 1) + 1  # so that the innermost feature map has a side of 2
    latents = Input(("B", config.in_channels, "H", "W"), dtype)
    text = {
        "text_tokens": Input(("B", "S", config.text_dim), dtype),
        "pooled_text": Input(("B", config.text_dim), dtype),
        "size_ids": Input(("B", 6), torch.float32, range(1024)),
    }
    times = Input((), torch.float32, timesteps), Input(("N",), torch.float32, timesteps)
    plain = {"latents": latents, "timestep": times[0], **text, "text_counts": _COUNTS}
    once = {**text, "timesteps": times[1]}
    step = {
        "latents": latents, "shifts": Input(("B", sum(_shift_widths(unet))), dtype),
        "keys_values": Input(("B", "S", 2 * sum(width for width, _ in _attention_sizes(unet))), dtype),
        "text_counts": _COUNTS,
    }  # fmt: skip
    context = _with_weights(unet, ONCE_A_RUN)
    return {
        "unet": Program(unet, _predict_noise, plain, ("noise",), least),
        "unet_context": Program(context, _precompute, once, ("keys_values", "shifts")),
        "unet_step": Program(_with_weights(unet, f"(?!{ONCE_A_RUN}$).*"), _step, step, ("noise",), least),
    }


def vae_programs(vae: VAE) -> dict[str, Program]:
    """Return `vae_encoder` and `vae_decoder`; ValueError as of `unet_programs`."""
    _check_exportable(vae)
    config, dtype = vae.config, vae.decoder.conv_in.weight.dtype
    height, width = (f"{config.vae_scale_factor}{side}" for side in "HW")
    images = {"images": Input(("B", config.image_channels, height, width), dtype)}
    latents = {"latents": Input(("B", config.latent_channels, "H", "W"), dtype)}
    encoder = _with_weights(vae, r"encoder\..*|quant_conv")
    decoder = _with_weights(vae, r"decoder\..*|post_quant_conv")
    encoder.run_coder = decoder.run_coder = call  # whole: tiles are chosen by sizes, which stay open
    return {
        "vae_encoder": Program(encoder, _encode_images, images, ("mean", "std")),
        "vae_decoder": Program(decoder, _decode_latents, latents, ("images",)),
    }


def check_can_export(to: str) -> None:
    """Raise ValueError for an unknown format, or naming what it needs and this environment lacks."""
    if to not in SUFFIXES:
        raise ValueError(f"a program's format must be one of {', '.join(SUFFIXES)}, got {to!r}")
    if TorchVersion(torch.__version__) < FIRST_TORCH:
        raise ValueError(f"export needs torch {FIRST_TORCH} or newer, got {torch.__version__}")
    if absent := [name for name in EXTRA.get(to, ()) if find_spec(name) is None]:
        raise ValueError(f"format {to} needs {', '.join(absent)}: pip install 'kolors_core[export]'")
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if to == "aot" and shutil.which(compiler) is None:
        raise ValueError(f"format aot needs a C++ compiler, and there is no {compiler}: set CXX to another")


@torch.no_grad()
def trace(program: Program) -> ExportedProgram:
    """Export a program by torch.export, with every open size left open.

    Attention is torch's own kernel, whose name is forced: another may be chosen by sizes, once for all. Stack
    traces, which name this machine's folders, are left out.
    """
    sizes = {"B": 2, "S": 7, "N": 3, "H": program.least + 3, "W": program.least + 6}
    least = {"B": 1, "S": 1, "N": 1, "H": program.least, "W": program.least}
    dims: dict[str, Any] = {name: Dim(name, min=size) for name, size in least.items()}

    def open_size(factor: int, name: str) -> Any:
        return dims[name] if factor == 1 else factor * dims[name]

    with attention_kernel("sdpa"):
        examples = program.examples(sizes)
        shapes = (_by_axis(program, open_size),)
        traced = torch.export.export(program, examples, dynamic_shapes=shapes, strict=False)
    for node in traced.graph.nodes:
        node.meta.pop("stack_trace", None)
    return traced


def write_program(program: Program, traced: ExportedProgram, file: Path, to: str) -> None:
    """Write a traced program in a format, whose suffix `file` has; ValueError as of `check_can_export`.

    ONNX has the weights in a second file, named as the first and ".data": one holds 2 GiB at most.
    """
    check_can_export(to)
    if to == "torch":
        torch.export.save(traced, file)
    elif to == "onnx":
        names = _by_axis(program, lambda factor, name: name if factor == 1 else f"{factor}{name}")
        with _silent():
            torch.onnx.export(
                traced, f=file, dynamo=True, external_data=True, verbose=False, dynamic_shapes=names,
                input_names=list(program.inputs), output_names=list(program.outputs),
            )  # fmt: skip
    else:
        from torch._inductor import aoti_compile_and_package

        with _silent():
            aoti_compile_and_package(traced, package_path=str(file))


def read_program(file: Path, to: str) -> Call:
    """Return a written program as a function of tensors; ONNX runs on the CPU."""
    if to == "torch":
        return torch.export.load(file).module()
    if to == "aot":
        from torch._inductor import aoti_load_package

        package = aoti_load_package(str(file))
        return lambda *tensors: tuple(package(*tensors))
    onnxruntime = import_module("onnxruntime")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        arrays = (tensor.numpy() for tensor in tensors)
        return tuple(map(torch.from_numpy, session.run(None, dict(zip(names, arrays, strict=True)))))

    return run


@torch.no_grad()
def check_program(program: Program, file: Path, to: str) -> float:
    """Run a written program at sizes other than the traced ones, and compare its outputs with the model's.

    Returns the largest difference by the largest value of an output. ValueError naming the file if that is
    above its dtype's `TOLERANCES`.
    """
    written, least, found = read_program(file, to), program.least, 0.0
    for sizes in (
        {"B": 1, "S": 1, "N": 1, "H": least, "W": least + 7},
        {"B": 3, "S": 12, "N": 5, "H": 2 * least + 1, "W": least + 4},
    ):
        tensors = program.examples(sizes)
        for one, other in zip(written(*tensors), program(*tensors), strict=True):
            difference = (one.double() - other.double()).abs().max() / other.double().abs().max()
            found = max(found, difference.item())
    most = TOLERANCES[next(program.parameters()).dtype]
    if not found <= most:
        raise ValueError(f"{file.name}: differs by {found:.1e} from the model, expected {most:.0e} at most")
    return found


_COUNTS = Input(("B", "S"), torch.float32, range(1, 9))


def _encode_text(model: ChatGLM, ids: Tensor, mask: Tensor, positions: Tensor, counts: Tensor) -> Any:
    found = model(TokenBatch(ids, mask, positions, counts))
    return found.tokens, found.pooled


def _predict_noise(model: UNet, *inputs: Tensor) -> tuple[Tensor]:
    return (model(*inputs),)


def _precompute(
    model: UNet, text_tokens: Tensor, pooled_text: Tensor, size_ids: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    context = model.context(text_tokens, None)
    pairs = [each for kv in model.project_kv(context) for each in (kv.k, kv.v)]  # [B, heads, S, C/heads]
    keys_values = torch.cat([each.transpose(1, 2).flatten(2) for each in pairs], dim=-1)  # [B, S, K]
    time = model.embed_time(timesteps)[:, None] + model.added_embedding(pooled_text, size_ids)
    return keys_values, torch.cat([shift.added for shift in model.time_shifts(time)], dim=-1)  # [N, B, T]


def _step(
    model: UNet, latents: Tensor, shifts: Tensor, keys_values: Tensor, text_counts: Tensor
) -> tuple[Tensor]:
    bias, sizes = log_multiplicity_bias(text_counts, latents.dtype), _attention_sizes(model)
    parts = iter(keys_values.split([width for width, _ in sizes for _ in range(2)], dim=-1))  # k, v, k, ...
    pairs = [(split_heads(next(parts), heads), split_heads(next(parts), heads)) for _, heads in sizes]
    contexts = [KeysValues(k, v, bias, ()) for k, v in pairs]
    times = map(TimeShift, shifts.split(_shift_widths(model), dim=-1))
    return (model.forward_precomputed(latents, times, contexts),)


def _encode_images(model: VAE, images: Tensor) -> tuple[Tensor, Tensor]:
    found = model.encode_images(images)
    return found.mean, found.std


def _decode_latents(model: VAE, latents: Tensor) -> tuple[Tensor]:
    return (model.decode_latents(latents),)


def _attention_sizes(unet: UNet) -> list[tuple[int, int]]:
    """List the width and the heads of each cross-attention, in their order of execution."""
    blocks = [block.cross_attention for block in unet.modules() if isinstance(block, TransformerBlock)]
    return [(attention.to_q.out_features, attention.heads) for attention in blocks]


def _shift_widths(unet: UNet) -> list[int]:
    """List the channels of each ResBlock's time shift, in their order of execution."""
    return [block.conv1.out_channels for block in unet.modules() if isinstance(block, ResBlock)]


def _check_exportable(model: nn.Module) -> None:
    require_plain(model, "export it")
    if any(getattr(module, "is_adapter", False) for module in model.modules()):
        raise ValueError(f"this {type(model).__name__} has adapters: fuse LoRAs, unload all, then export")


def _with_weights(model: nn.Module, pattern: str) -> Any:
    """Copy a model's modules with the same tensors, without those that have weights of other paths."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    copied = copy.deepcopy(model, memo=shared)
    for path, module in list(copied.named_modules()):
        if module._parameters and not re.fullmatch(pattern, path):
            parent, _, name = path.rpartition(".")
            del copied.get_submodule(parent)._modules[name]
    return copied


def _by_axis(program: Program, size: Callable[[int, str], Any]) -> tuple[dict[int, Any], ...]:
    """Return for each input axis -> size(factor, name) of its open sizes."""
    return tuple(
        {axis: size(*each) for axis, each in given.open_sizes().items()} for given in program.inputs.values()
    )


@contextmanager
def _silent() -> Iterator[None]:
    """Keep torch's exporters from logging and warning of what every export has, such as absent packages."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
