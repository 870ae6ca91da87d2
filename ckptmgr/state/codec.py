"""How do values become trees, and trees values? Types are kept; nothing is imported or executed.

A tree (see `snapshot`) is JSON with tensors in it. What JSON has no form for is a dict with a tag:

    $int $float $str               hexadecimal; nan, -nan, inf, -inf; base64 of a text with lone surrogates
    $complex $bytes $bytearray     [real, imag]; base64
    $tuple $set $frozenset $deque  [item, ...]; a deque's `maxlen`
    $dict                          [[key, value], ...]: keys that are not texts, or begin with "$"
    $ordered $counter $defaultdict the tree of a dict; a defaultdict's `factory`, the name of a builtin
    $range $slice                  [start, stop, step]
    $namespace $simple_namespace   the tree of a dict
    $date $datetime $time          ISO 8601 without zone; `fold`; `tz`, the tree of the zone
    $timedelta $timezone $zoneinfo [days, seconds, microseconds]; [offset, name]; key
    $path $uuid $decimal $fraction text, and a path's `kind`; text; text; [numerator, denominator]
    $size $dtype $layout           torch's, as [int, ...] and by name
    $memory_format $device         by name
    $generator                     device of a torch.Generator; `state`
    $meta                          shape of a tensor on the meta device; `dtype`
    $array $raw_array              a NumPy array as a tensor, foreign byte `order`; a dtype, `shape`, `data` as bytes
    $scalar $np_dtype              NumPy's own description of the dtype; a scalar's `data`
    $np_generator $random_state    the tree of NumPy's own state
    $namedtuple $dataclass $enum   "module:qualname"; `names` and `values`; `fields`; `names`
    $omegaconf                     the tree of the container; `flags`
    $object                        path of a value that had to be pickled
    $unsaved                       "module.qualname" of a value that could not even be pickled
    $inline                        a tensor as base64 in `to_json`; `dtype`, `shape`, `requires_grad`, `parameter`
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from ..errors import CheckpointError, ConfigError, DamagedError, StateMismatchError
from . import class_tags, numpy_tags, plain_tags
from .plain_tags import AbsentError, is_plain, is_unsaved, to_bytes, to_text
from .shards import is_sharded
from .snapshot import StoredTensor, Tree, map_leaves

MAX_DEPTH = 64  # levels of values within values; what is deeper has to be pickled

_DECODERS = plain_tags.DECODERS | numpy_tags.DECODERS | class_tags.DECODERS
# What may need a class, a library or a device that this process does not have.
FOREIGN_TAGS = {*class_tags.DECODERS, *numpy_tags.DECODERS, "$zoneinfo", "$generator"}
_BROKEN = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError)


def encode(
    value: Any,
    *,
    path: str = "",
    opaque: Callable[[Any, str], Tree] | None = None,
    tensor: Callable[[torch.Tensor], Tree] | None = None,
) -> Tree:
    """The tree of a value. Its containers are new; its tensors are live: not copied, cut off from the graph.

    `opaque(value, path)` gives the tree of what cannot be expressed; without it that is a
    `ConfigError`, as are containers that contain themselves and a `ShardedTensor`. `tensor` gives
    what stands for each tensor. `path` is the value's name in messages.
    """
    return _Encoder(path, opaque, tensor).encode(value)


def decode(
    tree: Tree,
    *,
    tensor: Callable[[Any], Any] | None = None,
    objects: Callable[[str], Any] | None = None,
    path: str = "",
) -> Any:
    """The value of a tree. `tensor` gives the value of a leaf, `objects` what was pickled, by path.

    What could not be saved is None, and left out of a dict. Raises `DamagedError` for a tree that
    `encode` did not make, `StateMismatchError` for a class or library that is not loaded, and for
    what was pickled when `objects` is None.
    """
    return _Decoder(path, tensor, objects).decode(tree)


def join(path: str, steps: Sequence[Any]) -> str:
    """A path for messages: keys with dots between them, positions in brackets."""
    for step in steps:
        if isinstance(step, int | list):
            path += f"[{step}]" if isinstance(step, int) else f"[{step[0]!r:.60}]"
        elif step is not None:
            path += f".{step}" if path else str(step)
    return path


class _Encoder:
    def __init__(
        self,
        path: str,
        opaque: Callable[[Any, str], Tree] | None,
        tensor: Callable[[torch.Tensor], Tree] | None,
        keep_tags: bool = False,
        most: float = math.inf,
    ) -> None:
        self._left = most
        self._path, self._opaque, self._tensor, self._keep_tags = path, opaque, tensor, keep_tags
        self._max_depth = 4 * MAX_DEPTH if keep_tags else MAX_DEPTH  # a tag adds levels of its own
        self._steps: list[Any] = []
        self._open: set[int] = set()

    @property
    def _here(self) -> str:
        return join(self._path, self._steps)

    def sub(self, value: Any, step: Any) -> Tree:
        if is_plain(value):
            return value
        self._steps.append(step)
        try:
            return self.encode(value)
        finally:
            self._steps.pop()

    def encode(self, value: Any) -> Tree:
        if isinstance(value, torch.Tensor):
            return self._encode_tensor(value)
        self._left -= 1
        if self._left < 0:
            raise ConfigError(f"{self._here} holds more than its file can")
        if id(value) in self._open:
            raise ConfigError(f"{self._here} contains itself; a checkpoint holds no reference cycles")
        tree = NotImplemented
        if len(self._steps) <= self._max_depth:
            self._open.add(id(value))
            try:
                tree = self._encode_value(value)
            finally:
                self._open.discard(id(value))
        return self._encode_opaque(value) if tree is NotImplemented else tree

    def _encode_value(self, value: Any) -> Tree:
        if self._keep_tags and type(value) is dict and any(type(key) is str and key[:1] == "$" for key in value):
            return {key: self.sub(item, key) for key, item in value.items()}
        if type(value) in (list, tuple) and _are_plain(value):
            return list(value) if type(value) is list else {"$tuple": list(value)}
        if encoder := plain_tags.ENCODERS.get(type(value)):
            return encoder(value, self.sub)
        tree = numpy_tags.encode_numpy(value, self.sub)
        return class_tags.encode_class(value, self.sub) if tree is NotImplemented else tree

    def _encode_opaque(self, value: Any) -> Tree:
        if self._opaque is None:
            raise ConfigError(
                f"{self._here or 'the value'} is a {_type_name(value)}, which a checkpoint has no form for"
            )
        return self._opaque(value, self._here)

    def _encode_tensor(self, value: torch.Tensor) -> Tree:
        kind = type(value)
        if kind.__name__ == "ShardedTensor":
            raise ConfigError(
                f"{self._here} is a ShardedTensor, which torch no longer makes; shard the model with fully_shard "
                "(FSDP2) or parallelize_module, whose DTensors a checkpoint holds"
            )
        if kind not in (torch.Tensor, torch.nn.Parameter) and not is_sharded(value):
            return self._encode_opaque(value)
        if value.is_meta:
            return {"$meta": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if not value.is_leaf:
            value = value.detach()
        return value if self._tensor is None else self._tensor(value)


def _are_plain(items: Collection[Any]) -> bool:
    """Whether JSON holds all the items as they are, where that is seen without a look at each: they are
    all of one kind. A list of the numbers of all parameters is long."""
    kinds = set(map(type, items))
    if kinds == {int}:
        return is_plain(min(items)) and is_plain(max(items))
    if kinds == {float}:
        return all(map(math.isfinite, items))
    return kinds <= {type(None), bool} or (kinds == {str} and all(map(str.isascii, items)))


def _meta(shape: Any, *, dtype: str) -> torch.Tensor:
    return torch.empty(shape, dtype=vars(torch)[dtype], device="meta")


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


class _Decoder:
    def __init__(self, path: str, tensor: Callable[[Any], Any] | None, objects: Callable[[str], Any] | None) -> None:
        self._path, self._tensor, self._objects = path, tensor, objects
        self._steps: list[Any] = []

    @property
    def _here(self) -> str:
        return join(self._path, self._steps) or "the value"

    def sub(self, tree: Tree, step: Any) -> Any:
        if type(tree) is StoredTensor and self._tensor is not None:
            return self._tensor(tree)
        if is_plain(tree):
            return tree
        self._steps.append(step)
        try:
            return self.decode(tree)
        finally:
            self._steps.pop()

    def decode(self, tree: Tree) -> Any:
        if isinstance(tree, torch.Tensor | StoredTensor):
            if self._tensor is not None:
                return self._tensor(tree)
            if isinstance(tree, torch.Tensor):
                return tree
        if len(self._steps) > MAX_DEPTH:
            raise DamagedError(f"{self._here} is nested more than {MAX_DEPTH} levels deep")
        if type(tree) is list:
            return [self.sub(item, i) for i, item in enumerate(tree)]
        if type(tree) is dict:
            for key in tree:
                if key[:1] == "$":
                    return self._decode_tagged(key, dict(tree))
            return {key: self.sub(item, key) for key, item in tree.items() if not is_unsaved(item)}
        if tree is None or isinstance(tree, str | int | float):
            return tree
        raise DamagedError(f"{self._here} holds a {type(tree).__name__}, which is no part of a tree")

    def _decode_tagged(self, tag: str, rest: dict[str, Any]) -> Any:
        content = rest.pop(tag)
        try:
            if tag == "$object":
                return self._decode_object(content, **rest)
            if tag == "$unsaved":
                return None
            if tag == "$meta":
                return _meta(content, **rest)
            if tag not in _DECODERS:
                raise DamagedError(f"{self._here} has the unknown tag {tag!r}")
            return _DECODERS[tag](content, self.sub, **rest)
        except AbsentError as exc:
            raise StateMismatchError(f"{self._here}: {exc}") from exc
        except CheckpointError:
            raise
        except _BROKEN as exc:
            raise DamagedError(f"{self._here} does not decode as {tag}: {exc!r}") from exc

    def _decode_object(self, path: Any) -> Any:
        if self._objects is None:
            raise StateMismatchError(f"{self._here} was pickled: loading it runs code from the checkpoint. {_TRUST}")
        return self._objects(path)


_TRUST = (
    "Pass trust_pickle=True if you trust where the checkpoint comes from, or leave the entry out with skip= or only="
)


def to_json(tree: Tree) -> Tree:
    """The tree with its tensors inline, for `json.dumps`; meant for small ones."""

    def inlined(leaf: Any, _: tuple[str, ...]) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        flat = leaf.detach().cpu().contiguous().view(-1).view(torch.uint8)
        dtype = str(leaf.dtype).removeprefix("torch.")
        flags = {"requires_grad": True} if leaf.requires_grad else {}
        flags |= {"parameter": True} if isinstance(leaf, torch.nn.Parameter) else {}
        data = ctypes.string_at(flat.data_ptr(), flat.nbytes) if flat.nbytes else b""
        return {"$inline": to_text(data), "dtype": dtype, "shape": list(leaf.shape), **flags}

    return map_leaves(tree, inlined)


def from_json(tree: Tree) -> Tree:
    """The inverse of `to_json`. Raises `DamagedError`."""
    if isinstance(tree, list):
        return [from_json(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "$inline" not in tree:
        return {key: from_json(item) for key, item in tree.items()}
    try:
        data = bytearray(to_bytes(tree["$inline"]))
        flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        tensor = flat.view(vars(torch)[tree["dtype"]]).view(tree["shape"])
        needs_grad = tree.get("requires_grad") is True
        if tree.get("parameter") is True:
            return torch.nn.Parameter(tensor, requires_grad=needs_grad)
        return tensor.requires_grad_() if needs_grad else tensor
    except (*_BROKEN, KeyError) as exc:
        raise DamagedError(f"a tensor in JSON does not decode: {exc!r}") from exc


# What `torch.load(weights_only=True)` reads without help.
_SAFE = {"$int", "$float", "$complex", "$str", "$bytes", "$bytearray", "$tuple", "$set", "$dict", "$ordered"}
_SAFE |= {"$counter", "$size", "$dtype", "$layout", "$device"}


def to_torch_safe(tree: Tree) -> Any:
    """The tree with real values in the place of tags, wherever `torch.load(weights_only=True)` reads
    such a value. So a saved optimizer is what `load_state_dict` takes. Other tags stay dicts."""
    if type(tree) is list:
        return [to_torch_safe(item) for item in tree]
    if type(tree) is not dict:
        return tree
    tag = next((key for key in tree if key[:1] == "$"), None)
    if tag is None:
        return {key: to_torch_safe(item) for key, item in tree.items()}
    if tag in _SAFE and _is_safe(tag, tree[tag]):

        def sub(part: Tree, step: Any) -> Any:
            return to_torch_safe(part)

        try:
            value = _DECODERS[tag](tree[tag], sub)
        except TypeError:  # a part that must be hashable is a tagged dict itself
            pass
        else:
            if not isinstance(value, dict) or not any(type(key) is str and key[:1] == "$" for key in value):
                return value
    return {key: to_torch_safe(item) for key, item in tree.items()}


def _is_safe(tag: str, content: Any) -> bool:
    """Whether the exceptions that torch makes, or that would lose a mark, do not apply."""
    if tag == "$int":
        return len(content) < 500  # it reads no whole number of more than 255 bytes
    if tag == "$bytes":
        return bool(content)  # nor empty bytes
    return tag != "$dict" or not any(is_unsaved(item) for _, item in content)


def from_torch_safe(value: Any, most: float = math.inf) -> Tree:
    """The inverse of `to_torch_safe`. Raises `DamagedError` for a value that it does not give: also for one of more
    than `most` parts, as lists make that hold the same list many times."""
    try:
        return _Encoder("", None, None, keep_tags=True, most=most).encode(value)
    except ConfigError as exc:
        raise DamagedError(f"not what ckptmgr writes: {exc}") from exc
