"""Uploads to a hub, a small one on this machine: what arrives there, and loads again.

The hub's client reads its settings when it is imported, so all uploads run in one process of their own.
"""

from pathlib import Path

import torch
from safetensors.torch import load

from kolors_core.compat.models import AutoencoderKL
from kolors_core.compat.tokenizer import ChatGLMTokenizer
from tests.support.hub import environment, serving
from tests.support.processes import run_program

PROGRAM = """
import sys
from pathlib import Path
import huggingface_hub
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

(home / "folder").mkdir()
(home / "folder" / "config.json").write_text("{}")
attempt(lambda: vae.push_to_hub("someone/refused", token=False))
attempt(lambda: push_folder(home / "folder", "a/b/c", token=TOKEN))
attempt(lambda: push_folder(home / "folder", "a/b", token="with space"))
attempt(lambda: push_folder(home / "folder", 5, token=TOKEN))
attempt(lambda: vae.push_to_hub("someone/refused", token=TOKEN, safe_serialization=False))
endpoint, huggingface_hub.constants.ENDPOINT = huggingface_hub.constants.ENDPOINT, "http://127.0.0.1:1"
attempt(lambda: vae.push_to_hub("a/b", token=TOKEN))
huggingface_hub.constants.ENDPOINT = endpoint

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


def test_a_model_is_pushed_and_loads_again_and_what_is_refused_is_one_line(tmp_path: Path) -> None:
    with serving({}) as hub:
        done = run_program(PROGRAM, str(tmp_path), env=environment(hub.endpoint, tmp_path))
        assert done.returncode == 0, done.stderr
        assert "hf_secret" not in done.stdout + done.stderr
        refused, lines = done.stdout.splitlines()[:6], done.stdout.splitlines()[6:]
        assert refused[0].startswith("OSError someone/refused: cannot be pushed to the hub: ")
        assert refused[1].startswith("OSError a/b/c: cannot be pushed to the hub: ")
        assert refused[2].startswith("ValueError token has a space")
        assert refused[3] == "TypeError repo_id must be a string, got 5"
        assert refused[4].startswith("ValueError safe_serialization=False would write a pickle")
        assert refused[5].startswith("OSError a/b: cannot be pushed to the hub: ")
        assert lines[0].startswith(f"{hub.endpoint}/someone/vae/commit/")
        ids = ChatGLMTokenizer.from_pretrained("tiny").encode("cat")
        assert lines[1:] == ["None", str(ids), "someone/vae True"]
        assert hub.repositories.keys() == {"someone/vae", "someone/named", "someone/kolors"}
        assert hub.fetched("someone/vae").count("config.json") == 2, "once more by force"
        names = set(hub.repositories["someone/vae"]["main"])
        assert {"config.json", "diffusion_pytorch_model.safetensors.index.fp16.json"} < names
        assert len(names) > 3
        whole = load(hub.repositories["someone/named"]["main"]["diffusion_pytorch_model.safetensors"])
        numbers = sum(map(torch.numel, whole.values()))
        assert numbers == AutoencoderKL.from_pretrained("tiny").num_parameters()
        sent = [one.token for one in hub.seen if one.method == "POST" and "/someone/" in one.path]
        assert sent and {*sent} == {"Bearer hf_secret"}
    assert sorted(file.name for file in (tmp_path / "named").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
