"""Does anything but an error of ours come of bytes that nobody wrote? Real files changed, and JSON made up."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from faults import parsers
from faults.forgery import build, sealed
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

logging.getLogger("ckptmgr").addHandler(logging.NullHandler())
_CALM = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -1, 1 << 63, 1 << 62, 0, 1])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../x", "os:system", "float32", "uint8", "m.safetensors", "latest", "\x00"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=4)
            | st.sampled_from(
                ["$tuple", "$tensor", "$dict", "$array", "$raw_array", "$dtype", "$meta", "$int", "data", "shape"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The JSON files of real checkpoints, by kind."""
    found = {}
    for format in ("safetensors", "torch", "dcp"):
        root = tmp_path_factory.mktemp("real") / format
        build(root, format)
        folder = root / "step-00000002"
        found[f"state of {format}"] = (folder / "state.json").read_bytes()
    found["manifest"] = (folder / "manifest.json").read_bytes()
    found["rank"] = (folder / "ranks" / "rank-00000.json").read_bytes()
    found["shards"] = (folder / "shards.json").read_bytes()
    return found


def _parsers() -> dict[str, Any]:
    return {parse.__name__: parse for parse in parsers.PARSERS}


@pytest.mark.parametrize("name", sorted(_parsers()))
def test_bytes_that_nobody_wrote_are_an_error_of_ours(name, profile, tally):
    count = 2000 if profile.is_full else 25

    @settings(max_examples=count, deadline=None, suppress_health_check=_CALM, database=None)
    @given(st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
    @example(b"[" * 4000)
    @example(b'{"format_version": 1e999, "step": 1e999}')
    @example(b'{"$fraction": ["1e99999999"]}')
    @example(b'{"$raw_array": "<U4", "shape": [268435456], "data": null}')
    @example(b'{"$size": [1000000000000000000000000000000]}')
    @example("\u00b2.json".encode())
    def run(data: bytes) -> None:
        parsers.only_ours(_parsers()[name], data)

    run()
    tally("fuzzed inputs", count)


@st.composite
def _changed(draw: st.DrawFn, body: Any) -> Any:
    """JSON with one or two of its values, however deep, replaced, removed or doubled."""
    body = json.loads(json.dumps(body))
    for _ in range(draw(st.integers(1, 2))):
        inside = body
        while True:
            keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(inside[key], dict | list) and inside[key] and draw(st.integers(0, 3)):
                inside = inside[key]
                continue
            match draw(st.integers(0, 2)):
                case 0:
                    del inside[key]
                case 1:
                    inside[key] = draw(VALUES)
                case _:
                    inside[key] = [inside[key], inside[key]]
            break
    return body


@pytest.mark.parametrize(
    "name", ["manifest", "rank", "shards", "state of safetensors", "state of torch", "state of dcp"]
)
def test_a_real_file_that_was_changed_is_an_error_of_ours(name, real, profile, tally):
    count = 1500 if profile.is_full else 25
    body = json.loads(real[name])

    @settings(max_examples=count, deadline=None, suppress_health_check=_CALM, database=None)
    @given(_changed(body))
    def run(changed: Any) -> None:
        is_sealed = name == "manifest" and isinstance(changed, dict)
        parsers.only_ours(_parsers()[name], sealed(changed) if is_sealed else json.dumps(changed).encode())

    run()
    tally("fuzzed inputs", count)


@given(st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=_CALM, database=None)
def test_a_manifest_of_which_any_byte_was_changed_is_never_taken_for_another(real, data):
    """Its digest covers all of it."""
    whole = bytearray(real["manifest"])
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    if parsers.only_ours(parsers.Manifest.from_json, bytes(whole)):
        assert parsers.Manifest.from_json(bytes(whole)) == parsers.Manifest.from_json(real["manifest"])


@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed")
def test_the_fuzzer_finds_nothing_in_a_moment(tmp_path):
    fuzzer = Path(__file__).with_name("fuzz_atheris.py")
    subprocess.run([sys.executable, fuzzer, "-runs=2000"], cwd=tmp_path, check=True, capture_output=True)
