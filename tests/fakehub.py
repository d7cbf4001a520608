"""A Hugging Face Hub on the loopback interface, with the endpoints that pushing and loading models take.

    with LoopbackHub() as hub:
        subprocess.run(..., env={**os.environ, **hub.environment(cache)})
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

USER = "tester"


@dataclass
class Repository:
    """A model repository with one branch; every commit holds all of its files."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    head: str = ""

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]

    def commit(self, files: dict[str, bytes]) -> str:
        content = [len(self.commits), *((path, _digest(data)) for path, data in sorted(files.items()))]
        self.head = _digest(json.dumps(content).encode())
        self.commits[self.head] = files
        return self.head

    def resolve(self, revision: str) -> str | None:
        return self.head if revision == "main" else revision if revision in self.commits else None


class LoopbackHub(ThreadingHTTPServer):
    """The server; runs in a thread while used as a context manager.

    Attributes:
        repositories (`dict[str, Repository]`): Model repositories by id.
        requests (`list[str]`): Method and path of every request, in order.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self, cache: Path) -> dict[str, str]:
        """Variables that point a new process to this Hub, and to an empty cache."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_loopback",
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackHub

    def dispatch(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        body = self._body()
        with self.server.lock:
            self.server.requests.append(f"{self.command} {path}")
            for pattern, route in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match:
                    return route(self, body, **match.groupdict())
        return self.fail(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = dispatch

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the test output clean."""

    def whoami(self, body: bytes) -> None:
        token = {"type": "access_token", "accessToken": {"role": "write"}}
        self.answer({"name": USER, "type": "user", "orgs": [], "auth": token})

    def validate_yaml(self, body: bytes) -> None:
        self.answer({"errors": [], "warnings": []})

    def create(self, body: bytes) -> None:
        request = json.loads(body)
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        code = 409 if repo_id in self.server.repositories else 200
        if code == 200:
            self.server.repositories[repo_id] = Repository()
            self.server.repositories[repo_id].commit({".gitattributes": b""})
        self.answer({"url": f"{self.server.url}/{repo_id}", "name": repo_id, "id": repo_id}, code)

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
        self.answer({"files": files})

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        repository = self.server.repositories[repo_id]
        files = dict(repository.files)
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(files)
        url = f"{self.server.url}/{repo_id}/commit/{sha}"
        self.answer({"success": True, "commitOid": sha, "commitUrl": url, "pullRequestUrl": None, "hookOutput": ""})

    def info(self, body: bytes, repo_id: str, revision: str | None = None) -> None:
        found = self._find(repo_id, revision)
        if found:
            sha, files = found
            siblings = [{"rfilename": path} for path in sorted(files)]
            self.answer({"_id": "0", "id": repo_id, "modelId": repo_id, "sha": sha, "tags": [], "siblings": siblings})

    def tree(self, body: bytes, repo_id: str, revision: str, folder: str | None = None) -> None:
        found = self._find(repo_id, revision)
        if found:
            _, files = found
            self.answer([_entry(p, data) for p, data in sorted(files.items()) if p.startswith(f"{folder or ''}")])

    def paths_info(self, body: bytes, repo_id: str, revision: str) -> None:
        found = self._find(repo_id, revision)
        if found:
            _, files = found
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
            self.answer([_entry(path, files[path]) for path in wanted if path in files])

    def download(self, body: bytes, repo_id: str, revision: str, path: str) -> None:
        found = self._find(repo_id, revision)
        if found:
            sha, files = found
            if path not in files:
                return self.fail(404, "EntryNotFound", {"X-Repo-Commit": sha})
            headers = {"X-Repo-Commit": sha, "ETag": f'"{_digest(files[path])}"'}
            self._send(200, files[path], {**headers, "Content-Type": "application/octet-stream"})

    def answer(self, content: Any, code: int = 200) -> None:
        self._send(code, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def fail(self, code: int, error: str, headers: dict[str, str] | None = None) -> None:
        self._send(code, b"{}", {"Content-Type": "application/json", "X-Error-Code": error, **(headers or {})})

    def _find(self, repo_id: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        repository = self.server.repositories.get(repo_id)
        sha = repository.resolve(revision or "main") if repository else None
        if repository is None or sha is None:
            self.fail(404, "RevisionNotFound" if repository else "RepoNotFound")
            return None
        return sha, repository.commits[sha]

    def _send(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)


def _entry(path: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "oid": _digest(data), "size": len(data), "path": path}


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


_MODEL = "/api/models/(?P<repo_id>[^/]+/[^/]+)"
_REVISION = "(?P<revision>[^/]+)"
_ROUTES: list[tuple[str, Callable[..., None]]] = [
    ("/api/whoami-v2", _Handler.whoami),
    ("/api/validate-yaml", _Handler.validate_yaml),
    ("/api/repos/create", _Handler.create),
    (f"{_MODEL}/preupload/{_REVISION}", _Handler.preupload),
    (f"{_MODEL}/commit/{_REVISION}", _Handler.commit),
    (f"{_MODEL}(/revision/{_REVISION})?", _Handler.info),
    (f"{_MODEL}/tree/{_REVISION}(/(?P<folder>.+))?", _Handler.tree),
    (f"{_MODEL}/paths-info/{_REVISION}", _Handler.paths_info),
    (f"/(?P<repo_id>[^/]+/[^/]+)/resolve/{_REVISION}/(?P<path>.+)", _Handler.download),
]
