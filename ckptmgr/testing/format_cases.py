"""Which snapshots are hard to store, and when is one that came back the same?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..state.codec import to_json
from ..state.snapshot import RankPart, Snapshot, StoredTensor, Tree, map_leaves

_INTEGERS = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
_FLOATS = ("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128")
_SMALL = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2")


def _every_dtype() -> Snapshot:
    dtypes = {name: getattr(torch, name) for name in _INTEGERS + _FLOATS + _SMALL if hasattr(torch, name)}
    pattern = torch.arange(16 * 12, dtype=torch.uint8) % 2
    return Snapshot(
        {"model": {name: pattern[: 12 * d.itemsize].clone().view(d).view(3, 4) for name, d in dtypes.items()}}
    )


def every_shape() -> Snapshot:
    base = torch.arange(240.0)
    return Snapshot(
        {
            "model": {
                "scalar": torch.tensor(1.5),
                "one": torch.ones(1, 1, 1),
                "empty": torch.empty(0),
                "empty_inside": torch.empty(3, 0, 5, dtype=torch.int64),
                "view": base[7:11],
                "row": base.view(12, 20)[:, 3],
                "transposed": base[:12].view(3, 4).t(),
                "expanded": torch.tensor([2.0]).expand(300, 300),
                "channels_last": base[:120].reshape(2, 3, 4, 5).to(memory_format=torch.channels_last),
                "channels_last_3d": base.reshape(2, 2, 3, 4, 5).to(memory_format=torch.channels_last_3d),
                "conjugate": torch.tensor([1 + 2j, 3 - 4j]).conj(),
                "negative": torch.tensor([1 + 2j]).conj().imag,
                "not_finite": torch.tensor([float("nan"), float("inf"), -0.0]),
            }
        }
    )


def _ties() -> Snapshot:
    shared, equal = torch.arange(6.0).view(2, 3), torch.arange(6.0).view(2, 3)
    return Snapshot(
        {
            "model": {"embedding": shared, "head": shared, "equal": equal},
            "average": {"head": shared, "own": torch.ones(2)},
        }
    )


def _flags() -> Snapshot:
    return Snapshot(
        {
            "value": {
                "parameter": torch.nn.Parameter(torch.ones(2)),
                "frozen": torch.nn.Parameter(torch.ones(3), requires_grad=False),
                "wants_grad": torch.ones(4, requires_grad=True),
                "plain": torch.ones(5),
            }
        }
    )


def _odd_keys() -> Snapshot:
    names = ["", ".", "a.b", "__metadata__", "format", "état/ü", "\N{PILE OF POO}", "x" * 300, "a\nb", '"']
    tree: Tree = {name: torch.full((2,), float(i)) for i, name in enumerate(names)}
    tree["a"] = {"b": torch.zeros(1), "list": [torch.zeros(2), {"deep": [torch.zeros(3)]}, [], {}]}
    pairs = [[1, torch.ones(1)], [{"$str": "7aCA"}, torch.ones(2)], [{"$tuple": [1, "a"]}, {"deep": torch.ones(3)}]]
    return Snapshot({"model": tree, "pairs": {"$dict": pairs}})


def odd_entries() -> Snapshot:
    names = ["", ".", "..", "Model", "model", "MODEL", "a/b", "a b", "a%20b", "manifest", "state", "objects", "tensors"]
    names += ["ranks/rank-00000", "é", "\ud800", "y" * 300, "y" * 299 + "z", "model-00001-of-00002", "model~2", "con"]
    return Snapshot({name: {"w": torch.full((3,), float(i))} for i, name in enumerate(names)})


def _no_tensors() -> Snapshot:
    scheduler = {
        "last": 3,
        "lr": [0.1, 1e-300, 5e-324, -0.0],
        "on": True,
        "none": None,
        "text": {"$str": "7aCAAA=="},
        "big": {"$int": "0xc9f2c9cd04674edea40000000"},
    }
    return Snapshot({"scheduler": scheduler, "tokens": 1234567890123456789, "empty": {}, "list": []})


def _everything_else() -> Snapshot:
    return Snapshot(
        {"optimizer": {"state": {"$dict": [[0, {"exp_avg": torch.ones(2)}], [1, {"exp_avg": torch.zeros(2)}]]}}},
        notes={"optimizer": {"params": [["a", "b"], []]}},
        ranks={0: RankPart({"python": [3, [1, 2, 3], None]}), 3: _own_entries()},
    )


def _own_entries() -> RankPart:
    tensors = [torch.arange(6.0).view(2, 3), torch.nn.Parameter(torch.ones(2)), torch.empty(0, dtype=torch.int8)]
    tensors += [torch.tensor(True), torch.ones(1, dtype=torch.complex64, requires_grad=True)]
    tree = {"tied": [{"$tensor": 0}, {"$tensor": 0}], "more": [{"$tensor": i} for i in range(1, 5)], "at": 3}
    rng = to_json({"torch": torch.arange(3)})
    return RankPart(rng, {"loader": tree}, {"loader": {"class": "a.B"}}, tuple(map(to_json, tensors)))


def _not_dense() -> Snapshot:
    dense = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]])
    return Snapshot({"value": {"coo": dense.to_sparse(), "plain": dense, "again": {"coo": dense.to_sparse()}}})


CASES: dict[str, Callable[[], Snapshot]] = {
    "every dtype": _every_dtype,
    "every shape": every_shape,
    "ties": _ties,
    "flags": _flags,
    "odd keys": _odd_keys,
    "odd entries": odd_entries,
    "no tensors": _no_tensors,
    "nothing": lambda: Snapshot({}),
    "a tensor alone": lambda: Snapshot({"weights": torch.arange(3)}),
    "everything else": _everything_else,
    "sparse": _not_dense,
}


def leaves(tree: Tree) -> list[Any]:
    found: list[Any] = []
    map_leaves(tree, lambda leaf, _: found.append(leaf))
    return found


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, layout, shape and bits."""
    if (a.dtype, a.layout, a.shape) != (b.dtype, b.layout, b.shape):
        return False
    if a.layout == torch.sparse_coo:
        a, b = a.to_dense(), b.to_dense()
    return _bits(a) == _bits(b)


def _bits(tensor: torch.Tensor) -> list[int]:
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    bits: list[int] = plain.view(-1).view(torch.uint8).tolist() if plain.numel() else []
    return bits


def without_tensors(tree: Tree) -> Tree:
    """The tree with a number for each distinct tensor: equal trees have the same ties."""
    numbers: dict[int, int] = {}

    def numbered(leaf: Any, _: tuple[str, ...]) -> Any:
        if isinstance(leaf, torch.Tensor | StoredTensor):
            return f"tensor {numbers.setdefault(id(leaf), len(numbers))}"
        return (type(leaf), repr(leaf))

    return map_leaves(tree, numbered)
