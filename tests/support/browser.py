"""Chromium for tests of a page: started without a window, controlled by its DevTools protocol."""

import json
import os
import shutil
import subprocess
from fcntl import F_DUPFD, fcntl
from pathlib import Path
from select import select
from typing import Any

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
# No window, no GPU, no sandbox (root has none), and no traffic of the browser's own.
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


class Browser:
    """Chromium without a window; a call sends a DevTools command through one pipe and reads its reply."""

    def __init__(self, place: Path) -> None:
        (theirs, self.out), (self.into, ours) = os.pipe(), os.pipe()
        theirs, ours = fcntl(theirs, F_DUPFD, 10), fcntl(ours, F_DUPFD, 10)
        self.process = subprocess.Popen(
            [str(BROWSER), *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={place}"],
            pass_fds=(3, 4), preexec_fn=lambda: (os.dup2(theirs, 3), os.dup2(ours, 4)),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.events, self.sent, self.read = list[dict[str, Any]](), 0, b""
        self.session: dict[str, str] = {}

    def message(self) -> dict[str, Any]:
        while b"\0" not in self.read:
            assert select([self.into], [], [], 30)[0], "the browser says nothing"
            self.read += (more := os.read(self.into, 2**16))
            assert more, "the browser has gone"
        content, _, self.read = self.read.partition(b"\0")
        return json.loads(content)

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        self.sent += 1
        order = {"id": self.sent, "method": method, "params": params} | self.session
        os.write(self.out, json.dumps(order).encode() + b"\0")
        while (reply := self.message()).get("id") != self.sent:
            self.events.append(reply)
        assert "error" not in reply, reply
        return reply["result"]

    def value(self, expression: str) -> Any:
        reply = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")
