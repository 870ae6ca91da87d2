"""Does a store behind a network keep its promises when answers get lost, buckets are missing and keys are wrong?"""

from __future__ import annotations

import builtins
import errno
import gc
import logging
import pickle
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
from servers import Bucket
from servers.faults import Fault, HttpServer, Reply, Request
from servers.patience import SkippedTime, impatient

from ckptmgr.errors import AlreadyExistsError, ConfigError, NotFoundError, StoreError
from ckptmgr.store import Store, open_store
from ckptmgr.store.dialect import seconds
from ckptmgr.store.multipart import part_size
from ckptmgr.store.oss import OssDialect
from ckptmgr.store.redaction import secrets_of
from ckptmgr.store.remote import FsspecStore
from ckptmgr.store.retries import Patience
from ckptmgr.store.s3 import S3Dialect

if TYPE_CHECKING:
    from servers.gcs import GcsServer
    from servers.proxy import Proxy

_MIB = 1 << 20


@pytest.fixture(params=["s3", "gcs", "oss"])
def faulty(request: pytest.FixtureRequest) -> tuple[Store, HttpServer, Bucket]:
    """A store on each kind of bucket, the server that can be told to fail, and the bucket."""
    if request.param == "s3":
        bucket, server = request.getfixturevalue("s3_proxy")
    else:
        bucket = request.getfixturevalue(request.param)
        server = request.getfixturevalue(f"{request.param}_server")
    return FsspecStore(f"{bucket.url}/runs", bucket.options, impatient(30)), server, bucket


@pytest.fixture(params=["s3_moto", "gcs", "oss"])
def bucket(request: pytest.FixtureRequest) -> Bucket:
    found: Bucket = request.getfixturevalue(request.param)
    return found


def _uploads(bucket: Bucket) -> list[str]:
    """The keys of the unended multipart uploads in a bucket; on GCS nobody can list them."""
    if bucket.url.startswith("gs"):
        return []
    if bucket.url.startswith("oss"):
        import oss2

        auth = oss2.Auth(bucket.options["key"], bucket.options["secret"])
        return [
            u.key for u in oss2.MultipartUploadIterator(oss2.Bucket(auth, bucket.options["endpoint"], bucket.url[6:]))
        ]
    fs = fsspec.filesystem("s3", **bucket.options)
    return [u["Key"] for u in fs.call_s3("list_multipart_uploads", Bucket=bucket.url[5:]).get("Uploads", [])]


# Lost answers

_WRITES = r"(PUT|POST) .*(runs|upload).*"


def test_a_create_whose_answer_was_lost_is_known_as_our_own(faulty: tuple[Store, HttpServer, Bucket]) -> None:
    store, server, _ = faulty
    server.faults.append(Fault(_WRITES, drop="after"))
    store.put("manifest", b"nonce 1", create=True)
    assert store.get("manifest") == b"nonce 1"
    assert [fault.count for fault in server.faults] == [0]


def test_a_lost_answer_does_not_make_the_object_of_another_ours(faulty: tuple[Store, HttpServer, Bucket]) -> None:
    store, server, _ = faulty
    store.put("manifest", b"nonce 1", create=True)
    server.faults.append(Fault(_WRITES, drop="after"))
    with pytest.raises(AlreadyExistsError, match="manifest"):
        store.put("manifest", b"nonce 2", create=True)
    assert store.get("manifest") == b"nonce 1"


def test_a_create_of_nothing_is_known_as_our_own(faulty: tuple[Store, HttpServer, Bucket]) -> None:
    store, server, _ = faulty
    server.faults.append(Fault(_WRITES, drop="after"))
    store.put("record", b"", create=True)
    assert store.get("record") == b""


def test_a_server_error_is_tried_again(faulty: tuple[Store, HttpServer, Bucket]) -> None:
    store, server, _ = faulty
    server.faults += [Fault(_WRITES, status=503), Fault("GET", status=503)]
    store.put("key", b"1")
    assert store.get("key") == b"1"
    assert [fault.count for fault in server.faults] == [0, 0]


def test_an_answer_that_was_cut_off_is_read_again(faulty: tuple[Store, HttpServer, Bucket]) -> None:
    store, server, _ = faulty
    store.put("key", b"0123456789")
    server.faults.append(Fault("GET .*key", cut=4))
    assert store.get("key", 0, 10) == b"0123456789"


def test_a_create_that_meets_another_of_the_same_name_is_tried_again(s3_proxy: tuple[Bucket, Proxy]) -> None:
    """S3 answers 409 while another conditional write is under way, which may yet fail."""
    bucket, proxy = s3_proxy
    proxy.faults.append(Fault("PUT", status=409))
    store = open_store(bucket.url, bucket.options)
    store.put("manifest", b"nonce 1", create=True)
    assert store.get("manifest") == b"nonce 1"
    assert [line.split()[0] for line in proxy.log] == ["PUT", "PUT", "GET"]


def test_a_create_that_keeps_meeting_another_is_an_error(s3_proxy: tuple[Bucket, Proxy]) -> None:
    bucket, proxy = s3_proxy
    proxy.faults.append(Fault("PUT", status=409, count=_BROKEN))
    with pytest.raises(StoreError, match="could not write"):
        FsspecStore(bucket.url, bucket.options, impatient(30)).put("manifest", b"nonce 1", create=True)


def test_a_read_that_is_always_cut_off_is_an_error_not_damage(
    faulty: tuple[Store, HttpServer, Bucket], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    store, server, _ = faulty
    store.put("key", b"0123456789")
    server.faults.append(Fault("GET .*key", cut=4, count=_BROKEN))
    with pytest.raises(StoreError, match="could not read"):
        store.get("key")


def test_a_lost_answer_to_the_last_request_of_an_upload_is_no_failure(faulty: tuple[Store, HttpServer, Bucket]) -> None:
    store, server, _ = faulty
    data = bytes(range(256)) * 4 * 33 * 1024
    writer = store.writer("large")
    writer.write(data)
    server.faults.append(Fault(r"POST .*[?&](uploadId=|upload_id=)|PUT .*upload_id=", drop="after"))
    writer.commit()
    assert store.get("large") == data


# S3 without conditional writes


@pytest.fixture(params=[(501, None), (501, b""), (501, b"<html>not here</html>"), (400, None)])
def unconditional(request: pytest.FixtureRequest, s3_proxy: tuple[Bucket, Proxy]) -> tuple[Bucket, Proxy]:
    """A bucket on a server that refuses conditional writes, in one of the words there are for it."""
    from servers.proxy import knows_no_conditions

    status, body = request.param
    knows_no_conditions(s3_proxy[1], status, *(() if body is None else (body,)))
    return s3_proxy


def test_where_conditional_writes_are_refused_a_create_looks_first_and_knows_so_from_then_on(
    unconditional: tuple[Bucket, Proxy], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ckptmgr.store")
    bucket, proxy = unconditional
    time = SkippedTime()
    store = FsspecStore(bucket.url, bucket.options, Patience(600, time.sleep, time))
    store.put("a", b"nonce 1", create=True)
    store.put("b", b"nonce 1", create=True)
    assert [line.split()[0] for line in proxy.log] == ["PUT", "HEAD", "PUT", "HEAD", "PUT"]
    assert time.waits == []
    assert [store.get("a"), store.get("b")] == [b"nonce 1", b"nonce 1"]
    told = [record.msg.split()[0] for record in caplog.records if record.name == "ckptmgr.store"]
    assert told == ["create.condition.unsupported"]


def test_where_conditional_writes_are_refused_the_object_of_another_stays(
    unconditional: tuple[Bucket, Proxy],
) -> None:
    bucket, _ = unconditional
    store = open_store(bucket.url, bucket.options)
    store.put("manifest", b"nonce 1")
    for _ in range(2):  # before it is known what is refused, and after
        with pytest.raises(AlreadyExistsError, match="manifest exists already"):
            store.put("manifest", b"nonce 2", create=True)
    assert store.get("manifest") == b"nonce 1"


def test_where_conditional_writes_are_refused_a_key_is_taken_though_its_object_goes_after_the_look(
    unconditional: tuple[Bucket, Proxy],
) -> None:
    bucket, proxy = unconditional
    store = open_store(bucket.url, bucket.options)
    store.put("manifest", b"nonce 1")
    proxy.faults.append(Fault("GET", status=404))  # as a reader hears that comes too late
    with pytest.raises(AlreadyExistsError, match="manifest exists already"):
        store.put("manifest", b"nonce 2", create=True)


def test_where_conditional_writes_are_refused_a_create_whose_answer_was_lost_is_our_own(
    unconditional: tuple[Bucket, Proxy],
) -> None:
    bucket, proxy = unconditional
    store = FsspecStore(bucket.url, bucket.options, impatient(30))
    store.put("known", b"", create=True)
    proxy.faults.append(Fault("PUT", drop="after"))
    store.put("manifest", b"nonce 1", create=True)
    assert store.get("manifest") == b"nonce 1"
    assert [fault.count for fault in proxy.faults] == [0]


@pytest.mark.parametrize("status", [400, 403, 405])
def test_a_create_that_is_refused_for_another_reason_is_not_made_without_its_condition(
    s3_proxy: tuple[Bucket, Proxy], status: int
) -> None:
    bucket, proxy = s3_proxy
    proxy.faults.append(Fault("PUT", status=status))
    store = FsspecStore(bucket.url, bucket.options, impatient(30))
    with pytest.raises(StoreError, match="write") as caught:
        store.put("manifest", b"nonce 1", create=True)
    assert not isinstance(caught.value, AlreadyExistsError)
    assert store.stat("manifest") is None


def test_a_server_that_writes_nothing_at_all_is_not_asked_for_minutes(s3_proxy: tuple[Bucket, Proxy]) -> None:
    bucket, proxy = s3_proxy
    proxy.faults.append(Fault("PUT", status=501, count=_BROKEN))
    time = SkippedTime()
    store = FsspecStore(bucket.url, bucket.options, Patience(600, time.sleep, time))
    with pytest.raises(StoreError, match="could not write"):
        store.put("manifest", b"nonce 1", create=True)
    assert (time.waits, _BROKEN - proxy.faults[0].count) == ([], 2)


# A server that stays broken

_BROKEN = 1000


def test_a_store_that_is_down_is_neither_empty_nor_missing(
    faulty: tuple[Store, HttpServer, Bucket], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    store, server, _ = faulty
    store.put("key", b"1")
    server.faults.append(Fault("", status=500, count=_BROKEN))
    calls: list[Callable[[], object]] = [
        lambda: store.get("key"),
        lambda: store.list(),
        lambda: store.stat("key"),
        lambda: store.put("key", b"2"),
        lambda: store.put("new", b"2", create=True),
        lambda: store.delete(["key"]),
        lambda: store.delete(["folder/"]),
    ]
    for call in calls:
        with pytest.raises(StoreError, match="then try again") as caught:
            call()
        assert not isinstance(caught.value, NotFoundError | AlreadyExistsError)
    server.faults.clear()
    assert [entry.key for entry in store.list()] == ["key"]


def test_an_upload_that_fails_half_way_leaves_nothing(
    faulty: tuple[Store, HttpServer, Bucket], caplog: pytest.LogCaptureFixture
) -> None:
    def finish() -> None:
        for _ in range(10):  # more parts than are in flight at once
            writer.write(bytes(16 * _MIB))
        writer.commit()

    caplog.set_level(logging.CRITICAL)
    store, server, bucket = faulty
    writer = store.writer("large")
    writer.write(bytes(17 * _MIB))
    server.faults.append(Fault(r"PUT .*(partNumber|upload_id)=|POST .*upload_id=", status=500, count=_BROKEN))
    with pytest.raises(StoreError, match="could not write"):
        finish()
    server.faults.clear()
    writer.abort()
    gc.collect()
    assert store.list(recursive=True) == []
    assert _uploads(bucket) == []


class _Heard(logging.Handler):
    """Sets an event when something is logged that begins so."""

    def __init__(self, begin: str) -> None:
        super().__init__()
        self.begin, self.event = begin, threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith(self.begin):
            self.event.set()


@pytest.mark.timeout(120)  # the store would be asked for ten minutes
@pytest.mark.parametrize("end", ["abort", "drop"])
def test_parts_are_not_sent_again_when_nobody_will_end_the_upload(s3_proxy: tuple[Bucket, Proxy], end: str) -> None:
    bucket, proxy = s3_proxy
    store, log, retried = open_store(bucket.url, bucket.options), logging.getLogger("ckptmgr.store"), _Heard("request.")
    proxy.faults.append(Fault("PUT .*partNumber", status=503, count=_BROKEN, headers={"Retry-After": "500"}))
    level = log.level
    log.addHandler(retried)
    log.setLevel(logging.INFO)
    try:
        writer = store.writer("large")
        writer.write(bytes(17 * _MIB))
        assert retried.event.wait(60)
        if end == "abort":
            writer.abort()
            assert _uploads(bucket) == []
        del writer
        gc.collect()
        for thread in threading.enumerate():
            if thread.name.startswith("ckptmgr-upload"):
                thread.join(60)
                assert not thread.is_alive()
    finally:
        log.removeHandler(retried)
        log.setLevel(level)


def test_an_abort_leaves_no_upload_behind(s3_moto: Bucket, oss: Bucket) -> None:
    for bucket in (s3_moto, oss):
        writer = open_store(bucket.url, bucket.options).writer("large")
        writer.write(bytes(33 * _MIB))
        assert _uploads(bucket) == ["large"]
        writer.abort()
        assert _uploads(bucket) == []


def test_deleting_a_folder_drops_the_uploads_of_dead_writers(s3_moto: Bucket, oss: Bucket) -> None:
    for bucket in (s3_moto, oss):
        store = open_store(f"{bucket.url}/runs", bucket.options)
        for key in ("draft/large", "draft-2/large"):
            store.writer(key).write(bytes(17 * _MIB))
        gc.collect()
        store.delete(["draft/"])
        assert _uploads(bucket) == ["runs/draft-2/large"]


def test_an_abort_that_the_store_refuses_is_only_logged(
    s3_proxy: tuple[Bucket, Proxy], caplog: pytest.LogCaptureFixture
) -> None:
    bucket, proxy = s3_proxy
    writer = FsspecStore(bucket.url, bucket.options, impatient(30)).writer("large")
    writer.write(bytes(17 * _MIB))
    proxy.faults.append(Fault("DELETE", status=500, count=_BROKEN))
    writer.abort()
    assert [r.message.split()[0] for r in caplog.records if r.name == "ckptmgr.store"] == ["upload.abort.failed"]


@pytest.mark.parametrize("end", ["drop", "abort"])
@pytest.mark.parametrize("size", [1, 33 * _MIB])
def test_a_file_of_gcsfs_does_not_publish_itself_later(gcs: Bucket, gcs_server: GcsServer, end: str, size: int) -> None:
    """Newer ones are closed, which is to publish them, by a thread that comes after the garbage collection."""
    from gcsfs import core

    store = open_store(gcs.url, gcs.options)
    writer = store.writer("large")
    writer.write(bytes(size))
    if end == "abort":
        writer.abort()
    del writer
    gc.collect()
    if (queue := getattr(core, "_deferred_close_queue", None)) is not None:
        drained = threading.Event()
        queue.put(drained.set)
        assert drained.wait(60)
    assert store.list() == []


# Missing buckets and wrong credentials


def test_a_missing_bucket_is_never_an_empty_one(bucket: Bucket) -> None:
    protocol = bucket.url.partition("://")[0]
    store = open_store(f"{protocol}://no-such-bucket-anywhere/runs", bucket.options)

    def write() -> None:
        writer = store.writer("key")
        writer.write(b"1")
        writer.commit()

    for call in (
        lambda: store.list(),
        lambda: store.list("a", recursive=True),
        lambda: store.get("key"),
        lambda: store.put("key", b"1"),
        lambda: store.put("key", b"1", create=True),
        write,
        lambda: store.delete(["a/"]),
    ):
        with pytest.raises(StoreError, match="bucket 'no-such-bucket-anywhere' does not exist: create it") as caught:
            call()
        assert not isinstance(caught.value, NotFoundError)


def _refused(store: Store, secret: str) -> None:
    for call in (
        lambda: store.get("key"),
        lambda: store.put("key", b"1"),
        lambda: store.put("key", b"1", create=True),
        lambda: store.list(),
        lambda: store.stat("key"),
        lambda: store.delete(["key"]),
    ):
        with pytest.raises(StoreError, match=r"(no permission to .* check|as) the credentials") as caught:
            call()
        assert caught.value.errno == errno.EACCES
        assert secret not in str(caught.value)


def test_wrong_credentials_say_where_to_look(oss: Bucket) -> None:
    store = open_store(f"{oss.url}/runs", {**oss.options, "secret": "not-the-secret"})
    _refused(store, "not-the-secret")
    with pytest.raises(StoreError, match="OSS_ACCESS_KEY_ID"):
        store.list()


@pytest.mark.server
def test_wrong_credentials_say_where_to_look_on_s3(s3_seaweed: Bucket) -> None:
    store = open_store(f"{s3_seaweed.url}/runs", {**s3_seaweed.options, "secret": "not-the-secret"})
    _refused(store, "not-the-secret")
    with pytest.raises(StoreError, match="AWS_PROFILE"):
        store.list()


@pytest.mark.parametrize("status", [401, 403])
def test_wrong_credentials_say_where_to_look_on_gcs(gcs: Bucket, gcs_server: GcsServer, status: int) -> None:
    gcs_server.faults.append(Fault("", status=status, count=_BROKEN))
    _refused(open_store(gcs.url, gcs.options), "anon ymous")


def test_no_credentials_at_all_say_where_to_look(s3_moto: Bucket) -> None:
    store = open_store(s3_moto.url, {"endpoint_url": s3_moto.options["endpoint_url"]})
    with pytest.raises(StoreError, match=r"NoCredentialsError.*AWS_ACCESS_KEY_ID") as caught:
        store.list()
    assert caught.value.errno == errno.EACCES


def test_deleting_a_folder_does_not_need_the_right_to_list_uploads(s3_proxy: tuple[Bucket, Proxy]) -> None:
    bucket, proxy = s3_proxy
    store = open_store(bucket.url, bucket.options)
    store.put("a/key", b"1")
    proxy.faults.append(Fault("GET .*uploads", status=403, count=_BROKEN))
    store.delete(["a/"])
    assert store.list(recursive=True) == []


# Where credentials and endpoints come from


def test_s3_reads_the_variables_of_the_aws_world(s3_moto: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    for variable in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "S3_ENDPOINT_URL"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, s3_moto.options["endpoint_url"])
            store = open_store(s3_moto.url)
            store.put(variable, b"1")
            if variable != "S3_ENDPOINT_URL":
                patch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:1")
                assert open_store(s3_moto.url).get(variable) == b"1"
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:1")
    for options in (s3_moto.options, {"client_kwargs": {"endpoint_url": s3_moto.options["endpoint_url"]}}):
        assert len(open_store(s3_moto.url, options).list()) == 3


def test_s3_reads_a_profile(s3_moto: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    endpoint = s3_moto.options["endpoint_url"]
    (tmp_path / "config").write_text(
        f"[profile lab]\naws_access_key_id = k\naws_secret_access_key = s\nendpoint_url = {endpoint}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    store = open_store(s3_moto.url)
    store.put("key", b"1")
    assert store.get("key") == b"1"


def test_gcs_reads_the_emulators_variable(gcs: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs.options["endpoint_url"])
    store = open_store(gcs.url)
    store.put("key", b"1")
    assert open_store(gcs.url, gcs.options).get("key") == b"1"


def test_oss_reads_its_variables_and_options_win(oss: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSS_ENDPOINT", oss.options["endpoint"])
    monkeypatch.setenv("OSS_ACCESS_KEY_ID", oss.options["key"])
    monkeypatch.setenv("OSS_ACCESS_KEY_SECRET", oss.options["secret"])
    open_store(oss.url).put("key", b"1")
    monkeypatch.setenv("OSS_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OSS_ACCESS_KEY_ID", "other")
    assert open_store(oss.url, oss.options).get("key") == b"1"


class _Witness(HttpServer):
    """Remembers how requests were signed."""

    def __init__(self) -> None:
        super().__init__()
        self.signed: list[tuple[str, str | None]] = []

    def answer(self, request: Request) -> Reply:
        headers = request.headers
        self.signed.append((headers.get("Authorization", "").partition(" ")[0], headers.get("x-oss-security-token")))
        return Reply(404)


@pytest.mark.parametrize(
    ("variables", "options", "expected"),
    [
        ({}, {}, ("", None)),
        ({}, {"key": "k", "secret": "s"}, ("OSS", None)),
        ({}, {"key": "k", "secret": "s", "region": "cn-hangzhou"}, ("OSS4-HMAC-SHA256", None)),
        ({"OSS_REGION": "cn-hangzhou"}, {"key": "k", "secret": "s"}, ("OSS4-HMAC-SHA256", None)),
        ({"OSS_SESSION_TOKEN": "t", "OSS_ACCESS_KEY_ID": "k", "OSS_ACCESS_KEY_SECRET": "s"}, {}, ("OSS", "t")),
        ({"OSS_SESSION_TOKEN": "t"}, {"key": "k", "secret": "s"}, ("OSS", None)),
    ],
)
def test_oss_signs_with_what_it_was_given(
    variables: dict[str, str],
    options: dict[str, str],
    expected: tuple[str, str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with _Witness() as server:
        assert open_store("oss://bucket/runs", {"endpoint": server.url, **options}).stat("key") is None
        assert server.signed == [expected]


def test_oss_without_an_endpoint_or_with_unknown_options_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="OSS_ENDPOINT"):
        open_store("oss://bucket/runs").list()
    with pytest.raises(ConfigError, match=r"'endpoint_url'.*known are.*'endpoint'"):
        open_store("oss://bucket/runs", {"endpoint_url": "http://127.0.0.1:1"}).list()


def test_options_that_do_not_fit_are_a_config_error_without_secrets() -> None:
    store = open_store("gs://bucket/runs", {"token": "anon", "access": "hush", "secret": "hush"})
    with pytest.raises(
        ConfigError, match=r"storage.options do not fit gs://bucket/runs: ValueError: access must"
    ) as caught:
        store.put("key", b"1")
    assert "hush" not in str(caught.value)


# URLs


def test_opening_a_store_asks_nothing_of_the_network() -> None:
    for url in ("s3://bucket/runs", "gs://bucket/runs", "oss://bucket/runs", "memory://runs"):
        store = open_store(url)
        assert (store.url, store.path, store.can_rename, repr(store)) == (url, None, False, f"FsspecStore('{url}')")


def test_a_url_is_shown_without_its_credentials() -> None:
    store = FsspecStore("ftp://me:hush@host:21/runs/?token=hush")
    assert store.url == "ftp://host:21/runs"
    assert "hush" not in repr(store)
    assert store.__reduce__() == (FsspecStore, ("ftp://me:hush@host:21/runs/?token=hush", {}, Patience()))


def test_an_unknown_protocol_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="'nonsense' is not known"):
        open_store("nonsense://bucket/runs")


def test_a_chained_url_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="is a chain"):
        open_store("simplecache::s3://bucket/runs")


@pytest.mark.parametrize(
    ("protocol", "library", "extra"), [("s3", "s3fs", "s3"), ("s3a", "s3fs", "s3"), ("oss", "oss2", "oss")]
)
def test_a_missing_library_names_the_extra_to_install(
    protocol: str, library: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, f"ckptmgr.store.{extra}", raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"pip install 'ckptmgr\[{extra}\]'"):
        open_store(f"{protocol}://bucket/runs")


def test_missing_gcsfs_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.delitem(sys.modules, "ckptmgr.store.gcs", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'ckptmgr\[gcs\]'"):
        open_store("gs://bucket/runs")


def test_the_missing_library_of_another_protocol_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(protocol: str) -> None:
        raise ImportError("install paramiko to use sftp")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ConfigError, match="install paramiko"):
        open_store("sftp://host/runs")


# Listings and sizes


def test_every_page_of_an_s3_listing_is_read(s3_moto: Bucket) -> None:
    from moto.s3.models import s3_backends

    backend, name = s3_backends["123456789012"]["aws"], s3_moto.url[5:]
    for n in range(1005):
        backend.put_object(name, f"runs/many/{n:04}", b"")
        backend.put_object(name, f"runs/folder-{n:04}/key", b"")
    store = open_store(f"{s3_moto.url}/runs", s3_moto.options)
    assert len(store.list("many")) == 1005
    assert len(store.list()) == 1006
    assert len(store.list(recursive=True)) == 2010


def test_what_is_no_key_of_ours_is_not_listed(s3_moto: Bucket) -> None:
    """Some tools make an empty object for a folder, and S3 takes any name."""
    fs = fsspec.filesystem("s3", **s3_moto.options)
    for name in ("runs/", "runs/a/", "runs/a//b", "runs/a/../c"):
        fs.call_s3("put_object", Bucket=s3_moto.url[5:], Key=name, Body=b"")
    store = open_store(f"{s3_moto.url}/runs", s3_moto.options)
    store.put("a/key", b"1")
    assert [entry.key for entry in store.list(recursive=True)] == ["a/key"]
    assert [entry.key for entry in store.list()] == ["a"]


def test_ten_thousand_parts_hold_a_tebibyte_and_each_is_allowed() -> None:
    sizes = [part_size(n) for n in range(10_000)]
    assert sum(sizes) > 1000 << 30
    assert sizes == sorted(sizes)
    assert sizes[0] == 16 * _MIB
    assert sizes[-1] <= 512 * _MIB


_NOON = datetime(2024, 1, 2, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (_NOON, _NOON.timestamp()),
        (_NOON.astimezone(timezone(timedelta(hours=9))), _NOON.timestamp()),
        (_NOON.replace(tzinfo=None), _NOON.timestamp()),
        ("2024-01-02T12:00:00.000Z", _NOON.timestamp()),
        ("2024-01-02T13:00:00+01:00", _NOON.timestamp()),
        (12, 12.0),
        (12.5, 12.5),
        ("yesterday", None),
        (None, None),
    ],
)
def test_times_are_seconds_whatever_the_library_makes_of_them(value: Any, expected: float | None) -> None:
    assert seconds(value) == expected


# Filesystems of which nothing is known


def test_a_filesystem_with_real_folders_is_given_them(tmp_path: Path) -> None:
    store = FsspecStore(f"file://{tmp_path}/runs")
    store.put("a/b/key", b"1")
    writer = store.writer("c/d/large")
    writer.write(b"2")
    writer.commit()
    store.put("e/new", b"3", create=True)
    with pytest.raises(AlreadyExistsError):
        store.put("e/new", b"4", create=True)
    assert [(e.key, e.size) for e in store.list(recursive=True)] == [("a/b/key", 1), ("c/d/large", 1), ("e/new", 1)]
    assert [(e.key, e.is_folder) for e in store.list()] == [("a", True), ("c", True), ("e", True)]
    assert store.list("a/b/key") == []
    assert pickle.loads(pickle.dumps(store)).get("a/b/key") == b"1"


class _BrokenFileSystem(fsspec.AbstractFileSystem):
    """Shows what it was given before it fails."""

    protocol = "broken"
    files: dict[str, bytes] = {}  # noqa: RUF012 - one for all, as a server would have
    error: builtins.type[BaseException] = OSError
    cachable = False

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        self.files[rpath] = b"half"
        raise self.error("hush: no more")

    def pipe_file(self, path: str, value: bytes, **kwargs: Any) -> None:
        raise self.error("no more")

    def info(self, path: str, **kwargs: Any) -> Any:
        if path not in self.files:
            raise FileNotFoundError(path)
        return {"name": path, "type": "file", "size": len(self.files[path])}

    def rm_file(self, path: str) -> None:
        del self.files[path]


@pytest.fixture
def broken() -> FsspecStore:
    fsspec.register_implementation("broken", _BrokenFileSystem, clobber=True)
    _BrokenFileSystem.files.clear()
    return FsspecStore("broken://runs", {"password": "hush"})


def test_what_a_broken_upload_has_shown_is_removed(broken: FsspecStore) -> None:
    writer = broken.writer("key")
    writer.write(b"whole")
    with pytest.raises(StoreError, match=r"could not write broken://runs/key: OSError: \*\*\*: no more"):
        writer.commit()
    writer.abort()
    assert broken.stat("key") is None


@pytest.mark.parametrize(
    ("error", "expected", "code"),
    [
        (PermissionError, StoreError, errno.EACCES),
        (RuntimeError, StoreError, None),
        (FileNotFoundError, NotFoundError, None),
    ],
)
def test_errors_of_any_library_are_told_in_our_words(
    broken: FsspecStore,
    error: type[BaseException],
    expected: type[OSError],
    code: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_BrokenFileSystem, "error", error)
    monkeypatch.setattr(_BrokenFileSystem, "makedirs", lambda *args, **options: None)
    with pytest.raises(expected) as caught:
        broken.put("key", b"1")
    assert isinstance(caught.value, expected)
    assert caught.value.errno == code
    assert caught.value.__cause__ is not None


# What must not go on for ever


def test_deleting_a_folder_asks_once_for_uploads_and_not_again_where_that_is_refused(
    s3_proxy: tuple[Bucket, Proxy],
) -> None:
    bucket, proxy = s3_proxy
    time = SkippedTime()
    store = FsspecStore(bucket.url, bucket.options, Patience(600, time.sleep, time))
    for status, looks in ((500, 1), (500, 1), (403, 1), (403, 0)):
        proxy.faults[:] = [Fault("GET .*uploads", status=status, count=_BROKEN)]
        store.put("a/key", b"1")
        store.delete(["a/"])
        assert (store.list(recursive=True), time.waits) == ([], [])
        assert _BROKEN - proxy.faults[0].count == looks


class _Drip:
    """An HTTP server whose answer has no end: a byte, again and again."""

    def __enter__(self) -> str:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._serve, daemon=True)]
        self._threads[0].start()
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                self._threads.append(threading.Thread(target=self._drip, args=(client,), daemon=True))
                self._threads[-1].start()

    def _drip(self, client: socket.socket) -> None:
        with suppress(OSError), client, client.makefile("rb") as asked:
            while asked.readline().strip():
                pass
            client.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 100000\r\nETag: "x"\r\n\r\n')
            while not self._stop.wait(0.02):
                client.sendall(b"x")


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("url", "endpoint", "options"),
    [
        ("s3://bucket", "endpoint_url", {"key": "kkkk", "secret": "ssss"}),
        ("gs://bucket", "endpoint_url", {"token": "anon"}),
        ("oss://bucket", "endpoint", {"key": "kkkk", "secret": "ssss"}),
    ],
)
def test_a_body_that_drips_is_given_up_at_the_deadline(url: str, endpoint: str, options: dict[str, str]) -> None:
    with _Drip() as drip:
        store = FsspecStore(url, {endpoint: drip, **options}, Patience(0.4))
        with pytest.raises(StoreError, match="could not read"):
            store.get("key")


# What several threads meet at once


def test_many_threads_have_one_client_together(gcs: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptmgr.store.gcs import GcsDialect

    built, begin, init = [], threading.Barrier(16), GcsDialect.__init__

    def count(self: GcsDialect, *args: Any) -> None:
        built.append(1)
        init(self, *args)

    def ask() -> None:
        begin.wait()
        store.list()

    monkeypatch.setattr(GcsDialect, "__init__", count)
    store = FsspecStore(gcs.url, gcs.options)
    with ThreadPoolExecutor(16) as pool:
        for future in [pool.submit(ask) for _ in range(16)]:
            future.result()
    assert len(built) == 1


def test_a_client_whose_credentials_expired_is_replaced_once(gcs: Bucket) -> None:
    store = FsspecStore(gcs.url, gcs.options)
    old = store._dialect
    store._forget(old)
    new = store._dialect
    store._forget(old)  # of another thread, which met the same error a moment later
    assert store._dialect is new
    assert new is not old


# What errors say


def test_secrets_are_found_however_deep_they_are() -> None:
    options = {
        "connection_string": "AccountName=me;AccountKey=abcd1234;EndpointSuffix=core.windows.net",
        "client_kwargs": {"headers": {"Authorization": "Bearer abcdef", "Accept": "text/plain"}},
        "credential": "hidden-1",
        "access_tokens": ["hidden-2", "hidden-3"],
        "sessions": [{"password": "hidden-4"}],
        "region": "eu-west-1",
        "key": "abc",
    }
    found = set(secrets_of(options))
    assert found >= {"abcd1234", "abcdef", "Bearer abcdef", "hidden-1", "hidden-2", "hidden-3", "hidden-4"}
    assert not found & {"me", "core.windows.net", "text/plain", "eu-west-1", "abc"}


def test_what_is_shown_has_no_secret_in_any_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "from-the-environment")
    options = {"key": "minio", "secret": "minio123", "password": 12345678}
    store = FsspecStore("ftp://me:p%40ss%2Fword@host/folder", options)
    for text in ("minio", "minio123", "12345678", "p%40ss%2Fword", "p@ss/word", "from-the-environment"):
        assert store._without_secrets(f"of {text}.") == "of ***."


def test_a_clock_that_is_wrong_is_told_as_that(s3_proxy: tuple[Bucket, Proxy]) -> None:
    bucket, proxy = s3_proxy
    body = b"<Error><Code>RequestTimeTooSkewed</Code><Message>The difference is too large.</Message></Error>"
    proxy.faults.append(Fault("PUT", status=403, body=body))
    with pytest.raises(StoreError, match=r"RequestTimeTooSkewed.*the clock of this machine is wrong"):
        FsspecStore(bucket.url, bucket.options, impatient(10)).put("key", b"1")


def test_an_upload_that_expired_is_no_missing_object(gcs: Bucket, gcs_server: GcsServer) -> None:
    store = FsspecStore(gcs.url, gcs.options, impatient(10))
    writer = store.writer("large")
    gcs_server.faults.append(Fault("PUT .*upload_id=", status=404, count=_BROKEN))
    with pytest.raises(StoreError, match="the upload has expired") as caught:
        writer.write(bytes(33 * _MIB))
    writer.abort()
    assert not isinstance(caught.value, NotFoundError)


def test_over_http_a_server_error_is_no_missing_file() -> None:
    class Web(HttpServer):
        def answer(self, request: Request) -> Reply:
            return Reply(404 if "missing" in request.path else 500)

    with Web() as server:
        store = open_store(f"{server.url}/root")
        assert store.stat("missing") is None
        with pytest.raises(StoreError, match="500"):
            store.stat("key")


def test_an_upload_that_ends_between_two_looks_is_left_out(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FsspecStore(bucket.url, bucket.options)
    dialect = store._dialect
    if not isinstance(dialect, S3Dialect | OssDialect):
        pytest.skip("nobody can list them there")
    stays, ends = dialect.begin("stays"), dialect.begin("ends")
    dialect.send("stays", stays, 1, bytearray(10))
    listed = list(dialect.unended(""))
    dialect.cancel("ends", ends)
    monkeypatch.setattr(dialect, "unended", lambda prefix: iter(listed))
    assert [(upload.name, upload.bytes) for upload in store.uploads()] == [("stays", 10)]
    for upload in listed:
        store.drop_upload(upload)
