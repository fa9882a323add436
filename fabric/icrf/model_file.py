"""The model that a run leaves: its safetensors bytes and the hash that proves them.

The hash is over the tensors' bytes in name order, not over the file: the same weights have the same hash however a
writer lays out its header.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import safetensors

from icrf.errors import ProtocolError, WeightsError

ARTIFACT = "model.safetensors"

# The library's own reader of raw bytes, for every dtype it knows; it carries no type annotations.
_deserialize: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = safetensors.deserialize


def tensor_sha256(data: bytes, *, place: str = ARTIFACT) -> str:
    """Hex sha256 over the bytes of all tensors of a safetensors file, in name order.

    Args:
        data: the whole file.
        place: what to call it in an error.

    Raises:
        WeightsError: W010 if `data` is no safetensors file.
    """
    try:
        tensors = _deserialize(data)
    except safetensors.SafetensorError as error:
        raise WeightsError("W010", f"not a safetensors file: {error}", place=place) from error
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(tensor["data"])
    return digest.hexdigest()


def receive_model(chunks: Iterable[bytes], expected_sha256: str, *, place: str = ARTIFACT) -> bytes:
    """Put a downloaded model together and check it against the hash that was committed.

    Raises:
        ProtocolError: P021 if the tensors are not those of the committed model.
        WeightsError: W010 if it is no safetensors file.
    """
    data = b"".join(chunks)
    found = tensor_sha256(data, place=place)
    if expected_sha256 and found != expected_sha256:
        raise ProtocolError(
            "P021",
            "the downloaded model is not the one that was committed",
            place=place,
            value=f"sha256 {found}",
            allowed=f"sha256 {expected_sha256}",
            hint="fetch it again; if it stays different, the mediator's blob store is damaged",
        )
    return data


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step, so that a reader never sees half a file."""
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(data)
    partial.replace(path)
