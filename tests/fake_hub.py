"""The part of the Hugging Face hub's HTTP interface that uploads and downloads need, on this machine, for its client.

Repositories live in memory. Files of at least LFS_BYTES, and all safetensors, go by LFS, others within the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_test"
LFS_BYTES = 10_000_000


@dataclass
class Repo:
    """`commits`: oid → files, the first one empty; the last is main."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    history: list[str] = field(default_factory=list)  # what was done to it, in order

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]


class FakeHub:
    """A server on a free port; `url` is its endpoint. `damage`: name of a file of which downloads lack the last byte's
    truth."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.damage: str | None = None
        self.refuse_commits = self.refuse_files = False
        self.requests: list[str] = []
        hub = self

        class Handler(_Handler):
            fake = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class _Handler(BaseHTTPRequestHandler):
    fake: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        path = self.path.partition("?")[0]
        self.body = self._read()
        self.fake.requests.append(f"{method} {path}")
        parts = path.strip("/").split("/")
        match parts:
            case ["lfs", oid]:
                good = hashlib.sha256(self.body).hexdigest() == oid and not self.fake.refuse_files
                self.fake.blobs[oid] = self.body
                self._answer(200 if good else 400, {})
            case ["api", "validate-yaml"]:
                good = "license:" in json.loads(self.body)["content"]
                self._answer(
                    200 if good else 400, {"errors": [] if good else [{"message": "no license"}], "warnings": []}
                )
            case ["api", "repos", "create"]:
                self._create(json.loads(self.body))
            case ["api", "models", user, name, *rest]:
                self._of_repo(f"{user}/{name}", rest)
            case [user, name, "info", "lfs", "objects", "batch"]:
                self._batch(json.loads(self.body))
            case [user, name, "resolve", revision, *file]:
                self._download(method, f"{user}/{name}", revision, "/".join(file))
            case _:
                self._answer(404, {"error": f"{method} {path}"})

    def _read(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _create(self, content: dict[str, Any]) -> None:
        repo = f"{content['organization'] or 'me'}/{content['name']}"
        if not self._authorized():
            self._answer(401, {"error": "Invalid username or password."})
        elif repo in self.fake.repos:
            self._answer(409, {"error": "You already created this model repo", "url": f"{self.fake.url}/{repo}"})
        else:
            private = content.get("visibility") == "private" or content.get("private") is True
            self.fake.repos[repo] = Repo(private, history=["created private" if private else "created public"])
            self._answer(200, {"url": f"{self.fake.url}/{repo}", "name": repo, "id": repo})

    def _of_repo(self, repo: str, rest: list[str]) -> None:
        found = self._repo(repo)
        if found is None:
            return
        match rest:
            case [] | ["revision", _]:
                siblings = [{"rfilename": name} for name in found.files]
                about = {"id": repo, "sha": found.head, "private": found.private, "siblings": siblings}
                self._answer(200, about | {"tags": [], "downloads": 0, "likes": 0})
            case ["tree", revision]:
                files = found.files if revision == "main" else found.commits[revision]
                self._answer(200, [_entry(name, data) for name, data in files.items()])
            case ["preupload", _]:
                files = json.loads(self.body)["files"]
                modes = [{"path": f["path"], "uploadMode": _mode(f["path"], f["size"])} for f in files]
                self._answer(200, {"files": [mode | {"shouldIgnore": False, "oid": None} for mode in modes]})
            case ["commit", "main"]:
                self._commit(repo, found)
            case ["settings"]:
                content = json.loads(self.body)
                found.private = (
                    content.get("visibility", "private" if content.get("private") else "public") == "private"
                )
                found.history.append("made private" if found.private else "made public")
                self._answer(200, content)
            case _:
                self._answer(404, {"error": self.path})

    def _commit(self, repo: str, found: Repo) -> None:
        if self.fake.refuse_commits:
            self._answer(403, {"error": "You are over your storage"})
            return
        files = dict(found.files)
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.fake.blobs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(self.body).hexdigest()
        found.commits[oid] = files
        found.history.append(f"{len(files)} files, {'private' if found.private else 'public'}")
        self._answer(200, {"commitUrl": f"{self.fake.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    def _batch(self, content: dict[str, Any]) -> None:
        objects: list[dict[str, Any]] = []
        for each in content["objects"]:
            upload = {"upload": {"href": f"{self.fake.url}/lfs/{each['oid']}", "header": {}}}
            objects.append(each | ({} if each["oid"] in self.fake.blobs else {"actions": upload}))
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _download(self, method: str, repo: str, revision: str, file: str) -> None:
        found = self._repo(repo)
        if found is None:
            return
        files = found.files if revision == "main" else found.commits[revision]
        if file not in files:
            self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        data = files[file]
        entity = hashlib.sha256(data).hexdigest()
        if file == self.fake.damage:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self._send(200, data, {"ETag": f'"{entity}"', "X-Repo-Commit": found.head}, method != "HEAD")

    def _repo(self, repo: str) -> Repo | None:
        found = self.fake.repos.get(repo)
        if found is None or (found.private and not self._authorized()):
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return found

    def _authorized(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {TOKEN}"

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self._send(status, data, {"Content-Type": "application/json"} | (headers or {}), self.command != "HEAD")

    def _send(self, status: int, data: bytes, headers: dict[str, str], with_data: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_data:
            self.wfile.write(data)


def _mode(path: str, size: int) -> str:
    return "lfs" if size >= LFS_BYTES or path.endswith(".safetensors") else "regular"


def _entry(name: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": blob}
    if _mode(name, len(data)) == "lfs":
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry
