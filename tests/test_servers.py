"""Are the servers behind the tests honest? What they share, and S3; `test_server_gcs` and `test_server_oss` go on."""

from __future__ import annotations

import os
from http.client import IncompleteRead, RemoteDisconnected

import fsspec
import pytest
from servers.clients import ask, filesystem, winners
from servers.faults import Fault, HttpServer, Reply, Request
from servers.listing import Page, page

# What they share: the log, injected faults, pages of a listing


class _Counter(HttpServer):
    """Answers every request with the number of requests that it has done the work of."""

    done = 0

    def answer(self, request: Request) -> Reply:
        self.done += 1
        return Reply(200, b"%d" % self.done)


def test_a_fault_with_a_status_does_no_work_and_hits_only_what_it_names_as_often_as_it_says():
    with _Counter() as server:
        server.faults.append(Fault(r"^PUT /b\?x=1", status=503, count=2))
        statuses = [
            ask(server.url, method, target)[0]
            for method, target in [("PUT", "/a"), ("PUT", "/b?x=1"), ("GET", "/b?x=1"), ("PUT", "/b?x=1")] * 2
        ]
        assert (statuses, server.done) == ([200, 503, 200, 503, 200, 200, 200, 200], 6)
        assert server.log == ["PUT /a", "PUT /b?x=1", "GET /b?x=1", "PUT /b?x=1"] * 2


@pytest.mark.parametrize(("drop", "done"), [("before", 0), ("after", 1)])
def test_a_dropped_request_gets_no_answer_and_is_done_or_not_as_the_fault_says(drop, done):
    with _Counter() as server:
        server.faults.append(Fault("PUT", drop=drop))
        with pytest.raises(RemoteDisconnected):
            ask(server.url, "PUT", "/", b"x" * 1000)
        assert server.done == done


def test_a_cut_answer_breaks_off_after_so_many_bytes():
    with _Counter() as server:
        server.faults.append(Fault("GET", cut=0))
        with pytest.raises(IncompleteRead):
            ask(server.url, "GET", "/")


def test_a_fault_says_one_thing():
    with pytest.raises(ValueError, match="exactly one"):
        Fault("x", status=503, drop="after")
    with pytest.raises(ValueError, match="exactly one"):
        Fault("x")


def test_pages_of_a_listing_put_together_are_the_whole_listing():
    names = ["a/1", "a/2", "b", "c/d/1", "c/d/2", "c/e", "d"]

    def pages(limit: int, **how: str) -> list[str]:
        entries, after = [], ""
        while after is not None:
            one = page(names, how.get("prefix", ""), how.get("delimiter", ""), after, limit)
            assert len(one.names) + len(one.prefixes) <= limit
            entries += sorted(one.names + one.prefixes)
            after = one.last
        return entries

    for limit in range(1, 9):
        assert pages(limit) == names
        assert pages(limit, delimiter="/") == ["a/", "b", "c/", "d"]
        assert pages(limit, prefix="c/", delimiter="/") == ["c/d/", "c/e"]
        assert pages(limit, prefix="c/d") == ["c/d/1", "c/d/2"]
    assert page(names, "x", "", "", 10) == Page([], [], None)


def test_nothing_of_this_machines_logins_reaches_the_tests():
    allowed = {"AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_EC2_METADATA_DISABLED"}
    allowed |= {"FSSPEC_CONFIG_DIR", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"}
    ours = {name for name in os.environ if name.startswith(("AWS_", "OSS_", "FSSPEC_", "GOOGLE_", "GCSFS_"))}
    assert ours == allowed


# S3


def test_moto_has_one_winner_of_sixteen_writers_that_only_create(s3_moto):
    fs = filesystem(s3_moto)
    won = winners(lambda content: fs.pipe_file(f"{s3_moto.url}/key", content, mode="create"), FileExistsError)
    assert [fs.cat_file(f"{s3_moto.url}/key")] == won


def test_the_proxy_passes_on_what_it_is_not_told_to_break(s3_proxy):
    bucket, proxy = s3_proxy
    fs, content = filesystem(bucket), os.urandom(11 * 2**20)
    fs.pipe_file(f"{bucket.url}/a b/key", content, chunksize=5 * 2**20)
    assert fs.cat_file(f"{bucket.url}/a b/key") == content
    assert fs.cat_file(f"{bucket.url}/a b/key", start=3, end=9) == content[3:9]
    assert fs.find(bucket.url) == [f"{bucket.name}/a b/key"]
    assert fs.info(f"{bucket.url}/a b/key")["size"] == len(content)
    fs.rm(f"{bucket.url}/a b", recursive=True)
    assert sum("partNumber" in line for line in proxy.log) == 3


def test_the_proxy_loses_a_reply_after_the_store_did_the_work(s3_proxy):
    bucket, proxy = s3_proxy
    fs = filesystem(bucket)
    proxy.faults.append(Fault("PUT .*/key", drop="after"))
    with pytest.raises(FileExistsError):
        fs.pipe_file(f"{bucket.url}/key", b"mine", mode="create")
    assert fs.cat_file(f"{bucket.url}/key") == b"mine"


def test_the_proxy_answers_for_the_store_and_cuts_its_answers_and_s3fs_gets_over_it(s3_proxy):
    bucket, proxy = s3_proxy
    fs = filesystem(bucket)
    fs.pipe_file(f"{bucket.url}/key", b"0123456789")
    proxy.reset()
    proxy.faults += [Fault("GET .*/key", status=503), Fault("GET .*/key", cut=4), Fault("GET .*/key", drop="before")]
    assert fs.cat_file(f"{bucket.url}/key") == b"0123456789"
    assert [line for line in proxy.log if line.startswith("GET")] == [f"GET /{bucket.name}/key"] * 4
    assert [fault.count for fault in proxy.faults] == [0, 0, 0]


@pytest.mark.server
def test_seaweed_has_one_winner_of_sixteen_writers_that_only_create(s3_seaweed):
    fs = filesystem(s3_seaweed)
    won = winners(lambda content: fs.pipe_file(f"{s3_seaweed.url}/key", content, mode="create"), OSError)
    assert [fs.cat_file(f"{s3_seaweed.url}/key")] == won


@pytest.mark.server
def test_seaweed_refuses_a_wrong_secret_and_strangers(s3_seaweed):
    fs = fsspec.filesystem("s3", **{**s3_seaweed.options, "secret": "wrong"})
    with pytest.raises(PermissionError):
        fs.pipe_file(f"{s3_seaweed.url}/key", b"x")
    assert ask(s3_seaweed.options["endpoint_url"], "PUT", f"/{s3_seaweed.name}/key", b"x")[0] == 403


@pytest.mark.server
def test_seaweed_keeps_what_s3fs_writes(s3_seaweed):
    fs, content = filesystem(s3_seaweed), os.urandom(11 * 2**20)
    fs.pipe_file(f"{s3_seaweed.url}/a/large", content, chunksize=5 * 2**20)
    fs.pipe_file(f"{s3_seaweed.url}/a/b/small", b"small")
    assert fs.cat_file(f"{s3_seaweed.url}/a/large") == content
    assert fs.cat_file(f"{s3_seaweed.url}/a/large", start=9, end=12) == content[9:12]
    assert fs.find(s3_seaweed.url) == [f"{s3_seaweed.name}/a/{key}" for key in ("b/small", "large")]
    fs.rm(f"{s3_seaweed.url}/a/b/small")
    with pytest.raises(FileNotFoundError):
        fs.cat_file(f"{s3_seaweed.url}/a/b/small")
