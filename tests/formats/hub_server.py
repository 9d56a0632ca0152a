"""A small Hugging Face hub on loopback: enough of its HTTP interface for the real client to work with.

It holds one model repository in memory. Commits arrive as the client sends them: small files inside the
commit, large ones (safetensors, pickles) through the LFS batch interface first.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

_LARGE = (".safetensors", ".pt", ".npz")


class Hub:
    """The server's state."""

    def __init__(self) -> None:
        self.url = ""
        self.repo_id: str | None = None
        self.private = False
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.tokens: set[str] = set()

    @property
    def revision(self) -> str:
        """The id of the last commit."""
        return hashlib.sha1(json.dumps([*self.commits, sorted(self.files)]).encode()).hexdigest()

    def commit(self, lines: list[dict[str, Any]]) -> None:
        """Apply a commit, of one JSON object per line."""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.blobs[value["oid"]]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, content: Any = None, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code: str) -> None:
        self._answer({"error": code}, 404, X_Error_Code=code, X_Repo_Commit=self.hub.revision)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        hub, path, body = self.hub, urlsplit(self.path).path, self._body()
        hub.tokens.add(self.headers.get("Authorization", ""))
        if path == "/api/repos/create":
            asked = json.loads(body)
            hub.repo_id = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            hub.private = asked.get("private", False) or asked.get("visibility") == "private"
            self._answer({"url": f"{hub.url}/{hub.repo_id}"})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": modes})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            hub.commit([json.loads(line) for line in body.splitlines()])
            url = f"{hub.url}/{hub.repo_id}/commit/{hub.revision}"
            self._answer({"success": True, "commitUrl": url, "commitOid": hub.revision})
        else:
            self._missing("NotFound")

    def do_PUT(self) -> None:
        content = self._body()
        assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
        self.hub.blobs[self.path.rpartition("/")[2]] = content
        self._answer({})

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        if path.startswith(f"/{hub.repo_id}/resolve/"):
            name = path.split("/resolve/")[1].partition("/")[2]
            if name not in hub.files:
                return self._missing("EntryNotFound")
            content = hub.files[name]
            etag = hashlib.sha256(content).hexdigest()
            return self._answer(content, ETag=f'"{etag}"', X_Repo_Commit=hub.revision)
        if path.startswith(f"/api/models/{hub.repo_id}/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in hub.files.items()
            ]
            return self._answer(entries)
        if path.startswith(f"/api/models/{hub.repo_id}"):
            siblings = [{"rfilename": name} for name in hub.files]
            return self._answer({"id": hub.repo_id, "sha": hub.revision, "siblings": siblings})
        return self._missing("RepoNotFound")

    do_HEAD = do_GET


@contextlib.contextmanager
def serve() -> Generator[Hub, None, None]:
    """A running hub, on a free port of loopback."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
