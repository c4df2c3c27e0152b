"""A local stand-in for the Hugging Face Hub: serves folders as model and dataset repositories over HTTP."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote

LFS_SUFFIXES = {".safetensors", ".bin", ".parquet", ".arrow", ".gz", ".zip", ".model"}
DATE = "2024-01-01T00:00:00.000Z"


class Repo:
    """A folder as one repository with the single branch `main`; the folder must not change afterwards."""

    def __init__(self, key: str, folder: Path) -> None:
        self.id = key.partition("/")[2]
        self.lines: dict[str, dict[str, Any]] = {}  # every file and folder, as in the Hub's tree listing
        self.files: dict[str, Path] = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_dir():
                oid = hashlib.sha1(f"tree {name}".encode()).hexdigest()
                self.lines[name] = {"type": "directory", "oid": oid, "size": 0, "path": name}
                continue
            blob = path.read_bytes()
            line: dict[str, Any] = {"type": "file", "size": len(blob), "path": name}
            if path.suffix in LFS_SUFFIXES:  # what git holds of a large file is a pointer to it
                digest, size = hashlib.sha256(blob).hexdigest(), len(blob)
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n"
                blob = pointer.encode()
                line["lfs"] = {"oid": digest, "size": size, "pointerSize": len(blob)}
            line["oid"] = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
            self.lines[name], self.files[name] = line, path
        content = "".join(f"{line['oid']} {name}\n" for name, line in self.lines.items())
        self.sha = hashlib.sha1(f"commit {key}\n{content}".encode()).hexdigest()

    def info(self, blobs: bool, expand: list[str]) -> dict[str, Any]:
        """Answer of `/api/models/ID` and `/api/datasets/ID`, with or without `/revision/REV`."""
        siblings: list[dict[str, Any]] = [{"rfilename": name} for name in self.files]
        for sibling in siblings if blobs else ():
            line = self.lines[sibling["rfilename"]]
            sibling |= {"size": line["size"], "blobId": line["oid"]}
            if lfs := line.get("lfs"):
                sibling["lfs"] = {**lfs, "sha256": lfs["oid"]}
        data: dict[str, Any] = {"_id": self.sha[:24], "id": self.id, "sha": self.sha}
        data |= {"author": self.id.partition("/")[0], "private": False, "gated": False, "disabled": False}
        data |= {"tags": [], "likes": 0, "downloads": 0}
        data |= {"lastModified": DATE, "createdAt": DATE, "siblings": siblings}
        return {k: v for k, v in data.items() if k in ("_id", "id", *expand)} if expand else data

    def tree(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """The entries of `folder` ("." for the root) or below it; of a file, the file itself."""
        if folder in self.files:
            return [self.lines[folder]]
        at = PurePosixPath(folder)
        paths = {name: PurePosixPath(name) for name in self.lines}
        below = (n for n, p in paths.items() if (at in p.parents if recursive else at == p.parent))
        return [self.lines[name] for name in below]


def reply(
    handler: BaseHTTPRequestHandler, status: int, body: object = b"", headers: Mapping[str, str] | None = None
) -> None:
    """Send a whole answer (bytes as they are, anything else as JSON); for fault hooks too."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = "application/octet-stream" if isinstance(body, bytes) else "application/json; charset=utf-8"
    handler.send_response(status)
    for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(data)


def fail(handler: BaseHTTPRequestHandler, status: int, code: str, message: str, commit: str = "") -> None:
    """Send an error as the Hub does; `code` is RepoNotFound, GatedRepo... or "" for none."""
    headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
    reply(handler, status, {"error": message}, {k: v for k, v in headers.items() if v})


class _Handler(BaseHTTPRequestHandler):
    # HTTP/1.0, the default here, closes every connection after its answer: none outlives the hub.
    server: _Server

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        hub = self.server.hub
        hub.requests.append(f"{self.command} {path}")
        if hub.fault is not None and hub.fault(self):
            return
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if path == "/":
            reply(self, 200)
        elif parts[0] == "api" and len(parts) > 2 and parts[1] in ("models", "datasets"):
            key = "/".join(parts[1:4])
            if self._known(key, parts[5] if len(parts) > 5 else "main"):
                self._api(hub.repos[key], parts[4:], parse_qs(query), body)
        elif "resolve" in parts[1:-2]:
            at = parts.index("resolve")
            key = "/".join(parts[:at] if parts[0] == "datasets" else ["models", *parts[:at]])
            if self._known(key, parts[at + 1]):
                self._file(hub.repos[key], "/".join(parts[at + 2 :]))
        else:
            fail(self, 404, "", "Not found")

    do_HEAD = do_POST = do_GET

    def _known(self, key: str, revision: str) -> bool:
        repo = self.server.hub.repos.get(key)
        if repo is None:
            fail(self, 404, "RepoNotFound", "Repository not found")
        elif revision not in ("main", "refs/heads/main", repo.sha):
            fail(self, 404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return True
        return False

    def _api(self, repo: Repo, rest: list[str], query: dict[str, list[str]], body: bytes) -> None:
        what = rest[0] if rest else "revision"
        if what == "revision":
            reply(self, 200, repo.info("blobs" in query, query.get("expand", [])))
        elif what == "tree":
            folder = "/".join(rest[2:]) or "."
            lines = repo.tree(folder, query.get("recursive") == ["true"])
            if lines or folder == ".":
                reply(self, 200, lines)
            else:
                fail(self, 404, "EntryNotFound", f"{folder} does not exist on the revision", repo.sha)
        elif what == "paths-info":
            is_json = "json" in (self.headers.get("Content-Type") or "")
            names = (json.loads(body) if is_json else parse_qs(body.decode())).get("paths", [])
            reply(self, 200, [repo.lines[name] for name in names if name in repo.lines])
        elif what == "refs":
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.sha}
            reply(self, 200, {"branches": [branch], "converts": [], "tags": [], "pullRequests": []})
        else:
            fail(self, 404, "", "Not found")

    def _file(self, repo: Repo, name: str) -> None:
        if name not in repo.files:
            return fail(self, 404, "EntryNotFound", "Entry not found", repo.sha)
        line = repo.lines[name]
        etag, size = f'"{line.get("lfs", line)["oid"]}"', line["size"]
        headers = {"X-Repo-Commit": repo.sha, "ETag": etag, "Accept-Ranges": "bytes"}
        if "lfs" in line:
            headers |= {"X-Linked-ETag": etag, "X-Linked-Size": str(size)}
        start, end, status = 0, size, 200
        unit, _, span = (self.headers.get("Range") or "").partition("=")
        if unit == "bytes":
            first, _, last = span.partition("-")
            start = int(first) if first else max(size - int(last), 0)
            end = min(int(last) + 1, size) if first and last else size
            if start >= end:
                return reply(self, 416, b"", {**headers, "Content-Range": f"bytes */{size}"})
            status, headers["Content-Range"] = 206, f"bytes {start}-{end - 1}/{size}"
        reply(self, status, repo.files[name].read_bytes()[start:end], headers)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep stderr quiet: `Hub.requests` has the log."""


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # the default of 5 delays a client that downloads with many threads
    hub: Hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report what went wrong, unless it is only a client that hung up."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Hub:
    """Context manager: serves `repos`, e.g. {"models/distilbert/distilgpt2": folder}, while it is open."""

    def __init__(self, repos: Mapping[str, Path]) -> None:
        self.repos = {key: Repo(key, folder) for key, folder in repos.items()}
        self.requests: list[str] = []  # "GET /path" without the query, in order of arrival
        self.fault: Callable[[BaseHTTPRequestHandler], bool] | None = None  # True: it has answered itself
        self.closed = threading.Event()  # set at the end; a fault that hangs: lambda _: hub.closed.wait(60)
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def env(self, home: Path) -> dict[str, str]:
        """The environment of a subprocess that knows this hub only and keeps its caches under `home`."""
        drop = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE", "TRANSFORMERS_CACHE")
        env = {k: v for k, v in os.environ.items() if not k.startswith(drop) and "_PROXY" not in k.upper()}
        env |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home / "huggingface")}
        return env | {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost"}
