"""Which client library speaks to the store at a URL? It is imported here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ConfigError
from .dialect import Dialect, public_url
from .retries import Patience


def dialect_for(url: str) -> Callable[[str, Mapping[str, Any], Patience], Dialect]:
    """What connects to the store at a URL. Raises `ConfigError` where nothing does."""
    protocol = url.partition("://")[0]
    if "::" in url:
        raise ConfigError(
            f"root: {public_url(url)!r} is a chain, which caches or repacks; give the URL of the store itself"
        )
    try:
        match protocol:
            case "s3" | "s3a":
                extra = "s3"
                from .s3 import S3Dialect

                return S3Dialect
            case "gs" | "gcs":
                extra = "gcs"
                from .gcs import GcsDialect

                return GcsDialect
            case "oss":
                extra = "oss"
                from .oss import OssDialect

                return OssDialect
        extra = ""
        from .generic import GenericDialect, filesystem_class

        filesystem_class(protocol)
        return GenericDialect
    except ImportError as exc:
        how = f"pip install 'ckptmgr[{extra}]'" if extra else str(exc)
        raise ConfigError(f"root: {public_url(url)!r} needs a library that is not installed: {how}") from exc
