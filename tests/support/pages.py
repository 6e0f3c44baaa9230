"""A page's server in a thread, asked over HTTP; a browser on a page."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from kolors_core.ui.__main__ import parser
from kolors_core.ui.gallery import Gallery
from kolors_core.ui.server import PageServer
from kolors_core.ui.studio import Studio
from tests.support.browser import BROWSER, Browser


@contextmanager
def served(folder: Path, token: str | None = None) -> Iterator[PageServer]:
    """A server of the embedded model."""
    with PageServer("127.0.0.1", 0, token) as server:
        server.studio = Studio(parser().parse_args(["-q"]), Gallery(folder))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def asked(server: PageServer, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """The status and the JSON, or bytes, of an answer."""
    link = HTTPConnection("127.0.0.1", server.server_port)
    given = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    link.request("GET" if body is None else "POST", path, content, given)
    answer = link.getresponse()
    read = answer.read()
    is_json = (answer.headers["Content-Type"] or "").startswith("application/json")
    link.close()
    return answer.status, json.loads(read) if is_json else read


def sent(server: PageServer, content: bytes) -> bytes:
    """All that comes for bytes on a connection, until the server closes it."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as link:
        link.sendall(content)
        read = b""
        try:
            while more := link.recv(2**16):
                read += more
        except ConnectionResetError:  # it did not read all
            pass
        return read


def finished(server: PageServer, path: str, **body: Any) -> dict[str, Any]:
    """The job that a request became, at its end."""
    status, answer = asked(server, path, body)
    assert status == 200, answer
    version, job = -1, {"state": "waiting"}
    while job["state"] in ("waiting", "running"):
        _, answer = asked(server, f"/api/job?id={answer.get('id') or job['id']}&version={version}")
        version, job = answer["version"], answer["job"]
    return job


class Tab:
    """A tab of a browser: what a person does on a page, and what they see."""

    def __init__(self, browser: Browser, address: str) -> None:
        self.browser = browser
        target = browser("Target.createTarget", url="about:blank")["targetId"]
        session = browser("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        browser.session = {"sessionId": session}
        for area in ("Page", "Runtime", "Log", "Network", "DOM"):
            browser(f"{area}.enable")
        browser("Page.navigate", url=address)
        self.until("document.body?.dataset.ready")

    def value(self, expression: str) -> Any:
        return self.browser.value(expression)

    def until(self, expression: str, seconds: float = 60) -> Any:
        end = time.monotonic() + seconds
        while not (found := self.value(f"(() => {{ return {expression} }})()")):
            assert time.monotonic() < end, f"never: {expression}\n{self.value('document.body.innerText')}"
            time.sleep(0.02)
        return found

    def point(self, selector: str, *places: tuple[float, float]) -> None:
        """Press at the middle of an element, or at parts of its sides, and release at the last."""
        self.value(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        x, y, w, h = self.value(
            f"(() => {{ const b = document.querySelector({selector!r}).getBoundingClientRect();"
            "return [b.left, b.top, b.width, b.height] })()"
        )
        for i, (part, other) in enumerate(places or [(0.5, 0.5)]):
            at = {"x": x + part * w, "y": y + other * h, "button": "left", "clickCount": 1}
            self.browser(
                "Input.dispatchMouseEvent", type="mouseMoved" if i else "mousePressed", buttons=1, **at
            )
        self.browser("Input.dispatchMouseEvent", type="mouseReleased", buttons=0, **at)

    def press(self, *keys: str, ctrl: bool = False) -> None:
        codes = {"Tab": 9, "Enter": 13, "Space": 32, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39,
                 "ArrowDown": 40, "Escape": 27}  # fmt: skip
        for key in keys:
            name = " " if key == "Space" else key
            event = {"key": name, "code": key, "windowsVirtualKeyCode": codes[key], "modifiers": 2 * ctrl}
            text = {"Space": " ", "Enter": "\r"}.get(key)
            self.browser("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **event,
                         **({"text": text} if text else {}))  # fmt: skip
            self.browser("Input.dispatchKeyEvent", type="keyUp", **event)

    def focus(self, selector: str) -> None:
        self.value(f"document.querySelector({selector!r}).focus()")

    def fill(self, selector: str, text: str) -> None:
        """Type a text in place of what stands in a field."""
        self.focus(selector)
        self.value(f"document.querySelector({selector!r}).select?.()")
        self.browser("Input.insertText", text=text)

    def choose_file(self, selector: str, file: Path) -> None:
        root = self.browser("DOM.getDocument")["root"]["nodeId"]
        node = self.browser("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.browser("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def faults(self, address: str) -> list[Any]:
        """Errors of the console, and requests that left the page's server."""
        found = []
        for event in self.browser.events:
            kind, params = event.get("method"), event.get("params", {})
            if kind in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
                found.append(params)
            if kind == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith((address, "data:", "blob:", "about:")):
                    found.append(url)
        return found


@contextmanager
def tab_on(address: str, profile: Path) -> Iterator[Tab]:
    if BROWSER is None:
        pytest.skip("neither chromium nor google-chrome is on PATH")
    browser = Browser(profile)
    try:
        yield Tab(browser, address)
    finally:
        browser.process.kill()
        browser.process.wait()
