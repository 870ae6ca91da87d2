"""What would Alibaba Cloud OSS answer? Its HTTP dialect, from memory, as far as oss2 and ossfs speak it.

Kept of the real one: signatures (version 1), `x-oss-forbid-overwrite` (exactly one writer wins),
crc64 in every answer, listings of both versions, multipart uploads, appends with their position
rule, and the odd rule for ranges. Not kept: versioning, symbolic links, callbacks, ACLs.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import threading
import time
from dataclasses import replace
from urllib.parse import unquote
from xml.etree import ElementTree

from .faults import HttpServer, Reply, Request
from .oss_dialect import (
    SUBRESOURCES,
    RefusedError,
    encoder,
    error_reply,
    iso_time,
    media_reply,
    signature,
    unknown,
    xml_reply,
)
from .oss_objects import Object, Upload, about_upload, list_objects, list_parts, list_uploads, new_object

__all__ = ["OssServer"]

_MOST_DELETED_AT_ONCE = 1000
_SMALLEST_PART = 100 * 1024
_OWNER = {"ID": "1", "DisplayName": "1"}
_PLACE = {"Location": "oss-local", "ExtranetEndpoint": "127.0.0.1", "IntranetEndpoint": "127.0.0.1"}
_BORN = {"CreationDate": iso_time(0), "StorageClass": "Standard"}


class OssServer(HttpServer):
    """Buckets and objects in memory. Its `url` is the endpoint for oss2 and ossfs."""

    def __init__(self, key: str, secret: str) -> None:
        super().__init__()
        self._key, self._secret = key, secret
        self._lock = threading.Lock()
        self._buckets: dict[str, dict[str, Object]] = {}
        self._uploads: dict[str, dict[str, Upload]] = {}
        self._numbers = itertools.count(1)

    def create_bucket(self, name: str) -> None:
        with self._lock:
            self._create_bucket(name)

    def answer(self, request: Request) -> Reply:
        # One lock around every request: "is it there?" and the write that depends on it are one step.
        with self._lock:
            try:
                self._check_signature(request)
                reply = self._answer(request)
            except RefusedError as refused:
                reply = error_reply(refused, request.method)
            return replace(reply, headers={**reply.headers, "x-oss-request-id": f"{next(self._numbers):024X}"})

    def failure(self, status: int) -> Reply:
        return error_reply(RefusedError(status, "InternalError", "injected by the test"), "GET")

    def _check_signature(self, request: Request) -> None:
        authorization = request.headers.get("Authorization")
        if authorization is None:
            raise RefusedError(403, "AccessDenied", "Anonymous access is forbidden for this operation.")
        key, _, signed = authorization.removeprefix("OSS ").partition(":")
        if key != self._key:
            raise RefusedError(403, "InvalidAccessKeyId")
        if signed != signature(self._secret, request):
            raise RefusedError(403, "SignatureDoesNotMatch")

    def _answer(self, request: Request) -> Reply:
        bucket, _, key = unquote(request.path[1:]).partition("/")
        operation = sorted((request.query.keys() & SUBRESOURCES) - {"continuation-token", "sequential"})
        if key:
            return self._on_object(request, bucket, key, operation)
        if bucket:
            return self._on_bucket(request, bucket, operation)
        buckets = [{"Name": name, **_PLACE, **_BORN} for name in sorted(self._buckets)]
        return xml_reply("ListAllMyBucketsResult", {"Owner": _OWNER, "Buckets": {"Bucket": buckets}})

    def _on_bucket(self, request: Request, bucket: str, operation: list[str]) -> Reply:
        if (request.method, operation) == ("PUT", []):
            return self._create_bucket(bucket)
        objects = self._objects(bucket)
        match [request.method, *operation]:
            case ["DELETE"]:
                if objects or self._uploads[bucket]:
                    raise RefusedError(409, "BucketNotEmpty")
                del self._buckets[bucket], self._uploads[bucket]
                return Reply(204)
            case ["GET"]:
                return list_objects(bucket, objects, request.query)
            case ["GET", "bucketInfo"]:
                about = {"Name": bucket, **_PLACE, **_BORN, "Owner": _OWNER, "AccessControlList": {"Grant": "private"}}
                return xml_reply("BucketInfo", {"Bucket": about})
            case ["GET", "location"]:
                return xml_reply("LocationConstraint", _PLACE["Location"])
            case ["GET", "stat"]:
                stored = sum(len(found.data) for found in objects.values())
                uploads = len(self._uploads[bucket])
                counts = {"Storage": stored, "ObjectCount": len(objects), "MultipartUploadCount": uploads}
                return xml_reply("BucketStat", counts)
            case ["GET", "uploads"]:
                return list_uploads(bucket, self._uploads[bucket], request.query)
            case ["POST", "delete"]:
                return _delete_many(objects, request)
        raise unknown(request)

    def _on_object(self, request: Request, bucket: str, key: str, operation: list[str]) -> Reply:
        objects = self._objects(bucket)
        match [request.method, *operation]:
            case ["PUT"] if "x-oss-copy-source" in request.headers:
                return self._copy(request, objects, key)
            case ["PUT"]:
                _check_overwrite(request, objects, key)
                objects[key] = _received(request)
                return Reply(200, headers=objects[key].digests)
            case ["GET"]:
                found = _find(objects, key)
                return media_reply(found.data, found.description, request.headers)
            case ["HEAD"] | ["HEAD" | "GET", "objectMeta"]:
                found = _find(objects, key)
                return Reply(200, headers={**found.description, "Content-Length": str(len(found.data))})
            case ["DELETE"]:
                objects.pop(key, None)
                return Reply(204)
            case ["POST", "append", "position"]:
                return _append(request, objects, key)
            case ["POST", "uploads"]:
                _check_overwrite(request, objects, key)
                upload = Upload(f"{next(self._numbers):032X}", key, time.time(), _kept_headers(request))
                self._uploads[bucket][upload.id] = upload
                return about_upload("InitiateMultipartUploadResult", request, bucket, key, {"UploadId": upload.id})
            case ["PUT", "partNumber", "uploadId"] if "x-oss-copy-source" in request.headers:
                return self._copy_part(request, self._upload(request, bucket, key))
            case ["PUT", "partNumber", "uploadId"]:
                part = _received(request)
                self._upload(request, bucket, key).parts[int(request.query["partNumber"])] = part
                return Reply(200, headers=part.digests)
            case ["POST", "uploadId"]:
                return self._complete(request, bucket, key)
            case ["DELETE", "uploadId"]:
                del self._uploads[bucket][self._upload(request, bucket, key).id]
                return Reply(204)
            case ["GET", "uploadId"]:
                return list_parts(self._upload(request, bucket, key), request, bucket)
        raise unknown(request)

    def _create_bucket(self, name: str) -> Reply:
        if name in self._buckets:
            raise RefusedError(409, "BucketAlreadyExists")
        self._buckets[name], self._uploads[name] = {}, {}
        return Reply(200)

    def _objects(self, bucket: str) -> dict[str, Object]:
        if bucket not in self._buckets:
            raise RefusedError(404, "NoSuchBucket", "The specified bucket does not exist.")
        return self._buckets[bucket]

    def _copy(self, request: Request, objects: dict[str, Object], key: str) -> Reply:
        found = self._copied(request)
        _check_overwrite(request, objects, key)
        objects[key] = copy = replace(found, modified=time.time(), kind="Normal")
        answer = {"ETag": copy.digests["ETag"], "LastModified": iso_time(copy.modified)}
        return xml_reply("CopyObjectResult", answer, headers=copy.digests)

    def _copy_part(self, request: Request, upload: Upload) -> Reply:
        found, spoken = self._copied(request), request.headers.get("x-oss-copy-source-range", "bytes=0-")
        start, _, last = spoken.removeprefix("bytes=").partition("-")
        stop = int(last) + 1 if last else len(found.data)
        if not int(start) < stop <= len(found.data):
            raise RefusedError(416, "InvalidRange", "The requested range cannot be satisfied")
        part = upload.parts[int(request.query["partNumber"])] = new_object(found.data[int(start) : stop], {})
        answer = {"ETag": part.digests["ETag"], "LastModified": iso_time(part.modified)}
        return xml_reply("CopyPartResult", answer, headers=part.digests)

    def _copied(self, request: Request) -> Object:
        from_bucket, _, from_key = unquote(request.headers["x-oss-copy-source"]).removeprefix("/").partition("/")
        return _find(self._objects(from_bucket), from_key)

    def _upload(self, request: Request, bucket: str, key: str) -> Upload:
        upload = self._uploads[bucket].get(request.query["uploadId"])
        if upload is None or upload.key != key:
            raise RefusedError(404, "NoSuchUpload", "The specified upload does not exist.")
        return upload

    def _complete(self, request: Request, bucket: str, key: str) -> Reply:
        upload, objects = self._upload(request, bucket, key), self._buckets[bucket]
        _check_overwrite(request, objects, key)
        named = [
            (int(node.findtext("PartNumber", "0")), node.findtext("ETag", "").strip('"'))
            for node in ElementTree.fromstring(request.body).iterfind("Part")
        ]
        numbers = [number for number, _ in named]
        if numbers != sorted(set(numbers)):
            raise RefusedError(400, "InvalidPartOrder")
        if not named or any(number not in upload.parts or upload.parts[number].etag != etag for number, etag in named):
            raise RefusedError(400, "InvalidPart")
        parts = [upload.parts[number] for number in numbers]
        if any(len(part.data) < _SMALLEST_PART for part in parts[:-1]):
            raise RefusedError(400, "EntityTooSmall")
        etag = hashlib.md5(b"".join(bytes.fromhex(part.etag) for part in parts)).hexdigest().upper()
        whole = new_object(b"".join(part.data for part in parts), upload.headers, "Multipart")
        objects[key] = whole = replace(whole, etag=f"{etag}-{len(parts)}")
        del self._uploads[bucket][upload.id]
        reply = about_upload("CompleteMultipartUploadResult", request, bucket, key, {"ETag": f'"{whole.etag}"'})
        return replace(reply, headers={**reply.headers, **whole.digests})


# What a request does to the objects of one bucket


def _received(request: Request) -> Object:
    _check_md5(request)
    return new_object(request.body, _kept_headers(request))


def _kept_headers(request: Request) -> dict[str, str]:
    kept = ("content-type", "content-encoding", "x-oss-meta-")
    return {name.lower(): value for name, value in request.headers.items() if name.lower().startswith(kept)}


def _check_md5(request: Request) -> None:
    actual = base64.b64encode(hashlib.md5(request.body).digest()).decode()
    if request.headers.get("Content-MD5", actual) != actual:
        raise RefusedError(400, "InvalidDigest", "The Content-MD5 you specified was invalid.")


def _check_overwrite(request: Request, objects: dict[str, Object], key: str) -> None:
    if key in objects and request.headers.get("x-oss-forbid-overwrite", "").lower() == "true":
        message = "The object you specified already exists and can not be overwritten."
        raise RefusedError(409, "FileAlreadyExists", message)


def _find(objects: dict[str, Object], key: str) -> Object:
    if key not in objects:
        raise RefusedError(404, "NoSuchKey", "The specified key does not exist.")
    return objects[key]


def _append(request: Request, objects: dict[str, Object], key: str) -> Reply:
    added = _received(request)
    old = objects.get(key) or new_object(b"", added.headers, "Appendable")
    if old.kind != "Appendable":
        raise RefusedError(409, "ObjectNotAppendable", "The object is not appendable")
    if int(request.query["position"]) != len(old.data):
        raise RefusedError(409, "PositionNotEqualToLength", "Position is not equal to file length")
    objects[key] = grown = new_object(old.data + added.data, old.headers, "Appendable")
    return Reply(200, headers={**grown.digests, "x-oss-next-append-position": str(len(grown.data))})


def _delete_many(objects: dict[str, Object], request: Request) -> Reply:
    if "Content-MD5" not in request.headers:
        raise RefusedError(400, "MissingArgument", "Missing Some Required Arguments: Content-MD5")
    _check_md5(request)
    wanted, encode = ElementTree.fromstring(request.body), encoder(request.query)
    keys = [node.text or "" for node in wanted.iterfind("Object/Key")]
    if not 0 < len(keys) <= _MOST_DELETED_AT_ONCE:
        raise RefusedError(400, "MalformedXML", f"{len(keys)} keys, 1 to {_MOST_DELETED_AT_ONCE} are allowed")
    for key in keys:
        objects.pop(key, None)
    deleted = [] if wanted.findtext("Quiet") == "true" else [{"Key": encode(key)} for key in keys]
    return xml_reply("DeleteResult", {"EncodingType": request.query.get("encoding-type"), "Deleted": deleted})
