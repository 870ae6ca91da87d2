"""Is the server that stands for Google Cloud Storage honest? As gcsfs sees it, and by bare requests."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from email.message import Message
from urllib.parse import urlsplit

import pytest
from fsspec.asyn import sync
from gcsfs.retry import HttpError
from servers import Bucket
from servers.clients import ODD_KEYS, ask, filesystem, statuses_at_once, winners
from servers.faults import Fault, Request
from servers.gcs import GcsServer

_CHUNK = 256 * 1024


def _begin_upload(server: GcsServer, bucket: Bucket, query: str = "") -> str:
    """Path and query of a new resumable upload to `key`."""
    start = f"/upload/storage/v1/b/{bucket.name}/o?uploadType=resumable&name=key{query}"
    place = urlsplit(ask(server.url, "POST", start)[2]["Location"])
    return f"{place.path}?{place.query}"


def test_gcs_keeps_what_gcsfs_writes_whatever_its_name_and_bytes(gcs):
    fs = filesystem(gcs)
    contents = [b"", b"\r", b"\n", b"\r\n--==0==--\r\n", b"x\n--==0==--", bytes(range(256))]
    for key, content in zip(ODD_KEYS, contents, strict=True):
        fs.pipe_file(f"{gcs.url}/{key}", content, consistency="md5")
    fs.invalidate_cache()
    assert fs.find(gcs.url) == sorted(f"{gcs.name}/{key}" for key in ODD_KEYS)
    assert [fs.cat_file(f"{gcs.url}/{key}") for key in ODD_KEYS] == contents
    assert fs.info(f"{gcs.url}/zz")["size"] == 256


@pytest.mark.parametrize("size", [10, 2 * _CHUNK], ids=["simple", "resumable"])
def test_gcs_has_one_winner_of_sixteen_writers_that_only_create(gcs, size):
    fs = filesystem(gcs)

    def create(content: bytes) -> None:
        fs.pipe_file(f"{gcs.url}/key", content.ljust(size), mode="create", chunksize=_CHUNK)

    won = winners(create, FileExistsError)
    assert [fs.cat_file(f"{gcs.url}/key").rstrip()] == won


def test_gcs_looks_and_writes_in_one_step(gcs_server, gcs):
    target = f"/upload/storage/v1/b/{gcs.name}/o?uploadType=media&name=key&ifGenerationMatch=0"
    # Digesting a body of this size lets other threads run, between the look and the write.
    create = Request("POST", target, Message(), bytes(2**20))
    assert statuses_at_once(gcs_server, create) == [200] + [412] * 15


def test_gcs_lets_only_one_of_two_uploads_create_that_both_began_before_either_ended(gcs_server, gcs):
    sessions = [_begin_upload(gcs_server, gcs, "&ifGenerationMatch=0") for _ in range(2)]
    assert [ask(gcs_server.url, "PUT", session, b"x")[0] for session in sessions] == [200, 412]
    assert ask(gcs_server.url, "PUT", sessions[1], b"x")[0] == 412


def test_gcs_gives_every_write_its_own_generation_and_keeps_to_preconditions(gcs_server, gcs):
    target = f"/upload/storage/v1/b/{gcs.name}/o?uploadType=media&name=key"
    first, second = (int(json.loads(ask(gcs_server.url, "POST", target)[1])["generation"]) for _ in range(2))
    assert second > first
    assert ask(gcs_server.url, "POST", f"{target}&ifGenerationMatch={first}")[0] == 412
    assert ask(gcs_server.url, "POST", f"{target}&ifGenerationNotMatch={second}")[0] == 412
    key = f"/storage/v1/b/{gcs.name}/o/key"
    assert ask(gcs_server.url, "DELETE", f"{key}?ifGenerationMatch={first}")[0] == 412
    assert ask(gcs_server.url, "GET", f"{key}?generation={first}")[0] == 404
    assert ask(gcs_server.url, "GET", f"{key}?generation={second}")[0] == 200
    assert ask(gcs_server.url, "POST", f"{target}&ifGenerationMatch={second}")[0] == 200


def test_gcs_pages_through_names_and_folders(gcs_server, gcs):
    fs = filesystem(gcs)
    keys = [f"{folder}/{number}" for folder in "abc" for number in range(5)]
    for key in keys:
        fs.pipe_file(f"{gcs.url}/{key}", b"x")
    fs.invalidate_cache()
    gcs_server.reset()
    assert fs.ls(f"{gcs.url}/b", items_per_call=2) == [f"{gcs.name}/b/{number}" for number in range(5)]
    assert ["pageToken" in line for line in gcs_server.log] == [False, True, True]
    assert fs.ls(gcs.url, items_per_call=1) == [f"{gcs.name}/{folder}" for folder in "abc"]
    assert fs.find(gcs.url) == [f"{gcs.name}/{key}" for key in keys]


def test_gcs_answers_ranges_cuts_them_at_the_end_and_refuses_one_behind_it(gcs):
    fs, key = filesystem(gcs), f"{gcs.url}/key"
    fs.pipe_file(key, b"0123456789")
    assert fs.cat_file(key, start=2, end=5) == b"234"
    assert fs.cat_file(key, start=7) == b"789"
    assert fs.cat_file(key, start=-3) == b"789"
    assert fs.cat_file(key, start=8, end=99) == b"89"
    with pytest.raises(HttpError, match="cannot be satisfied"):
        fs.cat_file(key, start=10, end=12)


def test_gcs_takes_an_object_in_chunks_and_shows_nothing_before_the_last(gcs_server, gcs):
    fs, key, content = filesystem(gcs), f"{gcs.url}/key", os.urandom(5 * _CHUNK + 7)
    with fs.open(key, "wb", block_size=_CHUNK, consistency="crc32c") as file:
        for start in range(0, len(content), _CHUNK):
            file.write(content[start : start + _CHUNK])
            assert not fs.exists(key)
    assert fs.cat_file(key) == content
    assert sum("upload_id" in line for line in gcs_server.log) > 2


def test_gcs_holds_a_resumable_upload_to_its_rules(gcs_server, gcs):
    session = _begin_upload(gcs_server, gcs)

    def put(content_range: str, body: bytes = b"") -> tuple[int, str | None]:
        status, _, headers = ask(gcs_server.url, "PUT", session, body, {"Content-Range": content_range})
        return status, headers.get("Range")

    chunk = bytes(_CHUNK)
    assert put("bytes */*") == (308, None)
    assert put("bytes 0-9/*", b"0123456789") == (400, None)  # no multiple of 256 KiB
    assert put("bytes 0-9/10", b"01234") == (400, None)  # not the bytes it speaks of
    assert put("0-9", b"0123456789") == (400, None)
    assert put(f"bytes {_CHUNK}-{2 * _CHUNK - 1}/*", chunk) == (503, None)  # a gap before it
    assert put(f"bytes 0-{_CHUNK - 1}/*", chunk) == (308, f"bytes=0-{_CHUNK - 1}")
    assert put("bytes */*") == (308, f"bytes=0-{_CHUNK - 1}")
    assert put(f"bytes 0-{_CHUNK + 2}/{_CHUNK + 3}", chunk + b"end") == (200, None)  # sent again, taken once
    assert put("bytes */*") == (200, None)
    assert filesystem(gcs).cat_file(f"{gcs.url}/key") == chunk + b"end"


def test_gcs_forgets_an_upload_that_was_given_up(gcs_server, gcs):
    fs = filesystem(gcs)
    file = fs.open(f"{gcs.url}/key", "wb", block_size=_CHUNK)
    file.write(bytes(2 * _CHUNK))
    session = urlsplit(file.location)
    file.discard()
    file.closed = True
    assert ask(gcs_server.url, "PUT", f"{session.path}?{session.query}", b"x")[0] == 404
    assert not fs.exists(f"{gcs.url}/key")


@pytest.mark.parametrize("kind", ["crc32c", "md5"])
def test_gcs_refuses_bytes_that_do_not_fit_their_checksum(gcs_server, gcs, kind):
    right = {"crc32c": "AAAAAA==", "md5": base64.b64encode(hashlib.md5(b"").digest()).decode()}[kind]
    target = f"/upload/storage/v1/b/{gcs.name}/o?uploadType=media&name=key"
    assert ask(gcs_server.url, "POST", target, b"x", headers={"X-Goog-Hash": f"{kind}={right}"})[0] == 400
    assert ask(gcs_server.url, "GET", f"/storage/v1/b/{gcs.name}/o/key")[0] == 404
    assert ask(gcs_server.url, "POST", target, b"", headers={"X-Goog-Hash": f"{kind}={right}"})[0] == 200


def test_gcs_says_whether_the_bucket_or_the_object_is_missing(gcs_server, gcs):
    status, body, _ = ask(gcs_server.url, "GET", f"/storage/v1/b/{gcs.name}/o/key?alt=media")
    assert (status, json.loads(body)["error"]["message"]) == (404, f"No such object: {gcs.name}/key")
    for method, target in [
        ("GET", "/storage/v1/b/no/o/key"),
        ("GET", "/storage/v1/b/no/o"),
        ("DELETE", "/storage/v1/b/no"),
    ]:
        status, body, _ = ask(gcs_server.url, method, target)
        assert (status, json.loads(body)["error"]["message"]) == (404, "The specified bucket does not exist.")
    fs = filesystem(gcs)
    with pytest.raises(FileNotFoundError):
        fs.cat_file(f"{gcs.url}/key")
    with pytest.raises(FileNotFoundError):
        fs.pipe_file("gs://no-such-bucket/key", b"x")


def test_gcs_copies_moves_and_deletes_one_or_many(gcs_server, gcs):
    fs = filesystem(gcs)
    for key in ODD_KEYS:
        fs.pipe_file(f"{gcs.url}/{key}", key.encode())
    fs.cp_file(f"{gcs.url}/zz", f"{gcs.url}/copy")
    fs.mv_file(f"{gcs.url}/zz", f"{gcs.url}/moved")
    fs.invalidate_cache()
    assert [fs.cat_file(f"{gcs.url}/{key}") for key in ("copy", "moved")] == [b"zz", b"zz"]
    assert not fs.exists(f"{gcs.url}/zz")
    fs.rm_file(f"{gcs.url}/copy")
    left = [f"{gcs.name}/{key}" for key in [*ODD_KEYS[:-1], "moved"]]
    absent = [f"{gcs.name}/never there"]
    # Public `rm` sends batches to Google's own host only.
    *deleted, refused = sync(fs.loop, fs._rm_files, left + absent)
    assert (deleted, type(refused)) == (left, OSError)
    assert sum(line.startswith("POST /batch") for line in gcs_server.log) == 1
    assert fs.find(gcs.url) == []
    with pytest.raises(FileNotFoundError):
        fs.rm_file(f"{gcs.url}/copy")


def test_gcs_rewrites_as_much_at_a_time_as_it_is_told_to(gcs_server, gcs, monkeypatch):
    fs, content = filesystem(gcs), os.urandom(10)
    fs.pipe_file(f"{gcs.url}/key", content)
    monkeypatch.setattr(gcs_server, "rewritten_at_once", 4)
    path, answers, token = f"/storage/v1/b/{gcs.name}/o/key/rewriteTo/b/{gcs.name}/o/copy", [], ""
    for _ in range(3):
        assert not fs.exists(f"{gcs.url}/copy")
        answers.append(json.loads(ask(gcs_server.url, "POST", path + token)[1]))
        token = f"?rewriteToken={answers[-1].get('rewriteToken')}"
    assert [(answer["done"], answer["totalBytesRewritten"]) for answer in answers] == [
        (False, "4"),
        (False, "8"),
        (True, "10"),
    ]
    fs.cp_file(f"{gcs.url}/key", f"{gcs.url}/other")
    assert fs.cat_file(f"{gcs.url}/copy") == fs.cat_file(f"{gcs.url}/other") == content


def test_gcs_makes_lists_and_removes_buckets(gcs):
    fs = filesystem(gcs)
    fs.mkdir(f"{gcs.name}-2")
    assert {f"{gcs.name}/", f"{gcs.name}-2/"} <= set(fs.ls(""))
    with pytest.raises(HttpError, match="succeeded"):
        fs.mkdir(f"{gcs.name}-2")
    fs.pipe_file(f"{gcs.name}-2/key", b"x")
    with pytest.raises(HttpError, match="not empty"):
        fs.rmdir(f"{gcs.name}-2")
    fs.rm_file(f"{gcs.name}-2/key")
    fs.rmdir(f"{gcs.name}-2")
    assert not fs.exists(f"{gcs.name}-2")


def test_gcs_takes_a_body_of_unknown_length(gcs_server, gcs):
    target = f"/upload/storage/v1/b/{gcs.name}/o?uploadType=media&name=key"
    assert ask(gcs_server.url, "POST", target, iter([b"one, ", b"two"]))[0] == 200
    assert filesystem(gcs).cat_file(f"{gcs.url}/key") == b"one, two"


def test_gcs_copies_with_new_properties_when_some_are_given(gcs_server, gcs):
    fs, here = filesystem(gcs), f"/storage/v1/b/{gcs.name}/o"
    fs.pipe_file(f"{gcs.url}/key", b"x", content_type="text/old")
    for to, body in [("same", b""), ("other", b'{"contentType": "text/new"}')]:
        assert ask(gcs_server.url, "POST", f"{here}/key/copyTo/b/{gcs.name}/o/{to}", body)[0] == 200
    assert [fs.info(f"{gcs.url}/{key}")["contentType"] for key in ("same", "other")] == ["text/old", "text/new"]


def test_gcs_says_that_it_does_not_know_what_it_does_not_know(gcs_server, gcs):
    assert ask(gcs_server.url, "POST", f"/storage/v1/b/{gcs.name}/o/key/compose")[0] == 501
    assert ask(gcs_server.url, "GET", "/favicon.ico")[0] == 501


def test_gcs_lost_reply_leaves_the_object_though_the_writer_heard_that_it_exists(gcs_server, gcs):
    gcs_server.faults.append(Fault("POST /upload", drop="after"))
    fs = filesystem(gcs)
    with pytest.raises(FileExistsError):
        fs.pipe_file(f"{gcs.url}/key", b"mine", mode="create")
    assert fs.cat_file(f"{gcs.url}/key") == b"mine"


def test_gcs_injected_errors_are_spoken_as_its_own(gcs_server, gcs):
    gcs_server.faults.append(Fault("GET", status=403))
    with pytest.raises(OSError, match=r"(?s)Forbidden.*injected by the test"):
        filesystem(gcs).cat_file(f"{gcs.url}/key")
