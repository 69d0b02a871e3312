"""A model hub on this machine: as much of its file API as downloads take."""

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Repositories = Mapping[str, Mapping[str, bytes]]  # "OWNER/NAME": {file: content}


@contextlib.contextmanager
def serving(repositories: Repositories) -> Iterator[tuple[str, list[str]]]:
    """(the hub's address, the files that were asked for so far)."""
    asked: list[str] = []
    handler = type("Handler", (Hub,), {"repositories": repositories, "asked": asked})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


class Hub(http.server.BaseHTTPRequestHandler):
    repositories: Repositories
    asked: list[str]

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0].strip("/").replace("%2F", "/")
        kind, *rest = path.split("/")
        if kind == "api":
            self.list_files("/".join(rest[1:3]), rest[3] if len(rest) > 3 else "", body)
        else:
            name, file = "/".join([kind, rest[0]]), "/".join(rest[3:])
            self.asked.append(file)
            content = self.repositories.get(name, {}).get(file)
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content or b"").hexdigest()}"'}
            self.send(404 if content is None else 200, content or b"", headers, body)

    def list_files(self, name: str, what: str, body: bool) -> None:
        if name not in self.repositories:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, body)
            return
        held = [{"rfilename": file, "path": file, "type": "file", "size": len(content), "oid": "0"}
                for file, content in self.repositories[name].items()]
        listed = held if what == "tree" else {"id": name, "sha": COMMIT, "siblings": held}
        self.send(200, json.dumps(listed).encode(), {"Content-Type": "application/json"}, body)

    def send(self, code: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)
