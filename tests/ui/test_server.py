"""The page's server: what it draws, whom it refuses, and how it words errors."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from kolors_core import KolorsPipeline
from kolors_core.__main__ import main
from kolors_core.image import png_bytes
from kolors_core.pipelines.png_metadata import read_metadata, save_png
from kolors_core.ui.preview import Preview
from kolors_core.ui.server import Handler, PageServer, chosen_token
from kolors_core.ui.sheet import axes_of, cells
from kolors_core.ui.studio import as_map, main_colors
from tests.support.pages import asked, finished, sent, served

REQUEST = {"prompt": "a red apple", "steps": "2", "seed": "7", "width": "64", "height": "64"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    with served(tmp_path_factory.mktemp("page") / "images") as server:
        yield server


def picture(server: PageServer, name: str) -> Image.Image:
    return Image.open(server.studio.gallery.find(name)).convert("RGB")


def test_it_draws_what_the_command_line_draws(server: PageServer, tmp_path: Path) -> None:
    job = finished(server, "/api/draw", request=REQUEST)
    assert job["state"] == "done" and job["step"] == job["steps"] == 2, job
    assert job["preview"].startswith("data:image/png;base64,")
    flags = [f"--{name}={value}" for name, value in REQUEST.items() if name != "prompt"]
    assert main(["a red apple", *flags, "-q", "-o", str(tmp_path / "it.png")]) == 0
    (name,) = job["result"]["images"]
    assert picture(server, name).tobytes() == Image.open(tmp_path / "it.png").convert("RGB").tobytes()
    own, theirs = (read_metadata(file) for file in (server.studio.gallery.find(name), tmp_path / "it.png"))
    assert own == theirs  # the page's callback changes nothing, and is not in them
    again = finished(server, "/api/draw", request={"from": name})
    assert again["notes"] == ["the embedded model draws at 128x128: expect a worse image at 64x64"]
    assert picture(server, again["result"]["images"][0]).tobytes() == picture(server, name).tobytes()
    other = finished(server, "/api/draw", request={"from": name, "seed": "8"})
    assert picture(server, other["result"]["images"][0]).tobytes() != picture(server, name).tobytes()


def test_every_task_and_adapter_and_nothing_stays(server: PageServer) -> None:
    before = finished(server, "/api/draw", request=REQUEST)["result"]["images"][0]
    red = Image.new("RGBA", (64, 64), (255, 0, 0, 128))
    mask = Image.new("RGB", (64, 64), "black")
    mask.paste("white", (0, 0, 32, 64))
    brought = [
        asked(server, "/api/bring", png_bytes(one), Content_Type="image/png")[1] for one in (red, mask)
    ]
    image, painted = (one["name"] for one in brought)
    assert brought[0] == {"name": image, "width": 64, "height": 64}
    edges = asked(server, "/api/edges", {"image": painted, "low": 100, "high": 200})[1]["name"]
    assert asked(server, f"/images/{edges}")[1][1:4] == b"PNG"
    for more in (
        {"image": image, "strength": "0.6"}, {"image": image, "mask": painted}, {"lora": ["tiny:0.5"]},
        {"control": "tiny:0.8", "control_image": edges}, {"ip_adapter": "tiny", "ip_image": image},
        {"guidance_rescale": "0.7", "pag": "2", "images": "2"},
    ):  # fmt: skip
        job = finished(server, "/api/draw", request=REQUEST | more)
        assert job["state"] == "done", job
        assert picture(server, job["result"]["images"][-1]).tobytes() != picture(server, before).tobytes(), (
            more
        )
    after = finished(server, "/api/draw", request=REQUEST)["result"]["images"][0]
    assert picture(server, after).tobytes() == picture(server, before).tobytes()


def test_a_cancelled_image_leaves_the_pipeline_as_it_was(server: PageServer) -> None:
    before = finished(server, "/api/draw", request=REQUEST)["result"]["images"][0]
    _, answer = asked(server, "/api/draw", {"request": REQUEST | {"steps": "900", "lora": ["tiny:1"]}})
    version, job = -1, {"step": 0}
    while not job["step"]:
        _, seen = asked(server, f"/api/job?id={answer['id']}&version={version}")
        version, job = seen["version"], seen["job"]
    asked(server, "/api/cancel", {"id": answer["id"]})
    after = finished(server, "/api/draw", request=REQUEST)["result"]["images"][0]
    _, seen = asked(server, f"/api/job?id={answer['id']}")
    assert seen["job"]["state"] == "cancelled" and seen["job"]["step"] < 900
    assert picture(server, after).tobytes() == picture(server, before).tobytes()


def test_a_sheet_says_how_it_was_made(server: PageServer) -> None:
    axes = [{"name": "seed", "values": ["1", "2"]}, {"name": "lora_weight", "values": ["0", "1"]}]
    request = {name: value for name, value in REQUEST.items() if name != "seed"} | {"lora": ["tiny:0.3"]}
    job = finished(server, "/api/compare", request=request, axes=axes)
    assert job["state"] == "done" and job["part"] == "image 4 of 4", job
    assert job["left"] == pytest.approx(0, abs=1e-6), "of the whole sheet"
    assert [(one["seed"], one["lora"]) for one in job["result"]["cells"]] == [
        ("1", ["tiny:0"]), ("2", ["tiny:0"]), ("1", ["tiny:1"]), ("2", ["tiny:1"]),
    ]  # fmt: skip
    (name,) = job["result"]["images"]
    told = json.loads(read_metadata(server.studio.gallery.find(name))["sheet"])
    assert told == request | {"axes": axes}
    sheet, plain = (
        picture(server, name),
        finished(server, "/api/draw", request=request | {"seed": "2", "lora": []}),
    )
    cell = picture(server, plain["result"]["images"][0])
    places = [(x, y) for x in range(sheet.width - 63) for y in range(sheet.height - 63)
              if sheet.getpixel((x + 32, y + 32)) == cell.getpixel((32, 32))]  # fmt: skip
    assert any(sheet.crop((x, y, x + 64, y + 64)).tobytes() == cell.tobytes() for x, y in places)


def test_what_is_inside(server: PageServer) -> None:
    job = finished(server, "/api/explain", request=REQUEST | {"steps": "3"})
    found = job["result"]
    assert [token["label"] for token in found["tokens"]][-3:] == ["a", "red", "apple"]
    assert {"all|all", "mid|all", "up|1 to 1"} <= found["views"].keys()
    assert all(len(view["maps"]) == len(found["tokens"]) for view in found["views"].values())
    assert sum(found["views"]["all|all"]["shares"]) == pytest.approx(1, abs=1e-3)
    for layer in (server.studio.layers()[0], next(n for n in server.studio.layers() if "attentions" in n)):
        job = finished(server, "/api/features", request=REQUEST, layer=layer, step=2)
        assert job["state"] == "done" and "channels of" in job["result"]["size"], job
    maps = torch.zeros(5, 4, 6)
    maps[0], maps[3] = torch.arange(6.0), torch.arange(4.0)[:, None] * 3
    colored = torch.tensor(list(main_colors(maps).getdata())).view(4, 6, 3)
    assert len(colored[..., 0].unique(dim=0)) == 4 and len(colored[..., 1].unique(dim=1).T) == 6
    tokens = maps.flatten(1).T
    assert torch.equal(as_map(tokens, 4 / 6), maps)


WRONG: list[tuple[str, Any, str]] = [
    ("/api/draw", {"request": {"prompt": "a cat", "steps": "x"}}, "expected a whole number, got 'x'"),
    ("/api/draw", {"request": {"prompt": "a cat", "sampler": "eulr"}}, "unknown 'eulr', did you mean euler"),
    ("/api/draw", {"request": {"prompt": "a cat", "out": "x.png"}}, "unknown field 'out'"),
    ("/api/draw", {"request": {"prompt": "a cat", "images": "17"}}, "a request may have 16 images, got 17"),
    ("/api/draw", {"request": {"prompt": "a cat", "image": "../secret.png"}}, "there is no image"),
    ("/api/draw", {"request": {"prompt": "a cat", "image": "/etc/passwd"}}, "there is no image"),
    ("/api/draw", {"request": {"from": "no.png"}}, "there is no image 'no.png'"),
    ("/api/draw", {}, "expected a request"),
    ("/api/draw", [], "expected an object, got list"),
    ("/api/draw", b"{", "expected JSON"),
    ("/api/compare", {"request": REQUEST, "axes": []}, "one, two or three axes"),
    ("/api/compare", {"request": REQUEST, "axes": [{"name": "weights", "values": ["x"]}]}, "an axis is one"),
    ("/api/compare", {"request": REQUEST, "axes": [{"name": "seed", "values": ["1"] * 65}]}, "64 images"),
    ("/api/features", {"request": REQUEST, "layer": "mid", "step": "1"}, "must be a whole number"),
    ("/api/bring", b"no image", "the image"),
    ("/api/edges", {"image": "no.png", "low": 1, "high": 2}, "there is no image"),
    ("/api/edges", {"image": "no.png", "low": 10**400, "high": 2}, "low must be a number"),
    ("/api/images?start=-1", None, "start must be a whole number"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "message"), WRONG)
def test_wrong_requests_are_refused_in_the_librarys_words(
    server: PageServer, path: str, body: Any, message: str
) -> None:
    kind = "image/png" if path == "/api/bring" else "application/json"
    status, answer = asked(server, path, body, Content_Type=kind)
    assert (status, message in answer["error"]) == (400, True), answer


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/api/draw", {"request": {}}, "no prompt: say what to draw"),
        ("/api/draw", {"request": REQUEST | {"steps": "0"}}, "--steps must be"),
        ("/api/draw", {"request": REQUEST | {"prompt": "\ud800"}}, "is not valid Unicode text"),
        ("/api/draw", {"request": REQUEST | {"mask": "M"}}, "--mask has no effect without --image"),
        ("/api/draw", {"request": REQUEST | {"width": "63"}}, "--width must be"),
        ("/api/draw", {"request": REQUEST | {"lora": ["no-such-file"]}}, "no-such-file"),
        ("/api/explain", {"request": REQUEST | {"lora": ["tiny"]}}, "lora has no effect on a map of tokens"),
        ("/api/features", {"request": REQUEST, "layer": "nothing", "step": 1}, "no layer is named 'nothing'"),
        ("/api/features", {"request": REQUEST, "layer": "L", "step": 3}, "must be from 1 to 2, got 3"),
    ],
)  # fmt: skip
def test_jobs_fail_in_the_librarys_words(server: PageServer, path: str, body: Any, message: str) -> None:
    body = json.loads(json.dumps(body).replace('"L"', f'"{server.studio.layers()[0]}"'))
    if body["request"].get("mask"):
        image = png_bytes(Image.new("RGB", (64, 64)))
        body["request"]["mask"] = asked(server, "/api/bring", image, Content_Type="image/png")[1]["name"]
    job = finished(server, path, **body)
    assert job["state"] == "failed" and message in job["error"], job


def test_images_of_another_model_and_links_are_refused(server: PageServer, tmp_path: Path) -> None:
    name = finished(server, "/api/draw", request=REQUEST)["result"]["images"][0]
    gallery = server.studio.gallery
    other = Image.open(gallery.find(name))
    facts = read_metadata(gallery.find(name)) | {"model": "Kwai-Kolors/Kolors-diffusers"}
    from kolors_core.pipelines.png_metadata import attach_metadata

    other.info.clear()
    attach_metadata(other, facts)
    save_png(other, gallery.folder / "other.png")
    status, answer = asked(server, "/api/draw", {"request": {"from": "other.png"}})
    assert status == 400 and "and the page was started with --weights tiny" in answer["error"], answer
    (tmp_path / "secret.png").write_bytes(gallery.find(name).read_bytes())
    (gallery.folder / "link.png").symlink_to(tmp_path / "secret.png")
    assert asked(server, "/images/link.png")[0] == 400
    assert asked(server, "/images/../../secret.png")[0] in (400, 404)


def test_other_sites_and_other_names_of_this_machine_are_refused(server: PageServer) -> None:
    body = {"request": REQUEST}
    assert asked(server, "/", Host="evil.example")[0] == 403  # a name that was bound to this machine
    assert asked(server, "/api/draw", body, Origin="http://evil.example")[0] == 403
    assert asked(server, "/api/draw", body, Content_Type="text/plain")[0] == 400  # of a form of another site
    assert asked(server, "/api/nothing", body)[0] == asked(server, "/nothing.js")[0] == 404
    assert asked(server, "/../server.py")[0] == asked(server, "/__main__.py")[0] == 404
    assert asked(server, "/", Host=f"localhost:{server.server_port}")[0] == 200


def test_a_refused_request_has_no_other_in_its_body(server: PageServer) -> None:
    """A page of any site can send one, with what it likes as its content."""
    body = json.dumps({"request": REQUEST}).encode()
    host = f"Host: 127.0.0.1:{server.server_port}\r\n".encode()
    inner = b"POST /api/draw HTTP/1.1\r\n" + host + b"Content-Type: application/json\r\n"
    inner += b"Content-Length: %d\r\n\r\n" % len(body) + body
    for line, origin in (
        (b"POST /api/draw", b"http://evil.example"), (b"POST /nothing", b"http://" + host[6:-2])
    ):  # fmt: skip
        head = line + b" HTTP/1.1\r\n" + host + b"Origin: " + origin + b"\r\n"
        answer = sent(server, head + b"Content-Length: %d\r\n\r\n" % len(inner) + inner)
        assert answer.count(b"HTTP/1.1") == 1 and answer.startswith(b"HTTP/1.1 40"), answer
        assert b"Cross-Origin-Resource-Policy: same-origin" in answer, "no page of theirs shows our images"
    strange = b"POST /api/draw HTTP/1.1\r\n" + host + b"Content-Length: \xb2\r\n\r\n" + inner
    assert sent(server, strange).count(b"HTTP/1.1") == 1
    assert b"Invalid IPv6 URL" in sent(server, b"GET http://[ HTTP/1.1\r\n" + host + b"\r\n")
    assert asked(server, "/api/about")[0] == 200


def test_a_slow_browser_is_left(server: PageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= Handler.timeout <= 600
    monkeypatch.setattr(Handler, "timeout", 0.05)
    for part in (b"GET / HT", b"POST /api/bring HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\nx"):
        assert sent(server, part) == b""


def test_images_have_any_name(server: PageServer) -> None:
    for name in ("a b.png", "猫#1?.png", "100%25.png"):
        Image.new("RGB", (8, 8)).save(server.studio.gallery.folder / name)
        assert asked(server, f"/images/{quote(name)}")[1][1:4] == b"PNG"
        (server.studio.gallery.folder / name).unlink()
    assert asked(server, "/images/%2e%2e%2fsecret.png")[0] == 400


def test_with_a_token_nothing_is_told_without(tmp_path: Path) -> None:
    with served(tmp_path / "images", "secret") as server:
        for path in ("/", "/app.js", "/api/about", "/?token=other"):
            assert asked(server, path)[0] == 403
        assert asked(server, "/api/draw", {"request": REQUEST})[0] == 403
        assert asked(server, "/?token=secret")[0] == 200
        cookie = f"kolors_{server.server_port}"  # that of a page on another port is another
        assert asked(server, "/api/about", Cookie=f"kolors_1=x; {cookie}=secret")[1]["model"] == "tiny"
        assert asked(server, "/api/about", Cookie=f"{cookie}=é; =")[0] == 403
    assert chosen_token("127.0.0.1", None) is None and chosen_token("127.0.0.1", "a-b") == "a-b"
    assert len(chosen_token("0.0.0.0", None) or "") >= 16
    with pytest.raises(ValueError, match="--token must be of letters"):
        chosen_token("0.0.0.0", "a b")


def test_a_preview_has_the_colors_of_the_image() -> None:
    pipe = KolorsPipeline.from_pretrained("tiny")
    preview = Preview(pipe)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    latents = pipe("a red apple", num_inference_steps=8, output_type="latent", generator=generator).images
    with torch.no_grad():
        image = F.interpolate(pipe.vae.decode_latents(latents), latents.shape[-2:], mode="area")
    seen, image = preview.image(latents), image.clamp(-1, 1)
    own, mirrored = ((seen - one).abs().mean() for one in (image, image.flip(3)))
    assert own < 0.2 and mirrored > 1.3 * own


def test_axes_are_cells() -> None:
    axes = axes_of([{"name": "steps", "values": [1, 2]}, {"name": "guidance", "values": [3]}])
    assert cells({"prompt": "a"}, axes) == [
        {"prompt": "a", "guidance": 3, "steps": 1}, {"prompt": "a", "guidance": 3, "steps": 2},
    ]  # fmt: skip
    with pytest.raises(ValueError, match="the axis lora_weight needs a LoRA"):
        cells({"prompt": "a"}, axes_of([{"name": "lora_weight", "values": [1]}]))


def test_it_listens_by_ipv6_and_asks_no_name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: Any) -> str:
        raise AssertionError("a request for a name leaves the machine")

    monkeypatch.setattr(socket, "getfqdn", resolve)
    with PageServer("127.0.0.1", 0, None) as server:
        assert server.address == f"http://127.0.0.1:{server.server_port}/"
    if socket.has_ipv6 and Path("/proc/net/if_inet6").exists():
        with PageServer("::1", 0, None) as server:
            assert server.address == f"http://[::1]:{server.server_port}/"


def test_the_command_refuses_what_it_cannot_serve(server: PageServer, capsys: pytest.CaptureFixture) -> None:
    assert main(["ui", "--port", "70000"]) == 2
    assert "--port must be from 0 to 65535, got 70000" in capsys.readouterr().err
    assert main(["ui", "--port", str(server.server_port)]) == 2
    assert f"cannot listen on 127.0.0.1:{server.server_port}" in capsys.readouterr().err
