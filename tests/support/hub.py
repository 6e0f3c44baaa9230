"""A small hub on this machine: repositories by name and revision, and a note of every request."""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


class Request(NamedTuple):
    method: str
    path: str
    token: str | None


class Hub(ThreadingHTTPServer):
    """Repositories, by name and revision, behind what loads and uploads ask of a hub; requests are noted."""

    def __init__(self, repositories: dict[str, dict[str, Files]]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories, self.seen = repositories, list[Request]()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self, repo: str, revision: str = "main") -> list[str]:
        """The files of a revision whose content was asked for."""
        start = f"/{repo}/resolve/{commit(repo, revision)}/"
        asked = [path for method, path, _ in self.seen if method == "GET" and path.startswith(start)]
        return [path.removeprefix(start) for path in asked]


class Answer(BaseHTTPRequestHandler):
    """Source: the paths and headers that huggingface_hub 2.4.0 reads in hf_api.py and file_download.py."""

    server: Hub
    protocol_version = "HTTP/1.1"
    api = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/(?P<view>tree|revision)/(?P<revision>[^/]+))?")
    file = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")

    def do_GET(self) -> None:
        url = urlsplit(self.path).path
        self.server.seen.append(Request(self.command, unquote(url), self.headers["Authorization"]))
        match = self.api.fullmatch(url) or self.file.fullmatch(url)
        repo = match["repo"] if match else ""
        if match is None or repo not in self.server.repositories:
            return self.refuse("RepoNotFound", "Repository not found")
        revisions = {name: name for name in self.server.repositories[repo]}
        revisions |= {commit(repo, name): name for name in revisions}
        revision = revisions.get(unquote(match["revision"] or "main"))
        if revision is None:
            return self.refuse("RevisionNotFound", "Invalid rev id")
        files, sha = self.server.repositories[repo][revision], commit(repo, revision)
        if match.re is self.file:
            content = files.get(unquote(match["path"]))
            if content is None:
                return self.refuse("EntryNotFound", "Entry not found")
            return self.send(200, content, {"ETag": f'"{git_hash(content)}"', "X-Repo-Commit": sha})
        if match["view"] == "tree":
            folders = sorted({path.rpartition("/")[0] for path in files} - {""})
            entries = [{"type": "directory", "path": path, "oid": commit(repo, path)} for path in folders]
            entries += [
                {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
                for path, content in files.items()
            ]
            return self.send(200, json.dumps(entries).encode())
        info = {"id": repo, "sha": sha, "siblings": [{"rfilename": path} for path in files]}
        return self.send(200, json.dumps(info).encode())

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Create a repository, or add a commit, whose files are all sent with it."""
        url, token = unquote(urlsplit(self.path).path), self.headers["Authorization"]
        self.server.seen.append(Request(self.command, url, token))
        lines = self.body().splitlines()
        if token is None:
            return self.send(401, b"{}", {"X-Error-Message": "Invalid username or password."})
        if url == "/api/repos/create":
            made = json.loads(lines[0])
            repo = f"{made.get('organization') or 'someone'}/{made['name']}"
            self.server.repositories.setdefault(repo, {"main": {}})
            return self.send(200, json.dumps({"url": f"{self.server.endpoint}/{repo}"}).encode())
        repo, view, revision = url.removeprefix("/api/models/").rsplit("/", 2)
        if view == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(lines[0])["files"]]  # fmt: skip
            return self.send(200, json.dumps({"files": files}).encode())
        items = [item["value"] for item in map(json.loads, lines) if item["key"] == "file"]
        sent = {item["path"]: base64.b64decode(item["content"]) for item in items}
        self.server.repositories[repo][revision] |= sent
        oid = commit(repo, revision)
        address = f"{self.server.endpoint}/{repo}/commit/{oid}"
        self.send(200, json.dumps({"success": True, "commitOid": oid, "commitUrl": address}).encode())

    def body(self) -> bytes:
        """What was sent, at once or in chunks."""
        if (length := self.headers["Content-Length"]) is not None:
            return self.rfile.read(int(length))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def refuse(self, code: str, message: str) -> None:
        self.send(404, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


def commit(repo: str, revision: str) -> str:
    return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving(repositories: dict[str, dict[str, Files]]) -> Iterator[Hub]:
    with Hub(repositories) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def environment(endpoint: str, home: Path, **settings: str) -> dict[str, str]:
    """For a process that knows this hub and cache only."""
    own = {
        name: value for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) and not name.lower().endswith("_proxy")
    }  # fmt: skip
    return own | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **settings}


def files_of(folder: Path) -> Files:
    """A folder as a repository."""
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
