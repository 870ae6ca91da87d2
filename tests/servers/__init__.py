"""Which object stores do the tests talk to? Real servers on 127.0.0.1, started by the fixtures in `conftest.py`.

`gcs` and `oss` speak the dialects of Google Cloud Storage and Alibaba OSS from memory, `seaweed`
starts SeaweedFS for S3, and `proxy` stands in front of any of them. What they share, and how they
are told to fail, is in `faults`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Bucket"]


@dataclass(frozen=True, slots=True)
class Bucket:
    """An empty bucket for one test: its URL, without a slash at the end, and fsspec's storage options."""

    url: str
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.url.partition("://")[2]
