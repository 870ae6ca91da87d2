"""What was the manager told? Settings from YAML, the environment and arguments, checked against the schema."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .layers import Layer, argument_layer, config_error, environment_layers, file_layer, merge, problems_in
from .schema import BestConfig, CheckpointConfig, KeepConfig, SaveConfig, StorageConfig, VerifyConfig

__all__ = [
    "BestConfig",
    "CheckpointConfig",
    "KeepConfig",
    "SaveConfig",
    "StorageConfig",
    "VerifyConfig",
    "config_schema",
    "load_config",
]


def load_config(
    source: str | Path | Mapping[str, Any] | CheckpointConfig | None = None, /, **overrides: Any
) -> CheckpointConfig:
    """The settings from `source` under those of the environment (`CKPTMGR_ROOT`, `CKPTMGR_KEEP__LAST=5`)
    under `overrides` (nested mappings, merged key by key).

    `source` is the path of a `.yaml` file, a root URL (which then counts as an override), a
    mapping, or a finished `CheckpointConfig`, over which only `overrides` are laid.
    Raises one `ConfigError` that lists every problem with its source and key.
    """
    layers = [*_source_layers(source), argument_layer(overrides)]
    problems = [problem for layer in layers for problem in layer.problems]
    try:
        config = CheckpointConfig.model_validate(merge(layers))
    except ValidationError as exc:
        known = {problem.key for problem in problems}
        found = problems_in(exc, CheckpointConfig, layers)
        raise config_error([*problems, *(problem for problem in found if problem.key not in known)]) from exc
    if problems:
        raise config_error(problems)
    return config


def _source_layers(source: str | Path | Mapping[str, Any] | CheckpointConfig | None) -> list[Layer]:
    if isinstance(source, CheckpointConfig):
        return [argument_layer(source.model_dump(exclude_unset=True), "config")]
    environment = environment_layers(CheckpointConfig)
    if source is None:
        return environment
    if isinstance(source, Mapping):
        return [argument_layer(source), *environment]
    if isinstance(source, str | Path) and str(source).endswith((".yaml", ".yml")):
        return [file_layer(Path(source)), *environment]
    return [*environment, argument_layer({"root": source})]


def config_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, for editors."""
    # "serialization": the other mode shows the defaults of durations and sizes in a form that does not load.
    schema = CheckpointConfig.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
