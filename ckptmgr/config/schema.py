"""Which settings are there, and what do they mean? The pydantic models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, ValidationInfo, field_validator

from ..errors import ConfigError
from ..folder_names import MAX_LENGTH, NameTemplate
from ..manifest import digest
from ..retention import Best, KeepEverySteps, KeepRule, Last, NewerThan
from ..triggers import (
    AnyOf,
    AtSteps,
    Every,
    EveryEpochs,
    EverySteps,
    Moment,
    OnRequest,
    OnSignals,
    Trigger,
    When,
    as_trigger,
)
from .layers import argument_layer, config_error, problems_in
from .values import (
    Count,
    Duration,
    Entries,
    PlainName,
    Predicate,
    Root,
    SignalName,
    Size,
    Text,
    VerifyOnResume,
    VerifyOnSave,
    predicate_name,
    resolved,
)


def _one_or_many(value: Any) -> str:
    return "<many>" if isinstance(value, list | tuple) else "<one>"


def _is_named(predicate: Callable[[Moment], object], path: str) -> bool:
    try:
        return resolved(path) is predicate
    except ValueError:
        return False


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, hide_input_in_errors=True
    )

    if not TYPE_CHECKING:

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as exc:
                raise config_error(problems_in(exc, type(self), [argument_layer(values)])) from exc

        # Keeps pydantic from calling this for sections inside sections, whose errors belong to the whole.
        __init__.__pydantic_base_init__ = True


class SaveConfig(_Section):
    """When a save is due: when any of these says so. One call saves at most once."""

    every_steps: Count | None = None
    """At the first call at or after each multiple of this many steps."""
    every_epochs: Count | None = None
    """At the first call at or after each multiple of this many epochs."""
    every: Duration | None = None
    """When this much time has passed since the last save: 500ms, 0.5s, 30m, 1.5h, 2d, or a number of seconds."""
    at_steps: list[Count] = []
    """At the first call at or after each of these steps."""
    when: Predicate = None
    """When this predicate, callable(Moment) -> bool, says so: an import path such as mytrain.rules:loss_improved."""
    on_signals: list[SignalName] = ["SIGTERM"]
    """When the process receives one of these; SIGTERM, SIGINT, SIGHUP and SIGQUIT also ask the loop to stop."""
    grace: Duration | None = None
    """How long the process lives after a signal to stop, such as 30s. A save that took longer the last time is then
    written without the copy, while training waits."""
    on_file: PlainName | None = None
    """When a file of this name appears in the root: it is removed, and saves once."""
    on_close: bool = False
    """When the manager closes and steps were made since the last save."""


class BestConfig(_Section):
    """Keep the best checkpoints by a metric. Those without it, with NaN, or unhealthy are never best."""

    metric: Text
    """The name of a metric given to maybe_save."""
    mode: Literal["min", "max"]
    """Whether a smaller or a larger value is better."""
    count: Count = 1
    """How many of the best to keep."""


class KeepConfig(_Section):
    """What stays: a checkpoint stays when any of these keeps it. With none of them, everything stays."""

    last: Count | None = 3
    """The newest this many."""
    every_steps: Count | None = None
    """The first at or after each multiple of this many steps."""
    best: (
        Annotated[
            Annotated[BestConfig, Tag("<one>")] | Annotated[list[BestConfig], Tag("<many>")],
            Discriminator(_one_or_many),
        ]
        | None
    ) = None
    """The best by a metric: {metric: val_loss, mode: min, count: 2}; a list keeps the best by each."""
    newer_than: Duration | None = None
    """Those saved less than this long ago."""
    min_good: Count = 1
    """At least this many undamaged ones stay, whatever else is said."""
    max_bytes: Size | None = None
    """A cap on all that stays, applied last: 64MiB, 500GB, 1TB. Spares min_good, the newest and the pinned."""


class VerifyConfig(_Section):
    """How closely bytes are checked."""

    on_save: VerifyOnSave = "size"
    """Before a save counts: off, size (sizes as the store reports them) or full (read everything back)."""
    on_resume: VerifyOnResume = "fast"
    """On restore: off, size, fast (digests of the bytes being read) or full (digests of every file first)."""
    scrub: bool = False
    """After each save, read an older checkpoint back in full, the one verified longest ago; it gives way to the next
    save. What is damaged counts no more for keep."""


class StorageConfig(_Section):
    """How to reach the store."""

    options: dict[str, Any] = Field(default={}, repr=False)
    """Passed to the fsspec filesystem as they are. Never shown, logged or stored."""
    deadline: Duration = timedelta(minutes=10)
    """How long one request to a store behind a network may take, its retries included: how long an outage a save or a
    resume outlives. One part of a large file (16 to 512 MiB) is a request too. While a store is down, a tenth.
    On filesystems other than S3, GCS and OSS no try is cut short: there it says when no other begins."""


class RanksConfig(_Section):
    """How the ranks of a job work together."""

    timeout: Duration = timedelta(minutes=10)
    """How long any rank may keep the others waiting before they all give up."""


class CheckpointConfig(_Section):
    """Every setting of a `CheckpointManager`. Building one raises a `ConfigError` that lists every problem."""

    root: Root
    """Where the run's checkpoints live: a folder or any fsspec URL. The only setting without a default."""
    run: Text | None = None
    """The run's name in manifests; made up when absent, inherited on resume."""
    save: SaveConfig = SaveConfig()
    """When a save is due: when any of these says so. One call saves at most once."""
    keep: KeepConfig = KeepConfig()
    """What stays: a checkpoint stays when any of these keeps it. With none of them, everything stays."""
    name: str = "step-{step:08d}"
    """Folder names; fields are step, epoch and run; must contain step."""
    latest: PlainName = "latest"
    """The name of the small text file that names the newest checkpoint."""
    format: Literal["safetensors", "torch", "dcp"] = "safetensors"
    """How tensors are written: safetensors, torch, or dcp (every rank writes its part; sharded state always is)."""
    split_size: Size = 5_000_000_000
    """A tensor file that would be larger is split."""
    only: Entries | None = None
    """Save only these entries of the state; all of them when absent."""
    background: bool = True
    """Write while training goes on; training waits only for a memory copy."""
    max_staging: Size | None = None
    """The most host memory for that copy; a state that needs more is saved while training waits. None: what is free."""
    overlap: bool = False
    """Copy parameters and optimizer state beside the next forward and backward; the next optimizer.step() waits for
    it. For loops where nothing else changes them before that step, and which is no replayed CUDA graph."""
    share_unchanged: bool = True
    """Link or copy files whose bytes are those of the checkpoint before (frozen weights) instead of writing them."""
    reuse_blocks: bool = True
    """On ext4 and XFS, keep large files of the checkpoint that went last, and have the next save write over their
    blocks. Never what somebody has open, mapped or linked; but false is for roots that others read over NFS."""
    when_busy: Literal["wait", "skip"] = "wait"
    """What a due save does while the one before is still being written: wait or skip."""
    overwrite: bool = False
    """Replace a checkpoint of the same step instead of refusing."""
    check_finite: bool = False
    """Mark checkpoints that hold NaN or infinity as unhealthy: they never evict a healthy one."""
    on_error: Literal["raise", "warn"] = "raise"
    """What a failed save does to the training: raise or warn."""
    max_failures: Count = 3
    """How many failed saves in a row on_error: warn tolerates before it raises."""
    on_full: Literal["raise", "prune", "skip"] = "raise"
    """What a save does when there is no room: raise (it fails, as on_error says), prune (deletes checkpoints, the least
    worth first, but never the pinned, the newest good one and those of keep.min_good) or skip (a due save is left out
    with a warning)."""
    commit: Literal["auto", "rename", "manifest"] = "auto"
    """How a save becomes visible: rename (of its folder), manifest (written last), or auto: as the store can."""
    fsync: bool = True
    """On local disks, report success only when a power cut can't undo it."""
    verify: VerifyConfig = VerifyConfig()
    """How closely bytes are checked."""
    trust_pickle: bool = False
    """Load pickled objects from checkpoints. They can run any code."""
    lease_ttl: Duration = timedelta(seconds=60)
    """How long a dead writer keeps others out, on stores without file locks."""
    read: Literal["auto", "all", "rank0", "per_node"] = "auto"
    """Which ranks read a checkpoint that is not sharded: all, rank0 (which tells the others), per_node (one each), or
    auto: all on a local disk, which is read once for the ranks of a machine, rank0 over a network."""
    on_world_change: Literal["exact", "derive", "drop"] = "derive"
    """What a resume by another number of ranks does with random generators and per_rank entries: exact (refuses),
    derive (seeds each rank's generators anew, from the checkpoint) or drop (leaves the generators as they are). The
    last two leave per_rank entries as they are."""
    ranks: RanksConfig = RanksConfig()
    """How the ranks of a job work together."""
    storage: StorageConfig = StorageConfig()
    """How to reach the store."""

    @field_validator("name")
    @classmethod
    def _name_is_template(cls, name: str, info: ValidationInfo) -> str:
        template = NameTemplate(name)
        run, save = info.data.get("run"), info.data.get("save")
        if run:
            if (length := template.length(run)) > MAX_LENGTH:
                raise ValueError(
                    f"gives folders with names of {length} characters with the run's name {run!r:.60}, more than "
                    f"{MAX_LENGTH}: shorten one of them"
                )
            try:
                template.format(step=1, epoch=1, run=run)
            except ConfigError as exc:
                raise ValueError(
                    f"puts the run's name {run!r} into folder names, which take letters, digits and . _ + = @ % ~ - "
                    "and begin with no dot"
                ) from exc
        if save and save.on_file and template.step(save.on_file) is not None:
            raise ValueError(f"gives folders like save.on_file, {save.on_file!r}; rename one of them")
        return name

    @field_validator("overlap")
    @classmethod
    def _overlap_has_a_copy(cls, overlap: bool, info: ValidationInfo) -> bool:
        if overlap and not info.data.get("background", True):
            raise ValueError("needs background: true, as there is no copy without it")
        return overlap

    @field_validator("latest")
    @classmethod
    def _latest_is_free(cls, latest: str, info: ValidationInfo) -> str:
        name, save = info.data.get("name"), info.data.get("save")
        if save and latest == save.on_file:
            raise ValueError("is also the name in save.on_file; rename one of them")
        if name and NameTemplate(name).step(latest) is not None:
            raise ValueError(f"looks like a folder of name: {name!r}; rename one of them")
        return latest

    def trigger(self, extra: Sequence[Trigger | Callable[[Moment], object]] = ()) -> AnyOf:
        """When a save is due, as one rule; `extra` are further triggers or callables(Moment) -> bool."""
        save, triggers = self.save, list[Trigger]()
        if save.every_steps:
            triggers.append(EverySteps(save.every_steps))
        if save.every_epochs:
            triggers.append(EveryEpochs(save.every_epochs))
        if save.every:
            triggers.append(Every(save.every))
        if save.at_steps:
            triggers.append(AtSteps(tuple(save.at_steps)))
        if save.when is not None:
            predicate = resolved(save.when) if isinstance(save.when, str) else save.when
            triggers.append(When(predicate, predicate_name(save.when) or ""))
        if save.on_signals:
            triggers.append(OnSignals(tuple(save.on_signals)))
        return AnyOf((*triggers, OnRequest(), *map(as_trigger, extra)))

    def keep_rules(self) -> tuple[KeepRule, ...]:
        """The rules for `retention.plan`; none keeps everything. `min_good` and `max_bytes` are no rules."""
        keep, rules = self.keep, list[KeepRule]()
        if keep.last:
            rules.append(Last(keep.last))
        if keep.every_steps:
            rules.append(KeepEverySteps(keep.every_steps))
        bests = [keep.best] if isinstance(keep.best, BestConfig) else keep.best or []
        rules.extend(Best(best.metric, best.mode, best.count) for best in bests)
        if keep.newer_than:
            rules.append(NewerThan(keep.newer_than))
        return tuple(rules)

    def fingerprint(self) -> str:
        """A digest of every setting but `storage`: equal for equal settings, wherever they came from."""
        return digest(json.dumps(self._shown(), sort_keys=True, separators=(",", ":")).encode())

    def to_yaml(self) -> str:
        """Every setting as YAML that loads back as the same, but for `storage`, which may hold secrets.

        Raises `ConfigError` when `save.when` is a callable without an import path.
        """
        shown, when = self._shown(), self.save.when
        if when is not None and not isinstance(when, str) and not _is_named(when, shown["save"]["when"]):
            raise ConfigError(f"save.when: {shown['save']['when']} is no import path of it; YAML can't name it")
        return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)

    def _shown(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"storage"})
