"""Committed state as bytes: safetensors, with the round in the file's metadata.

Centralized: the tensors of the global model by name. Decentralized: one flat array per node, named by the node's
index, so that another number of hosts can load it. Whatever is loaded is checked before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from icrf.errors import WeightsError
from icrf.learning.layout import Layout

Array = np.ndarray[Any, Any]
_PLACE = "checkpoint"


def pack_model(layout: Layout, flat: Array, round_number: int) -> bytes:
    """The global model of a round."""
    return layout.to_safetensors(flat, {"round": str(round_number)})


def unpack_model(layout: Layout, data: bytes, round_number: int) -> Array:
    """The inverse of :func:`pack_model`.

    Raises:
        WeightsError: W010 if it is no such checkpoint of that round and layout, W020 for non-finite values.
    """
    _require_round(data, round_number)
    flat = layout.from_safetensors(data)
    _require_finite(layout, flat, "the global model")
    return flat


def pack_nodes(rows: Mapping[int, Array], round_number: int) -> bytes:
    """States of nodes after a round: node index -> flat array."""
    ordered = {str(index): np.ascontiguousarray(rows[index]) for index in sorted(rows)}
    packed: bytes = safetensors.numpy.save(ordered, {"round": str(round_number)})
    return packed


def unpack_nodes(layout: Layout, data: bytes, round_number: int, indices: Sequence[int]) -> Array:
    """The states of these nodes in their order, shape (len(indices), row_size).

    Raises:
        WeightsError: W010 if one is missing or it is no such checkpoint, W020 for non-finite values.
    """
    rows = _load(data, round_number)
    state = np.empty((len(indices), layout.row_size), layout.dtype)
    for k, index in enumerate(indices):
        row = _row(rows, index)
        layout.check(row, size=layout.row_size)
        _require_finite(layout, row, f"node {index}")
        state[k] = row
    return state


def merge_nodes(parts: Sequence[bytes], round_number: int) -> bytes:
    """One checkpoint of the nodes of several hosts."""
    if len(parts) == 1:
        return parts[0]
    return pack_nodes({index: row for part in parts for index, row in _load(part, round_number).items()}, round_number)


def split_nodes(data: bytes, round_number: int, groups: Sequence[Sequence[int]]) -> list[bytes]:
    """One checkpoint per group of nodes.

    Raises:
        WeightsError: W010 if a node is missing or it is no checkpoint of that round.
    """
    rows = _load(data, round_number)
    return [pack_nodes({index: _row(rows, index) for index in group}, round_number) for group in groups]


def _row(rows: Mapping[int, Array], index: int) -> Array:
    if index not in rows:
        raise WeightsError("W010", f"the state of node {index} is missing", place=_PLACE)
    return rows[index]


def _load(data: bytes, round_number: int) -> dict[int, Array]:
    _require_round(data, round_number)
    try:
        return {int(name): row for name, row in safetensors.numpy.load(data).items()}
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise WeightsError("W010", f"not a checkpoint of nodes: {error}", place=_PLACE) from error


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


def _require_finite(layout: Layout, flat: Array, whose: str) -> None:
    if bad := layout.first_nonfinite(flat):
        raise WeightsError("W020", f"{whose} has non-finite values in {bad}", place=_PLACE)
