"""Damaged, hostile and mistaken files: each is one clear line that names the file and what is wrong in it."""

import json
import os
import shutil
import struct
import tempfile
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from kolors_core import KolorsPipeline
from kolors_core.adapters.clip_vision import IMAGE_ENCODER, CLIPVision, CLIPVisionConfig
from kolors_core.checkpoint import load_component, read_json, save_component
from kolors_core.config import KOLORS, ChatGLMConfig, UNetConfig
from kolors_core.pipelines.adapter_methods import MODELS
from kolors_core.registry import SkipInit
from tests.support.fuzz import CONFIGS, outcome
from tests.support.small import SMALL_CLIP
from weights_convert.__main__ import convert, main
from weights_convert.folder_to_single_file import to_single
from weights_convert.safetensors_files import Source, read_shard_index, save_tensors
from weights_convert.untrusted_files import DTYPES, MAX_HEADER_BYTES, MAX_TENSORS, read_json_object

few = settings(max_examples=60, derandomize=True, deadline=None, database=None)
WHOLE = save({"a": torch.ones(2, 3), "b.weight": torch.ones(4)})
HEADER = json.loads(WHOLE[8 : 8 + struct.unpack("<Q", WHOLE[:8])[0]])


def with_header(header: object, data: bytes = bytes(40)) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**fields: object) -> dict:
    return {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | fields}


B = {"b": {"dtype": "F32", "shape": [4], "data_offsets": [24, 40]}}
BAD_WEIGHTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty"),
    "short": (b"12345", "it is 5 bytes long"),
    "cut in the data": (WHOLE[:-1], "its tensors end at 40, and the data are 39 bytes"),
    "cut in the header": (WHOLE[:60], "by the first eight, and 52 follow"),
    "a byte too many": (WHOLE + b"x", "its tensors end at 40, and the data are 41 bytes"),
    "huge header": (struct.pack("<Q", 2**63) + WHOLE[8:], "its header is 9,223,372,036,854,775,808 bytes by"),
    "overlap": (with_header(entry() | {"b": B["b"] | {"data_offsets": [20, 36]}}, bytes(36)),
                "tensor 'b': data_offsets start at 20, expected 24"),
    "hole": (with_header(entry() | {"b": B["b"] | {"data_offsets": [32, 48]}}, bytes(48)),
             "tensor 'b': data_offsets start at 32, expected 24"),
    "no such dtype": (with_header(entry(dtype="F33") | B), "F33"),
    "wrong dtype": (with_header(entry(dtype="F16") | B),
                    "tensor 'a': data_offsets [0, 24] do not span the 12 bytes of F16 [2, 3]"),
    "huge shape": (with_header(entry(shape=[2**40, 2**40]) | B), "data_offsets [0, 24] do not span the 4,"),
    "negative shape": (with_header(entry(shape=[-2, -3]) | B), "shape is [-2, -3], expected sizes"),
    "offsets beyond": (with_header(entry(data_offsets=[2**62, 2**62 + 24]) | B), "expected 0, where the one"),
    "three offsets": (with_header(entry(data_offsets=[0, 24, 24]) | B), "is [0, 24, 24], expected two"),
    "field missing": (with_header({"a": {"dtype": "F32", "shape": [2, 3]}}), "'a': data_offsets is missing"),
    "name twice": (with_header(json.dumps(entry() | B)[:-1] + ', "b": ' + json.dumps(B["b"]) + "}"),
                   "its header: 'b' is given twice"),
    "name twice, spelled otherwise": (
        with_header(json.dumps(entry() | B | B)[:-1].replace('"data_off', '"data\\u005foff', 1)
                    + ', "b": ' + json.dumps(B["b"]) + "}"), "its header: 'b' is given twice"),
    "70 axes": (with_header(entry(shape=[1] * 69 + [6]) | B), "tensor a has 70 axes, expected at most 16"),
    "an exotic dtype": (with_header({"a": {"dtype": "F8_E8M0", "shape": [40], "data_offsets": [0, 40]}}),
                        "tensor a has dtype F8_E8M0, expected one of F64, F32, "),
    "half a byte": (with_header({"a": {"dtype": "F4", "shape": [80], "data_offsets": [0, 40]}}),
                    "tensor a has dtype F4, expected one of F64, F32, "),
    "too many": (with_header({f"files.{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
                              for i in range(MAX_TENSORS + 1)}, b""), "16,385 tensors, expected at most"),
    "not an object": (with_header([1]), "its header is list, expected an object"),
    "deep": (with_header("[" * 100_000), "its header: "),
    "not JSON": (with_header("{'a'"), "its header: "),
    "a line break in a name": (with_header({"a\nb": entry()["a"]} | B), "a tensor has the name 'a\\nb'"),
    "a pickle": (b"PK\x03\x04" + bytes(100), "it is a pickle under another name, which can run code"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "Git LFS pointer"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_a_damaged_file_is_named_with_what_is_wrong(case: str, tmp_path: Path) -> None:
    content, message = BAD_WEIGHTS[case]
    file = tmp_path / "w.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        Source([file])
    told = str(caught.value)
    assert told.startswith(f"{file}: ") and message in told and "\n" not in told and len(told) < 500


def test_a_long_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        stream.truncate(MAX_HEADER_BYTES * 2)  # a hole, which takes no room on the disk
    tracemalloc.start()
    with pytest.raises(ValueError, match="its header is 16,777,217 bytes, expected at most 16,777,216"):
        Source([file])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    (tmp_path / "config.json").write_bytes(b" " * (2**18 + 1))
    with pytest.raises(ValueError, match="config.json: 262,145 bytes, expected at most 262,144"):
        read_json(tmp_path / "config.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path, reference_folder: Path) -> None:
    os.mkfifo(tmp_path / "w.safetensors")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ValueError, match="w.safetensors: not a file"):
        Source([tmp_path / "w.safetensors"])
    with pytest.raises(ValueError, match="config.json: not a file"):
        read_json(tmp_path / "config.json")
    shutil.copytree(reference_folder / "vae", tmp_path / "k" / "vae")
    os.mkfifo(tmp_path / "k" / "vae" / "notes")
    for convert_to in (convert, to_single):
        with pytest.raises(ValueError, match="notes: not a file"):
            convert_to(tmp_path / "k", tmp_path / "out.safetensors")


def index(folder: Path, **files: str) -> Path:
    place = folder / "model.safetensors.index.json"
    place.write_text(json.dumps({"weight_map": files}))
    return place


@pytest.mark.parametrize(
    "name", ["../w.safetensors", "/etc/passwd", "", "..", "sub/w.safetensors", "..\\w", "\ud800"]
)
def test_an_index_names_files_beside_it_only(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"index.json: weight_map\['a'\] is .*expected a file beside the index"
    ):
        read_shard_index(index(tmp_path, a=name))


def test_links_in_a_folder_are_followed_with_and_without_an_index(
    reference_folder: Path, tmp_path: Path
) -> None:
    """Within a hub's cache, whose snapshots link to blobs, and to wherever a user keeps the weights."""
    cache, plain = tmp_path / "models--a--b", tmp_path / "plain"
    for folder, kept in (
        (cache / "snapshots" / "c0ffee" / "unet", cache / "blobs"),
        (plain, tmp_path / "disk"),
    ):
        shutil.copytree(reference_folder / "unet", folder)
        kept.mkdir()
        for number, shard in enumerate(sorted(folder.glob("*.safetensors"))):
            shard.rename(kept / f"{number}")
            shard.symlink_to(os.path.relpath(kept / f"{number}", folder))
        (place,) = folder.glob("*.index.*")
        assert set(read_shard_index(place).values()) == {file.name for file in folder.glob("*.safetensors")}
        with_index = load_component(folder.parent, "unet", subfolder=folder.name).state_dict()
        place.unlink()
        without = load_component(folder.parent, "unet", subfolder=folder.name).state_dict()
        assert all(torch.equal(with_index[name], without[name]) for name in without)


def test_a_component_is_not_loaded_past_such_an_index(reference_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(reference_folder, tmp_path / "k")
    place = next((tmp_path / "k" / "unet").glob("*.index.*"))
    content = json.loads(place.read_text())
    content["weight_map"]["conv_in.weight"] = "../../secret.safetensors"
    place.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"weight_map\['conv_in.weight'\] is '../../secret.safetensors'"):
        load_component(tmp_path / "k", "unet")
    with pytest.raises(ValueError, match=r"weight_map\['conv_in.weight'\] is '../../secret.safetensors'"):
        convert(tmp_path / "k", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_weight_is_read_of_a_folder_of_which_a_part_does_not_fit(
    reference_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The VAE, which comes last, is checked before the text encoder is filled."""
    shutil.copytree(reference_folder, tmp_path / "k")
    for file in (tmp_path / "k" / "vae").glob("*.safetensors"):
        state = load_file(file)
        if state.pop("decoder.conv_norm_out.bias", None) is not None:
            save_tensors(state, file)
    read: list[str] = []
    original = Source.mapped
    monkeypatch.setattr(Source, "mapped", lambda self, name: read.append(name) or original(self, name))
    with pytest.raises(ValueError, match="vae: the tensors do not fit the model: 1 missing"):
        KolorsPipeline.from_pretrained(tmp_path / "k")
    assert read == []
    KolorsPipeline.from_pretrained(reference_folder)
    assert read, "the measure sees what is read"


def test_other_models_are_named_by_a_field() -> None:
    small_clip = CLIPVisionConfig(image_size=224).to_public()
    with pytest.raises(
        ValueError, match="image_size is 224, expected 336: Kolors' adapters read CLIP ViT-L/14"
    ):
        CLIPVisionConfig.from_public(small_clip)
    with pytest.raises(ValueError, match="model_type is 'clip_text_model', expected 'chatglm'"):
        ChatGLMConfig.from_public({"model_type": "clip_text_model", "hidden_size": 768})
    sdxl = KOLORS.unet.to_public() | {"encoder_hid_dim": None, "encoder_hid_dim_type": None}
    with pytest.raises(ValueError, match="encoder_hid_dim_type is None, expected 'text_proj'"):
        UNetConfig.from_public(sdxl)
    many = {"transformer_layers_per_block": [100] * 3, "layers_per_block": 100}
    with pytest.raises(ValueError, match="transformer_layers_per_block .* up to 1,000 in all, not 40,200"):
        UNetConfig.from_public(KOLORS.unet.to_public() | many)
    with pytest.raises(ValueError, match="norm_eps is 1000.*expected a positive number up to 1e.06"):
        UNetConfig.from_public(KOLORS.unet.to_public() | {"norm_eps": 10**400})
    with pytest.raises(ValueError, match="^unet/config.json: 'new.nline' is 3, expected no such field"):
        UNetConfig.from_public(KOLORS.unet.to_public() | {"new\nline": 3})


def test_weights_of_another_clip_and_a_stale_unet_are_named(reference_folder: Path, tmp_path: Path) -> None:
    """Patches are counted in the position embedding: 16 of 28 pixels a side, 25 of 35."""
    save_component(CLIPVision(SMALL_CLIP), tmp_path, "image_encoder")
    place = tmp_path / "image_encoder" / "config.json"
    place.write_text(json.dumps(replace(SMALL_CLIP, image_size=35).to_public()))
    with pytest.raises(ValueError, match=r"1 misshapen: embedding.positions\S* is \[17, 64\].* \[26, 64\]"):
        load_component(tmp_path, "image_encoder", kind=IMAGE_ENCODER)
    shutil.copytree(reference_folder / "unet", tmp_path / "unet")
    for file in (tmp_path / "unet").glob("*.safetensors"):
        state = load_file(file)
        save_tensors({name: state[name] for name in state if not name.startswith("encoder_hid_proj")}, file)
    with pytest.raises(ValueError, match=r"encoder_hid_proj.weight is missing \(.* stale Kolors UNet"):
        load_component(tmp_path, "unet")


@pytest.mark.parametrize("component", CONFIGS)
def test_the_largest_sizes_that_a_config_may_name_can_be_built_without_memory(component: str) -> None:
    """So that what is wrong with them is seen by the files' headers."""
    public, tried = CONFIGS[component], 0
    widths = [name for name, value in public.items() if isinstance(value, int | list) and value not in (0, 1)]
    for name in widths:
        for value in (2**12, 2**24):
            given = [value] * len(public[name]) if isinstance(public[name], list) else value
            try:
                config = MODELS[component].config.from_public(public | {name: given}, "config.json")
            except ValueError:
                continue
            tried += 1
            with torch.device("meta"), SkipInit():
                assert MODELS[component].build(config)
    assert tried > 3


names = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=30)
kinds = st.sampled_from([dtype for dtype in DTYPES.values() if dtype.itemsize > 1])
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@few
@given(
    st.dictionaries(names.filter(lambda name: name != "__metadata__"), st.tuples(kinds, shapes), max_size=6)
)
def test_what_is_written_is_read_to_the_bit(wanted: dict) -> None:
    generator = np.random.default_rng(0)
    tensors = {}
    for name, (dtype, shape) in wanted.items():
        size = int(np.prod(shape)) * dtype.itemsize
        tensors[name] = torch.frombuffer(bytearray(generator.bytes(size) or b"\0" * 8), dtype=torch.uint8)[
            :size
        ]
        tensors[name] = tensors[name].view(dtype).reshape(shape)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "w.safetensors"
        save_tensors(tensors, file)
        source = Source([file])
        assert set(source) == set(tensors)
        for name, tensor in tensors.items():
            assert source.shape(name) == tuple(tensor.shape) and source.dtype(name) == tensor.dtype
            assert (
                source[name].numpy(force=True).tobytes() == tensor.numpy().tobytes()
                if (tensor.dtype != torch.bfloat16)
                else torch.equal(source[name].view(torch.int16), tensor.view(torch.int16))
            )


@few
@given(st.integers(0, len(WHOLE) - 1), st.binary(max_size=8))
def test_no_part_of_a_file_and_no_longer_file_passes_for_it(length: int, more: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "w.safetensors"
        for content in (WHOLE[:length], *((WHOLE + more,) if more else ())):
            file.write_bytes(content)
            with pytest.raises(ValueError, match="not a whole safetensors file"):
                Source([file])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
PUBLIC = KOLORS.unet.to_public()


@few
@given(st.dictionaries(st.sampled_from(list(PUBLIC)) | st.text(max_size=8), json_values, max_size=3))
def test_a_config_is_read_as_it_is_written_or_refused(changes: dict) -> None:
    try:
        config = UNetConfig.from_public(PUBLIC | changes)
    except ValueError as error:
        assert str(error).startswith("unet/config.json: ") and "\n" not in str(error)
    else:
        assert UNetConfig.from_public(config.to_public()) == config


@few
@given(st.integers(0, 2**32))
def test_mutated_files_are_read_or_refused_by_a_documented_error(number: int) -> None:
    """The cases of `python -m tests.support.fuzz`."""
    with tempfile.TemporaryDirectory() as folder:
        assert outcome(number, Path(folder))[1]


def test_the_fuzzer_sees_a_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tests.support import fuzz

    monkeypatch.setitem(fuzz.CASES, "weights", (lambda rng: b"", "w.safetensors", lambda file: 1 / 0))
    with pytest.raises(fuzz.Bad, match="case .*, weights: ZeroDivisionError"):
        for number in range(20):
            outcome(number, tmp_path)


def test_a_pickle_is_converted_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tensors = {
        "image_proj": {"latents": torch.ones(2, 2)},
        "ip_adapter": {"1.to_k_ip.weight": torch.ones(3).half()},
    }
    torch.save(tensors, tmp_path / "a.bin")
    assert main([str(tmp_path / "a.bin"), str(tmp_path / "a.safetensors")]) == 2
    assert "is a pickle under another name" in capsys.readouterr().err
    assert main(["--pickle", str(tmp_path / "a.bin"), str(tmp_path / "a.safetensors")]) == 0
    loaded = load_file(tmp_path / "a.safetensors")
    assert sorted(loaded) == ["image_proj.latents", "ip_adapter.1.to_k_ip.weight"]
    assert loaded["ip_adapter.1.to_k_ip.weight"].dtype == torch.float16
    wrapped = {"state_dict": {"a": torch.ones(2), "b": torch.ones(4)[::2]}, "epoch": 3}
    torch.save(wrapped, tmp_path / "b.ckpt", _use_new_zipfile_serialization=False)
    assert main(["--pickle", str(tmp_path / "b.ckpt"), str(tmp_path / "b.safetensors")]) == 0
    assert "left out: epoch, which is beside the state_dict" in capsys.readouterr().err
    assert sorted(load_file(tmp_path / "b.safetensors")) == ["a", "b"]


class Runs:
    """What a hostile pickle does when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.marker),)


def test_a_hostile_pickle_runs_nothing_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.save({"a": Runs(tmp_path / "ran")}, tmp_path / "a.bin")
    torch.save({"a": torch.ones(1).expand(2**40)}, tmp_path / "b.bin")
    torch.save({"a": "text"}, tmp_path / "c.bin")
    (tmp_path / "d.bin").write_bytes(b"\x80\x02]")
    torch.save({}, tmp_path / "e.bin")
    for name, message in (
        ("a", "a.bin: not a whole pickle of tensors alone"), ("b", "b.bin: a would be 4,398,046,511,104 by"),
        ("c", "c.bin: a is str, expected a plain tensor"),
        ("d", "d.bin: not a whole pickle of tensors alone"),
        ("e", "e.bin: has no tensors"), ("f", "f.bin: no such file"),
    ):  # fmt: skip
        assert main(["--pickle", str(tmp_path / f"{name}.bin"), str(tmp_path / "out.safetensors")]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
    assert main(["--pickle", "--prune", str(tmp_path / "c.bin"), str(tmp_path / "out.safetensors")]) == 2
    assert "--to and --prune have no effect with --pickle" in capsys.readouterr().err
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bin"] * 5


def test_an_object_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(ValueError, match="a.json: not JSON: 'a' is given twice"):
        read_json_object(tmp_path / "a.json", 100)
