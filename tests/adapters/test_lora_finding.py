"""Which file of a folder or hub repository is the LoRA."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kolors_core.pipelines.lora_methods import find_lora
from tests.support.hub import environment, serving
from tests.support.loras import ATTENTION, Models, factors, peft_names
from tests.support.parity import pair
from tests.support.processes import run_program

LORA, PEFT = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"


def folder_of(place: Path, *names: str) -> Path:
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(name.encode())
    return place


@pytest.mark.parametrize(("names", "asked", "found"), [
    (["style.safetensors", "README.md"], {}, "style.safetensors"),
    ([LORA, PEFT, "other.safetensors"], {}, LORA),
    ([PEFT, "other.safetensors", "adapter_config.json"], {}, PEFT),
    ([LORA, "a.safetensors", "b.safetensors"], {"weight_name": "b.safetensors"}, "b.safetensors"),
    (["a.safetensors", "late/b.safetensors"], {"subfolder": "late"}, "late/b.safetensors"),
    (["a.safetensors", "late/b.safetensors"], {"weight_name": "late/b.safetensors"}, "late/b.safetensors"),
    (["a.safetensors", "a.bin"], {}, "a.safetensors"),
])  # fmt: skip
def test_the_file_of_a_folder(names: list[str], asked: dict[str, str], found: str, tmp_path: Path) -> None:
    folder_of(tmp_path, *names)
    arguments = {"weight_name": None, "subfolder": None} | asked
    assert find_lora(tmp_path, **arguments) == tmp_path / found
    assert find_lora(str(tmp_path), **arguments) == tmp_path / found


@pytest.mark.parametrize(("names", "asked", "fault"), [
    (["a.safetensors", "b.safetensors"], {}, "or a weight_name, found a.safetensors, b.safetensors"),
    (["a.safetensors"], {"weight_name": "c.safetensors"}, "expected c.safetensors, found a.safetensors"),
    (["a.safetensors"], {"subfolder": "late"}, "late: no such folder"),
    (["README.md"], {}, "found no .safetensors file"),
    (["pytorch_lora_weights.bin"], {}, "pytorch_lora_weights.bin: a pickle can run code and is never opened. "
     "Convert it where you trust it"),
    (["a.safetensors", "b.pt"], {"weight_name": "b.pt"}, "b.pt: a pickle can run code"),
])  # fmt: skip
def test_no_one_file_in_a_folder(names: list[str], asked: dict[str, str], fault: str, tmp_path: Path) -> None:
    folder_of(tmp_path, *names)
    with pytest.raises((FileNotFoundError, ValueError), match=fault):
        find_lora(tmp_path, **({"weight_name": None, "subfolder": None} | asked))


def test_a_file_by_its_path(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.safetensors", "a.ckpt", "notes")
    assert find_lora(tmp_path / "a.safetensors", None, None) == tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="a.ckpt: a pickle can run code"):
        find_lora(tmp_path / "a.ckpt", None, None)
    with pytest.raises(ValueError, match="notes: is not a .safetensors file"):
        find_lora(tmp_path / "notes", None, None)
    with pytest.raises(ValueError, match="weight_name, subfolder and revision have no effect on it"):
        find_lora(tmp_path / "a.safetensors", "a.safetensors", None)
    with pytest.raises(FileNotFoundError, match="not a hub repository of the form owner/name"):
        find_lora(tmp_path / "nowhere", None, None)


def test_broken_files_are_named(tmp_path: Path) -> None:
    models = Models(pair("unet", torch.float32)[0])
    folder_of(tmp_path, "a.safetensors")
    with pytest.raises(ValueError, match="a.safetensors: not a whole safetensors file"):
        models.load_lora_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match="b.safetensors: no such file"):
        models.load_lora_weights(tmp_path / "b.safetensors")
    state = peft_names("unet", factors(models.unet, "unet", ATTENTION))
    (tmp_path / "a.safetensors").unlink()
    save_file(state, tmp_path / PEFT)
    for text, fault in (("[1]", "expected a JSON object, got list"),
                        ("{", "adapter_config.json: not JSON"),
                        ('{"lora_alpha": "two", "r": 2}', "'two' for .*, expected a number")):  # fmt: skip
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=fault):
            models.load_lora_weights(tmp_path)
    assert models.get_list_adapters() == {}


def test_of_a_hub_repository_only_the_lora_is_fetched(tmp_path: Path) -> None:
    files = {
        name: name.encode() for name in ("README.md", "late/other.bin", f"late/{PEFT}", "late/x.safetensors")
    }
    files["late/adapter_config.json"] = b"{}"
    program = "\n".join([
        "import json, sys", "from kolors_core.pipelines.lora_methods import find_lora",
        "for weight_name, subfolder in json.loads(sys.argv[1]):",
        "    try: print(find_lora('someone/style', weight_name, subfolder).name)",
        "    except FileNotFoundError as error: print(error)",
    ])  # fmt: skip
    with serving({"someone/style": {"main": files}}) as hub:
        names = json.dumps([(None, "late"), (None, None)])
        done = run_program(program, names, env=environment(hub.endpoint, tmp_path))
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [
            PEFT,
            "someone/style: expected one .safetensors file, or a weight_name, found no .safetensors file",
        ]  # fmt: skip
        assert sorted(set(hub.fetched("someone/style"))) == ["late/adapter_config.json", f"late/{PEFT}"]
