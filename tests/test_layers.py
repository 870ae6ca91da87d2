"""The house stands: files import only from layers below, the pure ones do nothing, and torch stays out of the tools."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ckptmgr"

LAYERS = [
    {"errors"},
    {"clock", "folder_names", "manifest", "quantities", "retention", "rotation", "triggers", "untrusted"},
    {
        "arena",
        "config",
        "coordinator",
        "memory",
        "moves",
        "overlap",
        "priority",
        "program",
        "request_file",
        "signals",
        "staging",
        "state",
        "store",
    },
    {
        "background",
        "draft",
        "fences",
        "formats",
        "joint_schedule",
        "lease",
        "listing",
        "litter",
        "lock",
        "owner",
        "pins",
        "pointer",
        "ranged",
        "records",
        "repository",
        "room",
        "scatter",
        "schedule",
        "sharded",
        "shared_source",
        "sharing",
        "source",
        "sweep",
        "transfer",
        "trash",
    },
    {
        "catalog",
        "committing",
        "copying",
        "direct",
        "job",
        "ledger",
        "reading",
        "request",
        "restart",
        "resumption",
        "run",
        "saving",
        "scrub",
        "sharded_save",
        "weights",
        "whole_save",
    },
    {"manager"},
    {"bench"},
    {"cli"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
OUTSIDE = {"__init__", "__main__", "testing"}  # the public names, the entry point, and what ships for tests


def modules() -> dict[str, list[Path]]:
    """Each module of the package with its files; a folder is one module."""
    found: dict[str, list[Path]] = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        found.setdefault(name, []).append(path)
    return found


def imports(paths: list[Path]) -> set[str]:
    """The modules of the package that these files import, inside functions too."""
    names = set()
    for path in paths:
        depth = len(path.relative_to(PACKAGE).parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == depth:
                names |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return names - {"__version__"}


def test_every_module_has_a_layer() -> None:
    assert set(modules()) - OUTSIDE == set(RANK)


@pytest.mark.parametrize("name", sorted(RANK))
def test_a_module_imports_nothing_from_a_layer_above(name: str) -> None:
    above = {other for other in imports(modules().get(name, [])) if RANK[other] > RANK[name]}
    assert above == set()


def test_no_module_imports_itself_through_others() -> None:
    graph = {name: imports(paths) - {name} for name, paths in modules().items() if name not in OUTSIDE}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", ["errors", "folder_names", "manifest", "retention", "triggers"])
def test_the_pure_modules_import_nothing_that_acts(name: str) -> None:
    allowed = {
        "__future__", "collections", "dataclasses", "datetime", "functools", "json", "math", "re", "string", "typing",
        "xxhash",
    }  # fmt: skip
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    roots = {
        root.split(".")[0]
        for node in ast.walk(tree)
        for root in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and node.level == 0
            else []
        )
    }
    assert roots <= allowed


@pytest.mark.parametrize(
    "module",
    ["", ".bench", ".cli", ".config", ".repository", ".retention", ".triggers", ".manifest", ".store", ".run", ".lock"],
)
def test_torch_stays_out_of_what_lists_and_verifies(module: str) -> None:
    code = f"import sys, ckptmgr{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_loads() -> None:
    import ckptmgr

    for name in ckptmgr.__all__:
        assert getattr(ckptmgr, name) is not None
    assert set(ckptmgr.__all__) <= set(dir(ckptmgr))
    with pytest.raises(AttributeError, match="nothing_of_ours"):
        _ = ckptmgr.nothing_of_ours
