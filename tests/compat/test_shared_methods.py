"""Uploads to a hub, a small one on this machine: what arrives there, and loads again.

The hub's client reads its settings when it is imported, so every upload runs in a process of its own.
"""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load

from kolors_core.compat.models import AutoencoderKL
from kolors_core.compat.tokenizer import ChatGLMTokenizer
from tests.support.hub import environment, serving

UPLOAD = """
import sys
from pathlib import Path
from kolors_core.compat.models import AutoencoderKL
from kolors_core.compat.tokenizer import ChatGLMTokenizer
from kolors_core.compat.shared_methods import push_folder

vae = AutoencoderKL.from_pretrained("tiny")
TOKEN, home = "hf_secret", Path(sys.argv[1])
def attempt(call):
    try:
        print(call())
    except Exception as error:
        print(type(error).__name__, error)
"""


def upload(endpoint: str, home: Path, program: str, **settings: str) -> list[str]:
    """The lines that the program prints."""
    done = subprocess.run(
        [sys.executable, "-c", UPLOAD + program, str(home)], env=environment(endpoint, home, **settings),
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "hf_secret" not in done.stdout + done.stderr
    return done.stdout.splitlines()


def test_a_model_is_pushed_and_loads_again_from_the_hub(tmp_path: Path) -> None:
    program = """
attempt(lambda: vae.push_to_hub("someone/vae", token=TOKEN, variant="fp16", max_shard_size="1MB"))
attempt(lambda: vae.save_pretrained(home / "named", push_to_hub=True, token=TOKEN, commit_message="mine"))
again = AutoencoderKL.from_pretrained("someone/vae", variant="fp16", force_download=True)
for force in (False, True):
    AutoencoderKL.from_pretrained("someone/vae", variant="fp16", force_download=force)
ChatGLMTokenizer.from_pretrained("tiny").save_pretrained(home / "tokenizer")
push_folder(home / "tokenizer", "someone/kolors", token=TOKEN)
print(ChatGLMTokenizer.from_pretrained("someone/kolors").encode("cat"))
pairs = zip(again.parameters(), vae.parameters(), strict=True)
print(again.name_or_path, all((one == other).all() for one, other in pairs))
"""
    with serving({}) as hub:
        lines = upload(hub.endpoint, tmp_path, program)
        assert lines[0].startswith(f"{hub.endpoint}/someone/vae/commit/")
        ids = ChatGLMTokenizer.from_pretrained("tiny").encode("cat")
        assert lines[1:] == ["None", str(ids), "someone/vae True"]
        assert hub.repositories.keys() == {"someone/vae", "someone/named", "someone/kolors"}
        assert hub.fetched("someone/vae").count("config.json") == 2, "once more by force"
        names = set(hub.repositories["someone/vae"]["main"])
        assert {"config.json", "diffusion_pytorch_model.safetensors.index.fp16.json"} < names and len(
            names
        ) > 3
        whole = load(hub.repositories["someone/named"]["main"]["diffusion_pytorch_model.safetensors"])
        numbers = sum(map(torch.numel, whole.values()))
        assert numbers == AutoencoderKL.from_pretrained("tiny").num_parameters()
        sent = [request for request in hub.seen if request.method == "POST"]
        assert sent and all(request.token == "Bearer hf_secret" for request in sent)
    assert sorted(file.name for file in (tmp_path / "named").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip


def test_what_the_hub_refuses_is_one_line(tmp_path: Path) -> None:
    program = """
(home / "folder").mkdir()
(home / "folder" / "config.json").write_text("{}")
attempt(lambda: vae.push_to_hub("someone/vae", token=False))
attempt(lambda: push_folder(home / "folder", "a/b/c", token=TOKEN))
attempt(lambda: push_folder(home / "folder", "a/b", token="with space"))
attempt(lambda: push_folder(home / "folder", 5, token=TOKEN))
attempt(lambda: vae.push_to_hub("someone/vae", token=TOKEN, safe_serialization=False))
"""
    with serving({}) as hub:
        lines = upload(hub.endpoint, tmp_path, program)
        assert not hub.repositories
    assert len(lines) == 5
    assert lines[0].startswith("OSError someone/vae: cannot be pushed to the hub: ")
    assert lines[1].startswith("OSError a/b/c: cannot be pushed to the hub: ")
    assert lines[2].startswith("ValueError token has a space")
    assert lines[3] == "TypeError repo_id must be a string, got 5"
    assert lines[4].startswith("ValueError safe_serialization=False would write a pickle")
    [line] = upload("http://127.0.0.1:1", tmp_path, 'attempt(lambda: vae.push_to_hub("a/b", token=TOKEN))')
    assert line.startswith("OSError a/b: cannot be pushed to the hub: ")
