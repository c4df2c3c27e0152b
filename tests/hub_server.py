"""Local server with the API of the Hugging Face Hub: serves folders as repos over HTTP and accepts commits."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote

LFS_SUFFIXES = {".safetensors", ".bin", ".parquet", ".arrow", ".gz", ".zip", ".model"}
DATE = "2024-01-01T00:00:00.000Z"


class Repo:
    """One commit of a repository with the single branch `main`: a folder that must not change."""

    def __init__(self, key: str, folder: Path, private: bool = False) -> None:
        self.id, self.private = key.partition("/")[2], private
        self.lines: dict[str, dict[str, Any]] = {}  # files and folders, as in the Hub's tree listing
        self.files: dict[str, Path] = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_dir():
                oid = hashlib.sha1(f"tree {name}".encode()).hexdigest()
                self.lines[name] = {"type": "directory", "oid": oid, "size": 0, "path": name}
                continue
            blob = path.read_bytes()
            line: dict[str, Any] = {"type": "file", "size": len(blob), "path": name}
            if path.suffix in LFS_SUFFIXES:  # git stores a pointer to a large file
                digest, size = hashlib.sha256(blob).hexdigest(), len(blob)
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n"
                blob = pointer.encode()
                line["lfs"] = {"oid": digest, "size": size, "pointerSize": len(blob)}
            line["oid"] = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
            self.lines[name], self.files[name] = line, path
        content = "".join(f"{line['oid']} {name}\n" for name, line in self.lines.items())
        self.sha = hashlib.sha1(f"commit {key}\n{content}".encode()).hexdigest()

    def info(self, blobs: bool, expand: list[str]) -> dict[str, Any]:
        """Build the response of `/api/models/ID` and `/api/datasets/ID`, with or without `/revision/REV`."""
        siblings: list[dict[str, Any]] = [{"rfilename": name} for name in self.files]
        for sibling in siblings if blobs else ():
            line = self.lines[sibling["rfilename"]]
            sibling |= {"size": line["size"], "blobId": line["oid"]}
            if lfs := line.get("lfs"):
                sibling["lfs"] = {**lfs, "sha256": lfs["oid"]}
        data: dict[str, Any] = {"_id": self.sha[:24], "id": self.id, "sha": self.sha}
        data |= {"author": self.id.partition("/")[0], "private": self.private, "gated": False, "disabled": False}
        data |= {"tags": [], "likes": 0, "downloads": 0}
        data |= {"lastModified": DATE, "createdAt": DATE, "siblings": siblings}
        return {k: v for k, v in data.items() if k in ("_id", "id", *expand)} if expand else data

    def tree(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """List the entries in or below `folder` ("." for the root); for a file, the file itself."""
        if folder in self.files:
            return [self.lines[folder]]
        at = PurePosixPath(folder)
        paths = {name: PurePosixPath(name) for name in self.lines}
        below = (n for n, p in paths.items() if (at in p.parents if recursive else at == p.parent))
        return [self.lines[name] for name in below]


def reply(
    handler: BaseHTTPRequestHandler, status: int, body: object = b"", headers: Mapping[str, str] | None = None
) -> None:
    """Send a complete response: bytes unchanged, anything else as JSON."""
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
    # HTTP/1.0, the default, closes each connection after the response, so none outlives the hub.
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
        elif path == "/api/validate-yaml":
            reply(self, 200, {"errors": [], "warnings": []})
        elif path == "/api/whoami-v2":
            self._who()
        elif path.endswith("/auth-check/write"):
            if self._may_write():
                reply(self, 200, {})
        elif path == "/api/repos/create":
            if self._may_write():
                self._create(json.loads(body))
        elif parts[0] == "api" and len(parts) > 2 and parts[1] in ("models", "datasets"):
            key = "/".join(parts[1:4])
            if (repo := self._find_repo(key, parts[5] if len(parts) > 5 else "main")) is None:
                return
            if parts[4:5] not in (["preupload"], ["commit"]):
                self._api(repo, parts[4:], parse_qs(query), body)
            elif self._may_write():
                self._preupload(repo, json.loads(body)) if parts[4] == "preupload" else self._commit(key, body)
        elif path.endswith(".git/info/lfs/objects/batch"):
            if self._may_write():
                self._batch(json.loads(body))
        elif parts[0] == "lfs" and self.command == "PUT":
            hub.blobs[hashlib.sha256(body).hexdigest()] = body
            reply(self, 200)
        elif "resolve" in parts[1:-2]:
            at = parts.index("resolve")
            key = "/".join(parts[:at] if parts[0] == "datasets" else ["models", *parts[:at]])
            if repo := self._find_repo(key, parts[at + 1]):
                self._file(repo, "/".join(parts[at + 2 :]))
        else:
            fail(self, 404, "", "Not found")

    do_HEAD = do_POST = do_PUT = do_GET

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _find_repo(self, key: str, revision: str) -> Repo | None:
        """Return the repository at a revision; if it is missing, send the error and return None."""
        hub = self.server.hub
        repo, last = None, hub.repos.get(key)
        if last is None or (last.private and not self._token()):
            fail(self, 404, "RepoNotFound", "Repository not found")
        elif (
            repo := last if revision in ("main", "refs/heads/main") else hub.commits.get((key, revision))
        ) is None:
            fail(self, 404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo

    def _may_write(self) -> bool:
        """Return True if the token allows writing; otherwise send the error."""
        token = self._token()
        if not token:
            fail(self, 401, "", "Invalid username or password.")
        elif token == "read-only":
            fail(self, 403, "", "You don't have the rights to write here")
        return token not in ("", "read-only")

    def _who(self) -> None:
        """Describe the account `user`, a member of `owner`; the token `fine-NAME` may write for NAME alone."""
        token = self._token()
        if not token:
            return fail(self, 401, "", "Invalid username or password.")
        role = {"read-only": "read"}.get(token, "fineGrained" if token.startswith("fine-") else "write")
        scope = {"entity": {"type": "org", "name": token.removeprefix("fine-")}, "permissions": ["repo.write"]}
        access = {"displayName": "laptop", "role": role, "fineGrained": {"scoped": [scope]}}
        orgs = [{"type": "org", "name": "owner", "roleInOrg": "write"}]
        orgs.append({"type": "org", "name": "museum", "roleInOrg": "read"})
        reply(self, 200, {"type": "user", "name": "user", "orgs": orgs, "auth": {"accessToken": access}})

    def _create(self, request: dict[str, Any]) -> None:
        hub = self.server.hub
        name = f"{request.get('organization') or 'user'}/{request['name']}"
        exists = f"models/{name}" in hub.repos
        if not exists:
            hub.commit(
                f"models/{name}", {}, request.get("visibility") == "private" or request.get("private") is True
            )
        answer = {"url": f"{hub.url}/{name}", "name": name}
        if exists:
            answer["error"] = "You already created this model repo"
        reply(self, 409 if exists else 200, answer)

    def _preupload(self, repo: Repo, request: dict[str, Any]) -> None:
        files = []
        for name in (file["path"] for file in request["files"]):
            mode = "lfs" if PurePosixPath(name).suffix in LFS_SUFFIXES else "regular"
            line = repo.lines.get(name, {})
            oid = line.get("lfs", line).get("oid")
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        reply(self, 200, {"files": files})

    def _batch(self, request: dict[str, Any]) -> None:
        """Send upload URLs for the large files that are missing here."""
        hub = self.server.hub
        objects = [{"oid": blob["oid"], "size": blob["size"]} for blob in request["objects"]]
        for blob in objects:
            if blob["oid"] not in hub.blobs:
                blob["actions"] = {"upload": {"href": f"{hub.url}/lfs/{blob['oid']}"}}
        reply(self, 200, {"transfer": "basic", "objects": objects})

    def _commit(self, key: str, body: bytes) -> None:
        hub = self.server.hub
        new: dict[str, bytes | None] = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in hub.blobs:
                    return fail(self, 400, "", f"{value['path']} was not uploaded")
                new[value["path"]] = hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                new[value["path"]] = None
            elif line["key"] != "header":
                return fail(self, 400, "", f"{line['key']} is not understood here")
        repo = hub.commit(key, new)
        url = f"{hub.url}/{repo.id}/commit/{repo.sha}"
        reply(self, 200, {"success": True, "commitOid": repo.sha, "commitUrl": url, "hookOutput": ""})

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
        """Report errors, unless a client has closed the connection."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Hub:
    """Context manager that serves `repos`, such as {"models/distilbert/distilgpt2": folder}.

    Writing needs any token but `read-only`, and a client without hf_xet, as `env` makes it.
    """

    def __init__(self, repos: Mapping[str, Path]) -> None:
        self.repos = {key: Repo(key, folder) for key, folder in repos.items()}  # as of their last commits
        self.commits = {(key, repo.sha): repo for key, repo in self.repos.items()}
        self.blobs: dict[str, bytes] = {}  # large files by sha256, uploaded but perhaps not committed
        self._place = tempfile.TemporaryDirectory()
        self.requests: list[str] = []  # "GET /path" without the query, in order of arrival
        self.fault: Callable[[BaseHTTPRequestHandler], bool] | None = (
            None  # returns True if it has sent a response
        )
        self.closed = threading.Event()  # set at the end; hang with: lambda _: hub.closed.wait(60)
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
        self._place.cleanup()

    def commit(self, key: str, new: Mapping[str, bytes | None], private: bool = False) -> Repo:
        """Add, replace or (None) delete files of a repository, which is created if it is missing."""
        if last := self.repos.get(key):
            new, private = (
                {name: path.read_bytes() for name, path in last.files.items()} | dict(new),
                last.private,
            )
        folder = Path(tempfile.mkdtemp(dir=self._place.name))
        for name, blob in new.items():
            if blob is None:
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(blob)
        repo = self.repos[key] = Repo(key, folder, private)
        self.commits[key, repo.sha] = repo
        return repo

    def env(self, home: Path) -> dict[str, str]:
        """Build the environment of a subprocess that uses only this hub, with its caches under `home`."""
        drop = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE", "TRANSFORMERS_CACHE")
        env = {k: v for k, v in os.environ.items() if not k.startswith(drop) and "_PROXY" not in k.upper()}
        env |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home / "huggingface")}
        return env | {
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    @contextlib.contextmanager
    def for_this_process(self, home: Path, monkeypatch: Any) -> Iterator[None]:
        """Let this process use only this hub, with its caches under `home`; undone by `monkeypatch`."""
        from huggingface_hub import constants

        from lora_tuner import hub

        settings = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        hub.why_unreachable.cache_clear()
        yield
        hub.why_unreachable.cache_clear()
