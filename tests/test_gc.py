"""Does `gc` find what dead processes left, remove it when asked, and touch nothing else?"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from servers import Bucket

from ckptmgr.cli import main
from ckptmgr.lock import acquire
from ckptmgr.manifest import Manifest
from ckptmgr.repository import Repository
from ckptmgr.store import Store, open_store
from ckptmgr.store.remote import FsspecStore
from ckptmgr.testing import HttpFault

_NONCE = "0123456789abcdef"


def _gc(bucket: Bucket, *args: str) -> Result:
    return CliRunner().invoke(main, ["gc", f"{bucket.url}/runs", "--option", json.dumps(bucket.options), *args])


def _begin_upload(store: Store, key: str) -> Any:
    """As a process does that is killed before it ends; the writer, whose end is nobody's business."""
    writer = store.writer(key)
    writer.write(bytes(17 << 20))
    return writer


def _wait_for_parts(writers: list[Any]) -> None:
    """A part that arrives after its upload has ended is an error of the server, for some servers."""
    for writer in writers:
        for future in writer._upload._in_flight:
            future.result()


@pytest.fixture(params=["s3_moto", "oss"])
def bucket(request: pytest.FixtureRequest) -> Bucket:
    found: Bucket = request.getfixturevalue(request.param)
    return found


def test_it_lists_and_ends_the_uploads_of_dead_writers_and_no_others(bucket: Bucket) -> None:
    store = open_store(f"{bucket.url}/runs", bucket.options)
    assert isinstance(store, FsspecStore)
    ours, foreign = f"step-00000001/{_NONCE}/model.safetensors", "someone/else.bin"
    outside = open_store(bucket.url, bucket.options)
    writers = [_begin_upload(store, ours), _begin_upload(store, foreign), _begin_upload(outside, f"a/{_NONCE}/b")]
    _wait_for_parts(writers)
    shown = _gc(bucket, "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert shown.output.splitlines()[1].split()[:3] == ["upload", "16.0", "MiB"]
    assert ours in shown.output
    assert foreign not in shown.output
    assert sorted(upload.name for upload in store.uploads()) == sorted([foreign, ours])
    told = json.loads(_gc(bucket, "--yes", "--json").output)
    assert [(one["kind"], one["key"], one["size"]) for one in told["litter"]] == [("upload", ours, 16 << 20)]
    assert told["freed"] == 16 << 20
    assert [upload.name for upload in store.uploads()] == [foreign]
    assert len(outside.uploads()) == 2  # type: ignore[attr-defined]
    for writer in writers:
        writer.abort()


def test_it_removes_dead_drafts(gcs: Bucket) -> None:
    store = open_store(f"{gcs.url}/runs", gcs.options)
    draft = Repository(store).begin(7, None, "run")
    with draft.create("model.bin") as file:
        file.write(b"12345")
    told = json.loads(_gc(gcs, "--json", "--yes").output)
    assert [(one["kind"], one["size"]) for one in told["litter"]] == [("draft", 5)]
    assert [entry.key for entry in store.list() if entry.key.startswith("step")] == []
    assert json.loads(_gc(gcs, "--json", "--yes").output)["litter"] == []


def test_a_folder_of_this_machine_has_drafts_too(tmp_path: Path) -> None:
    draft = Repository(open_store(tmp_path / "runs", fsync=False)).begin(7, None, "run")
    with draft.create("model.bin") as file:
        file.write(b"12345")
    runner = CliRunner()
    assert "1 piece of litter" in runner.invoke(main, ["gc", str(tmp_path / "runs"), "--dry-run"]).output
    assert runner.invoke(main, ["gc", str(tmp_path / "runs"), "--yes"]).exit_code == 0
    assert "0 pieces of litter" in runner.invoke(main, ["gc", str(tmp_path / "runs"), "--dry-run"]).output


def _committed(root: Path) -> tuple[Repository, str]:
    """A repository with a checkpoint of 5 bytes whose draft's note was left behind, and that note's key."""
    repository = Repository(open_store(root, fsync=False), commit="manifest")
    draft = repository.begin(7, None, "run")
    with draft.create("model.bin") as file:
        file.write(b"12345")
    about = Manifest(step=7, run="run", attempt=1, nonce="", time=datetime.now(UTC), format="raw", files=())
    info = draft.commit(about)
    note = f".ckptmgr/drafts/{info.name}.{draft.nonce}"
    repository.store.put(note, b"")
    return repository, note


def test_of_a_checkpoint_whose_note_was_left_behind_only_the_note_is_litter(tmp_path: Path) -> None:
    repository, note = _committed(tmp_path)
    told = json.loads(CliRunner().invoke(main, ["gc", str(tmp_path), "--json", "--yes"]).output)
    assert [(one["kind"], one["key"], one["size"]) for one in told["litter"]] == [("draft", note, 0)]
    assert (told["removed"], told["freed"]) == (1, 0)
    assert repository.store.stat(note) is None
    assert repository.verify(repository.find(7)) == []


def test_what_may_be_a_checkpoints_is_not_called_litter(tmp_path: Path) -> None:
    repository, note = _committed(tmp_path)
    repository.store.put("step-00000007/manifest.json", b"torn")
    told = json.loads(CliRunner().invoke(main, ["gc", str(tmp_path), "--json", "--yes"]).output)
    assert told["litter"] == []
    assert repository.store.stat(note) is not None


def test_it_does_nothing_while_another_process_writes(s3_moto: Bucket) -> None:
    store = open_store(f"{s3_moto.url}/runs", s3_moto.options)
    assert isinstance(store, FsspecStore)
    writer = _begin_upload(store, f"step-00000001/{_NONCE}/model.safetensors")
    lock = acquire(store, floor=0, takeover=False, ttl_s=60)
    result = _gc(s3_moto, "--yes")
    assert (result.exit_code, len(store.uploads())) == (4, 1)
    lock.release()
    writer.abort()


def test_it_asks_first(tmp_path: Path) -> None:
    draft = Repository(open_store(tmp_path, fsync=False)).begin(7, None, "run")
    with draft.create("model.bin") as file:
        file.write(b"12345")
    result = CliRunner().invoke(main, ["gc", str(tmp_path)])
    assert result.exit_code == 2
    assert "--yes" in result.output


def test_it_goes_on_where_uploads_may_not_be_looked_at(s3_proxy: Any) -> None:
    bucket, proxy = s3_proxy
    Repository(open_store(f"{bucket.url}/runs", bucket.options)).begin(7, None, "run").create("a").__enter__()
    proxy.faults.append(HttpFault("GET .*[?&]uploads", status=403, count=1000))
    shown = _gc(bucket, "--yes")
    assert shown.exit_code == 0, shown.output
    assert shown.output.count("are not looked at") == 1
    assert "removed 1 piece of litter" in shown.output


def test_the_upload_of_another_tool_below_a_folder_with_a_hash_for_a_name_stays(bucket: Bucket) -> None:
    store = open_store(f"{bucket.url}/runs", bucket.options)
    assert isinstance(store, FsspecStore)
    writer = _begin_upload(store, f"dataset/{_NONCE}/part-1.bin")
    assert json.loads(_gc(bucket, "--yes", "--json").output)["litter"] == []
    assert len(store.uploads()) == 1
    store.put(f".ckptmgr/drafts/dataset.{_NONCE}", b"")  # the note of a draft: it is ours
    found = json.loads(_gc(bucket, "--dry-run", "--json").output)["litter"]
    assert [one["kind"] for one in found] == ["draft", "upload"]
    writer.abort()


def test_an_upload_that_can_not_be_seen_any_more_is_not_told_to_be_gone(s3_proxy: Any) -> None:
    bucket, proxy = s3_proxy
    store = open_store(f"{bucket.url}/runs", bucket.options)
    assert isinstance(store, FsspecStore)
    writer = _begin_upload(store, f"step-00000001/{_NONCE}/model.safetensors")
    proxy.faults.append(HttpFault("GET .*[?&]uploads", skip=1, status=403, count=1000))
    told = _gc(bucket, "--yes")
    proxy.faults.clear()
    assert (told.exit_code, len(store.uploads())) == (5, 1), told.output
    assert "no permission" in told.output
    writer.abort()


def test_a_folder_goes_with_the_uploads_below_it_though_one_of_them_has_just_ended(s3_proxy: Any) -> None:
    bucket, proxy = s3_proxy
    store = open_store(f"{bucket.url}/runs", bucket.options)
    assert isinstance(store, FsspecStore)
    writers = [_begin_upload(store, f"step-00000001/{_NONCE}/{name}") for name in ("a", "b")]
    _wait_for_parts(writers)
    ended = b"<Error><Code>NoSuchUpload</Code><Message>it has ended</Message></Error>"
    proxy.faults.append(HttpFault("DELETE .*uploadId", status=404, body=ended))
    store.delete([f"step-00000001/{_NONCE}/"])
    assert [upload.name for upload in store.uploads()] == [f"step-00000001/{_NONCE}/a"]
    for writer in writers:
        writer.abort()
