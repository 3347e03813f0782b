# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The Hugging Face hub, small: a cache laid out as the hub's, and a server that answers as it does."""

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def blob_name(path: str, content: bytes) -> str:
    """What the hub names a file's content: SHA-256 of large files, git's SHA-1 of others."""
    if path.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def put_into_cache(cache: Path, name: str, directory: Path, *, commit: str = COMMIT, leave_out: str = "") -> Path:
    """Put a directory's files into a cache as a model of the hub; returns the snapshot's directory."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for part in (snapshot, folder / "blobs", folder / "refs"):
        part.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    for path in directory.iterdir():
        if path.name == leave_out:
            continue
        content = path.read_bytes()
        blob = folder / "blobs" / blob_name(path.name, content)
        blob.write_bytes(content)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


def use_hub(monkeypatch: pytest.MonkeyPatch, cache: Path, url: str | None = None) -> None:
    """Look for models in this cache alone, and at a hub; without a hub, offline."""
    from huggingface_hub import constants

    from megatron.bridge.utils import hf_hub

    monkeypatch.setattr(hf_hub, "_found", {})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", url is None)
    if url is not None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


class Hub:
    """Serves models. `url` is for HF_ENDPOINT."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.damaged: set[str] = set()
        """Files whose content changes on its way."""
        self.requests: list[tuple[str, str]] = []
        """Method and path, in order."""
        self.url = ""

    def put(self, name: str, directory: Path) -> None:
        """Offer a directory's files as a model."""
        self.models[name] = {path.name: path.read_bytes() for path in directory.iterdir()}

    def fetched(self) -> list[str]:
        """The names of files whose content was sent."""
        return [path.rpartition("/")[2] for method, path in self.requests if method == "GET" and "/resolve/" in path]


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub on a free port of this machine."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield hub
        server.shutdown()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """Answer without content."""
        self._answer(with_content=False)

    def do_GET(self) -> None:
        """Answer."""
        self._answer(with_content=True)

    def _answer(self, *, with_content: bool) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append((self.command, path))
        parts = path.strip("/").removeprefix("api/models/").split("/")
        name, kind, revision = "/".join(parts[:2]), parts[2], parts[3]
        files = self.hub.models.get(name)
        if files is None:
            self._send(401, {"X-Error-Code": "RepoNotFound"}, b"{}", with_content)
        elif revision not in ("main", COMMIT):
            self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"{}", with_content)
        elif kind == "revision":
            siblings = [{"rfilename": file} for file in files]
            self._send_json({"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})
        elif kind == "tree":
            self._send_json([_entry(file, content) for file, content in files.items()])
        elif name in self.hub.gated:
            self._send(401, {"X-Error-Code": "GatedRepo"}, b"{}", with_content)
        else:
            self._send_file(parts[-1], files[parts[-1]], with_content)

    def _send_file(self, file: str, content: bytes, with_content: bool) -> None:
        etag = f'"{blob_name(file, content)}"'
        sent = bytes([content[0] ^ 1]) + content[1:] if file in self.hub.damaged else content
        self._send(200, {"X-Repo-Commit": COMMIT, "ETag": etag}, sent, with_content)

    def _send_json(self, content: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(content).encode(), True)

    def _send(self, status: int, headers: dict[str, str], content: bytes, with_content: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_content:
            self.wfile.write(content)


def _entry(file: str, content: bytes) -> dict[str, object]:
    """A file in the list of a model's files."""
    name = blob_name(file, content)
    entry: dict[str, object] = {"type": "file", "path": file, "size": len(content), "oid": name[:40]}
    if len(name) == 64:
        entry["lfs"] = {"oid": name, "size": len(content), "pointerSize": 134}
    return entry
