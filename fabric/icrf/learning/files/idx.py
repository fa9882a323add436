"""IDX files, the format of MNIST and Fashion-MNIST, plain or gzipped.

A file begins with two zero bytes, a byte for the element type (8: unsigned byte), a byte for the number of dimensions
and one big-endian uint32 per dimension (Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database").
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from icrf.learning.files.problems import unreadable

Array = np.ndarray[Any, np.dtype[Any]]

_UNSIGNED_BYTE = 8
# Far above any data set in this format; a wrong header shall not ask for all memory.
_MAX_BYTES = 1 << 32


def read_idx_folder(folder: Path, *, hint: str) -> tuple[Array, Array, Array, Array]:
    """The four files of a data set in the naming of MNIST.

    Returns:
        uint8 images (num_train, 1, height, width) and labels (num_train,), then the same of the test part.

    Raises:
        ConfigError: C015 naming the file that is missing or broken.
    """
    found = []
    for part in ("train", "t10k"):
        images = read_idx(_find(folder, f"{part}-images", 3, hint), num_dimensions=3, hint=hint)
        labels = read_idx(_find(folder, f"{part}-labels", 1, hint), num_dimensions=1, hint=hint)
        found += [images[:, np.newaxis], labels]
    return found[0], found[1], found[2], found[3]


def read_idx(path: Path, *, num_dimensions: int, hint: str = "") -> Array:
    """The uint8 array of one IDX file of this many dimensions; read-only, mapped where the file is not gzipped.

    Raises:
        ConfigError: C015 with what was expected at this path.
    """
    expected = f"an IDX file of unsigned bytes in {num_dimensions} dimensions"
    head_bytes = 4 + 4 * num_dimensions
    zipped = path.suffix == ".gz"
    try:
        with gzip.open(path) if zipped else path.open("rb") as file:
            head = file.read(head_bytes)
            if len(head) < head_bytes or head[:4] != bytes((0, 0, _UNSIGNED_BYTE, num_dimensions)):
                raise unreadable(path, f"it begins with {head[:4].hex(' ') or 'nothing'}", expected=expected, hint=hint)
            shape = struct.unpack(f">{num_dimensions}I", head[4:])
            size = math.prod(shape)
            if not zipped and 0 < size == path.stat().st_size - head_bytes:
                # Only the pages of the samples that a node asks for are read.
                return np.memmap(path, np.uint8, "r", head_bytes, shape)
            body = file.read(min(size, _MAX_BYTES) + 1) if zipped else b""
            num_found = len(body) if zipped else path.stat().st_size - head_bytes
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, f"cannot be read: {error}", expected=expected, hint=hint) from error
    if num_found != size or not size:
        more = "or more " if zipped and num_found > size else ""
        problem = f"shape {'x'.join(map(str, shape))} needs {size} bytes, {num_found} {more}follow"
        raise unreadable(path, problem, expected=expected, hint=hint)
    return np.frombuffer(body, np.uint8).reshape(shape)


def _find(folder: Path, stem: str, num_dimensions: int, hint: str) -> Path:
    """The file in either spelling of its name, plain before gzipped."""
    names = [f"{stem}{dot}idx{num_dimensions}-ubyte{end}" for end in ("", ".gz") for dot in ("-", ".")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise unreadable(folder / names[0], "no such file", expected=f"{names[0]} or {names[2]}", hint=hint)
