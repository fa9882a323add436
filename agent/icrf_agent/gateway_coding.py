"""How a gateway packs what it sends, and unpacks what it gets.

A sender that packs against an earlier array uses the last one that this receiver has acknowledged. A receiver that does
not have it any more, because it was restarted or has room for so many only, says so (P027) and gets the array whole.
What was delivered is the same to the last bit either way: bases decide on the number of bytes only.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import xxhash

from icrf.codecs import NONE
from icrf.errors import ProtocolError
from icrf.exchange import MERGED, MODEL
from icrf.ports import PayloadHeader
from icrf.wire.packing import pack, unpack

PACKED, DELTA = "packed", "delta"
# What is much the same from one round to the next.
WITH_BASE = (MODEL, MERGED)
# What one gateway keeps of arrays to pack against, of all runs and for both directions; beyond it the oldest go.
MAX_KEPT_BYTES = 512 << 20
# Versions per sender: the newest, and the one before, which peers have that are still to get the newest.
_VERSIONS = 2

Array = np.ndarray[Any, Any]
Deliver = Callable[[PayloadHeader, Array], None]

# Run, kind, sender, and the cluster that it came from; "" for one of this cluster.
_Key = tuple[str, str, int, str]


@dataclass
class _Kept:
    """Arrays of one sender by identity, oldest first, and which of them each target has."""

    versions: OrderedDict[str, Array] = field(default_factory=OrderedDict)
    acknowledged: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.versions.values())


class PayloadCoder:
    """Packs and unpacks the payloads of one gateway; thread-safe.

    Args:
        max_kept_bytes: how much memory arrays to pack against may take.
    """

    def __init__(self, max_kept_bytes: int = MAX_KEPT_BYTES) -> None:
        self._max_kept_bytes = max_kept_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[_Key, _Kept] = OrderedDict()

    def send(self, header: PayloadHeader, array: Array, deliver: Deliver) -> None:
        """Have an array delivered the way that its header asks for.

        Args:
            header: its coding is "", ``packed``, or ``delta`` where an earlier array may serve as base.
            deliver: sends coded bytes under a header and returns when they were accepted.
        """
        if not header.coding:
            deliver(header, array)
            return
        if header.coding != DELTA or not self._send_delta(header, array, deliver):
            deliver(replace(header, coding=PACKED), pack(array))
        if header.coding == DELTA:
            self._keep(_key(header, ""), array, header.target)

    def _send_delta(self, header: PayloadHeader, array: Array, deliver: Deliver) -> bool:
        """Whether it could be delivered against what its receiver has acknowledged last."""
        with self._lock:
            kept = self._kept.get(_key(header, ""), _Kept())
            identity = kept.acknowledged.get(header.target, "")
            base = kept.versions.get(identity)
        if base is None or base.size != array.size or base.dtype != array.dtype:
            return False
        try:
            deliver(replace(header, base=identity), pack(array, base))
        except ProtocolError as error:
            if error.code != "P027":
                raise
            return False
        return True

    def decode(self, header: PayloadHeader, data: Array) -> tuple[PayloadHeader, Array]:
        """What came in as it was before it was packed, with the header of the plan.

        Raises:
            ProtocolError: P027 for a base that is not here; P001, P021 see :func:`icrf.wire.packing.unpack`.
        """
        if not header.coding:
            return header, data
        base = None
        if header.coding == DELTA:
            with self._lock:
                kept = self._kept.get(_key(header, header.source))
                base = kept.versions.get(header.base) if kept else None
            if base is None or (base.size, base.dtype.name) != (header.num_elements, header.dtype):
                raise ProtocolError(
                    "P027",
                    "the array that a payload was packed against is not here",
                    place=f"gateway of cluster {header.target}",
                    value=header.base,
                    hint="Send it whole",
                )
        elif header.coding != PACKED:
            raise ProtocolError(
                "P001",
                f"coding {header.coding!r} unknown",
                place="opening frame, field coding",
                allowed=f"{PACKED}, {DELTA}",
            )
        return replace(header, coding="", base=""), unpack(data, header.dtype, header.num_elements, base)

    def accepted(self, header: PayloadHeader, array: Array) -> None:
        """A coded payload was taken in: the next one of its sender may be packed against it."""
        if header.kind in WITH_BASE:
            self._keep(_key(header, header.source), array, "")

    def forget(self, run_id: str) -> None:
        """Drop what is kept for a run."""
        with self._lock:
            for key in [key for key in self._kept if key[0] == run_id]:
                del self._kept[key]

    def _keep(self, key: _Key, array: Array, target: str) -> None:
        """Keep an array that came in, or a copy of one that was sent: what it lies in may be used again."""
        identity = xxhash.xxh3_128_hexdigest(array.view(np.uint8).data)
        with self._lock:
            kept = self._kept.setdefault(key, _Kept())
            self._kept.move_to_end(key)
            if identity not in kept.versions:
                kept.versions[identity] = array.copy() if target else array
            kept.versions.move_to_end(identity)
            if target:
                kept.acknowledged[target] = identity
            while len(kept.versions) > _VERSIONS:
                kept.versions.popitem(last=False)
            while sum(k.nbytes for k in self._kept.values()) > self._max_kept_bytes:
                oldest = next(iter(self._kept))
                self._kept[oldest].versions.popitem(last=False)
                if not self._kept[oldest].versions:
                    del self._kept[oldest]


def coding_of(codec: str, kind: str) -> str:
    """How payloads of a kind are to travel under an ``inter_cluster_codec``."""
    if codec == NONE:
        return ""
    return DELTA if kind in WITH_BASE else PACKED


def _key(header: PayloadHeader, source: str) -> _Key:
    return header.run_id, header.kind, header.sender, source
