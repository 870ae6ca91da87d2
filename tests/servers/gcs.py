"""What would Google Cloud Storage answer? Its JSON API, from memory, as far as gcsfs speaks it.

Kept of the real one: generations and preconditions (with `ifGenerationMatch=0` exactly one writer
wins), checksums, paging, resumable uploads with their chunk rules, batches, and which 404 is which.
Not kept: authentication, older generations of an object, metagenerations, ACLs, the XML API.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

import google_crc32c

from .faults import HttpServer, Reply, Request
from .gcs_dialect import (
    RefusedError,
    batch_reply,
    batched,
    bucket_resource,
    json_reply,
    media_reply,
    properties_of,
    split_related,
    unknown,
)
from .listing import page

__all__ = ["GcsServer"]

_CHUNK = 256 * 1024
_PAGE = 1000


@dataclass(frozen=True, slots=True)
class _Object:
    bucket: str
    name: str
    data: bytes
    generation: int
    properties: dict[str, Any]
    created: str
    md5: str
    crc32c: str

    def resource(self) -> dict[str, Any]:
        return {
            "contentType": "application/octet-stream",
            **self.properties,
            "kind": "storage#object",
            "id": f"{self.bucket}/{self.name}/{self.generation}",
            "bucket": self.bucket,
            "name": self.name,
            "size": str(len(self.data)),
            "generation": str(self.generation),
            "metageneration": "1",
            "md5Hash": self.md5,
            "crc32c": self.crc32c,
            "etag": self.md5,
            "storageClass": "STANDARD",
            "timeCreated": self.created,
            "updated": self.created,
        }

    def media(self, wanted: str) -> Reply:
        about = {
            "Content-Type": self.resource()["contentType"],
            "X-Goog-Hash": f"crc32c={self.crc32c},md5={self.md5}",
            "X-Goog-Generation": str(self.generation),
        }
        return media_reply(self.data, about, wanted)


@dataclass(slots=True)
class _Session:
    """A resumable upload: what was said at its start, what arrived, and the answer once it is complete."""

    bucket: str
    name: str
    properties: dict[str, Any]
    query: dict[str, str]
    received: bytearray = field(default_factory=bytearray)
    finished: Reply | None = None


class GcsServer(HttpServer):
    """Buckets and objects in memory. Its `url` is gcsfs's `endpoint_url`, with `token="anon"`."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._buckets: dict[str, dict[str, _Object]] = {}
        self._sessions: dict[str, _Session] = {}
        self._numbers = itertools.count(1_000_000)
        self.rewritten_at_once = 1 << 40  # bytes

    def create_bucket(self, name: str) -> None:
        with self._lock:
            self._create_bucket(name)

    def answer(self, request: Request) -> Reply:
        # One lock around every request: a precondition and the write that it guards are one step.
        with self._lock:
            return self._answer(request)

    def failure(self, status: int) -> Reply:
        return RefusedError(status, "injected", "injected by the test").reply()

    def _answer(self, request: Request) -> Reply:
        try:
            match request.path.strip("/").split("/"):
                case ["batch", "storage", "v1"]:
                    return batch_reply([(content_id, self._answer(one)) for content_id, one in batched(request)])
                case ["upload", "storage", "v1", "b", bucket, "o"]:
                    return self._upload(request, unquote(bucket))
                case ["download", "storage", "v1", *parts] | ["storage", "v1", *parts]:
                    return self._resource(request, [unquote(part) for part in parts])
            raise unknown(request)
        except RefusedError as refused:
            return refused.reply()

    def _resource(self, request: Request, parts: list[str]) -> Reply:
        query = request.query
        match request.method, *parts:
            case "GET", "b":
                return json_reply({"kind": "storage#buckets", "items": [bucket_resource(b) for b in self._buckets]})
            case "POST", "b":
                return self._create_bucket(json.loads(request.body)["name"])
            case "GET", "b", bucket:
                self._objects(bucket)
                return json_reply(bucket_resource(bucket))
            case "DELETE", "b", bucket:
                if self._objects(bucket):
                    raise RefusedError(409, "conflict", "The bucket you tried to delete is not empty.")
                del self._buckets[bucket]
                return Reply(204)
            case "GET", "b", bucket, "o":
                return self._list(bucket, query)
            case "GET", "b", bucket, "o", name:
                found, is_media = self._find(bucket, name, query), query.get("alt") == "media"
                return found.media(request.headers.get("Range", "")) if is_media else json_reply(found.resource())
            case "DELETE", "b", bucket, "o", name:
                self._find(bucket, name, query)
                del self._buckets[bucket][name]
                return Reply(204)
            case "POST", "b", bucket, "o", name, "copyTo", "b", to_bucket, "o", to_name:
                return json_reply(self._copy(request, bucket, name, to_bucket, to_name).resource())
            case "POST", "b", bucket, "o", name, "rewriteTo", "b", to_bucket, "o", to_name:
                return self._rewrite(request, bucket, name, to_bucket, to_name)
            case "POST", "b", bucket, "o", name, "moveTo", "o", to_name:
                moved = self._copy(request, bucket, name, bucket, to_name)
                if to_name != name:
                    del self._buckets[bucket][name]
                return json_reply(moved.resource())
        raise unknown(request)

    # Buckets and objects

    def _create_bucket(self, name: str) -> Reply:
        if name in self._buckets:
            message = "Your previous request to create the named bucket succeeded and you already own it."
            raise RefusedError(409, "conflict", message)
        self._buckets[name] = {}
        return json_reply(bucket_resource(name))

    def _objects(self, bucket: str) -> dict[str, _Object]:
        if bucket not in self._buckets:
            raise RefusedError(404, "notFound", "The specified bucket does not exist.")
        return self._buckets[bucket]

    def _find(self, bucket: str, name: str, query: dict[str, str], prefix: str = "if") -> _Object:
        found = self._objects(bucket).get(name)
        if found is None or query.get("generation", str(found.generation)) != str(found.generation):
            raise RefusedError(404, "notFound", f"No such object: {bucket}/{name}")
        self._check_preconditions(bucket, name, query, prefix)
        return found

    def _check_preconditions(self, bucket: str, name: str, query: dict[str, str], prefix: str = "if") -> None:
        current = self._objects(bucket).get(name)
        generation = "0" if current is None else str(current.generation)
        wanted, unwanted = query.get(f"{prefix}GenerationMatch"), query.get(f"{prefix}GenerationNotMatch")
        if wanted not in (None, generation) or unwanted == generation:
            message = "At least one of the pre-conditions you specified did not hold."
            raise RefusedError(412, "conditionNotMet", message)

    def _store(self, bucket: str, name: str, data: bytes, properties: dict[str, Any], query: dict[str, str]) -> _Object:
        self._check_preconditions(bucket, name, query)
        md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
        crc32c = base64.b64encode(google_crc32c.Checksum(data).digest()).decode()
        for kind, actual in (("md5Hash", md5), ("crc32c", crc32c)):
            if properties.get(kind, actual) != actual:
                raise RefusedError(400, "invalid", f"Provided {kind} {properties[kind]} doesn't match {actual}.")
        created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        stored = _Object(bucket, name, data, next(self._numbers), properties, created, md5, crc32c)
        self._buckets[bucket][name] = stored
        return stored

    def _copy(self, request: Request, bucket: str, name: str, to_bucket: str, to_name: str) -> _Object:
        query = dict(request.query)
        if "sourceGeneration" in query:
            query["generation"] = query["sourceGeneration"]
        source = self._find(bucket, name, query, prefix="ifSource")
        properties = json.loads(request.body or b"{}") or source.properties
        return self._store(to_bucket, to_name, source.data, properties, query)

    def _rewrite(self, request: Request, bucket: str, name: str, to_bucket: str, to_name: str) -> Reply:
        """As much at a time as `rewritten_at_once` says; the token in the answer is where to go on."""
        size = len(self._find(bucket, name, {}).data)
        done = min(int(request.query.get("rewriteToken", "0")) + self.rewritten_at_once, size)
        answer = {"kind": "storage#rewriteResponse", "objectSize": str(size), "totalBytesRewritten": str(done)}
        if done < size:
            return json_reply({**answer, "done": False, "rewriteToken": str(done)})
        copy = self._copy(request, bucket, name, to_bucket, to_name).resource()
        return json_reply({**answer, "done": True, "resource": copy})

    def _list(self, bucket: str, query: dict[str, str]) -> Reply:
        first, end = query.get("startOffset", ""), query.get("endOffset")
        names = [name for name in self._objects(bucket) if name >= first and (end is None or name < end)]
        after = base64.urlsafe_b64decode(query.get("pageToken", "")).decode()
        limit = min(int(query.get("maxResults", _PAGE)), _PAGE)
        listed = page(names, query.get("prefix", ""), query.get("delimiter", ""), after, limit)
        answer: dict[str, Any] = {"kind": "storage#objects"}
        if listed.names:
            answer["items"] = [self._buckets[bucket][name].resource() for name in listed.names]
        if listed.prefixes:
            answer["prefixes"] = listed.prefixes
        if listed.last is not None:
            answer["nextPageToken"] = base64.urlsafe_b64encode(listed.last.encode()).decode()
        return json_reply(answer)

    # Uploads

    def _upload(self, request: Request, bucket: str) -> Reply:
        query = request.query
        self._objects(bucket)
        if "upload_id" in query:
            return self._continue(request, query["upload_id"])
        match request.method, query.get("uploadType"):
            case "POST", "media":
                stored = self._store(bucket, query["name"], request.body, properties_of(request.headers), query)
                return json_reply(stored.resource())
            case "POST", "multipart":
                properties, data = split_related(request)
                stored = self._store(bucket, query.get("name") or properties["name"], data, properties, query)
                return json_reply(stored.resource())
            case "POST", "resumable":
                properties = {**properties_of(request.headers), **json.loads(request.body or b"{}")}
                name = query.get("name") or properties["name"]
                self._check_preconditions(bucket, name, query)
                upload_id = f"session-{next(self._numbers)}"
                self._sessions[upload_id] = _Session(bucket, name, properties, query)
                return Reply(200, headers={"Location": f"{self.url}{request.target}&upload_id={upload_id}"})
        raise unknown(request)

    def _continue(self, request: Request, upload_id: str) -> Reply:
        session = self._sessions.get(upload_id)
        if session is None:
            raise RefusedError(404, "notFound", f"No such upload: {upload_id}")
        if request.method == "DELETE":
            del self._sessions[upload_id]
            return Reply(499)
        if session.finished is None:
            total = self._receive(session, request)
            if total != len(session.received):
                have = {"Range": f"bytes=0-{len(session.received) - 1}"} if session.received else {}
                return Reply(308, headers=have)
            data = bytes(session.received)
            stored = self._store(session.bucket, session.name, data, session.properties, session.query)
            session.finished = json_reply(stored.resource())
            session.received.clear()
        return session.finished

    def _receive(self, session: _Session, request: Request) -> int | None:
        """Take a chunk and return the upload's size, where the client knows it by now."""
        content_range = request.headers.get("Content-Range")
        if content_range is None:  # the whole of it in one request
            session.received[:] = request.body
            return len(request.body)
        spoken = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", content_range)
        if spoken is None:
            raise RefusedError(400, "badRequest", f"Failed to parse Content-Range header: {content_range}")
        total = None if spoken[3] == "*" else int(spoken[3])
        if spoken[1] is None:  # a question how much has arrived, or the end of an upload of unknown size
            return total
        start, stop = int(spoken[1]), int(spoken[2]) + 1
        if stop - start != len(request.body):
            raise RefusedError(400, "badRequest", f"{content_range} does not fit a body of {len(request.body)} bytes")
        if stop != total and len(request.body) % _CHUNK:
            raise RefusedError(400, "badRequest", f"Only the last chunk may be no multiple of {_CHUNK} bytes")
        have = len(session.received)
        if start > have:
            raise RefusedError(503, "backendError", f"The chunk starts at {start}, only {have} bytes have arrived")
        session.received += request.body[have - start :]  # what is here already is not taken twice
        return total
