"""What a plan can say about the bytes of coded payloads: bounds, because how far values pack shows only in the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from icrf.codecs import BF16, LOSSY, NONE, TOP_K, packed_bound
from icrf.exchange import (
    EXACT,
    GATHERED,
    MODEL,
    PARTIAL,
    PARTIAL_ITEMSIZE,
    UPDATE,
    ExchangePlan,
    Transfer,
    num_elements,
)
from icrf.protocol import AGGREGATED, DECENTRALIZED, PRIVATE, TensorSpec, element_type, shared_size

# A value that was rounded to bfloat16 is two bytes, and two or more of zeros.
_BF16_BYTES = 2


def coded_bytes(exchange: ExchangePlan, layout: Sequence[TensorSpec], config: Mapping[str, Any]) -> dict[str, Any]:
    """The plan's fields about ``inter_cluster_codec``.

    Args:
        layout: the model's tensors.
        config: the resolved configuration.
    """
    codec = config.get("inter_cluster_codec") or NONE
    if codec == NONE or not layout:
        return {"codec": codec}
    bound = _Bound(exchange, layout, codec, float(config.get("top_k_fraction") or 1.0))
    rounds = [exchange.transfers, *([exchange.merging] if exchange.merging else [])]
    return {"codec": codec, "bytes_coded_per_round": max(sum(map(bound.of, transfers)) for transfers in rounds)}


class _Bound:
    """Bounds on the bytes of single payloads."""

    def __init__(self, exchange: ExchangePlan, layout: Sequence[TensorSpec], codec: str, fraction: float) -> None:
        self._exchange, self._codec = exchange, codec
        self._size, self._itemsize = shared_size(layout), np.dtype(element_type(layout)).itemsize
        learned = sum(t.num_elements for t in layout if t.rule == AGGREGATED)
        # What is counted or averaged beside the rule is never rounded or left out.
        self._others = sum(t.num_elements for t in layout if t.rule not in (AGGREGATED, PRIVATE))
        self._most = max(1, math.ceil(fraction * learned)) + self._others

    def of(self, transfer: Transfer) -> int:
        """The most bytes of data of one payload."""
        exchange, kind = self._exchange, transfer.kind
        elements = num_elements(kind, self._size, exchange.rows, len(exchange.local_nodes(transfer.source)))
        itemsize = PARTIAL_ITEMSIZE if kind in EXACT else self._itemsize
        if self._codec not in LOSSY or kind == GATHERED:
            return packed_bound(elements, itemsize)
        if self._codec == TOP_K and kind in (PARTIAL, UPDATE):
            senders = len(exchange.local_participants(transfer.source)) if kind == PARTIAL else 1
            return packed_bound(elements, itemsize, nonzero=min(elements, senders * self._most))
        rounded = not self._others or exchange.flow == DECENTRALIZED
        if self._codec == BF16 and kind in (MODEL, UPDATE) and rounded:
            return packed_bound(elements, min(itemsize, _BF16_BYTES))
        return packed_bound(elements, itemsize)
