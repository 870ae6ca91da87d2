"""Is the server that stands for Alibaba OSS honest? As oss2 and ossfs see it."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable
from email.message import Message

import oss2
import pytest
from oss2.exceptions import OssError
from servers import Bucket
from servers.clients import ODD_KEYS, filesystem, statuses_at_once, winners
from servers.faults import Fault, Request
from servers.oss_dialect import signature
from servers.proxy import Proxy

_PART = 100 * 1024


def _oss_bucket(bucket: Bucket, secret: str | None = None) -> oss2.Bucket:
    options = bucket.options
    return oss2.Bucket(oss2.Auth(options["key"], secret or options["secret"]), options["endpoint"], bucket.name)


def _code(call: Callable[[], object]) -> tuple[int, str]:
    with pytest.raises(OssError) as caught:
        call()
    return caught.value.status, caught.value.code


def test_oss_keeps_what_oss2_writes_whatever_its_name_and_bytes(oss):
    bucket = _oss_bucket(oss)
    for key in ODD_KEYS:
        bucket.put_object(key, key.encode(), headers={"x-oss-meta-origin": "test", "Content-Type": "text/x"})
    bucket.put_object("empty", b"")
    assert [bucket.get_object(key).read().decode() for key in ODD_KEYS] == ODD_KEYS
    assert [item.key for item in oss2.ObjectIterator(bucket)] == sorted([*ODD_KEYS, "empty"])
    head = bucket.head_object("zz")
    assert (head.content_length, head.content_type, head.headers["x-oss-meta-origin"]) == (2, "text/x", "test")
    assert (head.etag, head.object_type) == (hashlib.md5(b"zz").hexdigest().upper(), "Normal")
    assert bucket.get_object_meta("empty").content_length == 0


def test_oss_refuses_a_wrong_secret_an_unknown_key_and_strangers(oss):
    endpoint = oss.options["endpoint"]
    assert _code(lambda: _oss_bucket(oss, "wrong").put_object("a", b"x")) == (403, "SignatureDoesNotMatch")
    stranger = oss2.Bucket(oss2.Auth("nobody", "x"), endpoint, oss.name)
    assert _code(lambda: stranger.get_object("a")) == (403, "InvalidAccessKeyId")
    anonymous = oss2.Bucket(oss2.AnonymousAuth(), endpoint, oss.name)
    assert _code(lambda: list(oss2.ObjectIterator(anonymous))) == (403, "AccessDenied")
    assert _code(lambda: anonymous.head_object("a")) == (403, "AccessDenied")


def test_oss_refuses_a_request_that_was_changed_after_it_was_signed(oss_server, oss):
    with Proxy(oss_server.url) as eavesdropper:
        endpoint, options = eavesdropper.url, oss.options
        bucket = oss2.Bucket(oss2.Auth(options["key"], options["secret"]), endpoint, oss.name)
        bucket.put_object("a", b"x", headers={"x-oss-forbid-overwrite": "true"})  # the Host is not signed

        answer = eavesdropper.answer

        def tampering(request):
            del request.headers["x-oss-forbid-overwrite"]
            return answer(request)

        eavesdropper.answer = tampering
        call = lambda: bucket.put_object("a", b"y", headers={"x-oss-forbid-overwrite": "true"})  # noqa: E731
        assert _code(call) == (403, "SignatureDoesNotMatch")


def test_oss_has_one_winner_of_sixteen_writers_that_forbid_overwriting(oss):
    bucket, forbid = _oss_bucket(oss), {"x-oss-forbid-overwrite": "true"}
    won = winners(lambda content: bucket.put_object("key", content, headers=forbid), OssError)
    assert [bucket.get_object("key").read()] == won
    assert _code(lambda: bucket.put_object("key", b"x", headers=forbid)) == (409, "FileAlreadyExists")
    assert _code(lambda: bucket.init_multipart_upload("key", headers=forbid)) == (409, "FileAlreadyExists")
    assert _code(lambda: bucket.copy_object(oss.name, "key", "key", headers=forbid)) == (409, "FileAlreadyExists")


def test_oss_looks_and_writes_in_one_step(oss_server, oss):
    headers = Message()
    headers["x-oss-forbid-overwrite"] = "true"
    # Digesting a body of this size lets other threads run, between the look and the write.
    put = Request("PUT", f"/{oss.name}/key", headers, bytes(2**20))
    headers["Authorization"] = f"OSS {oss.options['key']}:{signature(oss.options['secret'], put)}"
    assert statuses_at_once(oss_server, put) == [200] + [409] * 15


def test_oss_has_one_winner_of_sixteen_multipart_uploads_that_forbid_overwriting(oss):
    bucket, forbid = _oss_bucket(oss), {"x-oss-forbid-overwrite": "true"}

    def upload(content: bytes) -> None:
        upload_id = bucket.init_multipart_upload("key").upload_id
        part = bucket.upload_part("key", upload_id, 1, content)
        bucket.complete_multipart_upload("key", upload_id, [oss2.models.PartInfo(1, part.etag)], headers=forbid)

    won = winners(upload, OssError)
    assert [bucket.get_object("key").read()] == won


@pytest.mark.parametrize("iterator", [oss2.ObjectIterator, oss2.ObjectIteratorV2])
def test_oss_pages_through_names_and_folders(oss_server, oss, iterator):
    bucket = _oss_bucket(oss)
    keys = sorted([f"{folder}/ {number}" for folder in "aäc" for number in range(4)] + ["b"])
    for key in keys:
        bucket.put_object(key, b"x")
    oss_server.reset()
    assert [item.key for item in iterator(bucket, max_keys=3)] == keys
    assert len(oss_server.log) == 5
    found = [(item.key, item.is_prefix()) for item in iterator(bucket, delimiter="/", max_keys=1)]
    assert sorted(found) == sorted([("a/", True), ("b", False), ("c/", True), ("ä/", True)])
    assert [item.key for item in iterator(bucket, prefix="c/", delimiter="/")] == [f"c/ {n}" for n in range(4)]


def test_oss_answers_a_range_that_is_not_inside_the_object_with_all_of_it_unless_told_otherwise(oss):
    bucket = _oss_bucket(oss)
    bucket.put_object("key", b"0123456789")

    def read(start: int | None, end: int | None, **headers: str) -> tuple[int, bytes]:
        answer = bucket.get_object("key", byte_range=(start, end), headers=headers)
        return answer.status, answer.read()

    standard = {"x-oss-range-behavior": "standard"}
    inside = [((2, 4), b"234"), ((7, None), b"789"), ((None, 3), b"789"), ((0, 9), b"0123456789")]
    for wanted, content in inside:
        assert read(*wanted) == read(*wanted, **standard) == (206, content)
    for wanted in [(8, 10), (10, 12), (10, None), (None, 11), (5, 4)]:
        assert read(*wanted) == (200, b"0123456789")
    assert read(8, 10, **standard) == (206, b"89")
    assert read(None, 11, **standard) == (206, b"0123456789")
    assert _code(lambda: read(10, 12, **standard)) == (416, "InvalidRange")


def test_oss_puts_parts_together_and_shows_nothing_before(oss):
    bucket = _oss_bucket(oss)
    upload_id = bucket.init_multipart_upload("a b").upload_id
    contents = [os.urandom(_PART), os.urandom(_PART), b"end"]
    parts = []
    for number, content in enumerate(contents, start=1):
        part = bucket.upload_part("a b", upload_id, number, content)
        parts.append(oss2.models.PartInfo(number, part.etag, size=len(content), part_crc=part.crc))
    listed = [(part.part_number, part.size) for part in oss2.PartIterator(bucket, "a b", upload_id, max_parts=2)]
    assert listed == [(1, _PART), (2, _PART), (3, 3)]
    assert [upload.upload_id for upload in oss2.MultipartUploadIterator(bucket, "a")] == [upload_id]
    assert not bucket.object_exists("a b")
    bucket.complete_multipart_upload("a b", upload_id, parts)  # oss2 compares the crc64 of the whole
    assert bucket.get_object("a b").read() == b"".join(contents)
    assert bucket.head_object("a b").etag.endswith("-3")
    assert list(oss2.MultipartUploadIterator(bucket)) == []


def test_oss_refuses_parts_that_are_unknown_disordered_or_too_small_and_keeps_the_upload(oss):
    bucket = _oss_bucket(oss)
    upload_id = bucket.init_multipart_upload("key").upload_id
    etags = [bucket.upload_part("key", upload_id, number, b"%d" % number).etag for number in (1, 2)]

    # Not by `complete_multipart_upload`, which puts the parts in order.
    def complete(*parts: tuple[int, str]) -> tuple[int, str]:
        body = "".join(f"<Part><PartNumber>{n}</PartNumber><ETag>{etag}</ETag></Part>" for n, etag in parts)
        whole = f"<CompleteMultipartUpload>{body}</CompleteMultipartUpload>"
        return _code(lambda: bucket._Bucket__do_object("POST", "key", data=whole, params={"uploadId": upload_id}))

    assert complete((1, etags[0]), (2, etags[1])) == (400, "EntityTooSmall")
    assert complete((2, etags[1]), (1, etags[0])) == (400, "InvalidPartOrder")
    assert complete((1, etags[1])) == complete((3, etags[0])) == complete() == (400, "InvalidPart")
    assert not bucket.object_exists("key")
    bucket.abort_multipart_upload("key", upload_id)
    assert _code(lambda: bucket.upload_part("key", upload_id, 1, b"x")) == (404, "NoSuchUpload")


def test_oss_lists_unfinished_uploads_page_by_page(oss):
    bucket = _oss_bucket(oss)
    begun = [(key, bucket.init_multipart_upload(key).upload_id) for key in ("a", "b ä", "b ä", "c", "d/e")]
    found = [(upload.key, upload.upload_id) for upload in oss2.MultipartUploadIterator(bucket, max_uploads=2)]
    assert found == begun
    assert [upload.key for upload in oss2.MultipartUploadIterator(bucket, prefix="b")] == ["b ä", "b ä"]
    assert [upload.key for upload in bucket.list_multipart_uploads(key_marker="b ä").upload_list] == ["c", "d/e"]


def test_oss_appends_only_at_the_end_of_an_object_that_was_begun_by_appending(oss):
    bucket = _oss_bucket(oss)
    assert bucket.append_object("log", 0, b"one", init_crc=0).next_position == 3
    assert _code(lambda: bucket.append_object("log", 0, b"x")) == (409, "PositionNotEqualToLength")
    assert bucket.append_object("log", 3, b"two").next_position == 6
    assert bucket.get_object("log").read() == b"onetwo"
    assert bucket.head_object("log").object_type == "Appendable"
    bucket.put_object("log", b"new")
    assert _code(lambda: bucket.append_object("log", 3, b"x")) == (409, "ObjectNotAppendable")


def test_oss_says_whether_the_bucket_or_the_object_is_missing(oss):
    bucket, options = _oss_bucket(oss), oss.options
    missing = oss2.Bucket(oss2.Auth(options["key"], options["secret"]), options["endpoint"], "no-such-bucket")
    assert _code(lambda: bucket.get_object("a")) == _code(lambda: bucket.head_object("a")) == (404, "NoSuchKey")
    assert _code(lambda: missing.get_object("a")) == _code(lambda: missing.head_object("a")) == (404, "NoSuchBucket")
    assert _code(lambda: missing.put_object("a", b"x")) == (404, "NoSuchBucket")
    assert _code(lambda: list(oss2.ObjectIterator(missing))) == (404, "NoSuchBucket")
    assert not bucket.object_exists("a")
    bucket.delete_object("a")  # no error, as on the real one


def test_oss_copies_and_deletes_many_at_once(oss):
    bucket = _oss_bucket(oss)
    for key in ODD_KEYS:
        bucket.put_object(key, key.encode())
    bucket.copy_object(oss.name, "a/ä <x>.bin", "copy & co")
    assert bucket.get_object("copy & co").read().decode() == "a/ä <x>.bin"
    deleted = bucket.batch_delete_objects([*ODD_KEYS, "never there"]).deleted_keys
    assert deleted == [*ODD_KEYS, "never there"]
    assert [item.key for item in oss2.ObjectIterator(bucket)] == ["copy & co"]
    assert _code(lambda: bucket.batch_delete_objects([str(n) for n in range(1001)])) == (400, "MalformedXML")


def test_oss_copies_ranges_into_the_parts_of_an_upload(oss):
    bucket, content = _oss_bucket(oss), os.urandom(300 * 1024)
    bucket.put_object("a/ä <x>.bin", content)
    upload, parts = bucket.init_multipart_upload("whole").upload_id, []
    for number, span in enumerate([(0, 100 * 1024 - 1), (100 * 1024, None)], 1):
        part = bucket.upload_part_copy(oss.name, "a/ä <x>.bin", span, "whole", upload, number)
        part.resp.read()
        parts.append(oss2.models.PartInfo(number, part.etag))
    for span in ((0, 300 * 1024), (300 * 1024, None)):
        copy = lambda: bucket.upload_part_copy(oss.name, "a/ä <x>.bin", span, "whole", upload, 3)  # noqa: B023, E731
        assert _code(copy) == (416, "InvalidRange")
    missing = lambda: bucket.upload_part_copy(oss.name, "missing", (0, 1), "whole", upload, 3)  # noqa: E731
    assert _code(missing) == (404, "NoSuchKey")
    bucket.complete_multipart_upload("whole", upload, parts).resp.read()
    assert bucket.get_object("whole").read() == content


def test_oss_refuses_bytes_that_do_not_fit_their_md5(oss):
    bucket = _oss_bucket(oss)
    wrong = base64.b64encode(hashlib.md5(b"other").digest()).decode()
    assert _code(lambda: bucket.put_object("a", b"x", headers={"Content-MD5": wrong})) == (400, "InvalidDigest")
    assert not bucket.object_exists("a")


def test_oss_makes_describes_lists_and_removes_buckets(oss):
    options = oss.options
    auth = oss2.Auth(options["key"], options["secret"])
    bucket = oss2.Bucket(auth, options["endpoint"], f"{oss.name}-2")
    bucket.create_bucket()
    assert _code(bucket.create_bucket) == (409, "BucketAlreadyExists")
    bucket.put_object("a", b"123")
    stat = bucket.get_bucket_stat()
    assert (stat.storage_size_in_bytes, stat.object_count) == (3, 1)
    assert (bucket.get_bucket_info().name, bucket.get_bucket_location().location) == (f"{oss.name}-2", "oss-local")
    names = [found.name for found in oss2.BucketIterator(oss2.Service(auth, options["endpoint"]))]
    assert {oss.name, f"{oss.name}-2"} <= set(names)
    assert _code(bucket.delete_bucket) == (409, "BucketNotEmpty")
    bucket.delete_object("a")
    bucket.delete_bucket()
    assert _code(bucket.get_bucket_info) == (404, "NoSuchBucket")


def test_oss_says_that_it_does_not_know_what_it_does_not_know(oss):
    bucket = _oss_bucket(oss)
    assert _code(bucket.get_bucket_acl) == (501, "NotImplemented")
    assert _code(lambda: bucket.get_object_tagging("a")) == (501, "NotImplemented")
    assert _code(lambda: bucket.list_multipart_uploads(delimiter="/")) == (501, "NotImplemented")


def test_ossfs_runs_on_it_unchanged(oss, tmp_path):
    fs, content = filesystem(oss), os.urandom(11 * 2**20)
    fs.pipe_file(f"{oss.name}/a/small", b"small")
    fs.pipe_file(f"{oss.name}/a/large", content)  # in parts of 5 MiB
    (tmp_path / "file").write_bytes(content)
    fs.put_file(str(tmp_path / "file"), f"{oss.name}/a/file")  # in parts, too, above 10 MiB
    fs.cp_file(f"{oss.name}/a/small", f"{oss.name}/copy")
    assert fs.cat_file(f"{oss.name}/a/large") == fs.cat_file(f"{oss.name}/a/file") == content
    assert fs.find(oss.name) == [f"{oss.name}/{key}" for key in ("a/file", "a/large", "a/small", "copy")]
    assert fs.info(f"{oss.name}/a/large")["size"] == len(content)
    with fs.open(f"{oss.name}/a/large") as file:
        file.seek(-3, 2)
        assert file.read() == content[-3:]
    fs.rm(f"{oss.name}/a", recursive=True)
    assert (fs.exists(f"{oss.name}/a"), fs.exists(f"{oss.name}/copy")) == (False, True)
    with pytest.raises(FileNotFoundError):
        fs.cat_file(f"{oss.name}/a/small")


def test_oss_lost_reply_leaves_the_object_though_the_writer_heard_nothing(oss_server, oss):
    oss_server.faults.append(Fault("PUT", drop="after"))
    bucket = _oss_bucket(oss)
    with pytest.raises(oss2.exceptions.RequestError):
        bucket.put_object("key", b"mine")
    assert bucket.get_object("key").read() == b"mine"


def test_oss_injected_errors_are_spoken_as_its_own(oss_server, oss):
    oss_server.faults.append(Fault("GET", status=503))
    assert _code(lambda: _oss_bucket(oss).get_object("key")) == (503, "InternalError")
