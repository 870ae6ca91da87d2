"""`dcp.save` and `dcp.load` through `StoreWriter` and `StoreReader`: all or nothing, checked, without a pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import run_ranks, values
from servers import Bucket
from servers.faults import Fault
from store_ranks import error_of, is_loaded, load_on, state, two_ranks

from ckptmgr import AlreadyExistsError, ConfigError, DamagedError, StoreReader, StoreWriter, open_store, plain_errors
from ckptmgr.manifest import FileEntry, Manifest, digest

if TYPE_CHECKING:
    from moto.server import ThreadedMotoServer
    from servers.proxy import Proxy

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def bucket(moto_server: ThreadedMotoServer, _new_s3_bucket: Callable[[str], Bucket]) -> Bucket:
    host, port = moto_server.get_host_and_port()
    return _new_s3_bucket(f"http://{host}:{port}")


@pytest.fixture(scope="module")
def found(folder: Path, bucket: Bucket) -> Found:
    """What two ranks found."""
    return list(values(run_ranks(two_ranks, 2, args=(str(folder), bucket.url, bucket.options))))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of one process."""
    with plain_errors():
        dcp.save(state(), storage_writer=StoreWriter(tmp_path / "one"))
    return tmp_path


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_state_comes_back_from_any_store(found: Found, place: str) -> None:
    assert [one[f"{place} is back"] for one in found] == [True, True]


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_checkpoint_is_never_overwritten(found: Found, place: str) -> None:
    for one in found:
        assert one[f"{place} again"].startswith("AlreadyExistsError: rank 0: ")
        assert one[f"{place} is untouched"] is True


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_failure_on_one_rank_is_ours_on_all_and_leaves_no_checkpoint(found: Found, place: str) -> None:
    """Even what can't be pickled, which would leave the other ranks waiting."""
    for one in found:
        assert one[f"{place} unpicklable"].startswith("SaveFailedError: rank 1: ")
        assert one[f"{place} unpicklable"].endswith("was not saved: UnpicklableError: no bytes today")
        assert one[f"{place} half"].startswith("NotFoundError: rank 0: ")


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_result_that_is_lost_is_no_commit(found: Found, place: str) -> None:
    for one in found:
        assert one[f"{place} forgotten"].endswith("not whole: 1 items were not written: model.rows at [6, 0]")


@pytest.mark.parametrize("place", ["local", "s3"])
def test_after_failures_the_same_url_takes_a_save_and_is_cleared_of_them(
    found: Found, folder: Path, bucket: Bucket, place: str
) -> None:
    assert [one[f"{place} after failures"] for one in found] == [True, True]
    store = open_store(folder) if place == "local" else open_store(f"{bucket.url}/run", bucket.options)
    nonces = [entry.name for entry in store.list("step-100-half") if entry.is_folder]
    assert nonces == [Manifest.from_json(store.get("step-100-half/manifest.json")).nonce]


def test_checkpoint_id_is_another_url_with_the_same_options(found: Found) -> None:
    assert [one["by id"] for one in found] == [True, True]


def test_readers_of_dcp_read_the_files(found: Found) -> None:
    assert [one["stock"] for one in found] == [True, True]


def test_async_save_works_on_a_group_of_its_own(found: Found) -> None:
    assert [one["async"] for one in found] == [True, True]


def test_values_that_differ_are_those_of_the_lowest_rank(found: Found) -> None:
    """Text and small tensors alike; what only one rank has is its own."""
    assert [one["differing"] for one in found] == [["of 0", [0.0] * 3, "own 0"], ["of 0", [0.0] * 3, "own 1"]]


def test_a_pickle_is_told_of_when_saved_and_not_run_when_loaded_unless_trusted(found: Found) -> None:
    (warning,) = found[0]["payload warned"]
    assert warning.startswith("PickleWarning: odd is saved as a pickle of store_ranks._write")
    assert all("odd was pickled, and loading it runs code" in one["payload"] for one in found)
    assert [one["payload ran"] for one in found] == [False, False]
    assert found[0]["payload trusted"] == [True, True]


def test_another_dtype_is_refused_unless_casts_are_wanted(found: Found) -> None:
    for one in found:
        assert "model.large is torch.float32 in the checkpoint and torch.bfloat16 here" in one["other dtype"]
        assert one["cast"] is True


def test_what_is_not_loaded_is_logged(found: Found) -> None:
    assert [line for line in found[0]["left"] if "model.rows" in line and "history.0" in line] == found[0]["left"]
    assert len(found[0]["left"]) == 1


def test_elements_that_would_not_be_read_are_damage(found: Found) -> None:
    assert "model.rows: 0 of the 42 elements that belong here would be read" in found[0]["uncovered"]
    assert found[0]["uncovered"].startswith("DamagedError")


def test_what_is_no_checkpoint_of_ours_is_said_in_words(found: Found) -> None:
    for one in found:
        assert one["nothing"].startswith("NotFoundError: rank 0: the checkpoint can't be opened: no checkpoint at")
        assert "was not saved with StoreWriter" in one["stock folder"]


def test_a_part_is_never_committed_as_the_whole(found: Found) -> None:
    """Not without collectives, not by one rank of two, and not once the process group is gone."""
    for one in found:
        assert one["no collectives"].startswith("ConfigError: ")
        assert "do not have all parts of model.columns, model.rows" in one["one rank only"]
        assert "the process group of the 2 ranks is gone" in one["group gone"]
        assert one["alone"].startswith("NotFoundError: ")


def test_two_ranks_load_what_one_saved_and_one_what_two_saved(found: Found, folder: Path) -> None:
    with plain_errors():
        dcp.save(state(6.0), storage_writer=StoreWriter(folder / "one"))
    assert values(run_ranks(load_on, 4, args=(str(folder), 6.0))) == [True] * 4
    assert is_loaded(StoreReader(folder / "step-100"))
    assert is_loaded(StoreReader(f"file://{folder}/step-100"))


@pytest.mark.parametrize("name", ["__0_0.distcp", "shards.json"])
def test_a_flipped_byte_is_damage(saved: Path, name: str) -> None:
    (path,) = saved.glob(f"one/*/{name}")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=name.replace(".", r"\.")):
        is_loaded(StoreReader(saved / "one"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one["chunks"].clear(), "chunks are not the whole of model.rows"),
        (lambda one: one["chunks"][0].__setitem__(1, [3, 7]), "chunks are not the whole of model.rows"),
        (lambda one: one["chunks"][0].__setitem__(0, [1, 0]), "a chunk of 'model.rows' at"),
        (lambda one: one["chunks"][0].__setitem__(3, 1 << 40), "a chunk of 'model.rows' at"),
        (lambda one: one["chunks"][0].__setitem__(2, "x"), "a chunk of 'model.rows' at"),
        (lambda one: one["chunks"][0].__setitem__(3, -1), "does not parse"),
        (lambda one: one.__setitem__("shape", [11]), "does not parse"),
        (lambda one: one.pop("dtype"), "does not parse"),
    ],
)
def test_an_index_that_can_not_be_true_is_damage(saved: Path, change: Callable[[Any], Any], message: str) -> None:
    """Also where its digest is right: elements that are nowhere are never zeros."""
    (path,) = saved.glob("one/*/shards.json")
    body = json.loads(path.read_text())
    change(body["tensors"]["model.rows"])
    data = json.dumps(body).encode()
    path.write_bytes(data)
    at = saved / "one" / "manifest.json"
    manifest = Manifest.from_json(at.read_bytes())
    files = tuple(
        FileEntry(one.name, len(data), digest(data)) if one.name.endswith("shards.json") else one
        for one in manifest.files
    )
    at.write_bytes(replace(manifest, files=files).to_json())
    assert message in error_of(lambda: is_loaded(StoreReader(saved / "one")))
    assert error_of(lambda: is_loaded(StoreReader(saved / "one"))).startswith("DamagedError")


def test_a_missing_file_is_damage(saved: Path) -> None:
    (path,) = saved.glob("one/*/__0_0.distcp")
    path.unlink()
    assert error_of(lambda: is_loaded(StoreReader(saved / "one"))).startswith("DamagedError: rank 0")


def test_a_whole_folder_can_be_moved(saved: Path, tmp_path: Path) -> None:
    shutil.move(saved / "one", tmp_path / "two")
    assert is_loaded(StoreReader(tmp_path / "two"))


def test_an_upload_that_fails_leaves_no_object(s3_proxy: tuple[Bucket, Proxy]) -> None:
    """Not even a truncated one, which a stream closed after an error would publish."""
    bucket, proxy = s3_proxy
    url = f"{bucket.url}/step-1"
    proxy.faults += [Fault(r"(PUT|POST) .*__0_1", status=403)] * 20
    writer = StoreWriter(url, options=bucket.options, split_size_bytes=2000)
    assert error_of(lambda: dcp.save(state(), storage_writer=writer)).startswith("StoreError: rank 0: ")
    assert [entry.key for entry in open_store(bucket.url, bucket.options).list(recursive=True)] == []
    proxy.faults.clear()
    with plain_errors():
        dcp.save(state(), storage_writer=StoreWriter(url, options=bucket.options))
    assert is_loaded(StoreReader(url, options=bucket.options))


def test_of_two_saves_at_once_one_commits(tmp_path: Path) -> None:
    """The manifest is created, never replaced."""

    class Late(StoreWriter):
        def finish(self, metadata: Any, results: Any) -> None:
            with plain_errors():
                dcp.save(state(2.0), storage_writer=StoreWriter(tmp_path / "one"))
            super().finish(metadata, results)

    with pytest.raises(AlreadyExistsError, match="a checkpoint already"), plain_errors():
        dcp.save(state(), storage_writer=Late(tmp_path / "one"))
    assert is_loaded(StoreReader(tmp_path / "one"), 2.0)


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/", "/", "", "file:///x/a b"])
def test_a_url_without_a_folder_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"needs a folder of its own"):
        StoreWriter(url)


def test_tensors_that_are_no_plain_numbers_are_refused_by_name(tmp_path: Path) -> None:
    sparse = {"odd": torch.eye(3).to_sparse()}
    assert "odd" in error_of(lambda: dcp.save(sparse, storage_writer=StoreWriter(tmp_path / "a")))
    meta = {"odd": torch.ones(3, device="meta")}
    assert "odd has no values" in error_of(lambda: dcp.save(meta, storage_writer=StoreWriter(tmp_path / "b")))


def test_plans_of_an_earlier_save_are_refused(tmp_path: Path) -> None:
    class Caching(dcp.DefaultSavePlanner):
        pass

    for name, expected in (("a", ""), ("b", "ConfigError: rank 0: enable_plan_caching=True")):
        planner = Caching(enable_plan_caching=True)
        call = partial(dcp.save, state(), storage_writer=StoreWriter(tmp_path / name), planner=planner)
        assert error_of(call).startswith(expected)
    assert error_of(call)
    assert is_loaded(StoreReader(tmp_path / "a"))


def test_an_error_that_is_not_of_dcp_stays_as_it_is() -> None:
    with pytest.raises(ValueError, match="mine"), plain_errors():
        raise ValueError("mine")
