"""A server that speaks as much of wandb's protocol as a run needs, and a reader of wandb's files."""

import gzip
import json
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class StoredRun:
    """What the server was told about a run."""

    name: str = ""
    project: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    exit_code: int | None = None


class WandbServer:
    """Use as a context manager; answers on `url` until it is left."""

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.operations: list[str] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "WandbServer":
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def query(self, text: str, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Answer one GraphQL request."""
        self.operations.append(operation)
        project = {"id": "P", "name": "p", "entity": {"id": "E", "name": "e", "organization": None}}
        if operation == "Viewer":
            viewer = {"id": "V", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}
            return {"data": {"viewer": viewer}}
        if operation == "ServerFeaturesQuery":
            return {"data": {"serverInfo": {"features": []}}}
        if operation == "CreateRunFiles":
            run = self.runs[variables["run"]]
            run.files |= set(variables["files"])
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "R", "uploadHeaders": [], "files": files}}}
        if operation == "RunResumeStatus":
            run = self.runs.get(variables["name"])
            bucket = None if run is None else self._bucket(variables["name"], project) | _progress(run)
            return {"data": {"model": {**project, "bucket": bucket}}}
        if operation == "UpsertBucket":
            run = self.runs.setdefault(variables["name"], StoredRun())
            run.name = variables.get("displayName") or run.name
            run.project = run.project or variables["project"]
            run.config |= json.loads(variables.get("config") or "{}")
            return {"data": {"upsertBucket": {"bucket": self._bucket(variables["name"], project), "inserted": True}}}
        return {"errors": [{"message": f"{operation} is not known here"}]}

    def stream(self, run_id: str, content: dict[str, Any]) -> None:
        """Take lines of the history."""
        run = self.runs[run_id]
        part = content.get("files", {}).get("wandb-history.jsonl")
        for number, line in enumerate(part["content"] if part else []):
            run.history[part["offset"] + number] = json.loads(line)
        if content.get("complete"):
            run.exit_code = content.get("exitcode")

    def _bucket(self, run_id: str, project: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[run_id]
        empty = {"description": None, "config": "{}", "sweepName": None}
        return empty | {"id": "R", "name": run_id, "displayName": run.name, "project": project}


def _progress(run: StoredRun) -> dict[str, Any]:
    last = json.dumps([json.dumps(line) for _, line in sorted(run.history.items())][-1:])
    counts = {"logLineCount": 0, "eventsLineCount": 0, "historyLineCount": len(run.history)}
    tails = {"historyTail": last, "eventsTail": "[]", "summaryMetrics": "{}", "config": json.dumps(run.config)}
    return counts | tails | {"tags": [], "notes": None, "wandbConfig": json.dumps({"t": 1})}


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            answer: dict[str, Any] = {}
            if self.path == "/graphql":
                request = json.loads(body)
                answer = server.query(request["query"], request["operationName"], request.get("variables") or {})
            elif self.path.endswith("/file_stream"):
                server.stream(self.path.split("/")[-2], json.loads(body))
            self.reply(answer)

        def do_GET(self) -> None:
            self.reply({})

        def do_PUT(self) -> None:
            self.do_POST()

        def reply(self, answer: dict[str, Any]) -> None:
            text = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    return Handler


def read_run(folder: Path) -> StoredRun:
    """Read what a run wrote into `run-*.wandb`, whether it was sent or not."""
    run = StoredRun()
    (path,) = folder.glob("run-*.wandb")
    for record in _records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.name, run.project = record.run.display_name, record.run.project
        elif kind == "config":
            run.config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "history":
            values = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            run.history[values["_step"]] = values
        elif kind == "files":
            run.files |= {item.path for item in record.files.files}
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _records(data: bytes) -> Iterator[Any]:
    """Split the file: 7 bytes of header, then blocks of 32 KiB with pieces of (checksum, length, kind, content)."""
    from wandb.proto.wandb_internal_pb2 import Record

    whole, last = 1, 4
    position, piece = 7, b""
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        piece += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (whole, last):
            record = Record()
            record.ParseFromString(piece)
            yield record
            piece = b""
