"""A Hub on loopback for the tests, in memory, with faults on demand.

It answers the requests of the real `huggingface_hub` client. Large files use git-LFS's basic
transfer, which every client supports. The real Hub uses Xet by default, a chunk store with a
compiled client. The tests turn it off (`HF_HUB_DISABLE_XET=1`).
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".bin", ".png")  # as in the .gitattributes of a new repository


@dataclass
class Repo:
    """A repository.

    A commit maps paths to contents. A branch, tag or pull request is a name of a commit.
    """

    owner: str
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, bytes]) -> str:
        content = [
            f"{len(self.commits)} {ref}",
            *(f"{path} {_sha256(data)}" for path, data in sorted(files.items())),
        ]
        oid = hashlib.sha1("\n".join(content).encode()).hexdigest()
        self.commits[oid], self.refs[ref] = dict(files), oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


@dataclass
class Fault:
    """A fault of the next `times` requests of a method whose path contains `path`.

    `kind` is a status to answer with, or `"cut"` (the connection ends after half of the body), or
    `"corrupt"` (one byte of the body is changed).
    """

    method: str
    path: str
    kind: int | str
    times: int


class HubServer:
    """The Hub and its state. `HF_ENDPOINT` must be its `url`.

    Attributes:
        users: name of the user of each token.
        repos: the repositories by name.
        requests: method, path and headers of every request.
    """

    def __init__(self):
        self.reset()
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        self.users: dict[str, str] = {"hf_alice": "alice", "hf_bob": "bob", "hf_reader": "reader"}
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.faults: list[Fault] = []

    def fail(self, method: str, path: str, kind: int | str, times: int = 1_000) -> None:
        self.faults.append(Fault(method, path, kind, times))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.commits[repo.resolve(revision)]

    def put(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> str:
        """Commit to the main branch of a repository without a client. The repository may be new."""
        repo = self.repos.setdefault(repo_id, Repo(repo_id.split("/")[0], private))
        self.lfs |= {_sha256(data): data for path, data in files.items() if _is_lfs(path)}
        return repo.commit("main", files)

    def asked(self, method: str, path: str) -> list[dict[str, str]]:
        """Return the headers of all requests of a method whose path contains `path`."""
        return [headers for m, p, headers in self.requests if m == method and path in p]


class _Answer(Exception):
    """An answer that ends a request before its normal end."""

    def __init__(self, status: int, message: str, code: str | None = None, **body):
        self.status, self.body = status, {"error": message} | body
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(
            (self.command, parts.path, {k.lower(): v for k, v in self.headers.items()})
        )
        self.user = self.hub.users.get(
            (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        )
        fault = next(
            (
                f
                for f in self.hub.faults
                if f.times and f.method == self.command and f.path in unquote(parts.path)
            ),
            None,
        )
        if fault is not None:
            fault.times -= 1
        self.fault = None if fault is None else fault.kind
        try:
            if isinstance(self.fault, int):
                raise _Answer(self.fault, "a fault of the test")
            for pattern, method in _ROUTES:
                match = re.fullmatch(pattern, f"{self.command} {parts.path}")
                if match:
                    return method(
                        self, **{name: unquote(value) for name, value in match.groupdict().items()}
                    )
            raise _Answer(404, f"no such page: {self.command} {parts.path}")
        except _Answer as answer:
            self._json(answer.body, answer.status, answer.headers)

    # Answers

    def _json(self, value, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(
            json.dumps(value).encode(),
            status,
            {"Content-Type": "application/json"} | (headers or {}),
        )

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault == "corrupt":
            at = len(body) - 3  # within the last tensor of a safetensors file: the file still opens
            body = body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :]
        if self.fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self.wfile.write(body)

    def _file(self, data: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            return self._send(data, 200, headers | {"Accept-Ranges": "bytes"})
        first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
        self._send(
            data[first : last + 1],
            206,
            headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"},
        )

    # Permissions

    def _repo(self, repo_id: str, write: bool = False) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self.user != repo.owner):
            # The Hub gives the same answer for a private repository and for a missing one.
            if self.user is None:
                raise _Answer(401, "Invalid username or password.")
            raise _Answer(404, "Repository not found", "RepoNotFound")
        if write and self.user is None:
            raise _Answer(401, "Invalid username or password.")
        if write and self.user != repo.owner and "create_pr" not in self.query:
            raise _Answer(403, "You don't have the rights to write to this repository")
        return repo

    def _commit(self, repo: Repo, revision: str) -> str:
        oid = repo.resolve(revision)
        if oid is None:
            raise _Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    # The pages

    def whoami(self):
        if self.user is None:
            raise _Answer(401, "Invalid credentials in Authorization header")
        self._json({"type": "user", "name": self.user, "orgs": []})

    def create_repo(self):
        asked = json.loads(self.sent)
        if self.user is None:
            raise _Answer(401, "Invalid username or password.")
        owner = asked.get("organization") or self.user
        repo_id = f"{owner}/{asked['name']}"
        if repo_id in self.hub.repos:
            raise _Answer(
                409, "You already created this model repo", url=f"{self.hub.url}/{repo_id}"
            )
        if owner != self.user:
            raise _Answer(
                403, f"You don't have the rights to create a model under the namespace {owner!r}"
            )
        repo = self.hub.repos[repo_id] = Repo(owner, asked.get("visibility") == "private")
        repo.commit(
            "main",
            {".gitattributes": b"".join(b"*%s filter=lfs\n" % s.encode() for s in LFS_SUFFIXES)},
        )
        self._json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id})

    def create_ref(self, repo_id, kind, name):
        repo, asked = self._repo(repo_id, write=True), json.loads(self.sent or b"{}")
        start = asked.get("startingPoint", "main") if kind == "branch" else name
        name = name if kind == "branch" else asked["tag"]
        if name in repo.refs:
            raise _Answer(409, f"Reference already exists: {name}")
        repo.refs[name] = self._commit(repo, start)
        self._json({})

    def info(self, repo_id, revision="main"):
        repo = self._repo(repo_id)
        oid = self._commit(repo, revision)
        siblings = [{"rfilename": path} for path in repo.commits[oid]]
        self._json(
            {"id": repo_id, "sha": oid, "private": repo.private, "tags": [], "siblings": siblings}
        )

    def tree(self, repo_id, revision):
        repo = self._repo(repo_id)
        files = repo.commits[self._commit(repo, revision)]
        self._json(
            [_entry(path, data) for path, data in files.items()],
            headers={"X-Repo-Commit": self._commit(repo, revision)},
        )

    def validate_yaml(self):
        text = json.loads(self.sent)["content"]
        front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        if front is None or not re.search(r"^library_name: \S", front[1], re.MULTILINE):
            raise _Answer(
                400,
                "Invalid metadata",
                errors=[{"message": "no metadata, or no library_name in it"}],
            )
        self._json({"errors": [], "warnings": []})

    def preupload(self, repo_id, revision):
        repo = self._repo(repo_id, write=True)
        there = repo.commits[self._commit(repo, revision)]
        files = []
        for asked in json.loads(self.sent)["files"]:
            path = asked["path"]
            mode = {
                "path": path,
                "uploadMode": "lfs" if _is_lfs(path) else "regular",
                "shouldIgnore": False,
            }
            files.append(mode | ({"oid": _oid(path, there[path])} if path in there else {}))
        self._json({"files": files})

    def lfs_batch(self, repo_id):
        self._repo(repo_id)
        if self.user is None:  # others may: for a pull request
            raise _Answer(401, "Invalid username or password.")
        asked = json.loads(self.sent)
        if "basic" not in asked["transfers"]:
            raise _Answer(422, "only the basic transfer is served here")
        objects = []
        for entry in asked["objects"]:
            href = f"{self.hub.url}/lfs/{entry['oid']}"
            new = {"actions": {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}}
            objects.append(entry | ({} if entry["oid"] in self.hub.lfs else new))
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if _sha256(self.sent) != oid:
            raise _Answer(400, "the contents do not have the hash they were announced with")
        self.hub.lfs[oid] = self.sent
        self._send(b"")

    def lfs_verify(self, oid):
        if oid not in self.hub.lfs:
            raise _Answer(404, "no such object")
        self._json({})

    def commit(self, repo_id, revision):
        repo = self._repo(repo_id, write=True)
        parent = self._commit(repo, revision)
        files = dict(repo.commits[parent])
        for line in self.sent.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header" and value.get("parentCommit", parent) != parent:
                raise _Answer(412, "A commit has happened since. Please refresh and try again.")
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise _Answer(
                        400, f"LFS pointer pointed to a file that does not exist: {value['path']}"
                    )
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise _Answer(404, "A file with this name doesn't exist", "EntryNotFound")
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        as_request = "create_pr" in self.query
        oid = repo.commit(f"refs/pr/{number}" if as_request else revision, files)
        url = f"{self.hub.url}/{repo_id}"
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}"}
        self._json(
            answer | {"pullRequestUrl": f"{url}/discussions/{number}" if as_request else None}
        )

    def resolve(self, repo_id, revision, path):
        repo = self._repo(repo_id)
        oid = self._commit(repo, revision)
        headers = {"X-Repo-Commit": oid}
        if path not in repo.commits[oid]:
            return self._json(
                {"error": "Entry not found"}, 404, headers | {"X-Error-Code": "EntryNotFound"}
            )
        data = repo.commits[oid][path]
        if not _is_lfs(path):
            return self._file(data, headers | {"ETag": f'"{_oid(path, data)}"'})
        headers |= {"X-Linked-Etag": f'"{_sha256(data)}"', "X-Linked-Size": str(len(data))}
        # Another host, as on the real Hub: the client follows redirections within the Hub itself,
        # and treats a redirection to another host differently.
        elsewhere = self.hub.url.replace("127.0.0.1", "localhost")
        self._send(b"", 302, headers | {"Location": f"{elsewhere}/cdn/{_sha256(data)}"})

    def cdn(self, oid):
        if "Authorization" in self.headers:
            raise _Answer(400, "a token was sent to another host than the Hub")
        self._file(self.hub.lfs[oid], {"ETag": f'"{oid}"'})


_ID = r"(?P<repo_id>[^/]+/[^/]+)"
_ROUTES = [
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create_repo),
    (r"POST /api/validate-yaml", _Handler.validate_yaml),
    (rf"POST /api/models/{_ID}/(?P<kind>branch|tag)/(?P<name>[^/]+)", _Handler.create_ref),
    (rf"POST /api/models/{_ID}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (rf"POST /api/models/{_ID}/commit/(?P<revision>[^/]+)", _Handler.commit),
    (rf"GET /api/models/{_ID}/tree/(?P<revision>[^/]+)", _Handler.tree),
    (rf"GET /api/models/{_ID}/revision/(?P<revision>[^/]+)", _Handler.info),
    (rf"GET /api/models/{_ID}", _Handler.info),
    (rf"POST /{_ID}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"PUT /lfs/(?P<oid>\w+)", _Handler.lfs_put),
    (r"POST /lfs/(?P<oid>\w+)/verify", _Handler.lfs_verify),
    (rf"(GET|HEAD) /{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    (r"(GET|HEAD) /cdn/(?P<oid>\w+)", _Handler.cdn),
]


def _is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _oid(path: str, data: bytes) -> str:
    """Return the Hub's hash of a file: SHA-256 of a large file, git's hash of a small one."""
    return (
        _sha256(data)
        if _is_lfs(path)
        else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    )


def _entry(path: str, data: bytes) -> dict:
    entry = {
        "type": "file",
        "path": path,
        "size": len(data),
        "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
    }
    return entry | (
        {"lfs": {"oid": _sha256(data), "size": len(data), "pointerSize": 134}}
        if _is_lfs(path)
        else {}
    )
