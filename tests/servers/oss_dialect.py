"""How does Alibaba OSS put it? Its signatures (version 1), its XML, its errors and its ranges."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import time
from collections.abc import Callable, Mapping
from email.message import Message
from urllib.parse import quote, unquote
from xml.etree import ElementTree

from .faults import Reply, Request

__all__ = [
    "SUBRESOURCES",
    "RefusedError",
    "encoder",
    "error_reply",
    "iso_time",
    "media_reply",
    "signature",
    "unknown",
    "xml_reply",
]

# Of a query only these parameters are signed; most of them ask for an operation of their own.
SUBRESOURCES = {
    "acl",
    "append",
    "bucketInfo",
    "continuation-token",
    "delete",
    "location",
    "objectMeta",
    "partNumber",
} | {"position", "sequential", "stat", "tagging", "uploadId", "uploads", "versionId", "versioning", "versions"}


class RefusedError(Exception):
    """What the store will not do, with its status and its code for why."""

    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(message or code)
        self.status, self.code = status, code


def unknown(request: Request) -> RefusedError:
    return RefusedError(501, "NotImplemented", f"this server does not know {request}")


def error_reply(refused: RefusedError, method: str) -> Reply:
    answer = {"Code": refused.code, "Message": str(refused), "RequestId": "0", "HostId": "127.0.0.1"}
    reply = xml_reply("Error", answer, refused.status)
    if method == "HEAD":  # the answer to HEAD has no body, so OSS puts it into a header
        return Reply(refused.status, headers={"x-oss-err": base64.b64encode(reply.body).decode()})
    return reply


def xml_reply(tag: str, content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """`content` as XML: a mapping becomes children, a list one child per item, None no child."""
    root = ElementTree.Element(tag)
    _fill(root, content)
    body = ElementTree.tostring(root, "utf-8", xml_declaration=True)
    return Reply(status, body, {"Content-Type": "application/xml", **(headers or {})})


def _fill(node: ElementTree.Element, content: object) -> None:
    if not isinstance(content, dict):
        node.text = str(content)
        return
    for tag, value in content.items():
        items = value if isinstance(value, list) else [] if value is None else [value]
        for item in items:
            _fill(ElementTree.SubElement(node, tag), item)


def encoder(query: dict[str, str]) -> Callable[[str], str]:
    """How the client wants the keys in an answer written."""
    return (lambda key: quote(key, safe="")) if query.get("encoding-type") == "url" else str


def iso_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(seconds))


def signature(secret: str, request: Request) -> str:
    """What stands behind "OSS <access key>:" in the Authorization header of a well-signed request."""
    headers = {name.lower(): value.encode("latin-1") for name, value in request.headers.items()}
    lines = [
        request.method.encode(),
        headers.get("content-md5", b""),
        headers.get("content-type", b""),
        headers.get("x-oss-date") or headers.get("date", b""),
    ]
    lines += [name.encode() + b":" + value for name, value in sorted(headers.items()) if name.startswith("x-oss-")]
    signed = sorted((name, value) for name, value in request.query.items() if name in SUBRESOURCES)
    parameters = "&".join(f"{name}={value}" if value else name for name, value in signed)
    resource = unquote(request.path) + (f"?{parameters}" if parameters else "")
    digest = hmac.new(secret.encode(), b"\n".join([*lines, resource.encode()]), hashlib.sha1).digest()
    return base64.b64encode(digest).decode()


def media_reply(data: bytes, about: dict[str, str], headers: Message) -> Reply:
    """The bytes, or the range of them that the client's headers name, by OSS's own rule.

    A range that is not wholly inside the object is answered with the whole object and 200, unless
    the client asks for the standard behaviour: cut at the end, or 416 when it starts behind it.
    """
    size = len(data)
    spoken = re.fullmatch(r"bytes=(?:(\d+)-(\d*)|-(\d+))", headers.get("Range", "").strip())
    if spoken is None:
        return Reply(200, data, about)
    if spoken[3]:
        start, stop = size - int(spoken[3]), size
    else:
        start, stop = int(spoken[1]), int(spoken[2]) + 1 if spoken[2] else size
    if not 0 <= start < stop <= size:
        if headers.get("x-oss-range-behavior") != "standard":
            return Reply(200, data, about)
        start, stop = max(start, 0), min(stop, size)
        if start >= stop:
            raise RefusedError(416, "InvalidRange", "The requested range cannot be satisfied")
    return Reply(206, data[start:stop], {**about, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})
