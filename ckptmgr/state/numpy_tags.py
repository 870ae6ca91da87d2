"""How are NumPy's values written as tagged dicts, and read back? Nothing here imports NumPy."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch

from .plain_tags import AbsentError, Sub, to_bytes, to_text
from .snapshot import Tree

_BIT_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
_TORCH_KINDS = "?bBhHiIlLqQefdFD"  # numpy type codes that torch has too


def encode_numpy(value: Any, sub: Sub) -> Tree:
    """The tagged dict of a NumPy array, scalar, dtype or generator, or NotImplemented for what is
    none or holds Python objects. An array's leaf shares its memory where torch can."""
    np = sys.modules.get("numpy")
    if np is None:
        return NotImplemented
    if type(value) is np.ndarray:
        return _encode_array(np, value, sub)
    if isinstance(value, np.generic):
        array = np.array(value)  # an empty text has a dtype without size, but not in an array
        descr = _descr(np, array.dtype, sub)
        return NotImplemented if descr is None else {"$scalar": descr, "data": to_text(array.tobytes())}
    if isinstance(value, np.dtype):
        descr = _descr(np, value, sub)
        return NotImplemented if descr is None else {"$np_dtype": descr}
    if type(value) is np.random.Generator and type(value.bit_generator).__name__ in _BIT_GENERATORS:
        return {"$np_generator": sub(value.bit_generator.state, None)}
    if type(value) is np.random.RandomState:
        return {"$random_state": sub(value.get_state(legacy=False), None)}
    return NotImplemented


def _descr(np: Any, dtype: Any, sub: Sub) -> Tree | None:
    """A dtype as `numpy.lib.format` describes it, or None where that would lose something."""
    if dtype.hasobject:
        return None
    descr = np.lib.format.dtype_to_descr(dtype) if dtype.subdtype is None else (dtype.subdtype[0].str, dtype.shape)
    return sub(descr, None) if np.lib.format.descr_to_dtype(descr) == dtype else None


def _encode_array(np: Any, array: Any, sub: Sub) -> Tree:
    if array.dtype.char in _TORCH_KINDS:
        native = array if array.dtype.isnative else array.byteswap().view(array.dtype.newbyteorder("="))
        fits = native.flags.writeable and all(s >= 0 and s % array.itemsize == 0 for s in native.strides)
        # torch warns of read-only memory and has no negative strides.
        leaf = torch.from_numpy(
            native if fits else native.copy(order="K" if min(native.strides, default=0) >= 0 else "C")
        )
        order = {} if array.dtype.isnative else {"order": array.dtype.byteorder}
        return {"$array": sub(leaf, None), **order}
    descr = _descr(np, array.dtype, sub)
    if descr is None:
        return NotImplemented
    data = torch.frombuffer(bytearray(array.tobytes()), dtype=torch.uint8) if array.nbytes else None
    return {"$raw_array": descr, "shape": list(array.shape), "data": sub(data, None)}


def _numpy() -> Any:
    np = sys.modules.get("numpy")
    if np is None:
        raise AbsentError("this value needs numpy, which is not installed here; install it, or skip the entry")
    return np


def _dtype(content: Any, sub: Sub) -> Any:
    np = _numpy()
    dtype = np.lib.format.descr_to_dtype(sub(content, None))
    if dtype.hasobject:
        raise ValueError(f"dtype {dtype} holds Python objects")
    return dtype


def _decode_array(content: Any, sub: Sub, *, order: str = "=") -> Any:
    _numpy()
    array = sub(content, None).numpy()
    if order == "=":
        return array
    return array.byteswap().view(array.dtype.newbyteorder({"<": "<", ">": ">"}[order]))


def _from_bytes(dtype: Any, shape: list[int], data: bytes | None) -> Any:
    np = _numpy()
    if any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"{shape} is no shape")
    if not data:
        if math.prod(shape) * dtype.itemsize:  # else a few bytes of a checkpoint would take all the memory
            raise ValueError(f"no data for the shape {shape}")
        return np.zeros(shape, dtype)
    return np.frombuffer(bytearray(data), np.uint8).view(dtype).reshape(shape)


def _decode_raw(content: Any, sub: Sub, *, shape: list[int], data: Any) -> Any:
    tensor = sub(data, None)
    return _from_bytes(_dtype(content, sub), shape, None if tensor is None else tensor.numpy().tobytes())


def _decode_scalar(content: Any, sub: Sub, *, data: str) -> Any:
    array = _from_bytes(_dtype(content, sub), [], to_bytes(data))
    return array[()]


def _bit_generator(state: Any) -> Any:
    if state["bit_generator"] not in _BIT_GENERATORS:
        raise ValueError(f"{state['bit_generator']!r} is no bit generator of numpy")
    check_place(state)
    generator = getattr(_numpy().random, state["bit_generator"])(0)
    generator.state = {key: value for key, value in state.items() if key not in ("has_gauss", "gauss")}
    return generator


def check_place(state: Any) -> None:
    """Raises an error for a generator's state whose place lies outside of its numbers: NumPy takes it, and then
    reads memory that is not its own."""
    if state["bit_generator"] == "MT19937":
        place, last = state["state"]["pos"], 624
    elif state["bit_generator"] == "Philox":
        place, last = state["buffer_pos"], 4
    else:
        return
    if not 0 <= place <= last:
        raise ValueError(f"place {place} of {last} numbers")


def _decode_random_state(content: Any, sub: Sub) -> Any:
    state = sub(content, None)
    value = _numpy().random.RandomState(_bit_generator(state))
    value.set_state(state)
    return value


DECODERS: dict[str, Callable[..., Any]] = {
    "$array": _decode_array,
    "$raw_array": _decode_raw,
    "$scalar": _decode_scalar,
    "$np_dtype": _dtype,
    "$np_generator": lambda content, sub: _numpy().random.Generator(_bit_generator(sub(content, None))),
    "$random_state": _decode_random_state,
}
