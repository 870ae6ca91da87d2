"""How does an error on one rank become the same error on all? By class and text, never as an object.

An exception that can't be pickled, or not be made again from its pickle, would leave the others waiting.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import errors
from ..errors import CheckpointError, RankError, StoreError, StoreFullError


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as it travels. `ends` says that the ranks are out of step from now on."""

    kind: str
    text: str
    rank: int
    errno: int | None = None
    ends: bool = False
    sizes: tuple[int | None, int | None] = (None, None)  # of a `StoreFullError`: needed and free

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Failure:
        if isinstance(error, CheckpointError):
            kind, text = next(c.__name__ for c in type(error).__mro__ if c.__name__ in errors.__all__), str(error)
        else:
            kind, text = RankError.__name__, f"{type(error).__name__}: {error}"
        sizes = (error.needed, error.free) if isinstance(error, StoreFullError) else (None, None)
        return cls(kind, text, rank, getattr(error, "errno", None), sizes=sizes)

    def error(self) -> CheckpointError:
        kind: type[CheckpointError] = getattr(errors, self.kind)
        text = self.text if self.ends else f"rank {self.rank}: {self.text}"
        if kind is StoreFullError:
            return StoreFullError(text, self.errno, needed=self.sizes[0], free=self.sizes[1])
        return StoreError(text, self.errno) if kind is StoreError else kind(text)


@dataclass(frozen=True, slots=True)
class Message:
    """What one rank tells the others: which call it makes, and what became of its part."""

    what: str
    value: Any
    failure: Failure | None

    @classmethod
    def from_bytes(cls, data: bytes) -> Message:
        found = pickle.loads(data)  # noqa: S301 - of this very job, as torch.distributed's own objects are
        assert isinstance(found, cls)
        return found


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one rank's part: a value, or a failure. `cause` stays on its rank."""

    value: Any = None
    failure: Failure | None = None
    cause: BaseException | None = None

    def to_bytes(self, what: str, rank: int) -> bytes:
        try:
            return pickle.dumps(Message(what, self.value, self.failure))
        except Exception as exc:  # noqa: BLE001 - objects raise anything when they are pickled
            return pickle.dumps(Message(what, None, Failure.of(exc, rank)))

    def get(self) -> Any:
        """The value. Raises the failure; on the rank where it came from, from its cause."""
        if self.failure is None:
            return self.value
        if self.cause is not None and not isinstance(self.cause, Exception):
            raise self.cause  # an interrupt stays one where it came
        raise self.failure.error() from self.cause


def attempt(make: Callable[[], Any], rank: int) -> Outcome:
    try:
        return Outcome(make())
    except BaseException as exc:  # noqa: BLE001 - the other ranks are told first
        return Outcome(failure=Failure.of(exc, rank), cause=exc)
