"""A stand-in for a Hugging Face hub at HF_ENDPOINT: the requests that huggingface_hub makes to download and to upload,
counted. Uploads of large files are those of Git LFS, as with HF_HUB_DISABLE_XET=1.

Repositories are {name: {commit: {file: bytes}}} with branches {name: {branch: commit}}.
"""

import base64
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """State of the server. requests: (method, kind) → number, kind being "info", "tree", an endpoint of uploads or a
    file's name. gated: names that answer 401. private: names that answer 401, except to the owner of the token. cut:
    files whose download ends after half of it, so many times.

    token, role: that of user `user`, member of `organizations`; they may write to their own models only. objects: large
    files by SHA-256. verified: those whose upload was confirmed.
    """

    url: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    cut: Counter[str] = field(default_factory=Counter)
    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    paths: list[str] = field(default_factory=list)
    token: str = "hf_token_of_ada"
    role: str = "write"
    user: str = "ada"
    organizations: tuple[str, ...] = ("lab",)
    objects: dict[str, bytes] = field(default_factory=dict)
    verified: set[str] = field(default_factory=set)

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

        def do_PUT(self) -> None:
            """A large file, at the address that the answer to its batch has given."""
            self._count("upload")
            sha256, content = self.path.rpartition("/")[2], self._body()
            if hashlib.sha256(content).hexdigest() != sha256:
                return self._error(400, "", "The content does not have this SHA-256")
            hub.objects[sha256] = content
            return self._send(200)

        def do_POST(self) -> None:
            body = self._body()
            path = urlsplit(self.path).path.strip("/")
            if path == "api/validate-yaml":
                self._count("validate-yaml")
                return self._json({"errors": [], "warnings": []})
            if not self._known():
                return self._error(401, "", "Invalid username or password.")
            if path == "api/repos/create":
                return self._create(json.loads(body))
            if path.startswith("verify/"):
                self._count("verify")
                hub.verified.add(json.loads(body)["oid"])
                return self._json({})
            name, kind, answer = self._upload_request(path)
            self._count(kind)
            if name not in hub.repositories:
                return self._error(404, "RepoNotFound", "Repository not found")
            if not self._may_write(name):
                return self._error(403, "", "You don't have the rights to write to this model")
            return answer(name, body)

        def _upload_request(self, path: str) -> tuple[str, str, Callable[[str, bytes], None]]:
            """Name of the model, endpoint and method of a POST."""
            if path.endswith(".git/info/lfs/objects/batch"):
                return path.removesuffix(".git/info/lfs/objects/batch"), "batch", self._batch
            name, _, rest = path.removeprefix("api/models/").partition("/preupload/")
            if rest:
                return name, "preupload", self._preupload
            return name.partition("/commit/")[0], "commit", self._commit_files

        def _known(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {hub.token}"

        def _may_write(self, name: str) -> bool:
            return hub.role != "read" and name.partition("/")[0] in (hub.user, *hub.organizations)

        def _create(self, asked: dict[str, Any]) -> None:
            self._count("create")
            name = f"{asked.get('organization') or hub.user}/{asked['name']}"
            if not self._may_write(name):
                return self._error(403, "", "You don't have the rights to create a model under this namespace")
            if name in hub.repositories:
                return self._json({"error": "You already created this model repo", "url": f"{hub.url}/{name}"}, 409)
            hub.repositories[name], hub.branches[name] = {"0" * 40: {}}, {"main": "0" * 40}
            # huggingface_hub 1 sends "private".
            if asked.get("private") or asked.get("visibility") == "private":
                hub.private.add(name)
            return self._json({"url": f"{hub.url}/{name}", "name": name, "id": name})

        def _preupload(self, name: str, body: bytes) -> None:
            modes = {True: "lfs", False: "regular"}
            files = [
                {"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self._json({"files": files, "commitOid": hub.branches[name]["main"]})

        def _batch(self, name: str, body: bytes) -> None:
            found = []
            for entry in json.loads(body)["objects"]:
                oid = entry["oid"]
                actions = {
                    "upload": {"href": f"{hub.url}/objects/{oid}"},
                    "verify": {"href": f"{hub.url}/verify/{oid}"},
                }
                found.append(entry if oid in hub.objects else {**entry, "actions": actions})
            return self._json({"transfer": "basic", "objects": found})

        def _commit_files(self, name: str, body: bytes) -> None:
            files = dict(hub.repositories[name][hub.branches[name]["main"]])
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]
            commit = hub.add(name, files)
            url = f"{hub.url}/{name}/commit/{commit}"
            return self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _json(self, content: Any, status: int = 200) -> None:
            self._send(status, json.dumps(content).encode(), Content_Type="application/json")

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
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if cut else body)
            if cut:
                self.close_connection = True

        def _error(self, status: int, code: str, message: str) -> None:
            self._send(status, json.dumps({"error": message}).encode(), X_Error_Code=code, X_Error_Message=message)

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            if path == "api/whoami-v2":
                return self._who()
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

        def _who(self) -> None:
            self._count("whoami")
            if not self._known():
                return self._error(401, "", "Invalid username or password.")
            token = {"accessToken": {"displayName": "test", "role": hub.role}}
            names = [{"name": name} for name in hub.organizations]
            return self._json({"type": "user", "name": hub.user, "orgs": names, "auth": token})

        def _commit(self, name: str, revision: str) -> str | None:
            """The commit; None if an error was sent."""
            if name in hub.gated:
                self._error(401, "GatedRepo", "Access to this model is restricted")
            elif (name in hub.private and not self._known()) or name not in hub.repositories:
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
            # The tree of a folder; there are none.
            if kind == "tree" and revision.endswith("/additional_chat_templates"):
                return self._error(404, "EntryNotFound", "The folder does not exist")
            commit = self._commit(name, revision)
            if commit is None:
                return
            files = hub.repositories[name][commit]
            if kind == "info":
                info = {
                    "id": name,
                    "sha": commit,
                    "private": name in hub.private,
                    "siblings": [{"rfilename": f} for f in files],
                }
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
