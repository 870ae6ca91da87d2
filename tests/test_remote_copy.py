"""Do object stores copy by themselves, large objects in parts, and leave nothing of a copy that failed?"""

from __future__ import annotations

import errno
import random
from typing import TYPE_CHECKING

import fsspec
import oss2
import pytest
from servers import Bucket
from servers.faults import Fault
from servers.patience import impatient

from ckptmgr.errors import StoreError
from ckptmgr.store import multipart, open_store
from ckptmgr.store.remote import FsspecStore

if TYPE_CHECKING:
    from servers.faults import HttpServer
    from servers.gcs import GcsServer
    from servers.oss import OssServer
    from servers.proxy import Proxy

_MIB = 1 << 20
_PART = 5 * _MIB  # the smallest that S3 takes
_BROKEN = 1000


@pytest.fixture
def data() -> bytes:
    return random.Random(0).randbytes(2 * _PART + 99)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything above 5 MiB is large."""
    monkeypatch.setattr(multipart, "_COPIED_AT_ONCE", _PART)


@pytest.fixture(params=["s3", "oss"])
def parted(request: pytest.FixtureRequest, small_parts: None) -> tuple[Bucket, HttpServer]:
    """A bucket whose store copies a large object in parts, and the server that sees the requests."""
    if request.param == "s3":
        bucket, server = request.getfixturevalue("s3_proxy")
    else:
        bucket, server = request.getfixturevalue("oss"), request.getfixturevalue("oss_server")
    return bucket, server


def _uploads(bucket: Bucket) -> list[str]:
    if bucket.url.startswith("oss"):
        auth = oss2.Auth(bucket.options["key"], bucket.options["secret"])
        found = oss2.MultipartUploadIterator(oss2.Bucket(auth, bucket.options["endpoint"], bucket.name))
        return [upload.key for upload in found]
    fs = fsspec.filesystem("s3", **bucket.options)
    return [upload["Key"] for upload in fs.call_s3("list_multipart_uploads", Bucket=bucket.name).get("Uploads", [])]


def test_a_large_object_is_copied_in_parts_that_never_come_here(parted: tuple[Bucket, HttpServer], data: bytes) -> None:
    bucket, server = parted
    store = open_store(f"{bucket.url}/runs", bucket.options)
    store.put("old", data)
    server.log.clear()
    assert store.copy("old", "new")
    assert sum(line.startswith("PUT ") and "partNumber=" in line for line in server.log) == 3
    assert [line for line in server.log if line.startswith("GET ")] == []
    assert store.get("new") == data
    assert _uploads(bucket) == []


@pytest.mark.usefixtures("small_parts")
@pytest.mark.server
def test_seaweed_copies_in_parts(s3_seaweed: Bucket, data: bytes) -> None:
    store = open_store(f"{s3_seaweed.url}/runs", s3_seaweed.options)
    for size in (_PART, _PART + 1, len(data)):
        store.put("old", data[:size])
        assert store.copy("old", f"new-{size}")
        assert store.get(f"new-{size}") == data[:size]


@pytest.mark.parametrize("match", [r"PUT .*partNumber=2", r"POST .*uploadId="])
def test_a_copy_that_fails_half_way_leaves_nothing(parted: tuple[Bucket, HttpServer], data: bytes, match: str) -> None:
    bucket, server = parted
    store = FsspecStore(f"{bucket.url}/runs", bucket.options, impatient(30))
    store.put("old", data)
    server.faults.append(Fault(match, status=500, count=_BROKEN))
    with pytest.raises(StoreError, match=r"could not copy .*runs/old"):
        store.copy("old", "new")
    server.faults.clear()
    assert (store.stat("new"), _uploads(bucket)) == (None, [])


def test_a_copy_whose_answer_was_lost_is_made_again(parted: tuple[Bucket, HttpServer], data: bytes) -> None:
    bucket, server = parted
    store = open_store(f"{bucket.url}/runs", bucket.options)
    for key, match, size in (("small", "PUT .*small", 9), ("part", "PUT .*partNumber=2", len(data))):
        store.put("old", data[:size])
        server.faults.append(Fault(match, drop="after"))
        assert store.copy("old", key)
        assert store.get(key) == data[:size]
    assert [fault.count for fault in server.faults] == [0, 0]


@pytest.mark.parametrize("status", [405, 501])
@pytest.mark.parametrize("size", [1, _PART + 1])
@pytest.mark.usefixtures("small_parts")
def test_a_store_that_speaks_like_s3_but_does_not_copy_says_so(
    s3_proxy: tuple[Bucket, Proxy], status: int, size: int
) -> None:
    bucket, proxy = s3_proxy
    store = open_store(f"{bucket.url}/runs", bucket.options)
    store.put("old", bytes(size))
    proxy.faults.append(Fault("PUT .*new", status=status, count=_BROKEN))
    assert not store.copy("old", "new")
    assert ([entry.key for entry in store.list()], _uploads(bucket)) == (["old"], [])


def test_gcs_goes_on_with_a_copy_until_it_is_done(
    gcs: Bucket, gcs_server: GcsServer, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(f"{gcs.url}/runs", gcs.options)
    store.put("old", data)
    monkeypatch.setattr(gcs_server, "rewritten_at_once", _PART)
    gcs_server.log.clear()
    gcs_server.faults.append(Fault("POST .*rewriteToken", drop="after"))
    assert store.copy("old", "new")
    asked = [line for line in gcs_server.log if line.startswith("POST ")]
    assert ["rewriteToken" in line for line in asked] == [False, True, True, True]  # one answer was lost
    assert store.get("new") == data


def test_a_copy_that_is_not_allowed_says_where_to_look(oss: Bucket, oss_server: OssServer) -> None:
    store = open_store(f"{oss.url}/runs", oss.options)
    store.put("old", b"1")
    oss_server.faults.append(Fault("PUT .*new", status=403, count=_BROKEN))
    with pytest.raises(StoreError, match=r"no permission to copy .* check the credentials") as caught:
        store.copy("old", "new")
    assert caught.value.errno == errno.EACCES


def test_a_folder_is_known_by_one_page_of_its_listing(gcs: Bucket, gcs_server: GcsServer) -> None:
    store = open_store(f"{gcs.url}/runs", gcs.options)
    for n in range(3):
        store.put(f"a/{n}", b"")
    gcs_server.log.clear()
    assert store.stat("a/") is not None
    assert len(gcs_server.log) == 1
