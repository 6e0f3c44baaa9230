"""Downloads from a hub, against a small one on this machine: what is asked of it, and what the cache serves.

The hub's client reads its settings when it is imported, so every load runs in a process of its own.
"""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from kolors_core import EulerDiscreteScheduler, KolorsPipeline
from kolors_core.chatglm import ChatGLM
from kolors_core.config import TINY
from kolors_core.pipelines.adapter_methods import MODELS
from kolors_core.tokenizer import Tokenizer
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from tests.support.hub import Files, Hub, environment, files_of, serving
from tests.support.processes import run_program

LOADING = "import json, sys, tests.test_hub as own; own.main(json.loads(sys.argv[1]))"
REPO, PULL_REQUEST = "someone/kolors", "refs/pr/4"
FIRST = "pretrained_model_name_or_path"
NEEDED = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.fp16-00001-of-00002.safetensors",
    "text_encoder/model.fp16-00002-of-00002.safetensors",
    "tokenizer/tokenizer.model",
    "tokenizer/tokenizer_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.fp16.safetensors",
}
# What a public repository holds beside. The weights among them are no weights: opening one fails.
BESIDE = {
    ".gitattributes": b"*.safetensors filter=lfs",
    "README.md": b"# Kolors",
    "imgs/ladybug.png": b"an image",
    "text_encoder/model.safetensors.index.fp16.json": b"{}",
    "text_encoder/pytorch_model.bin": b"a pickle",
    "text_encoder/modeling_chatglm.py": b"raise SystemExit",
    "unet/diffusion_pytorch_model.safetensors": b"the float32 weights",
    "unet/diffusion_pytorch_model.bin": b"a pickle",
    "unet/sample.jpg": b"an image",
}


class Outcome(NamedTuple):
    """Of one `from_pretrained`: a hash of each model loaded, or the error; and the addresses reached for."""

    loaded: dict[str, str]
    error: str
    reached: list[str]


def from_pretrained(endpoint: str, home: Path, *calls: dict[str, Any], **settings: str) -> list[Outcome]:
    """Each call of `KolorsPipeline.from_pretrained`, in a fresh process with this hub and cache only."""
    told = json.dumps([{FIRST: REPO, **call} for call in calls])
    done = run_program(LOADING, told, env=environment(endpoint, home, **settings))
    assert done.returncode == 0, done.stderr
    return [Outcome(*outcome) for outcome in json.loads(done.stdout)]


def main(calls: list[dict[str, Any]]) -> None:
    """The other side of the function above."""
    reached = set[str]()

    def note(event: str, args: tuple[Any, ...]) -> None:
        if event == "socket.connect":
            reached.add("{}:{}".format(*args[1]))
        elif event == "socket.getaddrinfo":
            reached.add("{}:{}".format(*args))

    sys.addaudithook(note)
    outcomes = []
    for call in calls:
        reached.clear()
        loaded, error = {}, ""
        try:
            loaded = hashes(KolorsPipeline.from_pretrained(**call))
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        outcomes.append(Outcome(loaded, error, sorted(reached)))
    print(json.dumps(outcomes))


def hashes(pipe: KolorsPipeline) -> dict[str, str]:
    """A hash of every tensor of each model that the pipeline has."""
    found = {}
    for component in MODELS:
        if (model := getattr(pipe, component)) is not None:
            digest = hashlib.sha1()
            for name, tensor in sorted(model.state_dict().items()):
                digest.update(name.encode() + (b"" if tensor.is_meta else tensor.numpy().tobytes()))
            found[component] = digest.hexdigest()
    return found


@pytest.fixture(scope="module")
def pipe(small_tokenizer: Path) -> KolorsPipeline:
    """A small Kolors with random weights."""
    tokenizer = Tokenizer(small_tokenizer)
    vocabulary = tokenizer.pieces.vocab_size() + 9  # ChatGLM's special tokens follow the pieces
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text_encoder = ChatGLM(replace(TINY.text_encoder, vocab_size=vocabulary))
        unet, vae = UNet(TINY.unet), VAE(TINY.vae)
    return KolorsPipeline(vae, text_encoder, tokenizer, unet, EulerDiscreteScheduler())


@pytest.fixture(scope="module")
def repository(pipe: KolorsPipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """Two revisions of one repository: main in the layout of the public one, and a pull request."""
    folder = tmp_path_factory.mktemp("repository")
    pipe.save_pretrained(folder, variant="fp16")
    whole = folder / "text_encoder" / "model.fp16.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    for part, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        shard = whole.with_name(f"model.fp16-{part:05}-of-00002.safetensors")
        save_file({name: tensors[name] for name in names}, shard)
    ours = files_of(folder)
    assert set(ours) == NEEDED
    pull_request = {path.replace(".fp16", ""): content for path, content in ours.items()}
    return {"main": ours | BESIDE, PULL_REQUEST: pull_request}


class Download(NamedTuple):
    """What a first download of the fp16 variant gave, and left: a filled cache. Its hub is stopped."""

    outcome: Outcome
    hub: Hub
    home: Path


@pytest.fixture(scope="module")
def download(repository: dict[str, Files], tmp_path_factory: pytest.TempPathFactory) -> Download:
    home = tmp_path_factory.mktemp("home")
    with serving({REPO: repository}) as hub:
        [outcome] = from_pretrained(hub.endpoint, home, {"variant": "fp16"})
    return Download(outcome, hub, home)


def test_only_the_needed_files_are_fetched(download: Download, pipe: KolorsPipeline) -> None:
    assert download.outcome.error == ""
    assert download.outcome.loaded == hashes(pipe)
    assert sorted(download.hub.fetched(REPO)) == sorted(NEEDED)  # each once
    asked = {path for _, path, _ in download.hub.seen}
    assert not [path for path in asked if path.endswith(tuple(BESIDE))]


def test_for_a_plan_no_weights_are_fetched(repository: dict[str, Files], tmp_path: Path) -> None:
    with serving({REPO: repository}) as hub:
        [outcome] = from_pretrained(hub.endpoint, tmp_path, {"device": "meta"})
    assert outcome.error == "" and set(outcome.loaded) == {"text_encoder", "unet", "vae"}
    assert sorted(hub.fetched(REPO)) == sorted(path for path in NEEDED if path.endswith(".json"))


def test_hf_endpoint_is_the_only_place_asked(download: Download) -> None:
    assert download.outcome.reached == [download.hub.endpoint.removeprefix("http://")]


def test_the_cache_serves_when_the_hub_is_gone(download: Download, tmp_path: Path) -> None:
    empty = {"cache_dir": str(tmp_path)}
    local, unreachable, local_empty, unreachable_empty = from_pretrained(
        download.hub.endpoint, download.home,
        {"variant": "fp16", "local_files_only": True}, {"variant": "fp16"},
        {"local_files_only": True, **empty}, empty,
    )  # fmt: skip
    assert (local.loaded, local.error, local.reached) == (download.outcome.loaded, "", [])
    assert (unreachable.loaded, unreachable.error) == (download.outcome.loaded, "")
    assert (
        local_empty.error == f"FileNotFoundError: {REPO}: not in the local cache, and local_files_only is set"
    )
    assert local_empty.reached == []
    start = f"FileNotFoundError: {REPO}: not in the local cache, and the hub cannot be reached: "
    assert unreachable_empty.error.startswith(start)
    assert "\n" not in unreachable_empty.error


def test_offline_mode_reads_the_cache_and_asks_nobody(download: Download, tmp_path: Path) -> None:
    cached, absent = from_pretrained(
        download.hub.endpoint, download.home,
        {"variant": "fp16"}, {"variant": "fp16", "cache_dir": str(tmp_path)}, HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert (cached.loaded, cached.error) == (download.outcome.loaded, "")
    assert absent.error.startswith(f"FileNotFoundError: {REPO}: not in the local cache, and ")
    assert "offline mode is enabled" in absent.error and "\n" not in absent.error
    assert cached.reached == absent.reached == []


def test_revision_cache_token_and_left_out_components_are_passed_on(
    repository: dict[str, Files], pipe: KolorsPipeline, tmp_path: Path
) -> None:
    cache = {"cache_dir": str(tmp_path / "cache")}
    with serving({REPO: repository}) as hub:
        call = {
            "revision": PULL_REQUEST,
            "token": "hf_secret",
            "text_encoder": None,
            "tokenizer": None,
            **cache,
        }
        first, again = from_pretrained(
            hub.endpoint, tmp_path / "home", call, {**call, "local_files_only": True}
        )
    expected = {component: value for component, value in hashes(pipe).items() if component != "text_encoder"}
    assert (first.loaded, first.error) == (again.loaded, again.error) == (expected, "")
    wanted = [
        path for path in repository[PULL_REQUEST] if not path.startswith(("text_encoder/", "tokenizer/"))
    ]
    assert sorted(hub.fetched(REPO, PULL_REQUEST)) == sorted(wanted)
    assert hub.fetched(REPO) == []
    assert {request.token for request in hub.seen} == {"Bearer hf_secret"}
    assert (tmp_path / "cache" / "models--someone--kolors").is_dir()


def test_an_error_is_one_line_and_comes_before_any_file(repository: dict[str, Files], tmp_path: Path) -> None:
    with serving({REPO: repository}) as hub:
        no_repo, no_revision, no_variant, not_both, no_name = from_pretrained(
            hub.endpoint, tmp_path,
            {FIRST: "someone/nothing"}, {"revision": "v9"}, {"variant": "bf16"},
            {"variant": "bf16", "text_encoder": None}, {FIRST: "someone/no such name"},
        )  # fmt: skip
    assert no_repo.error.startswith("FileNotFoundError: someone/nothing: cannot be had from the hub: 404 ")
    assert "Repository Not Found" in no_repo.error
    assert no_revision.error.startswith(f"FileNotFoundError: {REPO}: cannot be had from the hub: 404 ")
    assert "Revision Not Found" in no_revision.error and "v9" in no_revision.error
    wanted = "expected weights of variant 'bf16', found"
    assert no_variant.error == f"FileNotFoundError: {REPO}/text_encoder: {wanted} 'fp16'"
    assert not_both.error == f"FileNotFoundError: {REPO}/unet: {wanted} no variant, 'fp16'"
    assert no_name.error.startswith("FileNotFoundError: someone/no such name: cannot be had from the hub: ")
    assert not [outcome for outcome in (no_repo, no_revision, no_name) if "\n" in outcome.error]
    assert not [path for _, path, _ in hub.seen if "/resolve/" in path]
