"""Whatever is done to a repository, in any order and with deaths in between, it agrees with a dict."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ckptmgr.manifest import CheckpointInfo, Manifest
from ckptmgr.repository import Repository
from ckptmgr.retention import Best, KeepEverySteps, Last, plan
from ckptmgr.testing import Crash, CrashingStore, MemoryStore

START = datetime(2030, 1, 1, tzinfo=UTC)


class RepositoryMachine(RuleBasedStateMachine):
    """The model maps each committed step to its bytes; `archived` are those put aside."""

    @initialize(can_rename=st.booleans())
    def start(self, can_rename: bool) -> None:
        self.store = MemoryStore(can_rename=can_rename)
        self.model: dict[int, bytes] = {}
        self.damaged: set[int] = set()
        self.pinned: set[int] = set()
        self.archived = 0
        self.step, self.attempt = 0, 1
        self.minutes = 0

    def repository(self, after: int | None = None) -> Repository:
        return Repository(CrashingStore(self.store, after))

    def save(self, repository: Repository, step: int, data: bytes, pin: bool, **fields: Any) -> CheckpointInfo:
        self.minutes += 1
        draft = repository.begin(step, None, "run")
        with draft.create("model.bin") as file:
            file.write(data)
        about = Manifest(
            step=step, run="run", attempt=self.attempt, nonce="", files=(), format="raw",
            time=START + timedelta(minutes=self.minutes), **fields,
        )  # fmt: skip
        return draft.commit(about, pin=pin)

    @rule(
        gap=st.integers(1, 40), data=st.binary(max_size=20), loss=st.floats(0, 9), healthy=st.booleans(),
        pin=st.booleans(),
    )  # fmt: skip
    def commit(self, gap: int, data: bytes, loss: float, healthy: bool, pin: bool) -> None:
        self.step += gap
        self.save(self.repository(), self.step, data, pin, metrics={"loss": loss}, healthy=healthy)
        self.added(data, pin)

    def added(self, data: bytes, pin: bool) -> None:
        self.model[self.step] = data
        if pin:
            self.pinned.add(self.step)

    @rule(gap=st.integers(1, 40), data=st.binary(max_size=20), after=st.integers(1, 12), pin=st.booleans())
    def die_while_saving(self, gap: int, data: bytes, after: int, pin: bool) -> None:
        self.step += gap
        try:
            self.save(self.repository(after), self.step, data, pin)
        except Crash:
            self.restart()
            listed = self.repository().infos()
            if any(info.step == self.step for info in listed):
                self.added(data, pin)  # it died after the commit
        else:
            self.added(data, pin)

    @rule(last=st.integers(1, 4), every=st.integers(5, 50), best=st.booleans())
    def rotate(self, last: int, every: int, best: bool) -> None:
        repository = self.repository()
        rules = (Last(last), KeepEverySteps(every), *([Best("loss", "min")] if best else []))
        for verdict in plan(repository.infos(), rules, now=START).drop:
            step = verdict.info.step
            assert step not in self.pinned
            if step not in self.damaged:
                good = [s for s in self.model if s not in self.damaged]
                assert step != max(good)
            repository.drop(verdict.info)
            self.forget(step)

    @precondition(lambda self: self.model)
    @rule(choice=st.randoms(use_true_random=False), after=st.integers(1, 8))
    def die_while_dropping(self, choice: Any, after: int) -> None:
        step = choice.choice(sorted(self.model))
        repository = self.repository(after)
        try:
            repository.drop(repository.find(step))
        except Crash:
            self.restart()
        if all(info.step != step for info in self.repository().infos()):
            self.forget(step)

    @precondition(lambda self: self.model)
    @rule(choice=st.randoms(use_true_random=False))
    def pin(self, choice: Any) -> None:
        step = choice.choice(sorted(self.model))
        self.repository().pin(self.repository().find(step))
        self.pinned.add(step)

    @precondition(lambda self: self.model)
    @rule(choice=st.randoms(use_true_random=False))
    def flip_a_byte_and_notice(self, choice: Any) -> None:
        step = choice.choice(sorted(self.model))
        repository = self.repository()
        info = repository.find(step)
        assert info.manifest is not None
        key = f"{info.name}/{info.manifest.files[0].name}"
        data = self.store.get(key)
        if data and step not in self.damaged:
            self.store.put(key, bytes([data[0] ^ 1]) + data[1:])
            (problem,) = repository.verify(info)
            repository.mark_damaged(info, str(problem))
            self.damaged.add(step)

    @precondition(lambda self: self.model)
    @rule(choice=st.randoms(use_true_random=False))
    def rewind(self, choice: Any) -> None:
        step = choice.choice(sorted(self.model))
        repository = self.repository()
        for info in repository.infos():
            if info.step > step:
                repository.archive(info)
                self.forget(info.step)
                self.archived += 1
        self.step = step

    @rule()
    def restart(self) -> None:
        self.repository().sweep()
        self.attempt += 1

    def forget(self, step: int) -> None:
        del self.model[step]
        self.damaged.discard(step)
        self.pinned.discard(step)

    @invariant()
    def the_repository_is_the_model(self) -> None:
        if not hasattr(self, "model"):
            return
        repository = self.repository()
        infos = repository.infos()
        assert sorted(info.step for info in infos) == sorted(self.model)
        assert {info.step for info in infos if info.damaged} == self.damaged
        assert {info.step for info in infos if info.pins} == self.pinned
        assert {entry.name for entry in self.store.list(".ckptmgr/pins")} == {
            f"{pin.name}.{pin.nonce}.json" for info in infos for pin in info.pins
        }
        assert len(repository.archived()) == self.archived
        for info in infos:
            if info.damaged is None:
                assert repository.open(info).read("model.bin") == self.model[info.step]


TestRepositoryMachine = RepositoryMachine.TestCase
TestRepositoryMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
