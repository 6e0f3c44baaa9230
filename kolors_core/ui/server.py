"""Server of the page: files of the page, images of its folder, and jobs, as JSON over HTTP.

For one person on one machine: it listens on this machine alone unless another address was named, and then
only with the token. A page of another site can neither read it nor give it jobs: the host that is asked for,
the origin and the kind of content are checked. Nothing here asks for anything elsewhere.
"""

import hmac
import json
import secrets
import socket
import sys
from collections.abc import Callable, Mapping
from functools import partial
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from kolors_core.ui.gallery import MOST_BYTES
from kolors_core.ui.jobs import Job, Queue
from kolors_core.ui.sheet import axes_of
from kolors_core.ui.studio import Studio
from kolors_core.validation import check_float

PAGE = Path(__file__).parent / "page"
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".png": "image/png"}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_JSON = 2**20
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}  # fmt: skip


class PageServer(ThreadingHTTPServer):
    """HTTP server of one studio. token: asked for once, in the address, and then in a cookie; None: never."""

    daemon_threads = True

    def __init__(self, host: str, port: int, token: str | None) -> None:
        """Raises OSError naming the address if it is in use. studio: set before `serve_forever`."""
        self.token, self.queue = token, Queue()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.studio: Studio
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            self.queue.close()
            raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from None
        self.hosts = {*LOOPBACK} if host in LOOPBACK else None  # None: any, with the token
        # Browsers send a host's cookies to all of its ports, where another page may be.
        self.cookie = f"kolors_{self.server_port}"

    def server_bind(self) -> None:
        """Bind, without asking a name server for the name of this machine."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = (str(self.server_address[0]), int(self.server_address[1]))

    @property
    def address(self) -> str:
        """The address of the page, with its token."""
        host = str(self.server_address[0])
        name = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        return f"http://{name}:{self.server_port}/" + (f"?token={self.token}" if self.token else "")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print a fault, unless the browser has gone."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        """End the job that runs, and stop listening."""
        self.queue.close()
        super().server_close()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: PageServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds without a byte, after which a connection is closed
    server_version = "kolors_core"

    def log_message(self, format: str, *args: Any) -> None:
        """Write no line a request: what matters is on the page."""

    def do_GET(self) -> None:
        """Answer with a file, an image, the state of a job, or what the page can ask for."""
        self._answer({
            "/api/about": lambda _: self.server.studio.about(),
            "/api/images": self._list, "/api/job": self._wait,
        })  # fmt: skip

    def do_POST(self) -> None:
        """Take a job or an image, or cancel a job."""
        self._answer({
            "/api/draw": self._draw, "/api/compare": self._compare, "/api/explain": self._explain,
            "/api/features": self._features, "/api/edges": self._edges, "/api/cancel": self._cancel,
            "/api/bring": self._bring,
        })  # fmt: skip

    def _answer(self, routes: Mapping[str, Callable[[Mapping[str, str]], Any]]) -> None:
        try:
            url = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(url.query).items()}
            if (refusal := self._refusal(query)) is not None:
                return self._send_json({"error": refusal}, HTTPStatus.FORBIDDEN)
            if url.path in routes:
                return self._send_json(routes[url.path](query))
            if self.command == "GET" and (file := self._file(url.path)) is not None:
                return self._send(file.read_bytes(), KINDS[file.suffix])
            self._send_json({"error": "there is no such page"}, HTTPStatus.NOT_FOUND)
        except KeyError:
            self._send_json(
                {"error": "there is no such job: the page was started anew"}, HTTPStatus.NOT_FOUND
            )
        except (ValueError, TypeError, OSError) as error:
            if isinstance(error, ConnectionError | TimeoutError):  # the browser has gone
                raise
            self._send_json({"error": str(error)}, HTTPStatus.BAD_REQUEST)

    def _refusal(self, query: Mapping[str, str]) -> str | None:
        """Say why a request is refused: of another host or site, or without the token."""
        given_host = self.headers.get("Host", "")
        host = urlsplit(f"//{given_host}").hostname
        if self.server.hosts is not None and host not in self.server.hosts:
            return f"this page is at {self.server.address} alone"
        origin = self.headers.get("Origin")
        if (
            self.command == "POST"
            and origin is not None
            and urlsplit(origin).netloc != self.headers.get("Host")
        ):
            return "requests of other sites are refused"
        if self.server.token is None:
            return None
        try:
            kept = SimpleCookie(self.headers.get("Cookie", "")).get(self.server.cookie)
        except CookieError:
            kept = None
        given = query.get("token") or (kept.value if kept else "")
        if hmac.compare_digest(given.encode(), self.server.token.encode()):
            return None
        return "open this page by the address with its token, which the command has printed"

    def _file(self, path: str) -> Path | None:
        if path.startswith("/images/"):
            return self.server.studio.gallery.find(unquote(path.removeprefix("/images/")))
        name = "index.html" if path == "/" else path.removeprefix("/")
        return next((file for file in PAGE.iterdir() if file.name == name and file.suffix in KINDS), None)

    def _body(self, most: int, kind: str) -> bytes:
        size = self.headers.get("Content-Length", "")[:20]
        if not (size.isascii() and size.isdecimal()) or int(size) > most:
            raise ValueError(f"expected at most {most:,} bytes, got {size or 'no length'}")
        content = self.rfile.read(int(size))
        if not self.headers.get("Content-Type", "").startswith(kind):
            raise ValueError(f"expected {kind}, got {self.headers.get('Content-Type')}")
        return content

    def _json(self) -> dict[str, Any]:
        try:
            body = json.loads(self._body(MOST_JSON, "application/json"))
        except (UnicodeDecodeError, RecursionError, json.JSONDecodeError):
            raise ValueError("expected JSON") from None
        if not isinstance(body, dict):
            raise ValueError(f"expected an object, got {type(body).__name__}")
        return body

    def _request(self, body: Mapping[str, Any]) -> dict[str, Any]:
        request = body.get("request")
        if not isinstance(request, dict):
            raise ValueError("expected a request")
        return request

    def _add(
        self, kind: str, request: Mapping[str, Any], work: Callable[[Job], Mapping[str, Any]]
    ) -> dict[str, str]:
        self.server.studio.check(request)
        title = str(request.get("prompt") or request.get("from") or kind)
        return {"id": self.server.queue.add(title[:200], work).id}

    def _draw(self, _: Mapping[str, str]) -> dict[str, str]:
        request = self._request(self._json())
        return self._add("draw", request, partial(self.server.studio.draw, request))

    def _compare(self, _: Mapping[str, str]) -> dict[str, str]:
        body = self._json()
        request, axes = self._request(body), axes_of(body.get("axes"))
        return self._add("compare", request, partial(self.server.studio.compare, request, axes))

    def _explain(self, _: Mapping[str, str]) -> dict[str, str]:
        request = self._request(self._json())
        return self._add("explain", request, partial(self.server.studio.explain, request))

    def _features(self, _: Mapping[str, str]) -> dict[str, str]:
        body = self._json()
        request, layer, step = self._request(body), str(body.get("layer")), body.get("step")
        if not isinstance(step, int):
            raise ValueError(f"the step must be a whole number, got {str(step)[:100]!r}")
        return self._add("features", request, partial(self.server.studio.features, request, layer, step))

    def _edges(self, _: Mapping[str, str]) -> dict[str, Any]:
        body = self._json()
        low, high = (check_float(name, body.get(name), least=0) for name in ("low", "high"))
        return self.server.studio.edges(str(body.get("image")), low, high)

    def _cancel(self, _: Mapping[str, str]) -> dict[str, Any]:
        self.server.queue.cancel(str(self._json().get("id")))
        return {}

    def _bring(self, _: Mapping[str, str]) -> dict[str, Any]:
        return self.server.studio.gallery.bring(self._body(MOST_BYTES, "image/"))

    def _list(self, query: Mapping[str, str]) -> dict[str, Any]:
        start = query.get("start", "0")
        if not start.isdigit():
            raise ValueError(f"start must be a whole number, got {start[:100]!r}")
        return self.server.studio.gallery.list(int(start))

    def _wait(self, query: Mapping[str, str]) -> dict[str, Any]:
        seen = query.get("version", "")
        version, job = self.server.queue.wait(query["id"], int(seen) if seen.isdigit() else -1)
        return {"version": version, "job": job}

    def _send_json(self, content: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(content).encode(), "application/json", status)

    def _send(self, content: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        if status != HTTPStatus.OK:  # what was not read of a refused request would be read as the next one
            self.send_header("Connection", "close")
        kind += "; charset=utf-8" if kind.startswith("text/") or kind == "application/json" else ""
        headers = {"Content-Type": kind, "Content-Length": str(len(content))}
        if self.server.token is not None and status == HTTPStatus.OK and kind.startswith("text/html"):
            cookie = f"{self.server.cookie}={self.server.token}"
            headers["Set-Cookie"] = f"{cookie}; HttpOnly; SameSite=Strict; Path=/"
        for name, value in (headers | HEADERS).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def chosen_token(host: str, token: str | None) -> str | None:
    """Return the token of a page: the given one, a random one for other machines, none for this one alone."""
    if token is None:
        return None if host in LOOPBACK else secrets.token_urlsafe(16)
    if not (token.isascii() and token.replace("-", "").replace("_", "").isalnum()):
        raise ValueError("--token must be of letters, digits, - and _")
    return token
