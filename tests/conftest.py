"""Which object stores can a test ask for? Real servers on 127.0.0.1, each with an empty bucket of its own.

`s3_moto`, `s3_seaweed`, `gcs` and `oss` are buckets; `s3_proxy` is a bucket of moto's behind a
proxy that can be told to fail. A server starts with the first test that needs it and lives as long
as the test process; with pytest-xdist every worker has its own.
"""

from __future__ import annotations

import os
import signal
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

# What this machine is logged in to is no business of the tests. This must happen before fsspec, botocore
# or gcsfs are imported: they read their variables then.
for _name in list(os.environ):
    if _name.startswith(("AWS_", "OSS_", "FSSPEC_", "GOOGLE_", "GCSFS_", "STORAGE_EMULATOR_")):
        del os.environ[_name]
os.environ.update(
    AWS_CONFIG_FILE=os.devnull,
    AWS_SHARED_CREDENTIALS_FILE=os.devnull,
    AWS_EC2_METADATA_DISABLED="true",
    FSSPEC_CONFIG_DIR=os.devnull,
    # Else gcsfs asks a gRPC service what kind of bucket it has, which no emulator answers.
    GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false",
    NO_PROXY="127.0.0.1",
    no_proxy="127.0.0.1",
)

# A shell that starts the tests in the background has them, and whatever they start, ignore an interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from servers import Bucket  # noqa: E402 (the variables come first)

if TYPE_CHECKING:
    from moto.server import ThreadedMotoServer
    from servers.gcs import GcsServer
    from servers.oss import OssServer
    from servers.proxy import Proxy

_KEY, _SECRET = "testkey", "testsecret"


def _new_name() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def moto_server() -> Iterator[ThreadedMotoServer]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def _botocore_reads_once() -> Iterator[None]:
    """Every new client reads the description of S3 anew, which takes it a fifth of a second."""
    from botocore.loaders import Loader

    read: dict[Any, Any] = {}
    init = Loader.__init__

    def begin(self: Any, *args: Any, **how: Any) -> None:
        init(self, *args, **how)
        self._cache = read

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "__init__", begin)
        yield


@pytest.fixture(scope="session")
def _new_s3_bucket(_botocore_reads_once: None) -> Callable[[str], Bucket]:
    """Makes an empty bucket on the S3 server at a URL."""
    import boto3

    clients: dict[str, Any] = {}

    def make(endpoint_url: str) -> Bucket:
        if endpoint_url not in clients:
            clients[endpoint_url] = boto3.client(
                "s3",
                endpoint_url=endpoint_url,
                region_name="us-east-1",
                aws_access_key_id=_KEY,
                aws_secret_access_key=_SECRET,
            )
        name = _new_name()
        clients[endpoint_url].create_bucket(Bucket=name)
        return Bucket(f"s3://{name}", {"key": _KEY, "secret": _SECRET, "endpoint_url": endpoint_url})

    return make


def _moto_url(server: ThreadedMotoServer) -> str:
    host, port = server.get_host_and_port()
    return f"http://{host}:{port}"


@pytest.fixture
def s3_moto(moto_server: ThreadedMotoServer, _new_s3_bucket: Callable[[str], Bucket]) -> Bucket:
    return _new_s3_bucket(_moto_url(moto_server))


@pytest.fixture
def s3_proxy(s3_moto: Bucket) -> Iterator[tuple[Bucket, Proxy]]:
    from servers.proxy import Proxy

    with Proxy(s3_moto.options["endpoint_url"]) as proxy:
        yield Bucket(s3_moto.url, {**s3_moto.options, "endpoint_url": proxy.url}), proxy


@pytest.fixture(scope="session")
def _seaweed_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from servers.processes import seaweed

    with seaweed(tmp_path_factory.mktemp("seaweed"), _KEY, _SECRET) as url:
        yield url


@pytest.fixture
def s3_seaweed(_seaweed_url: str, _new_s3_bucket: Callable[[str], Bucket]) -> Bucket:
    return _new_s3_bucket(_seaweed_url)


@pytest.fixture(scope="session")
def _gcs_session() -> Iterator[GcsServer]:
    from servers.gcs import GcsServer

    with GcsServer() as server:
        yield server


@pytest.fixture
def gcs_server(_gcs_session: GcsServer) -> GcsServer:
    """The server behind `gcs`, with an empty log and no faults."""
    _gcs_session.reset()
    return _gcs_session


@pytest.fixture
def gcs(gcs_server: GcsServer) -> Bucket:
    name = _new_name()
    gcs_server.create_bucket(name)
    return Bucket(f"gs://{name}", {"endpoint_url": gcs_server.url, "token": "anon"})


@pytest.fixture(scope="session")
def _oss_session() -> Iterator[OssServer]:
    from servers.oss import OssServer

    with OssServer(_KEY, _SECRET) as server:
        yield server


@pytest.fixture
def oss_server(_oss_session: OssServer) -> OssServer:
    """The server behind `oss`, with an empty log and no faults."""
    _oss_session.reset()
    return _oss_session


@pytest.fixture
def oss(oss_server: OssServer) -> Bucket:
    name = _new_name()
    oss_server.create_bucket(name)
    return Bucket(f"oss://{name}", {"endpoint": oss_server.url, "key": _KEY, "secret": _SECRET})


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What the tests below `faults` have tried. Here, as with pytest-xdist the process that reports loads no other
    conftest."""
    counts = Counter[str]()
    for report in terminalreporter.stats.get("passed", ()):
        for key, value in getattr(report, "user_properties", ()):
            if key == "faults" and report.when == "call":
                counts[value[0]] += value[1]
    if counts:
        terminalreporter.section("faults tried and survived")
        for what, number in sorted(counts.items()):
            terminalreporter.line(f"{number:>7,} {what}")
