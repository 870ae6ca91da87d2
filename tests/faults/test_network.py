"""Does a checkpoint survive its network? Faults at every request of a save and of a resume, on S3, GCS and OSS.

A single fault is survived: the save is saved, the resume resumes. Whatever else happens: a save
reports success exactly when its checkpoint is there, or raises a `CheckpointError` within the deadline;
the one before it stays; the next save works; a resume returns the newest, bit for bit, or says that the
store failed. The full profile tries every fault at every request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from servers import Bucket
from servers.patience import SkippedTime

from ckptmgr import CheckpointManager
from ckptmgr.errors import AlreadyExistsError, CheckpointError, DamagedError, NotFoundError, SaveFailedError, StoreError
from ckptmgr.lease import Lease
from ckptmgr.pointer import Pointer
from ckptmgr.repository import Repository
from ckptmgr.store import gcs as gcs_dialect
from ckptmgr.store import multipart
from ckptmgr.store.remote import FsspecStore
from ckptmgr.store.retries import Patience, Retries
from ckptmgr.testing import HttpFault
from ckptmgr.testing.http_server import HttpServer, Reply, Request

if TYPE_CHECKING:
    from conftest import Profile

_STORES = ("s3", "gcs", "oss")
_FOR_EVER = 100_000
_DEADLINE_S = 20.0
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
_WRONG_REGION = (
    b"<Error><Code>AuthorizationHeaderMalformed</Code><Message>the region is wrong</Message><Region>eu-west-1</Region>"
    b"</Error>"
)

FAULTS: dict[str, dict[str, Any]] = {
    "a server error": {"status": 500},
    "slow down": {"status": 503, "body": _SLOW_DOWN, "headers": {"Retry-After": "2"}},
    "too many requests": {"status": 429, "headers": {"Retry-After": "1"}},
    "a request that got lost": {"drop": "before"},
    "an answer that got lost": {"drop": "after"},
    "a reset before": {"reset": "before"},
    "a reset in the request": {"reset": "body"},
    "a reset in the answer": {"reset": "answer"},
    "an answer cut off": {"cut": 5},
    "an answer that lacks its end": {"wrong_length": -3},
    "an answer that promises more": {"wrong_length": 10},
    "an answer that is no HTTP": {"garbage": True},
}
MAY_FIND_NOTHING = {  # to spoil, in an answer without a body
    "an answer cut off",
    "an answer that lacks its end",
    "an answer that promises more",
}
LASTING: dict[str, dict[str, Any]] = {
    "an outage": {"status": 503, "count": _FOR_EVER},
    "every answer lost": {"drop": "after", "count": _FOR_EVER},
    "every connection reset": {"reset": "before", "count": _FOR_EVER},
    "no permission any more": {"status": 403, "count": _FOR_EVER},
    "expired credentials": {"status": 400, "body": _EXPIRED, "count": _FOR_EVER},
    "another region": {"status": 400, "body": _WRONG_REGION, "count": _FOR_EVER},
    "a redirect": {"status": 301, "count": _FOR_EVER},
}


class Place:
    """A root on one kind of store, behind a server that fails when told to."""

    def __init__(self, bucket: Bucket, server: HttpServer) -> None:
        self.bucket, self.server = bucket, server
        self.time = SkippedTime()
        patience = Patience(_DEADLINE_S, self.time.sleep, self.time)
        self.store = FsspecStore(f"{bucket.url}/run", bucket.options, patience)  # one: clients take long to make

    def fresh(self) -> None:
        """An empty root again."""
        self.server.reset()
        self.store.delete([f"{entry.key}/" if entry.is_folder else entry.key for entry in self.store.list()])

    def manager(self, **more: Any) -> CheckpointManager:
        options = {"background": False, "lease_ttl": "1h", **more}
        return CheckpointManager(self.store.url, store=self.store, **options)

    def steps(self) -> list[int]:
        return sorted(info.step for info in Repository(self.store).infos())


@pytest.fixture(params=_STORES)
def place(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[Place]:
    caplog.set_level(logging.CRITICAL)
    if request.param == "s3":
        bucket, server = request.getfixturevalue("s3_proxy")
    else:
        bucket, server = request.getfixturevalue(request.param), request.getfixturevalue(f"{request.param}_server")
    yield Place(bucket, server)
    server.reset()


def state(step: int) -> dict[str, Any]:
    return {"model": {"weight": torch.arange(8.0) + step}, "tokens": step}


def saved(manager: CheckpointManager, step: int) -> bool:
    """Whether the save reported success. Anything but a `CheckpointError` is a violation, and comes out."""
    try:
        manager.save(state(step), step).wait()
    except CheckpointError:
        return False
    return True


def is_state(found: Any, step: int) -> bool:
    return bool(torch.equal(found["model"]["weight"], state(step)["model"]["weight"])) and found["tokens"] == step


def litter_of(store: FsspecStore) -> list[str]:
    """What lies beside the checkpoints, the records and the pointer."""
    repository = Repository(store)
    known = {"latest"}
    for info in repository.infos():
        assert info.manifest is not None
        known |= {f"{info.name}/manifest.json", *(f"{info.name}/{file.name}" for file in info.manifest.files)}
    return [e.key for e in store.list(recursive=True) if e.key not in known and not e.key.startswith(".ckptmgr/")]


def violations_of_a_save(place: Place, fault: HttpFault) -> list[str]:
    """What of the promises a save breaks when this happens to it."""
    place.fresh()
    is_single = fault.count == 1
    found = []
    with place.manager(keep={"last": 5}) as manager:
        manager.resume()
        assert saved(manager, 1)
        place.server.faults[:] = [fault]
        begin = place.time()
        is_saved = saved(manager, 2)
        seconds = place.time() - begin
        place.server.faults.clear()
        if seconds > 3 * _DEADLINE_S:
            found.append(f"took {seconds:.0f} s")
        there = place.steps()
        if is_saved and there != [1, 2]:
            found.append(f"success was reported, but {there} is there")
        if not is_saved and there not in ([1], [1, 2]):
            found.append(f"a failure was reported, and {there} is there")
        if is_single and not is_saved:
            found.append("a single fault failed the save")
        if not saved(manager, 3):
            return [*found, f"the next save failed, and {place.steps()} is there"]
    expected = [*there, 3]
    with place.manager() as manager:
        resumed = manager.resume()
        if not (resumed.step == 3 and is_state(resumed.values, 3)):
            found.append(f"resumed {resumed.step}")
        for step in expected:
            if not is_state(manager.load(step), step):
                found.append(f"step {step} is not what was saved")
        if place.steps() != expected:
            found.append(f"{place.steps()} is there, not {expected}")
    if left := litter_of(place.store):
        found.append(f"left {left}")
    return found


def survived(
    check: Callable[[Place, HttpFault], list[str]], place: Place, tried: list[tuple[str, int]]
) -> Iterator[tuple[str, int]]:
    """Those of `tried` that happened, with nothing found."""
    for name, skip in tried:
        fault = HttpFault("", skip=skip, **(FAULTS | LASTING)[name])
        count = fault.count
        assert check(place, fault) == [], (name, skip)
        if fault.count < count:
            yield name, skip
        else:
            assert name in MAY_FIND_NOTHING, (name, skip)


def requests_of_a_save(place: Place) -> int:
    place.fresh()
    with place.manager(keep={"last": 5}) as manager:
        manager.resume()
        assert saved(manager, 1)
        place.server.log.clear()
        assert saved(manager, 2)
        return len(place.server.log)


def test_a_save_survives_any_single_fault_at_any_request(
    place: Place, profile: Profile, tally: Callable[[str, int], None]
) -> None:
    count = requests_of_a_save(place)
    points = [(name, skip) for skip in range(count) for name in FAULTS]
    done = list(survived(violations_of_a_save, place, profile.sample(points, quick=2)))
    assert done
    tally("network faults during a save", len(done))


def test_a_save_that_loses_its_store_fails_in_time_and_loses_nothing(
    place: Place, profile: Profile, tally: Callable[[str, int], None]
) -> None:
    count = requests_of_a_save(place)
    points = [(name, skip) for skip in range(count) for name in LASTING]
    done = list(survived(violations_of_a_save, place, profile.sample(points, quick=2)))
    assert done
    tally("lasting network faults during a save", len(done))


def violations_of_a_resume(place: Place, fault: HttpFault) -> list[str]:
    """The root holds steps 1 and 2. What of the promises a resume breaks when this happens to it."""
    place.server.faults[:] = [fault]
    is_single = fault.count == 1
    found = []
    manager = place.manager()
    try:
        resumed = manager.resume()
        if not (resumed.step == 2 and is_state(resumed.values, 2)):
            found.append(f"resumed {resumed.step}")
        if resumed.skipped:
            found.append(f"skipped {resumed.skipped}")
    except StoreError as exc:
        if is_single:
            found.append(f"a single fault failed the resume: {exc}")
    except (DamagedError, NotFoundError, AlreadyExistsError) as exc:
        found.append(f"a network error was told as {exc!r}")
    finally:
        place.server.faults.clear()
        manager.close()
    if any(info.damaged for info in Repository(place.store).infos()):
        found.append("a network error was taken for damage")
    if place.steps() != [1, 2]:
        found.append(f"{place.steps()} is there")
    return found


def _two_saves(place: Place) -> int:
    """The number of requests of a resume from them."""
    place.fresh()
    with place.manager() as manager:
        manager.resume()
        assert saved(manager, 1)
        assert saved(manager, 2)
    place.server.log.clear()
    with place.manager() as manager:
        manager.resume()
        return len(place.server.log)


def test_a_resume_returns_the_newest_or_says_that_the_store_failed(
    place: Place, profile: Profile, tally: Callable[[str, int], None]
) -> None:
    count = _two_saves(place)
    points = [(name, skip) for skip in range(count) for name in (*FAULTS, "an outage", "no permission any more")]
    done = list(survived(violations_of_a_resume, place, profile.sample(points, quick=4)))
    assert done
    tally("network faults during a resume", len(done))


# A listing that lags


class Lagging:
    """Answers listings of the root as they were when it was made."""

    def __init__(self, server: HttpServer) -> None:
        self._server, self._old = server, dict[str, Reply]()
        server.before = self

    def __call__(self, request: Request) -> Reply | None:
        is_list = request.method == "GET" and ("prefix=" in request.target or "list-type" in request.target)
        if not is_list or "run" not in request.target or ".ckptmgr" in request.target:
            return None
        if request.target not in self._old:
            self._old[request.target] = self._server.answer(request)
        return self._old[request.target]


def violations_of_a_lagging_listing(place: Place) -> list[str]:
    place.fresh()
    found = []
    with place.manager(verify={"on_save": "off"}) as manager:
        manager.resume()
        assert saved(manager, 1)
        place.store.list()
        Lagging(place.server)
        place.store.list()
        assert saved(manager, 2)
    with place.manager(read_only=True, verify={"on_resume": "off"}) as manager:
        if (step := manager.resume().step) != 2:
            found.append(f"resumed {step}")
    return found


def test_a_listing_that_lags_does_not_hide_what_the_pointer_names(place: Place) -> None:
    assert violations_of_a_lagging_listing(place) == []


def test_training_goes_on_while_the_store_is_down_when_it_was_told_to(place: Place) -> None:
    place.fresh()
    with place.manager(on_error="warn", save={"every_steps": 1}) as manager:
        manager.resume()
        manager.maybe_save(state(1), 1)
        place.server.faults.append(HttpFault("", status=503, count=_FOR_EVER))
        manager.maybe_save(state(2), 2)
        place.server.faults.clear()
        manager.maybe_save(state(3), 3)
    assert place.steps() == [1, 3]


@pytest.mark.parametrize("point", ["begin", "part", "complete"])
@pytest.mark.parametrize("fault", [{"drop": "after"}, {"reset": "body"}, {"status": 503}, {"reset": "answer"}], ids=str)
def test_a_large_file_survives_a_fault_of_any_of_its_requests(
    place: Place,
    point: str,
    fault: dict[str, Any],
    profile: Profile,
    tally: Callable[[str, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not profile.is_full and (point, "drop" in fault) != ("complete", True) and fault != {"reset": "body"}:
        pytest.skip("in the full profile")
    place.fresh()
    matches = {
        "begin": r"POST .*([?&]uploads=?|uploadType=resumable)(&name=[^&]*)?$",
        "part": r"PUT .*(partNumber=1|upload_id=)",
        "complete": r"POST .*[?&]uploadId=|PUT .*upload_id=",
    }
    last = 2 if point == "complete" and place.bucket.url.startswith("gs:") else 0  # the third block completes it
    monkeypatch.setattr(multipart, "_SMALLEST", 5 << 20)  # the least that S3 takes
    monkeypatch.setattr(gcs_dialect, "_BLOCK", 5 << 20)
    data = bytes(range(256)) * (4 * 11 * 1024)  # 11 MiB
    place.server.faults.append(strike := HttpFault(matches[point], skip=last, **fault))
    store = place.store
    writer = store.writer("large", len(data))
    writer.write(data)
    assert store.stat("large") is None
    writer.commit()
    assert store.get("large") == data
    assert store.uploads() == ()
    assert strike.count == 0
    tally("network faults during a large file", 1)


@pytest.mark.parametrize("place", ["gcs"], indirect=True)
def test_an_upload_of_which_nothing_arrives_is_given_up_though_the_store_answers_how_much_it_has(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.fresh()
    monkeypatch.setattr(gcs_dialect, "_BLOCK", 5 << 20)

    def lose(request: Request) -> Reply | None:
        has_bytes = request.method == "PUT" and not request.headers["Content-Range"].startswith("bytes */")
        return Reply(503) if has_bytes else None

    place.server.before = lose
    writer = place.store.writer("large", 11 << 20)
    begin = place.time()
    with pytest.raises(StoreError, match="tries in"):
        writer.write(bytes(11 << 20))
    assert place.time() - begin < 3 * _DEADLINE_S
    writer.abort()


def violations_of_a_broken_file(place: Place) -> list[str]:
    place.fresh()
    writer = place.store.writer("file")
    writer.write(b"half of it")
    place.server.faults.append(HttpFault("PUT|POST", status=403))
    with pytest.raises(StoreError, match=r"no permission to write .*file"):
        writer.commit()
    writer.abort()
    return [] if place.store.stat("file") is None else ["what broke off is to be seen"]


def test_a_file_that_broke_off_is_not_to_be_seen(place: Place) -> None:
    assert violations_of_a_broken_file(place) == []


# Whoever can't wait


@pytest.mark.timeout(30)
@pytest.mark.parametrize("place", ["gcs", "oss"], indirect=True)
def test_a_heartbeat_that_is_stalled_once_arrives_before_the_lease_runs_out(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """Its connection is silent for a minute; the lease holds three seconds."""
    place.fresh()
    store = FsspecStore(place.store.url, place.bucket.options)
    lease = Lease(store, floor=0, takeover=False, ttl_s=3)
    place.server.faults.append(fault := HttpFault("(PUT|POST) .*beat|POST .*uploadType", stall="before"))
    caplog.set_level(logging.WARNING, "ckptmgr")
    lease.beat()
    assert fault.count == 0
    lease.release()
    assert "failed" not in caplog.text


@pytest.mark.timeout(60)
@pytest.mark.parametrize("place", ["gcs", "oss"], indirect=True)
def test_after_a_close_that_timed_out_nothing_waits_for_the_store_any_more(place: Place) -> None:
    place.fresh()
    store = FsspecStore(place.store.url, place.bucket.options)  # whose deadline is ten minutes
    manager = CheckpointManager(store.url, store=store, background=True, save={"on_signals": []}, lease_ttl="1h")
    manager.resume()
    place.server.faults.append(HttpFault("", status=503, count=_FOR_EVER))
    manager.save(state(1), 1)
    with pytest.raises(TimeoutError):
        manager.close(timeout=0.5)
    with pytest.raises(SaveFailedError):
        manager.wait()
    manager.close()


# The checks find what they are for


def _asked_once(self: Retries, request: Callable[[float], Any], what: str = "", mend: Any = None) -> Any:
    return request(_DEADLINE_S)


@pytest.mark.parametrize("place", ["gcs"], indirect=True)
def test_they_find_that_nothing_is_retried(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    _two_saves(place)
    monkeypatch.setattr(Retries, "__call__", _asked_once)
    assert violations_of_a_resume(place, HttpFault("GET", status=500)) != []
    assert violations_of_a_save(place, HttpFault("PUT|POST", status=500)) != []


def test_they_find_a_create_that_takes_its_own_object_for_that_of_another(
    s3_proxy: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def create(self: FsspecStore, dialect: Any, key: str, name: str, body: bytes) -> None:
        try:
            dialect.create(name, body)
        except OSError as exc:
            raise AlreadyExistsError(key) from exc

    def commit(store: Any, name: str, key: str, data: bytes) -> None:
        store.put(key, data, create=True)

    caplog.set_level(logging.CRITICAL)
    monkeypatch.setattr(FsspecStore, "_create", create)
    monkeypatch.setattr("ckptmgr.draft.create_manifest", commit)
    fault = HttpFault("PUT .*step.*manifest.json", drop="after")
    assert violations_of_a_save(Place(*s3_proxy), fault) != []


def test_they_find_an_upload_that_is_published_after_an_error(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file of fsspec does when it is closed."""
    from ckptmgr.store.remote_writer import RemoteWriter

    def publish(writer: RemoteWriter) -> None:
        if writer._upload is not None:
            writer._upload.commit()

    monkeypatch.setattr(RemoteWriter, "abort", publish)
    assert violations_of_a_broken_file(place) == ["what broke off is to be seen"]


def test_they_find_a_resume_that_believes_the_listing_alone(
    s3_proxy: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    monkeypatch.setattr(Pointer, "read", lambda self: None)
    assert violations_of_a_lagging_listing(Place(*s3_proxy)) != []
