"""Committed state as bytes: safetensors, with the round in the file's metadata.

One flat array per keeper: the server's rows under :data:`SERVER`, and those of a node, all that it keeps, under the
node's index, so that another number of hosts can load it. With the server's rows go the models of earlier rounds that
late clusters still train from. Whatever is loaded is checked before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from icrf.errors import WeightsError
from icrf.learning.layout import Layout

Array = np.ndarray[Any, Any]
SERVER = "server"
_MODEL_OF = "model-"
_PLACE = "checkpoint"


def pack_rows(rows: Mapping[str, Array], round_number: int) -> bytes:
    """What was kept after a round: keeper -> flat array."""
    ordered = {name: np.ascontiguousarray(rows[name]) for name in sorted(rows)}
    packed: bytes = safetensors.numpy.save(ordered, {"round": str(round_number)})
    return packed


def unpack_rows(layout: Layout, data: bytes, round_number: int, names: Sequence[str], num_elements: int) -> Array:
    """What these keepers kept, in their order, shape (len(names), num_elements).

    Raises:
        WeightsError: W010 if one is missing or differs, or it is no such checkpoint; W020 for non-finite values.
    """
    rows = _load(data, round_number)
    state = np.empty((len(names), num_elements), layout.dtype)
    for k, name in enumerate(names):
        row = _row(rows, name)
        if row.shape != (num_elements,) or row.dtype != layout.dtype:
            raise WeightsError(
                "W010",
                f"the state of {name} differs from the model's layout",
                place=_PLACE,
                value=f"{row.dtype} {row.shape}",
                allowed=f"{layout.dtype} ({num_elements},)",
            )
        if not np.isfinite(row).all():
            raise WeightsError("W020", f"the state of {name} has non-finite values", place=_PLACE)
        state[k] = row
    return state


def model_of(round_number: int) -> str:
    """What the global model of an earlier round is called in a checkpoint."""
    return f"{_MODEL_OF}{round_number}"


def unpack_models(layout: Layout, data: bytes, round_number: int) -> dict[int, Array]:
    """The models of earlier rounds in a checkpoint, by round; W010, W020 as :func:`unpack_rows`."""
    names = [name for name in _load(data, round_number) if name.startswith(_MODEL_OF)]
    rows = unpack_rows(layout, data, round_number, names, layout.num_parameters)
    return {int(name.removeprefix(_MODEL_OF)): row for name, row in zip(names, rows, strict=True)}


def merge_rows(parts: Sequence[bytes], round_number: int) -> bytes:
    """One checkpoint of the keepers of several hosts; empty parts are those of hosts that keep nothing."""
    parts = [part for part in parts if part]
    if len(parts) < 2:
        return parts[0] if parts else b""
    return pack_rows({name: row for part in parts for name, row in _load(part, round_number).items()}, round_number)


def only_rows(data: bytes, round_number: int, nodes: Collection[int]) -> bytes:
    """What these nodes have kept; the server's rows stay, with those of earlier rounds, for whoever is the server."""
    if not data:
        return b""
    rows = _load(data, round_number)
    chosen = {name: row for name, row in rows.items() if not name.isdecimal() or int(name) in nodes}
    return pack_rows(chosen, round_number) if chosen else b""


def split_rows(data: bytes, round_number: int, groups: Sequence[Sequence[str]]) -> list[bytes]:
    """One checkpoint per group of keepers, empty for an empty one; models of earlier rounds go with the server's rows.

    Raises:
        WeightsError: W010 if a keeper is missing or it is no checkpoint of that round.
    """
    if not any(groups):
        return [b""] * len(groups)
    rows = _load(data, round_number)
    earlier = [name for name in rows if name.startswith(_MODEL_OF)]
    named = [[*group, *earlier] if SERVER in group else group for group in groups]
    return [pack_rows({name: _row(rows, name) for name in names}, round_number) if names else b"" for names in named]


def _row(rows: Mapping[str, Array], name: str) -> Array:
    if name not in rows:
        raise WeightsError("W010", f"the state of {name} is missing", place=_PLACE)
    return rows[name]


def _load(data: bytes, round_number: int) -> dict[str, Array]:
    _require_round(data, round_number)
    try:
        rows = dict(safetensors.numpy.load(data))
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise WeightsError("W010", f"not a checkpoint: {error}", place=_PLACE) from error
    strange = [name for name in rows if name != SERVER and not name.removeprefix(_MODEL_OF).isdecimal()]
    if strange:
        raise WeightsError("W010", "a checkpoint of somebody unknown", place=_PLACE, value=strange[0][:40])
    return rows


def _require_round(data: bytes, round_number: int) -> None:
    """Read the metadata by hand: the library gives them for files only."""
    size = int.from_bytes(data[:8], "little")
    try:
        found = json.loads(data[8 : 8 + size])["__metadata__"]["round"]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError("W010", "not a checkpoint", place=_PLACE, value=f"{len(data)} bytes") from error
    if found != str(round_number):
        raise WeightsError(
            "W010", "a checkpoint of another round", place=_PLACE, value=found, allowed=str(round_number)
        )
