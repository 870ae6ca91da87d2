"""Sharded state comes back bit by bit on any number of ranks, and never half, torn or silently wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import run_ranks, values
from sharded_ranks import differences, load_layouts, make, odd_states, opened, save, save_and_note, save_layouts
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from ckptmgr import DamagedError
from ckptmgr.state import materialize

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of four ranks, in four layouts."""
    root = tmp_path_factory.mktemp("layouts")
    saves = {"fsdp4": "fsdp", "hsdp4": "hsdp", "tp4": "tp", "ddp4": "ddp"}
    values(run_ranks(save_layouts, 4, args=(str(root), saves)))
    return root


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks found of odd states."""
    found = values(run_ranks(odd_states, 2, args=(str(tmp_path_factory.mktemp("odd")),)))
    return list(found)


def test_what_four_ranks_saved_comes_back_on_two_and_on_one_and_from_there_on_four(layouts: Path) -> None:
    """Weights, optimizer state and learning rate, bit by bit, whatever is sharded how before and after; into fresh
    objects and into trained ones; from whole tensors of the other formats too."""
    root = str(layouts)
    pairs = [("fsdp4", "fsdp"), ("hsdp4", "fsdp"), ("tp4", "fsdp"), ("ddp4", "fsdp"), ("fsdp4", "ddp"), ("fsdp4", "tp")]
    assert values(run_ranks(load_layouts, 2, args=(root, pairs, {"fsdp2": "fsdp"}))) == [[], []]
    for name in ("fsdp4", "hsdp4", "tp4", "ddp4", "fsdp2"):
        assert differences(root, name, "plain") == []
    save_and_note(root, "plain1", "plain", 5)
    save_and_note(root, "safetensors1", "plain", 6, format_name="safetensors")
    save_and_note(root, "torch1", "plain", 6, format_name="torch")
    pairs = [("fsdp2", "fsdp"), ("fsdp2", "hsdp"), ("plain1", "fsdp"), ("plain1", "ddp"), ("plain1", "tp")]
    pairs += [("safetensors1", "fsdp"), ("safetensors1", "tp"), ("torch1", "fsdp"), ("torch1", "hsdp")]
    assert values(run_ranks(load_layouts, 4, args=(root, pairs))) == [[]] * 4


def test_every_element_is_written_once_and_replicas_are_spread(layouts: Path) -> None:
    """The buffer of 80,000 bytes that all ranks have is written by one, and shards that two have by either."""
    for name in ("fsdp4", "hsdp4", "ddp4"):
        index = json.loads((layouts / name / "shards.json").read_text())["tensors"]
        elements = {key: sum(_product(chunk[1]) for chunk in one["chunks"]) for key, one in index.items()}
        assert elements == {key: _product(one["shape"]) for key, one in index.items()}
        assert len(index["model.table"]["chunks"]) == 1
    index = json.loads((layouts / "hsdp4" / "shards.json").read_text())["tensors"]
    writers = {chunk[2].split("_")[2] for one in index.values() for chunk in one["chunks"]}
    assert writers == {"0", "1", "2", "3"}


def test_optimizer_state_is_under_the_names_of_its_parameters(layouts: Path) -> None:
    index = json.loads((layouts / "fsdp4" / "shards.json").read_text())["tensors"]
    assert index["optimizer.state.model.up.weight.exp_avg"]["shape"] == [10, 6]


def test_readers_of_dcp_read_the_files(layouts: Path, tmp_path: Path) -> None:
    """`dcp.load`, and the tool that makes one file of a checkpoint, give what `ckptmgr` gives."""
    state = opened(str(layouts), "fsdp4")
    ours = materialize(state, state.entries, state.fetch)
    loaded = {"model": {"up.weight": torch.zeros(10, 6)}, "scheduler": {"last_epoch": 0}, "seen": 0}
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(layouts / "fsdp4"))
    assert torch.equal(loaded["model"]["up.weight"], ours["model"]["up.weight"])
    assert [loaded["scheduler"], loaded["seen"]] == [{"last_epoch": 2}, 34]
    dcp_to_torch_save(layouts / "tp4", tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    state = opened(str(layouts), "tp4")
    ours = materialize(state, state.entries, state.fetch)
    assert all(torch.equal(value, ours["model"][key]) for key, value in whole["model"].items())
    assert whole["optimizer"]["param_groups"] == ours["optimizer"]["param_groups"]


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", "shards.json", "state.json"])
def test_a_flipped_byte_is_damage(tmp_path: Path, layouts: Path, name: str) -> None:
    folder = layouts / "fsdp4"
    broken = tmp_path / "fsdp4"
    broken.mkdir()
    for path in folder.rglob("*"):
        if path.is_file():
            (broken / path.relative_to(folder)).parent.mkdir(exist_ok=True)
            os.link(path, broken / path.relative_to(folder))
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (broken / name).unlink()
    (broken / name).write_bytes(data)

    def read() -> None:
        state = opened(str(tmp_path), "fsdp4")
        materialize(state, state.entries, state.fetch)

    with pytest.raises(DamagedError, match=name.replace(".", r"\.")):
        read()


def test_a_pickle_in_the_metadata_is_never_read(tmp_path: Path) -> None:
    save(str(tmp_path), "one", make("plain", 0))
    (tmp_path / "one" / ".metadata").write_bytes(b"no pickle")
    state = opened(str(tmp_path), "one")
    assert set(materialize(state, state.entries, state.fetch)) == {"model", "optimizer", "scheduler", "seen"}


# What two ranks found


def test_a_state_of_the_same_shape_is_known_again(odd: list[dict[str, Any]]) -> None:
    assert [one["one shape"] for one in odd] == [True, True]


def test_parameters_of_fsdp_are_filled_in_place(odd: list[dict[str, Any]]) -> None:
    assert [one["in place"] for one in odd] == [True, True]


@pytest.mark.parametrize("name", ["safetensors", "torch"])
def test_other_formats_refuse_sharded_tensors_and_name_the_one_that_takes_them(
    odd: list[dict[str, Any]], name: str
) -> None:
    for one in odd:
        assert one[name].startswith(f"ConfigError: model.up.weight is sharded (a DTensor), and format {name} writes")
        assert "format: dcp" in one[name]


def test_values_that_are_not_finite_are_found_in_shards(odd: list[dict[str, Any]]) -> None:
    assert [(one["finite"], one["not finite"]) for one in odd] == [([], ["model.up.weight"])] * 2


def test_dtypes_of_optimizer_state_are_kept_and_parameters_are_cast(odd: list[dict[str, Any]]) -> None:
    assert [(one["wide"], one["cast"]) for one in odd] == [([], True)] * 2


def test_tied_parameters_stay_tied_where_a_rank_has_nothing_of_them(odd: list[dict[str, Any]]) -> None:
    assert [one["tied"] for one in odd] == [True, True]
    assert odd[0]["tied names"] == ["model.0.weight", "model.2.bias", "model.2.weight"]


def test_states_that_make_no_whole_are_refused_in_words(odd: list[dict[str, Any]]) -> None:
    for one in odd:
        assert one["partial"].startswith("StateMismatchError: w is a sum that is not summed")
        assert "rank 0 has v, which rank 1 does not have; w is torch.float32 (3,) on rank 0" in one["other"]
        assert one["too few"] == "ConfigError: plans of ranks [0] do not make the 2 ranks of this save"
        assert one["half"].startswith("StateMismatchError: the ranks' parts of the state do not make a whole")
        assert one["none"].startswith("StateMismatchError: no rank of this save has any part of w;")
        assert one["half of one"].startswith("StateMismatchError: w: the ranks have 2 of its 4 elements;")


def test_a_save_that_is_not_whole_is_not_finished(odd: list[dict[str, Any]]) -> None:
    """Every item that was planned must have been written, and no other."""
    start = "SaveFailedError: the save is not whole: 1 items were"
    assert odd[0]["missing"] == f"{start} not written: w at [0]"
    assert odd[0]["surplus"] == f"{start} not planned: x at [0]"
    assert odd[0]["twice"] == f"{start} written twice: w at [0]"


def _product(sizes: list[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
