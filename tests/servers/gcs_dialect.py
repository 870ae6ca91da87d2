"""How does Google Cloud Storage put it? Its errors, media, uploads in several parts, and batches."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from typing import Any

from .faults import Reply, Request

__all__ = [
    "RefusedError",
    "batch_reply",
    "batched",
    "bucket_resource",
    "json_reply",
    "media_reply",
    "properties_of",
    "split_related",
    "unknown",
]

_BATCH = 100


class RefusedError(Exception):
    """What the store will not do, with its status and its word for why."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason

    def reply(self) -> Reply:
        message = str(self)
        error = {"code": self.status, "message": message, "errors": [{"reason": self.reason, "message": message}]}
        return json_reply({"error": error}, self.status)


def unknown(request: Request) -> RefusedError:
    return RefusedError(501, "notImplemented", f"this server does not know {request}")


def json_reply(content: dict[str, Any], status: int = 200) -> Reply:
    return Reply(status, json.dumps(content).encode(), {"Content-Type": "application/json; charset=UTF-8"})


def bucket_resource(name: str) -> dict[str, Any]:
    return {"kind": "storage#bucket", "id": name, "name": name, "location": "US", "storageClass": "STANDARD"}


def media_reply(data: bytes, about: dict[str, str], wanted: str) -> Reply:
    """The bytes, or the range of them that the Range header `wanted` names."""
    size = len(data)
    spoken = re.fullmatch(r"bytes=(?:(\d+)-(\d*)|-(\d+))", wanted.strip())
    if spoken is None:
        return Reply(200, data, about)
    if spoken[3]:
        start, stop = max(size - int(spoken[3]), 0), size
    else:
        start, stop = int(spoken[1]), min(int(spoken[2]) + 1, size) if spoken[2] else size
    if start >= size:
        raise RefusedError(416, "requestedRangeNotSatisfiable", "The requested range cannot be satisfied.")
    return Reply(206, data[start:stop], {**about, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})


def properties_of(headers: Message) -> dict[str, str]:
    """What the headers of an upload say of the object, under the names of an object's resource."""
    names = {"md5": "md5Hash", "crc32c": "crc32c"}
    hashes = dict(pair.strip().split("=", 1) for pair in headers.get("X-Goog-Hash", "").split(",") if pair)
    properties = {names[kind]: value for kind, value in hashes.items()}
    content_type = headers.get("X-Upload-Content-Type") or headers.get("Content-Type")
    return {**properties, "contentType": content_type} if content_type else properties


def split_related(request: Request) -> tuple[dict[str, Any], bytes]:
    """The properties and the bytes of a multipart/related upload, whose lines end with either LF or CRLF."""
    opening = b"--" + _boundary(request.headers).encode()
    newline = b"\r\n" if request.body.startswith(opening + b"\r\n") else b"\n"
    delimiter = newline + opening
    described, _, rest = request.body.partition(delimiter)
    properties = json.loads(described.partition(newline * 2)[2])
    # The last delimiter ends the bytes; one that stands among them belongs to them.
    headers, _, data = rest[: rest.rindex(delimiter + b"--")].partition(newline * 2)
    return {**properties_of(Parser().parsestr(headers.decode().strip())), **properties}, data


def batched(request: Request) -> Iterator[tuple[str, Request]]:
    """Each request of a batch, with the id under which the client wants its answer."""
    parts = request.body.decode().split(f"--{_boundary(request.headers)}")[1:-1]
    if len(parts) > _BATCH:
        raise RefusedError(400, "badRequest", f"{len(parts)} calls in one batch, {_BATCH} are allowed")
    for part in parts:
        outer, _, inner = part.strip().replace("\r\n", "\n").partition("\n\n")
        first, _, rest = inner.partition("\n")
        method, target, _ = first.split(" ")
        headers, _, body = rest.partition("\n\n")
        content_id = Parser().parsestr(outer).get("Content-ID", "").strip("<>")
        yield content_id, Request(method, target, Parser().parsestr(headers), body.encode())


def batch_reply(replies: list[tuple[str, Reply]]) -> Reply:
    boundary = "batch_of_replies"
    parts = [
        f"--{boundary}\r\nContent-Type: application/http\r\nContent-ID: <response-{content_id}>\r\n\r\n"
        f"HTTP/1.1 {reply.status} batched\r\nContent-Length: {len(reply.body)}\r\n\r\n{reply.body.decode()}\r\n"
        for content_id, reply in replies
    ]
    body = "".join([*parts, f"--{boundary}--\r\n"]).encode()
    return Reply(200, body, {"Content-Type": f"multipart/mixed; boundary={boundary}"})


def _boundary(headers: Message) -> str:
    return str(headers.get_param("boundary"))
