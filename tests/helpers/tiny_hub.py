"""A hub on this machine: as much of the protocol as huggingface_hub needs to download from it."""

import contextlib
import hashlib
import http.server
import json
import pathlib
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1", COMMIT)


class Hub:
    """Serves folders as repositories: `folder/owner/repo/...`.

    Attributes:
      url: for HF_ENDPOINT.
      gated: repositories whose files only `TOKEN` may read.
      broken: files whose bytes end too soon.
      downloaded: the files that were asked for, in order, as "owner/repo/path".
      requests: their number.
    """

    TOKEN = "hf_one_that_accepted_the_licence"

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.gated, self.broken = folder, set(), set()
        self.downloaded: list[str] = []
        self.requests = 0
        self.url = ""

    def sizes(self, repo: str) -> dict[str, int]:
        """Returns {path: bytes} of a repository's files; empty where there is none of that name."""
        root = self.folder / repo
        return {str(path.relative_to(root)): path.stat().st_size for path in sorted(root.rglob("*")) if path.is_file()}


@contextlib.contextmanager
def serve(folder: pathlib.Path) -> Iterator[Hub]:
    """Serves the repositories in a folder, on a port of 127.0.0.1, while the context lasts."""
    hub = Hub(folder)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


def use(monkeypatch: Any, url: str) -> None:
    """Has huggingface_hub ask the hub at `url`, as HF_ENDPOINT would, and not wait before it tries again."""
    from huggingface_hub import constants, file_download, utils

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    for module in (utils._http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self):
        self.hub.requests += 1
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        about = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = about or file
        if not found or not self.hub.sizes(found[1]):
            return self._refuse(401, "RepoNotFound")
        if (about[3] if about else file[2]) not in (None, *REVISIONS):
            return self._refuse(404, "RevisionNotFound")
        return self._about(about[1], about[2]) if about else self._file(file[1], file[3])

    do_HEAD = do_GET

    def _about(self, repo: str, kind: str | None):
        sizes = self.hub.sizes(repo)
        tree = [{"type": "file", "path": name, "size": sizes[name], "oid": _etag(name)} for name in sizes]
        siblings = [{"rfilename": name} for name in sizes]
        said = tree if kind == "tree" else {"id": repo, "sha": COMMIT, "siblings": siblings}
        self._answer(json.dumps(said).encode(), {"Content-Type": "application/json"})

    def _file(self, repo: str, name: str):
        if repo in self.hub.gated and self.headers.get("Authorization") != f"Bearer {self.hub.TOKEN}":
            return self._refuse(403 if "Authorization" in self.headers else 401, "GatedRepo")
        path = self.hub.folder / repo / name
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        if self.command == "GET":
            self.hub.downloaded.append(f"{repo}/{name}")
        headers = {"ETag": f'"{_etag(name)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        return self._answer(path.read_bytes(), headers, broken=name in self.hub.broken)

    def _answer(self, body: bytes, headers: dict[str, str], broken: bool = False):
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if broken else body)
        self.close_connection = broken

    def _refuse(self, status: int, code: str):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        """Says nothing."""


def _etag(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()
