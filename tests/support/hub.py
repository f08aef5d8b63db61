"""A stand-in for a Hugging Face hub at HF_ENDPOINT: the requests that huggingface_hub makes to download, counted.

Repositories are {name: {commit: {file: bytes}}} with branches {name: {branch: commit}}.
"""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """State of the server. requests: (method, kind) → number, kind being "info", "tree" or a file's name. gated,
    private: names that answer 401. cut: files whose download ends after half of it, so many times."""

    url: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    cut: Counter[str] = field(default_factory=Counter)
    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    paths: list[str] = field(default_factory=list)

    def add(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit, move the branch to it, and return its hash."""
        content = json.dumps({file: hashlib.sha1(data).hexdigest() for file, data in files.items()})
        commit = hashlib.sha1(f"{name}{content}".encode()).hexdigest()
        self.repositories.setdefault(name, {})[commit] = files
        self.branches.setdefault(name, {})[branch] = commit
        return commit

    def downloads(self, file: str) -> int:
        return self.requests["GET", file]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _count(self, kind: str) -> None:
            with lock:
                hub.requests[self.command, kind] += 1
                hub.paths.append(self.path)

        def _send(self, status: int, body: bytes = b"", cut: bool = False, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[: len(body) // 2] if cut else body)
            if cut:
                self.close_connection = True

        def _error(self, status: int, code: str, message: str) -> None:
            self._send(status, json.dumps({"error": message}).encode(), X_Error_Code=code, X_Error_Message=message)

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            if path.startswith("api/models/"):
                path = path.removeprefix("api/models/")
                for kind, separator in (("tree", "/tree/"), ("info", "/revision/")):
                    if separator in path:
                        name, revision = path.split(separator, 1)
                        return self._api(kind, name, revision)
                return self._api("info", path, "main")
            name, _, rest = path.partition("/resolve/")
            revision, _, file = rest.partition("/")
            self._count(file)
            commit = self._commit(name, revision)
            if commit is None:
                return None
            data = hub.repositories[name][commit].get(file)
            if data is None:
                return self._error(404, "EntryNotFound", "Entry not found")
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": commit}
            with lock:
                cut = self.command == "GET" and hub.cut[file] > 0
                hub.cut[file] -= cut
            return self._send(200, data, cut=cut, **headers, Accept_Ranges="none")

        def _commit(self, name: str, revision: str) -> str | None:
            """The commit; None if an error was sent."""
            if name in hub.gated:
                self._error(401, "GatedRepo", "Access to this model is restricted")
            elif name in hub.private or name not in hub.repositories:
                # The hub does not say which of the two.
                self._error(401 if name in hub.private else 404, "RepoNotFound", "Repository not found")
            else:
                commit = hub.branches[name].get(revision, revision)
                if commit in hub.repositories[name]:
                    return commit
                self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None

        def _api(self, kind: str, name: str, revision: str) -> None:
            self._count(kind)
            commit = self._commit(name, revision)
            if commit is None:
                return
            files = hub.repositories[name][commit]
            if kind == "info":
                info = {"id": name, "sha": commit, "private": False, "siblings": [{"rfilename": f} for f in files]}
                self._send(200, json.dumps(info).encode(), Content_Type="application/json")
                return
            tree = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for file, data in files.items()
            ]
            self._send(200, json.dumps(tree).encode(), Content_Type="application/json")

    return Handler


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub that runs until the end of the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
