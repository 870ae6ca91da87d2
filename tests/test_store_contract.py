"""Does every store of ours hold what `StoreContract` says?"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Bucket

from ckptmgr.store import Store, open_store
from ckptmgr.store.local import LocalStore
from ckptmgr.store.remote import FsspecStore
from ckptmgr.testing import MemoryStore, StoreContract


class TestLocal(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path / "deep" / "root")


class TestLocalWithoutFsync(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path / "root", fsync=False)


class TestLocalInMemory(StoreContract):
    @pytest.fixture
    def store(self) -> Iterator[Store]:
        if not os.access("/dev/shm", os.W_OK):
            pytest.skip("this system has no /dev/shm")
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            yield LocalStore(Path(folder, "root"))


class TestMemory(StoreContract):
    shares = False

    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()


class TestMemoryWithoutRename(StoreContract):
    shares = False

    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore(can_rename=False)


class TestFsspecMemory(StoreContract):
    conditional_create = False
    shares = False
    can_place = False
    can_copy = False

    @pytest.fixture
    def store(self) -> Store:
        return FsspecStore(f"memory://{uuid.uuid4().hex}/runs")


class TestS3(StoreContract):
    can_place = False
    many = 10  # pages are listed in test_remote_store.py, where it is faster

    @pytest.fixture
    def store(self, s3_moto: Bucket) -> Store:
        return open_store(f"{s3_moto.url}/runs/digits", s3_moto.options)


@pytest.mark.server
class TestSeaweed(StoreContract):
    can_place = False
    many = 10

    @pytest.fixture
    def store(self, s3_seaweed: Bucket) -> Store:
        return open_store(f"{s3_seaweed.url}/runs", s3_seaweed.options)


class TestGcs(StoreContract):
    can_place = False

    @pytest.fixture
    def store(self, gcs: Bucket) -> Store:
        return open_store(f"{gcs.url}/runs", gcs.options)


class TestGcsAtTheBucketsRoot(StoreContract):
    can_place = False

    @pytest.fixture
    def store(self, gcs: Bucket) -> Store:
        return open_store(gcs.url.replace("gs://", "gcs://"), gcs.options)


class TestOss(StoreContract):
    can_place = False

    @pytest.fixture
    def store(self, oss: Bucket) -> Store:
        return open_store(f"{oss.url}/runs", oss.options)
