"""What does OSS keep, and how does it list it? Objects, unfinished uploads and their parts."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

from oss2.utils import Crc64

from .faults import Reply, Request
from .listing import page
from .oss_dialect import RefusedError, encoder, iso_time, xml_reply

__all__ = ["Object", "Upload", "about_upload", "list_objects", "list_parts", "list_uploads", "new_object"]

_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Object:
    data: bytes
    etag: str
    crc64: int
    modified: float
    headers: Mapping[str, str]
    kind: str = "Normal"

    @property
    def digests(self) -> dict[str, str]:
        return {"ETag": f'"{self.etag}"', "x-oss-hash-crc64ecma": str(self.crc64)}

    @property
    def description(self) -> dict[str, str]:
        position = {"x-oss-next-append-position": str(len(self.data))} if self.kind == "Appendable" else {}
        return {
            "content-type": "application/octet-stream",
            **self.headers,
            **self.digests,
            **position,
            "Last-Modified": formatdate(self.modified, usegmt=True),
            "x-oss-object-type": self.kind,
            "x-oss-storage-class": "Standard",
        }


@dataclass(frozen=True, slots=True)
class Upload:
    id: str
    key: str
    initiated: float
    headers: Mapping[str, str]
    parts: dict[int, Object] = field(default_factory=dict)


def new_object(data: bytes, headers: Mapping[str, str], kind: str = "Normal") -> Object:
    crc = Crc64()
    crc(data)
    return Object(data, hashlib.md5(data).hexdigest().upper(), crc.crc, time.time(), headers, kind)


def list_objects(bucket: str, objects: dict[str, Object], query: dict[str, str]) -> Reply:
    if query.get("list-type") == "2":
        after, token = query.get("continuation-token") or query.get("start-after", ""), "NextContinuationToken"
    else:
        after, token = query.get("marker", ""), "NextMarker"
    limit, encode = min(int(query.get("max-keys") or 100), _PAGE), encoder(query)
    listed = page(objects, query.get("prefix", ""), query.get("delimiter", ""), after, limit)
    contents = [
        {
            "Key": encode(key),
            "LastModified": iso_time(objects[key].modified),
            "ETag": objects[key].digests["ETag"],
            "Type": objects[key].kind,
            "Size": len(objects[key].data),
            "StorageClass": "Standard",
        }
        for key in listed.names
    ]
    answer: dict[str, Any] = {
        "Name": bucket,
        "MaxKeys": limit,
        "EncodingType": query.get("encoding-type"),
        "IsTruncated": _truth(listed.last is not None),
        token: None if listed.last is None else encode(listed.last),
        "Contents": contents,
        "CommonPrefixes": [{"Prefix": encode(prefix)} for prefix in listed.prefixes],
    }
    return xml_reply("ListBucketResult", answer)


def list_uploads(bucket: str, uploads: dict[str, Upload], query: dict[str, str]) -> Reply:
    if query.get("delimiter"):
        raise RefusedError(501, "NotImplemented", "uploads are listed without a delimiter only")
    # Without the id of an upload the marker stands behind all uploads of its key.
    after = (query.get("key-marker", ""), query.get("upload-id-marker") or "~")
    begun = sorted((one.key, one.id, one.initiated) for one in uploads.values())
    prefix, limit, encode = query.get("prefix", ""), min(int(query.get("max-uploads") or _PAGE), _PAGE), encoder(query)
    rest = [one for one in begun if one[0].startswith(prefix) and one[:2] > after]
    key, upload_id, _ = rest[:limit][-1] if rest else ("", "", 0)
    answer: dict[str, Any] = {
        "Bucket": bucket,
        "EncodingType": query.get("encoding-type"),
        "IsTruncated": _truth(len(rest) > limit),
        "NextKeyMarker": encode(key),
        "NextUploadIdMarker": upload_id,
        "Upload": [{"Key": encode(key), "UploadId": id_, "Initiated": iso_time(at)} for key, id_, at in rest[:limit]],
    }
    return xml_reply("ListMultipartUploadsResult", answer)


def list_parts(upload: Upload, request: Request, bucket: str) -> Reply:
    query = request.query
    limit, after = min(int(query.get("max-parts") or _PAGE), _PAGE), int(query.get("part-number-marker") or 0)
    rest = [(number, upload.parts[number]) for number in sorted(upload.parts) if number > after]
    parts = [
        {
            "PartNumber": number,
            "ETag": part.digests["ETag"],
            "Size": len(part.data),
            "LastModified": iso_time(part.modified),
            "HashCrc64ecma": part.crc64,
        }
        for number, part in rest[:limit]
    ]
    answer = {
        "UploadId": upload.id,
        "IsTruncated": _truth(len(rest) > limit),
        "NextPartNumberMarker": parts[-1]["PartNumber"] if parts else after,
        "Part": parts,
    }
    return about_upload("ListPartsResult", request, bucket, upload.key, answer)


def about_upload(tag: str, request: Request, bucket: str, key: str, answer: dict[str, Any]) -> Reply:
    encoding, encode = request.query.get("encoding-type"), encoder(request.query)
    return xml_reply(tag, {"EncodingType": encoding, "Bucket": bucket, "Key": encode(key), **answer})


def _truth(value: bool) -> str:
    return "true" if value else "false"
