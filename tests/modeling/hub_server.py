"""A small Hub on this machine: model repositories in a folder, served over HTTP as huggingface_hub expects them.

It answers what `from_pretrained` and `push_to_hub` ask (huggingface_hub 2.4): the repository's commit, its tree, its
files, the creation of a repository and a commit with the files' bytes in it. One branch, no access control, no LFS.
"""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/[^/]+/(?P<file>.+)")
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<action>revision|tree|preupload|commit)/[^/]+)?")


class LocalHub(ThreadingHTTPServer):
    """Serves `root/<owner>/<name>/<file>`; `downloads` lists the files sent."""

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.downloads: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repo: str) -> list[Path]:
        return sorted(path for path in (self.root / repo).rglob("*") if path.is_file())

    def commit(self, repo: str) -> str:
        """A repository's commit hash: of its files' names, sizes and times."""
        state = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.files(repo)]
        return hashlib.sha1(repr(state).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalHub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if match := _FILE.fullmatch(path):
            return self.send_file(match["repo"], match["file"])
        match = _API.fullmatch(path)
        if match is None or not (self.server.root / match["repo"]).is_dir():
            return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        repo, folder = match["repo"], self.server.root / match["repo"]
        names = {str(file.relative_to(folder)): file for file in self.server.files(repo)}
        if match["action"] == "tree":
            tree = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": _etag(file.read_bytes())}
                for name, file in names.items()
            ]
            return self.answer(tree)
        siblings = [{"rfilename": name} for name in names]
        return self.answer({"id": repo, "sha": self.server.commit(repo), "siblings": siblings, "tags": []})

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            fields = json.loads(body)
            repo = f"{fields['organization']}/{fields['name']}"
            (self.server.root / repo).mkdir(parents=True, exist_ok=True)
            return self.answer({"url": f"{self.server.url}/{repo}", "id": repo})
        match = _API.fullmatch(path)
        if match["action"] == "preupload":  # "regular": the bytes come with the commit
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self.answer({"files": [file | {"shouldIgnore": False} for file in files]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                file = self.server.root / match["repo"] / line["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(line["value"]["content"]))
        commit = self.server.commit(match["repo"])
        self.answer({"commitUrl": f"{self.server.url}/{match['repo']}/commit/{commit}", "commitOid": commit})

    def send_file(self, repo: str, name: str) -> None:
        file = self.server.root / repo / name
        if not file.is_file():
            return self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": self.server.commit(repo)}
        if self.command == "GET":
            self.server.downloads.append(name)
        self.send(content, 200, headers | {"Content-Type": "application/octet-stream"})

    def answer(self, fields: dict | list, status: int = 200, headers: dict | None = None) -> None:
        self.send(json.dumps(fields).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def send(self, content: bytes, status: int, headers: dict) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
