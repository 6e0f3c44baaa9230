"""Tensors that nothing computes with, and .npy files that lie: refused by name, or read as they say."""

import json
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kolors_core import KolorsControlNet, KolorsPipeline, load_image_embeds, save_image_embeds
from kolors_core.adapters.controlnet import ControlNetConfig
from kolors_core.adapters.face_id import load_face_embeds
from kolors_core.adapters.lora import attach, save_adapters
from kolors_core.adapters.lora_files import METADATA
from kolors_core.adapters.textual_inversion import vectors_of
from kolors_core.checkpoint import EMBEDDED, load_component
from kolors_core.config import TINY
from kolors_core.pipelines.single_file import load_model
from tests.support.ip_adapters import adapter_config, write_adapter

STEM = "diffusion_pytorch_model.safetensors"


def tiny() -> KolorsPipeline:
    return KolorsPipeline.from_pretrained("tiny")


def write_lora(folder: Path) -> Path:
    unet = tiny().unet
    adapter = attach(unet, rank=2)
    for seed, parameter in enumerate(adapter.parameters()):
        parameter.data.normal_(generator=torch.Generator().manual_seed(seed))
    save_adapters({"unet": adapter}, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def write(name: str, **tensors: Tensor) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        save_file(tensors, folder / name)
        return folder / name

    return save


def copy(component: str) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        shutil.copytree(EMBEDDED / component, folder / component)
        return folder / component / STEM

    return save


def read_lora(file: Path) -> list[Tensor]:
    pipe = tiny()
    pipe.load_lora_weights(file)
    return [p for name, p in sorted(pipe.unet.state_dict().items()) if "lora" in name]


def read_words(file: Path) -> list[Tensor]:
    pipe = tiny()
    pipe.load_textual_inversion(file)
    assert pipe.text_encoder is not None
    return list(vectors_of(pipe.text_encoder).values())


def read_ip_adapter(file: Path) -> list[Tensor]:
    pipe = tiny()
    pipe.load_ip_adapter(file, image_encoder_folder=None)
    return list(pipe._ip_adapters[0].adapter.state_dict().values())


NOISE = torch.randn(1, 2, 3, 192, generator=torch.Generator().manual_seed(0))
# An entry -> how to write its file, and how to read it.
ENTRIES: dict[str, tuple[Callable[[Path], Path], Callable[[Path], list[Tensor]]]] = {
    "LoRA": (write_lora, read_lora),
    "textual inversion": (write("words.safetensors", **{"<x>": NOISE[0, 0]}), read_words),
    "image embeddings": (write("e.safetensors", **{"ip_adapter.0": NOISE}), load_image_embeds),
    "a face's id": (write("id.safetensors", id=NOISE[0, 0, 0]), lambda file: [load_face_embeds(file)]),
    "IP-Adapter": (lambda folder: write_adapter(folder / "ip.safetensors", 0, adapter_config(TINY.unet)),
                   read_ip_adapter),
    "a single file": (copy("unet"), lambda file: list(
        load_model(file, "unet", config=EMBEDDED).state_dict().values())),
    "a checkpoint's UNet": (copy("unet"), lambda file: list(
        load_component(file.parent.parent, "unet").state_dict().values())),
    "ControlNet": (copy("controlnet"), lambda file: list(
        KolorsControlNet.from_pretrained(file.parent).state_dict().values())),
}  # fmt: skip


def retyped(file: Path, dtype: str, shape: Callable[[int], list[int]]) -> str:
    """Replace the first tensor's dtype and shape, for its number of bytes; return its name."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = min((name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    start, end = header[name]["data_offsets"]
    header[name] |= {"dtype": dtype, "shape": shape(end - start)}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return name


ODD: dict[str, tuple[str, Callable[[int], list[int]], str]] = {
    "70 axes": ("F32", lambda size: [1] * 69 + [size // 4], "has 70 axes, expected at most 16"),
    "powers of two": ("F8_E8M0", lambda size: [size], "has dtype F8_E8M0, expected one of F64, F32"),
    "4 bits": ("F4", lambda size: [2 * size], "has dtype F4, expected one of F64, F32"),
    "6 bits": ("F6_E2M3", lambda size: [size * 8 // 6], "has dtype F6_E2M3, expected one of"),
    "complex": ("C64", lambda size: [size // 8], "has dtype C64, expected one of"),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_nothing_computes_with_is_refused_at_every_entry(entry: str, tmp_path: Path) -> None:
    make, read = ENTRIES[entry]
    file = make(tmp_path)
    whole = file.read_bytes()
    assert read(file)
    for case, (dtype, shape, message) in ODD.items():
        if case == "6 bits" and load_first(whole) % 3:
            continue
        name = retyped(file, dtype, shape)
        with pytest.raises(ValueError) as caught:
            read(file)
        told = str(caught.value)
        assert told.startswith(f"{file}: tensor {name} {message}") and "\n" not in told, case
        file.write_bytes(whole)


def load_first(content: bytes) -> int:
    """Bytes of a file's first tensor."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return min(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("entry", ENTRIES)
def test_8_bit_floats_are_the_numbers_that_they_are(entry: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """As if the file had the same numbers in float32, to the bit."""
    make, read = ENTRIES[entry]
    file = make(tmp_path)
    narrow = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file({name: tensor.float() for name, tensor in narrow.items()}, file)
    expected = read(file)
    save_file(narrow, file)
    found = read(file)
    assert len(found) == len(expected) > 0
    assert all(
        one.dtype == torch.float32 and torch.equal(one, two) for one, two in zip(found, expected, strict=True)
    )


def test_learned_words_that_do_not_fit_are_named_with_their_file(tmp_path: Path) -> None:
    pipe, good = tiny(), tmp_path / "good.safetensors"
    save_file({"<good>": torch.ones(192)}, good)
    for name, tensors, message in (
        ("width", {"<x>": torch.ones(3)}, r"<x>: expected vectors \[n, 192\], got \[3\]"),
        ("nan", {"<x>": torch.full((192,), torch.nan)}, "<x>: expected finite floating-point vectors"),
        ("ints", {"<x>": torch.ones(192, dtype=torch.int32)}, "<x>: expected finite .*, got torch.int32"),
        ("space", {" x": torch.ones(192)}, "a learned word must be some text without space around it"),
        ("again", {"<good>": torch.ones(192)}, "the word <good> comes twice"),
    ):
        file = tmp_path / f"{name}.safetensors"
        save_file(tensors, file)
        with pytest.raises(ValueError, match=f"^{file}: {message}"):
            pipe.load_textual_inversion([good, file])
        assert pipe.text_encoder is not None and vectors_of(pipe.text_encoder) == {}


def test_embeddings_of_another_shape_are_named_with_their_file(tmp_path: Path) -> None:
    file = tmp_path / "e.safetensors"
    for tensor, got in ((torch.ones(2, 3), r"\[2, 3\] of torch.float32"),
                        (torch.ones(1, 1, 2, 3).int(), r"\[1, 1, 2, 3\] of torch.int32")):  # fmt: skip
        save_image_embeds([tensor], file, overwrite=True)
        with pytest.raises(
            ValueError, match=f"^{file}: ip_adapter.0 is {got}, expected floats .batch, images"
        ):
            load_image_embeds(file)


def test_a_lora_s_settings_are_bounded(tmp_path: Path) -> None:
    file = write_lora(tmp_path)
    save_file(load_file(file), tmp_path / "deep.safetensors", metadata={METADATA: "[" * 100_000})
    with pytest.raises(ValueError, match=f"deep.safetensors: {METADATA}: not JSON: .*recursion"):
        tiny().load_lora_weights(tmp_path / "deep.safetensors")
    save_file(load_file(file), tmp_path / "adapter_model.safetensors")
    for content, message in (
        (b"[" * 100_000, "not JSON: .*recursion"),
        (b" " * 2**20, "1,048,576 bytes, expected"),
    ):
        (tmp_path / "adapter_config.json").write_bytes(content)
        with pytest.raises(ValueError, match=f"adapter_config.json: {message}"):
            tiny().load_lora_weights(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("value", [7, "DownBlock2D", None, {"a": 1}, [7], [], True])
def test_a_controlnet_s_block_types_are_named(value: object) -> None:
    public = ControlNetConfig().to_public() | {"down_block_types": value}
    with pytest.raises(
        ValueError, match="^controlnet/config.json: down_block_types is .*, expected 3 of DownBlock2D"
    ):
        ControlNetConfig.from_public(public)


def npy(shape: str, data: int = 100, version: bytes = b"\1\0") -> bytes:
    """A .npy file with a header of this shape and so many bytes after it."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + bytes(data)


NPY: dict[str, tuple[bytes, str]] = {
    shape: (npy(shape), f"its header has the shape {wanted} of float32, and 100 bytes follow")
    for shape, wanted in (
        ("(30000000000,)", "(30000000000,)"), ("(4611686018427387904,4)", "(4611686018427387904, 4)"),
        ("(9223372036854775808,)", "(9223372036854775808,)"), ("(-1,)", "(-1,)"), ("(True,)", "(True,)"),
        ("(-5,-5)", "(-5, -5)"), ("(1000000000,)", "(1000000000,)"), ("(24,)", "(24,)"), ("(26,)", "(26,)"),
    )
} | {
    "(1,)*2": (npy("(1,)*2"), "malformed node"), "(3.0,)": (npy("(3.0,)"), "shape is not valid: (3.0,)"),
    "[512]": (npy("[512]"), "shape is not valid: [512]"), "empty": (b"", "reading magic string"),
    "a zip": (b"PK\3\4" + bytes(50), "the magic string is not correct"),
    "version 2": (npy("(25,)", version=b"\2\0"), "its format is (2, 0), expected (1, 0)"),
    "deep": (npy("-" * 5000 + "1"), "recursion"), "open": (npy("(25,"), "EOF in multi-line statement"),
    "cut in the header": (npy("(25,)")[:40], "EOF: reading array header"),
}  # fmt: skip


@pytest.mark.parametrize("case", NPY)
def test_an_npy_file_is_read_only_if_its_header_tells_its_size(case: str, tmp_path: Path) -> None:
    content, message = NPY[case]
    file = tmp_path / "id.npy"
    file.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError) as caught:
        load_face_embeds(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    told = str(caught.value)
    assert told.startswith(f"{file}: not an array of numbers: ") and message in told
    assert "\n" not in told and peak < 2**22
    file.write_bytes(npy("(25,)"))
    assert load_face_embeds(file).shape == (1, 25)


def test_what_is_no_file_of_floats_is_named(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {
        "pickle": np.array([1, "a"], dtype=object), "text": np.array(["a"]), "big-endian": np.ones(3, ">f4"),
        "whole numbers": np.arange(3), "complex": np.ones(3, np.complex64),
        "none": np.ones((1, 0), np.float32),
    }  # fmt: skip
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(ValueError, match=f"^{tmp_path}/{name}.npy: "):
            load_face_embeds(tmp_path / f"{name}.npy")
    np.savez(tmp_path / "several", a=np.zeros(3))
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    (tmp_path / "folder.npy").mkdir()
    for name, message in {
        "several": "the magic string is not",
        "folder": "not a file",
        "no": "no such file",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=f"^{tmp_path}/{name}.npy: .*{message}"):
            load_face_embeds(tmp_path / f"{name}.npy")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
@pytest.mark.parametrize("name", ["id.npy", "id.safetensors"])
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: not a file"):
        load_face_embeds(tmp_path / name)
