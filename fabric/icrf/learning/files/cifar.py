"""The "python version" of CIFAR-10 (A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009).

Its batches are pickles, and unpickling runs whatever a file asks for. So they are not unpickled: the reader below goes
through the opcodes as data. It knows dicts, lists, tuples, numbers, strings and NumPy arrays of bytes; nothing in a
file can name anything else, and nothing is imported or called.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from icrf.learning.files.problems import unreadable

Array = np.ndarray[Any, np.dtype[Any]]

FOLDER = "cifar-10-batches-py"
_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_SHAPE = (3, 32, 32)
# A batch of 10,000 images has 31 MB.
_MAX_BYTES = 1 << 28
_EXPECTED = "a python batch of CIFAR-10 with data (uint8, n x 3072) and labels (n integers)"


def read_cifar_folder(folder: Path, *, hint: str) -> tuple[Array, Array, Array, Array]:
    """Five training batches and the test batch, from `folder` or its subfolder ``cifar-10-batches-py``.

    Returns:
        uint8 images (num_train, 3, 32, 32) and int64 labels (num_train,), then the same of the test part.

    Raises:
        ConfigError: C015 naming the file that is missing or broken.
    """
    if (folder / FOLDER).is_dir():
        folder = folder / FOLDER
    batches = [read_batch(folder / name, hint=hint) for name in _TRAIN]
    test_x, test_y = read_batch(folder / "test_batch", hint=hint)
    return np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches]), test_x, test_y


def read_batch(path: Path, *, hint: str = "") -> tuple[Array, Array]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) int64 of one batch; C015 if it is none."""
    if not path.is_file():
        raise unreadable(path, "no such file", expected=_EXPECTED, hint=hint)
    if path.stat().st_size > _MAX_BYTES:
        raise unreadable(path, f"{path.stat().st_size} bytes", expected=f"up to {_MAX_BYTES} bytes", hint=hint)
    try:
        content = read_plain_pickle(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"it holds a value of type {type(content).__name__}")
        content = {key.decode("latin-1") if isinstance(key, bytes) else key: value for key, value in content.items()}
        for key in ("data", "labels"):
            if key not in content:
                raise ValueError(f"it has no {key!r}")
        images, labels = np.asarray(content["data"]), np.asarray(content["labels"])
        if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != np.prod(_SHAPE):
            raise ValueError(f"data is {images.dtype} of shape {images.shape}")
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            raise ValueError(f"labels is {labels.dtype} of shape {labels.shape}")
    except (OSError, ValueError, TypeError) as error:
        raise unreadable(path, f"not readable: {error}", expected=_EXPECTED, hint=hint) from error
    return images.reshape(-1, *_SHAPE), labels.astype(np.int64)


# ---------------------------------------------------------------- pickles as data


@dataclass
class _Symbol:
    """What a file calls by name, and what it wants to be built from: never looked up, let alone called."""

    name: str
    arguments: Any = None
    state: Any = None


_MARK = object()
_ARRAY = frozenset({"numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct"})
_DTYPE, _NDARRAY, _ENCODE = "numpy dtype", "numpy ndarray", "_codecs encode"
_KNOWN = _ARRAY | {_DTYPE, _NDARRAY, _ENCODE}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = frozenset({"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "BINFLOAT"})
_TEXTS = frozenset({"BINSTRING", "SHORT_BINSTRING", "STRING", "BINUNICODE", "SHORT_BINUNICODE", "UNICODE"})
_LITERALS = _NUMBERS | _TEXTS | {"BINBYTES", "SHORT_BINBYTES"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NOTHING = frozenset({"PROTO", "FRAME", "STOP"})


def read_plain_pickle(data: bytes) -> Any:
    """The plain values and byte arrays of a pickle.

    Raises:
        ValueError: for anything else that the file asks for, by name, and for a malformed file.
    """
    reader = _Reader()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            reader.step(opcode.name, argument)
        return _array_of(reader.stack.pop())
    except (IndexError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"malformed ({type(error).__name__})") from error


class _Reader:
    """The stack and the memo of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self._steps: dict[str, Callable[[], None]] = {
            "MARK": lambda: self.stack.append(_MARK),
            "EMPTY_DICT": lambda: self.stack.append({}),
            "EMPTY_LIST": lambda: self.stack.append([]),
            "DICT": lambda: self.stack.append(_pairs(self._since_mark())),
            "LIST": lambda: self.stack.append(self._since_mark()),
            "TUPLE": lambda: self.stack.append(tuple(self._since_mark())),
            "APPEND": lambda: self._append([self.stack.pop()]),
            "APPENDS": lambda: self._append(self._since_mark()),
            "SETITEM": lambda: self._update(self._top(2)),
            "SETITEMS": lambda: self._update(self._since_mark()),
            "REDUCE": self._reduce,
            "BUILD": self._build,
        }

    def step(self, name: str, argument: Any) -> None:
        """One opcode."""
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            self.stack.append(tuple(self._top(_TUPLES[name])))
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self.stack.append(self.memo[int(argument)])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[int(argument)] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            wanted = argument if name == "GLOBAL" else " ".join(map(str, self._top(2)))
            if wanted not in _KNOWN:
                raise ValueError(f"it asks for {wanted.replace(' ', '.')}")
            self.stack.append(_Symbol(wanted))
        elif name in self._steps:
            self._steps[name]()
        elif name not in _NOTHING:
            raise ValueError(f"it uses {name}")

    def _top(self, count: int) -> list[Any]:
        found = [self.stack.pop() for _ in range(count)]
        return found[::-1]

    def _since_mark(self) -> list[Any]:
        found = []
        while (item := self.stack.pop()) is not _MARK:
            found.append(item)
        return found[::-1]

    def _append(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("it appends to what is no list")
        self.stack[-1].extend(map(_array_of, items))

    def _update(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise ValueError("it sets items of what is no dict")
        self.stack[-1].update(_pairs(items))

    def _reduce(self) -> None:
        symbol, arguments = self._top(2)
        if symbol.name == _ENCODE:
            text, codec = arguments
            if codec != "latin1":
                raise ValueError(f"it encodes as {codec}")
            self.stack.append(text.encode("latin-1"))
        else:
            self.stack.append(_Symbol(symbol.name, arguments))

    def _build(self) -> None:
        symbol, state = self._top(2)
        symbol.state = state
        self.stack.append(symbol)


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return {key: _array_of(value) for key, value in zip(items[::2], items[1::2], strict=True)}


def _array_of(value: Any) -> Any:
    """The array that a symbol describes; other values as they are."""
    if not isinstance(value, _Symbol):
        return value
    if value.name not in _ARRAY or not isinstance(value.state, tuple):
        raise ValueError(f"it holds a {value.name.replace(' ', '.')}")
    _, shape, dtype, fortran, content = value.state
    kind = np.dtype(dtype.arguments[0])
    if kind.kind not in "iu" or dtype.name != _DTYPE:
        raise ValueError(f"it holds an array of {kind}")
    content = content.encode("latin-1") if isinstance(content, str) else content
    # The state of a dtype begins with a version and the byte order.
    order = dtype.state[1] if dtype.state else "="
    flat = np.frombuffer(content, kind if order == "|" else kind.newbyteorder(order))
    return flat.reshape(shape, order="F" if fortran else "C")
