"""Weights from another run or file get into a model by name, all of them or as chosen, and nothing else does."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks, values
from torch import nn

from ckptmgr import (
    CheckpointManager,
    ConfigError,
    DamagedError,
    NotFoundError,
    StateMismatchError,
    StoreError,
    direct,
    save_file,
    warm_start,
)
from ckptmgr.testing import MemoryStore


def network(out: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, out))


@pytest.fixture
def source(tmp_path: Path) -> nn.Sequential:
    torch.manual_seed(0)
    model = network()
    with CheckpointManager(str(tmp_path / "run"), background=False, keep={"last": None}) as mgr:
        for step in (1, 2):
            nn.init.constant_(model[0].bias, step)
            mgr.save({"model": model, "other": {"a": 1}}, step)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "w.pt")
    return model


def equal(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True))


@pytest.mark.parametrize("where", ["run", "run/step-00000002", "w.safetensors", "w.pt"])
def test_weights_come_from_a_run_a_checkpoint_or_a_file(tmp_path: Path, source: nn.Sequential, where: str) -> None:
    model = network()
    done = warm_start(tmp_path / where, model)
    assert equal(model, source)
    assert set(done.loaded) == set(model.state_dict())
    assert (done.missing, done.unexpected) == ((), ())


def test_one_checkpoint_of_a_run_is_named_by_its_folder(tmp_path: Path, source: nn.Sequential) -> None:
    model = network()
    warm_start(tmp_path / "run" / "step-00000001", model)
    assert model[0].bias.tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("here", "where"),
    [("run", "step-00000001"), ("run/step-00000001", "."), ("run/step-00000002", "../step-00000001/"), ("run", "link")],
)
def test_a_checkpoint_is_named_by_any_path_to_its_folder(
    tmp_path: Path, source: nn.Sequential, monkeypatch: pytest.MonkeyPatch, here: str, where: str
) -> None:
    (tmp_path / "run" / "link").symlink_to(tmp_path / "run" / "step-00000001")
    monkeypatch.chdir(tmp_path / here)
    model = network()
    warm_start(where, model)
    assert model[0].bias.tolist() == [1.0] * 4


@pytest.mark.parametrize("name", ["0007", "2", "latest", "best"])
def test_a_copied_checkpoint_may_have_any_name(tmp_path: Path, source: nn.Sequential, name: str) -> None:
    """Also one that elsewhere means a step, beside a checkpoint of that very step."""
    for folder, step in ((name, 1), ("other", 2)):
        shutil.copytree(tmp_path / "run" / f"step-{step:08d}", tmp_path / "pre" / folder)
    model = network()
    warm_start(tmp_path / "pre" / name, model)
    assert model[0].bias.tolist() == [1.0] * 4


def test_a_folder_with_someone_else_s_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "manifest.json").write_text("{}")
    with pytest.raises(NotFoundError, match=r"no checkpoint in .*theirs; give"):
        warm_start(tmp_path / "theirs", network())


def test_a_damaged_newest_is_passed_over(
    tmp_path: Path, source: nn.Sequential, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (2, 1):
        path = tmp_path / "run" / f"step-{step:08d}" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        model = network()
        if step == 2:
            warm_start(tmp_path / "run", model)
            assert model[0].bias.tolist() == [1.0] * 4
            assert "warm_start.skip.damaged step=2" in caplog.text
        else:
            with pytest.raises(DamagedError):
                warm_start(tmp_path / "run", model)


def test_the_manager_warm_starts_with_its_own_options(tmp_path: Path, source: nn.Sequential) -> None:
    model = network()
    with CheckpointManager(str(tmp_path / "new")) as mgr:
        assert not mgr.resume(model)
        mgr.warm_start(tmp_path / "run", model)
    assert equal(model, source)


def test_what_does_not_fit_is_listed_and_the_model_is_left_alone(tmp_path: Path, source: nn.Sequential) -> None:
    model = network(out=5)
    model.append(nn.Linear(5, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(StateMismatchError) as caught:
        warm_start(tmp_path / "run", model)
    for words in ("3.weight", "2.weight is (2, 4) there and (5, 4) here", "strict=False", "exclude="):
        assert words in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    done = warm_start(tmp_path / "run", model, strict=False)
    assert set(done.missing) == {"3.weight", "3.bias"}
    assert done.mismatched == ("2.weight is (2, 4) there and (5, 4) here", "2.bias is (2,) there and (5,) here")
    assert torch.equal(model[0].weight, source[0].weight)


def test_patterns_choose_by_the_model_s_names(tmp_path: Path, source: nn.Sequential) -> None:
    model = network(out=5)
    done = warm_start(tmp_path / "w.safetensors", model, exclude=["2.*"])
    assert set(done.loaded) == {name for name in model.state_dict() if not name.startswith("2.")}
    only = warm_start(tmp_path / "w.safetensors", model, include=["0.*"])
    assert only.loaded == ("0.weight", "0.bias")


def test_names_are_mapped_by_prefix_or_by_a_function(tmp_path: Path, source: nn.Sequential) -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = network()

    model = Body()
    warm_start(tmp_path / "w.safetensors", model, rename={"": "encoder."})
    assert equal(model.encoder, source)
    again = Body()
    warm_start(
        tmp_path / "w.safetensors", again, rename=lambda n: f"encoder.{n}" if n[0] != "2" else None, exclude=["*.2.*"]
    )
    assert torch.equal(again.encoder[0].weight, source[0].weight)


def test_a_source_in_which_nothing_fits_is_an_error_even_when_not_strict(tmp_path: Path, source: nn.Module) -> None:
    with pytest.raises(StateMismatchError, match="no weight of"):
        warm_start(tmp_path / "run", nn.Embedding(2, 2), strict=False)


def test_wrong_sources_say_what_they_are(tmp_path: Path, source: nn.Module) -> None:
    torch.save({"epoch": 3}, tmp_path / "no.pt")
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    cases = {
        "no.pt": (ConfigError, "keys are epoch"),
        "list.pt": (NotFoundError, "holds a list"),
        "junk.pt": (DamagedError, r"junk\.pt"),
        "gone.pt": (NotFoundError, r"gone\.pt"),
        "empty": (NotFoundError, r"no checkpoint in .*empty; give"),
    }
    for name, (error, words) in cases.items():
        with pytest.raises(error, match=words):
            warm_start(tmp_path / name, network())
    with pytest.raises(NotFoundError, match="no entry ema; it has model, other"):
        warm_start(tmp_path / "run", network(), entry="ema")
    with pytest.raises(ConfigError, match="no state dict"):
        warm_start(tmp_path / "run", network(), entry="other")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_file_of_pickled_objects_is_no_state_dict_and_not_taken_for_damaged(
    tmp_path: Path, source: nn.Sequential
) -> None:
    torch.save(source, tmp_path / "whole.pt")
    torch.save(source, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": source.state_dict(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "args.ckpt")
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path / "script.pt")
    found = {
        "whole.pt": "torch.nn.modules", "old.bin": "torch.nn.modules", "args.ckpt": "argparse.Namespace",
        "script.pt": "TorchScript",
    }  # fmt: skip
    for name, kind in found.items():
        with pytest.raises(ConfigError) as caught:
            warm_start(tmp_path / name, network())
        text = str(caught.value)
        assert f"{name} holds pickled objects ({kind}" in text
        assert "save model.state_dict()" in text
        assert "weights_only" not in text


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_that_torch_does_not_read_comes_with_no_advice_to_run_its_code(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(pickle.dumps({"a": 1}, protocol=4))
    with pytest.raises(DamagedError, match=r"w\.bin is not a torch\.save file .*: Unsupported operand") as caught:
        warm_start(tmp_path / "w.bin", network())
    assert "arbitrary code" not in str(caught.value)


def test_a_store_that_fails_while_weights_are_read_is_not_mistaken_for_damage(
    tmp_path: Path, source: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Down(MemoryStore):
        def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            raise StoreError("connection reset")

    store = Down()
    store.put("w.pt", (tmp_path / "w.pt").read_bytes())
    monkeypatch.setattr(direct, "open_store", lambda root, options: store)
    with pytest.raises(StoreError, match="connection reset"):
        warm_start("s3://bucket/w.pt", network())


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_stands_alone_is_not_taken_for_its_letters(
    tmp_path: Path, source: nn.Sequential, argument: str
) -> None:
    choice: dict[str, Any] = {argument: "0.*"}
    with pytest.raises(ConfigError, match=rf"{argument}='0\.\*' is one text; give a list: \['0\.\*'\]"):
        warm_start(tmp_path / "w.safetensors", network(), **choice)


@pytest.mark.parametrize("strict", [True, False])
def test_names_that_rename_makes_one_are_an_error_that_names_all_and_the_model_is_left_alone(
    tmp_path: Path, strict: bool
) -> None:
    save_file({"q.weight": torch.zeros(2, 2), "k.weight": torch.ones(2, 2)}, tmp_path / "w.safetensors")
    model = nn.Linear(2, 2, bias=False)
    before = model.weight.detach().clone()
    with pytest.raises(ConfigError, match=r"q\.weight, k\.weight to weight\n.*return None"):
        warm_start(tmp_path / "w.safetensors", model, rename={"q.": "", "k.": ""}, strict=strict)
    assert torch.equal(model.weight, before)
    warm_start(tmp_path / "w.safetensors", model, rename=lambda name: name[2:] if name[0] == "k" else None)
    assert model.weight.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_names_that_rename_makes_one_do_no_harm_where_that_one_is_left_out(tmp_path: Path) -> None:
    tensors = {"q.weight": torch.zeros(2, 2), "k.weight": torch.ones(2, 2), "k.bias": torch.ones(2)}
    save_file(tensors, tmp_path / "w.safetensors")
    done = warm_start(tmp_path / "w.safetensors", nn.Linear(2, 2), rename={"q.": "", "k.": ""}, exclude=["weight"])
    assert (done.loaded, done.unexpected) == (("bias",), ())


@pytest.mark.parametrize("kind", [nn.Linear, nn.LazyLinear])
def test_a_model_without_memory_is_refused_and_not_reported_as_loaded(tmp_path: Path, kind: Any) -> None:
    save_file(nn.Linear(3, 3).state_dict(), tmp_path / "w.safetensors")
    model = kind(*[3] * (2 if kind is nn.Linear else 1), device="meta")
    for strict in (True, False):
        with pytest.raises(StateMismatchError, match=r"weight is on the meta device here .* \(to_empty\)"):
            warm_start(tmp_path / "w.safetensors", model, strict=strict)


def test_only_what_has_memory_is_loaded_when_not_strict(tmp_path: Path, source: nn.Sequential) -> None:
    model = network()
    model[2].to("meta")
    before = model[0].weight.detach().clone()
    with pytest.raises(StateMismatchError, match=r"different: 2\.weight is on the meta device"):
        warm_start(tmp_path / "w.safetensors", model)
    assert torch.equal(model[0].weight, before)
    done = warm_start(tmp_path / "w.safetensors", model, strict=False)
    assert [one.partition(" here")[0] for one in done.mismatched] == [
        "2.weight is on the meta device",
        "2.bias is on the meta device",
    ]
    assert torch.equal(model[0].weight, source[0].weight)


def test_weights_that_were_saved_without_values_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.empty(2, 2, device="meta"), "bias": torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(StateMismatchError, match="weight was on the meta device when it was saved"):
        warm_start(tmp_path / "w.pt", nn.Linear(2, 2))


def test_a_lazy_module_takes_its_shapes_from_the_source(tmp_path: Path) -> None:
    theirs = nn.Linear(4, 3)
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    model = nn.LazyLinear(3)
    assert set(warm_start(tmp_path / "w.safetensors", model).loaded) == {"weight", "bias"}
    batch = torch.randn(2, 4)
    assert torch.equal(model(batch), theirs(batch))


def warm_start_sharded(layout: str, folder: str) -> Any:
    """What a rank's sharded model holds, and what it should, whole, after a start from a file and one from a run."""
    from sharded_ranks import build, whole

    rank, found = dist.get_rank(), []
    theirs = build(layout, 1)
    with CheckpointManager(f"{folder}/run", background=False) as mgr:
        mgr.save({"model": theirs}, 1)
    expected = {name: whole(value) for name, value in theirs.state_dict().items()}
    if rank == 0:
        save_file(expected, f"{folder}/w.safetensors")
    for where in ("w.safetensors", "run"):
        model = build(layout, 2).bfloat16() if where == "run" else build(layout, 2)
        for turn in range(dist.get_world_size()):
            dist.barrier()
            if turn == rank:  # alone: the others don't take part
                done = warm_start(f"{folder}/{where}", model)
        now = {name: whole(value) for name, value in model.state_dict().items()}
        same = [name for name, value in now.items() if torch.equal(value, expected[name].to(value.dtype))]
        found.append([set(done.loaded) == set(expected), same])
    return [list(expected), found]


@pytest.mark.parametrize("layout", ["fsdp", "tp"])
def test_a_sharded_model_gets_the_whole_weights_each_rank_for_itself(tmp_path: Path, layout: str) -> None:
    for names, found in values(run_ranks(warm_start_sharded, 2, args=(layout, str(tmp_path)))):
        assert found == [[True, names], [True, names]]


def warm_start_sharded_without_memory(path: str) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(3, 3, device="meta")
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    with pytest.raises(StateMismatchError) as caught:
        warm_start(path, model)
    return str(caught.value)


def test_a_sharded_model_without_memory_is_refused_on_every_rank(tmp_path: Path) -> None:
    save_file(nn.Linear(3, 3).state_dict(), tmp_path / "w.safetensors")
    for text in values(run_ranks(warm_start_sharded_without_memory, 2, args=(str(tmp_path / "w.safetensors"),))):
        assert "weight is on the meta device here" in text


class Scaled(nn.Linear):
    """A module with a state of its own besides its tensors."""

    def __init__(self, extra: Any = None) -> None:
        super().__init__(2, 2)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        if state == "unknown":
            raise ValueError("no such scale")
        self.extra = state


@pytest.mark.parametrize("where", ["run", "w.pt"])
@pytest.mark.parametrize("extra", [{"scale": 3, "by": "max"}, None, torch.arange(3)])
def test_a_model_starts_from_its_own_checkpoint_with_the_extra_state_of_its_modules(
    tmp_path: Path, where: str, extra: Any
) -> None:
    theirs = nn.Sequential(Scaled(extra))
    with CheckpointManager(str(tmp_path / "run"), background=False) as mgr:
        mgr.save({"model": theirs}, 1)
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    model = nn.Sequential(Scaled(torch.zeros(5)))  # of another kind or shape: that is for the module to judge
    done = warm_start(tmp_path / where, model)
    assert set(done.loaded) == {"0.weight", "0.bias", "0._extra_state"}
    assert torch.equal(model[0].weight, theirs[0].weight)
    assert repr(model[0].extra) == repr(extra)


def test_extra_state_follows_names_and_patterns_and_is_no_weight_left_over(tmp_path: Path) -> None:
    torch.save(nn.ModuleDict({"old": Scaled(7)}).state_dict(), tmp_path / "w.pt")
    model = nn.ModuleDict({"new": Scaled("fresh")})
    warm_start(tmp_path / "w.pt", model, rename={"old.": "new."}, exclude=["*._extra_state"])
    assert model["new"].extra == "fresh"
    warm_start(tmp_path / "w.pt", model, rename={"old.": "new."})
    assert model["new"].extra == 7
    assert warm_start(tmp_path / "w.pt", nn.Linear(2, 2), rename={"old.": ""}).unexpected == ()


@pytest.mark.filterwarnings("ignore:.*pickle")
def test_extra_state_that_only_running_code_could_load_is_refused_with_the_way_to_the_weights(tmp_path: Path) -> None:
    with CheckpointManager(str(tmp_path / "run"), background=False) as mgr:
        mgr.save({"model": Scaled(argparse.Namespace)}, 1)
    model = Scaled("fresh")
    before = model.weight.detach().clone()
    with pytest.raises(
        StateMismatchError, match=r"code from the checkpoint: model\._extra_state.*load\(only=\['model'\]"
    ):
        warm_start(tmp_path / "run", model)
    assert torch.equal(model.weight, before)
    with CheckpointManager(str(tmp_path / "run"), read_only=True, trust_pickle=True) as mgr:
        model.load_state_dict(mgr.load(only=["model"])["model"])
    assert model.extra is argparse.Namespace


@pytest.mark.filterwarnings("ignore:.*pickle")
def test_what_is_left_out_needs_no_trust(tmp_path: Path) -> None:
    theirs = Scaled(argparse.Namespace)
    with CheckpointManager(str(tmp_path / "run"), background=False) as mgr:
        mgr.save({"model": theirs}, 1)
    model = Scaled("fresh")
    done = warm_start(tmp_path / "run", model, exclude=["_extra_state"])
    assert set(done.loaded) == {"weight", "bias"}
    assert torch.equal(model.weight, theirs.weight)
    assert model.extra == "fresh"


def test_files_with_nothing_that_is_wanted_are_not_read(tmp_path: Path, source: nn.Sequential) -> None:
    with CheckpointManager(str(tmp_path / "split"), background=False, split_size=100) as mgr:
        mgr.save({"model": source}, 1)
    rows = json.loads((tmp_path / "split" / "step-00000001" / "state.json").read_text())["tensors"]
    file = tmp_path / "split" / "step-00000001" / next(row[0] for row in rows if row[1] == "2.weight")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    model = network()
    with pytest.raises(DamagedError):
        warm_start(tmp_path / "split", model)
    warm_start(tmp_path / "split", model, include=["0.*"])
    assert torch.equal(model[0].weight, source[0].weight)


def test_of_a_file_of_tensors_only_what_is_wanted_is_read(tmp_path: Path) -> None:
    """The rest of this one fits into no memory."""
    rest = 1 << 42
    header = {
        "rest": {"dtype": "U8", "shape": [rest], "data_offsets": [0, rest]},
        "bias": {"dtype": "F32", "shape": [2], "data_offsets": [rest, rest + 8]},
    }
    text = json.dumps(header).encode()
    with (tmp_path / "w.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(rest, os.SEEK_CUR)
        file.write(torch.tensor([1.0, 2.0]).numpy().tobytes())
    model = nn.Linear(3, 2)
    assert warm_start(tmp_path / "w.safetensors", model, strict=False).unexpected == ("rest",)
    assert model.bias.tolist() == [1.0, 2.0]


def test_what_a_module_refuses_is_an_error_that_says_so(tmp_path: Path) -> None:
    torch.save(Scaled("unknown").state_dict(), tmp_path / "w.pt")
    with pytest.raises(StateMismatchError, match=r"refused the weights of .*w\.pt: no such scale.* partly filled"):
        warm_start(tmp_path / "w.pt", Scaled())
