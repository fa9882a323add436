"""Plain values as bytes, without pickle: call arguments, results and message bodies.

A value is ``None``, bool, int, float, str, bytes, a list, a tuple, a dict with string keys, or a NumPy array or
scalar of a numeric type. Torch tensors are taken too and come back as NumPy arrays.

Layout::

    "ICRV" | u16 version | u16 zero | u32 length of the tree | tree (JSON, ASCII) | buffers

The tree holds the value; each array or bytes object in it is a placeholder that names a buffer. Buffers follow in
order, each at the next multiple of 64 bytes from the start. Integers are little-endian.
"""

from __future__ import annotations

import json
import math
import re
import struct
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from icrf.errors import ConfigError, ProtocolError

MAX_DEPTH = 64
ALIGNMENT_BYTES = 64
_MAGIC, _VERSION = b"ICRV", 1
_HEAD = struct.Struct("<4sHHI")
_DTYPES = frozenset(["|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8", "<c8", "<c16"])
_SAFE_INT = 1 << 63
_MAX_DIMENSIONS = 32
_HEX = re.compile(r"-?0x[0-9a-f]+")
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(value: Any, root: str = "value") -> bytes:
    """Encode a value.

    Args:
        value: see the module's docstring.
        root: what error messages call the whole value, e.g. ``body``.

    Raises:
        ConfigError: C006 naming the place inside the value (``body['x'][3]``) and its type; C003 if it is nested
            deeper than 64 levels (or contains itself).
    """
    encoder = _Encoder()
    body = encoder.tree(value, root, 0)
    text = json.dumps({"value": body, "buffers": [len(b) for b in encoder.buffers]}, separators=(",", ":")).encode()
    parts: list[bytes | memoryview] = [_HEAD.pack(_MAGIC, _VERSION, 0, len(text)), text]
    position = _HEAD.size + len(text)
    for buffer in encoder.buffers:
        padding = -position % ALIGNMENT_BYTES
        parts += [bytes(padding), buffer]
        position += padding + len(buffer)
    return b"".join(parts)


def decode(data: bytes | bytearray | memoryview) -> Any:
    """The inverse of :func:`encode`. Arrays own their memory and are writable.

    Raises:
        ProtocolError: P001 if `data` is not exactly one well-formed value.
    """
    view = memoryview(data).cast("B")
    if len(view) < _HEAD.size:
        raise _malformed(f"{len(view)} bytes, need at least {_HEAD.size}")
    magic, version, reserved, length = _HEAD.unpack_from(view)
    if magic != _MAGIC or version != _VERSION or reserved:
        raise _malformed(f"magic {magic!r} version {version}, expected {_MAGIC!r} version {_VERSION}")
    if _HEAD.size + length > len(view):
        raise _malformed(f"tree of {length} bytes in {len(view)} bytes")
    document = _parse(bytes(view[_HEAD.size : _HEAD.size + length]))
    if not isinstance(document, dict) or set(document) != {"value", "buffers"}:
        raise _malformed("tree without value and buffers")
    decoder = _Decoder(_buffers(view, _HEAD.size + length, document["buffers"]))
    value = decoder.value(document["value"], 0)
    if decoder.used != len(decoder.buffers):
        raise _malformed(f"{len(decoder.buffers) - decoder.used} buffers that nothing refers to")
    return value


class _Encoder:
    """Collects buffers while it turns a value into a JSON tree.

    Anything but null, booleans, text, small integers, finite floats and lists becomes an object with one key, the
    kind: ``i`` (big integer), ``f`` (nan or infinity), ``t`` (tuple), ``d`` (dict), ``b`` (bytes), ``a`` (array),
    ``s`` (NumPy scalar).
    """

    def __init__(self) -> None:
        self.buffers: list[memoryview] = []

    def tree(self, value: Any, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ConfigError("C003", f"{path[:200]}: nested deeper than {MAX_DEPTH} levels")
        if isinstance(value, np.generic) and value.dtype.kind in "biufc":
            return {"s": self._array(np.asarray(value), path)}
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return str(value)
        if isinstance(value, int):
            return int(value) if -_SAFE_INT <= value < _SAFE_INT else {"i": hex(value)}
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"f": str(float(value))}
        if isinstance(value, bytes | bytearray):
            return {"b": self._buffer(memoryview(bytes(value)))}
        if isinstance(value, list):
            return self._items(value, path, depth)
        if isinstance(value, tuple):
            return {"t": self._items(value, path, depth)}
        if isinstance(value, dict):
            return {"d": self._entries(value, path, depth)}
        if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
            return {"a": self._array(value, path)}
        tensor = getattr(sys.modules.get("torch"), "Tensor", None)
        if tensor is not None and isinstance(value, tensor):
            return {"a": self._array(_tensor_as_array(value, path), path)}
        raise _not_encodable(value, path)

    def _items(self, value: list[Any] | tuple[Any, ...], path: str, depth: int) -> list[Any]:
        return [self.tree(item, f"{path}[{number}]", depth + 1) for number, item in enumerate(value)]

    def _entries(self, value: dict[Any, Any], path: str, depth: int) -> dict[str, Any]:
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(
                    "C006", f"{path}: key {key!r} of type {type(key).__qualname__}", allowed="dict keys that are str"
                )
        return {str(key): self.tree(item, f"{path}[{key!r}]", depth + 1) for key, item in value.items()}

    def _array(self, array: np.ndarray[Any, Any], path: str) -> list[Any]:
        dtype = array.dtype.newbyteorder("<")
        if dtype.str not in _DTYPES:
            raise ConfigError(
                "C006", f"{path}: array of dtype {array.dtype}", allowed="bool, integer, float and complex dtypes"
            )
        flat = np.ascontiguousarray(array, dtype=dtype).reshape(-1).view(np.uint8)
        return [self._buffer(flat.data), dtype.str, list(array.shape)]

    def _buffer(self, buffer: memoryview) -> int:
        self.buffers.append(buffer)
        return len(self.buffers) - 1


def _tensor_as_array(tensor: Any, path: str) -> np.ndarray[Any, Any]:
    try:
        array: np.ndarray[Any, Any] = tensor.detach().cpu().resolve_conj().resolve_neg().numpy()
    except (TypeError, RuntimeError) as error:
        raise ConfigError(
            "C006",
            f"{path}: torch tensor of {tensor.dtype}, {tensor.layout} has no NumPy form",
            hint="Convert it first, e.g. with .float() or .to_dense().",
        ) from error
    return array


def _not_encodable(value: Any, path: str) -> ConfigError:
    kind = type(value)
    return ConfigError(
        "C006",
        f"{path}: values of type {kind.__module__}.{kind.__qualname__} cannot be sent",
        allowed="None, bool, int, float, str, bytes, list, tuple, dict with str keys, numeric arrays, torch tensors",
    )


def _parse(text: bytes) -> Any:
    try:
        return json.loads(text.decode("ascii"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _malformed(f"tree is not readable ({error})") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("duplicate key")
    return entries


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"constant {name}")


def _buffers(view: memoryview, position: int, sizes: Any) -> list[memoryview]:
    if not isinstance(sizes, list):
        raise _malformed("buffer sizes are no list")
    buffers = []
    for size in sizes:
        if type(size) is not int or size < 0:
            raise _malformed(f"buffer of size {str(size)[:40]}")
        start = position + -position % ALIGNMENT_BYTES
        position = start + size
        if position > len(view):
            raise _malformed(f"buffer ends at byte {position} of {len(view)}")
        buffers.append(view[start:position])
    if position != len(view):
        raise _malformed(f"{len(view) - position} bytes after the end")
    return buffers


class _Decoder:
    """Turns a JSON tree back into a value; each buffer must be used once, in order."""

    def __init__(self, buffers: list[memoryview]) -> None:
        self.buffers = buffers
        self.used = 0

    def value(self, tree: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise _malformed(f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(tree, list):
            return [self.value(item, depth + 1) for item in tree]
        if not isinstance(tree, dict):
            return tree
        if len(tree) != 1:
            raise _malformed(f"placeholder with {len(tree)} keys")
        (kind, content), *_ = tree.items()
        return self._placeholder(kind, content, depth)

    def _placeholder(self, kind: str, content: Any, depth: int) -> Any:
        if kind == "d" and isinstance(content, dict):
            return {key: self.value(item, depth + 1) for key, item in content.items()}
        if kind == "t" and isinstance(content, list):
            return tuple(self.value(item, depth + 1) for item in content)
        simple: dict[str, Callable[[Any], Any]] = {
            "i": _big_int,
            "f": _non_finite,
            "b": lambda number: bytes(self._take(number)),
            "a": self._array,
            "s": self._scalar,
        }
        if kind not in simple:
            raise _malformed(f"placeholder {kind[:40]!r}")
        return simple[kind](content)

    def _take(self, number: Any) -> memoryview:
        if type(number) is not int or number != self.used or number >= len(self.buffers):
            raise _malformed(f"reference to buffer {str(number)[:40]}, expected {self.used}")
        self.used += 1
        return self.buffers[number]

    def _array(self, content: Any) -> np.ndarray[Any, Any]:
        if not isinstance(content, list) or len(content) != 3:
            raise _malformed("array without buffer, dtype and shape")
        number, dtype_name, shape = content
        if not isinstance(dtype_name, str) or dtype_name not in _DTYPES:
            raise _malformed(f"array dtype {str(dtype_name)[:40]!r}")
        if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
            raise _malformed(f"array shape {str(shape)[:80]}")
        if any(type(size) is not int or not 0 <= size < _SAFE_INT for size in shape):
            raise _malformed(f"array shape {str(shape)[:80]}")
        dtype = np.dtype(dtype_name)
        buffer = self._take(number)
        if len(buffer) != math.prod(shape) * dtype.itemsize:
            raise _malformed(f"{len(buffer)} bytes for an array of {dtype} with shape {shape}")
        if dtype.kind == "b" and np.frombuffer(buffer, np.uint8).max(initial=0) > 1:
            raise _malformed("bool array with bytes other than 0 and 1")
        try:
            return np.frombuffer(buffer, dtype=dtype).reshape(shape).copy()
        except ValueError as error:  # empty arrays may still have a shape that NumPy refuses
            raise _malformed(f"array shape {shape}") from error

    def _scalar(self, content: Any) -> Any:
        array = self._array(content)
        if array.shape != ():
            raise _malformed(f"scalar of shape {array.shape}")
        return array[()]


def _big_int(content: Any) -> int:
    if not isinstance(content, str) or not _HEX.fullmatch(content):
        raise _malformed("big integer is not hexadecimal")
    return int(content, 16)


def _non_finite(content: Any) -> float:
    if not isinstance(content, str) or content not in _NON_FINITE:
        raise _malformed(f"float {str(content)[:40]!r}")
    return _NON_FINITE[content]


def _malformed(reason: str) -> ProtocolError:
    return ProtocolError("P001", f"malformed value: {reason}")
