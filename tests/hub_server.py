"""A small Hugging Face Hub on this machine, for tests with the real client.

It speaks the part of the Hub's HTTP interface that the client uses to create, list, upload and download model
repositories with regular (not LFS, not Xet) files. Everything is in memory; every request is bounded in size and time;
leaving the context stops it. ``requests`` records what was asked, so a test can prove that the network stayed silent.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, ClassVar, Self
from urllib.parse import unquote, urlsplit

TOKEN = "hf_local_test_token"
MAX_BODY = 160 * 2**20  # a card of 92 MB in base64, and some more
REPOSITORY = r"(?P<repository>[\w.-]+/[\w.-]+)"

Files = dict[str, bytes]


@dataclass
class Repository:
    """Branches point to commits, commits hold all files."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)

    def commit(self, files: Files, branch: str = "main") -> str:
        """Adds or replaces files on a branch and returns the commit's name."""
        merged = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        seed = repr((len(self.commits), sorted(merged))).encode()
        sha = hashlib.sha1(seed).hexdigest()
        self.commits[sha] = merged
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch or commit name stands for."""
        return self.branches.get(revision, revision if revision in self.commits else None)


class HubError(Exception):
    """An answer other than success; the Hub puts its code into a header that the client reads."""

    def __init__(self, status: HTTPStatus, code: str) -> None:
        super().__init__(code)
        self.status = status


class HubServer:
    """``with HubServer() as hub: hub.add("org/name", {...})``, then point the client to ``hub.endpoint``."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Closes the port; calling it twice is fine."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join(timeout=10)
        self._server.server_close()

    def add(self, name: str, files: Files, *, private: bool = False, branch: str = "main") -> str:
        """Puts files into a repository, creating it if needed, and returns the commit's name."""
        return self.repositories.setdefault(name, Repository(private)).commit(files, branch)


class _Handler(BaseHTTPRequestHandler):
    """One request. Routes are tried in order; a route's groups become keyword arguments."""

    hub: ClassVar[HubServer]
    protocol_version = "HTTP/1.1"
    timeout = 20

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        size = int(self.headers.get("Content-Length") or 0)
        if size > MAX_BODY:
            self.close_connection = True
            self._send(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, b"")
            return
        body = self.rfile.read(size)
        try:
            for method, pattern, route in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method == ("GET" if self.command == "HEAD" else self.command):
                    route(self, body, **match.groupdict())
                    return
            self._send(HTTPStatus.NOT_FOUND, b"")
        except HubError as error:
            headers = {"X-Error-Code": str(error), "X-Error-Message": str(error)}
            self._send(error.status, json.dumps({"error": str(error)}).encode(), headers)

    def _send(self, status: HTTPStatus, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_json(self, data: object) -> None:
        self._send(HTTPStatus.OK, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _find(self, name: str, revision: str = "main") -> tuple[Repository, str]:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._authorised()):
            raise HubError(HTTPStatus.NOT_FOUND, "RepoNotFound")
        commit = repository.resolve(revision)
        if commit is None:
            raise HubError(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        return repository, commit

    def _need_token(self) -> None:
        if not self._authorised():
            raise HubError(HTTPStatus.UNAUTHORIZED, "Unauthorized")

    def whoami(self, body: bytes) -> None:
        self._need_token()
        self._send_json({"type": "user", "name": "tester", "orgs": []})

    def model(self, body: bytes, repository: str, revision: str | None = None) -> None:
        found, commit = self._find(repository, revision or "main")
        siblings = [{"rfilename": name} for name in sorted(found.commits[commit])]
        self._send_json({"id": repository, "sha": commit, "private": found.private, "tags": [], "siblings": siblings})

    def tree(self, body: bytes, repository: str, revision: str) -> None:
        found, commit = self._find(repository, revision)
        files = sorted(found.commits[commit].items())
        self._send_json([{"type": "file", "path": name, "size": len(data), "oid": _etag(data)} for name, data in files])

    def download(self, body: bytes, repository: str, revision: str, name: str) -> None:
        found, commit = self._find(repository, revision)
        data = found.commits[commit].get(name)
        if data is None:
            raise HubError(HTTPStatus.NOT_FOUND, "EntryNotFound")
        self._send(HTTPStatus.OK, data, {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": commit})

    def create(self, body: bytes) -> None:
        self._need_token()
        request = json.loads(body)
        name = "/".join(filter(None, (request.get("organization") or "tester", request["name"])))
        if name in self.hub.repositories:
            url = json.dumps({"error": "exists", "url": f"{self.hub.endpoint}/{name}"})
            self._send(HTTPStatus.CONFLICT, url.encode())
            return
        private = bool(request.get("private")) or request.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private)
        self.hub.repositories[name].commit({})
        self._send_json({"url": f"{self.hub.endpoint}/{name}"})

    def branch(self, body: bytes, repository: str, name: str) -> None:
        self._need_token()
        found, commit = self._find(repository)
        if name in found.branches:
            raise HubError(HTTPStatus.CONFLICT, "BranchExists")
        found.branches[name] = commit
        self._send_json({})

    def validate_card(self, body: bytes) -> None:
        self._send_json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repository: str, revision: str) -> None:
        self._find(repository, revision)
        files = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
        ]
        self._send_json({"files": files})

    def commit(self, body: bytes, repository: str, revision: str) -> None:
        self._need_token()
        found, _ = self._find(repository, revision)
        operations: list[dict[str, Any]] = [json.loads(line) for line in body.splitlines()]
        files = {
            operation["value"]["path"]: base64.b64decode(operation["value"]["content"])
            for operation in operations
            if operation["key"] == "file"
        }
        sha = found.commit(files, revision)
        url = f"{self.hub.endpoint}/{repository}/commit/{sha}"
        self._send_json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_card),
    ("GET", rf"/api/models/{REPOSITORY}", _Handler.model),
    ("GET", rf"/api/models/{REPOSITORY}/revision/(?P<revision>.+)", _Handler.model),
    ("GET", rf"/api/models/{REPOSITORY}/tree/(?P<revision>[^/]+)/?", _Handler.tree),
    ("POST", rf"/api/models/{REPOSITORY}/branch/(?P<name>.+)", _Handler.branch),
    ("POST", rf"/api/models/{REPOSITORY}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"/api/models/{REPOSITORY}/commit/(?P<revision>.+)", _Handler.commit),
    ("GET", rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.download),
]


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
