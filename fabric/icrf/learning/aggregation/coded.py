"""Rules whose nodes send a lossy form of what their training has changed.

Around any rule whose nodes send their trained models: a node sends its change, made cheaper, and the rule gets the
committed model plus the mean of the changes in place of the mean of the models. The server keeps its model in full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any

import numpy as np

from icrf.codecs import BF16, LOSSY, TOP_K
from icrf.errors import ConfigError
from icrf.learning.aggregation.base import (
    Aggregator,
    Array,
    ClientUpdate,
    MeanAggregator,
    Means,
    RoundFacts,
    UpdateAggregator,
)
from icrf.learning.training import LocalTerms
from icrf.lossy import largest, to_bfloat16


class _Coded(Aggregator):
    """What both kinds of rules have in common.

    Args:
        rule: whose nodes send their trained models.
        codec: ``bf16`` rounds the model that is sent to nodes, and their changes. ``top_k`` has nodes send the largest
            entries of a change; what they leave out they keep, and add to their next change (error feedback: Seide et
            al. 2014; Stich et al. 2018, arXiv 1809.07599).
        fraction: with ``top_k``: the share of a change's entries that is sent.
    """

    def __init__(self, rule: Any, codec: str, fraction: float) -> None:
        self.rule, self.codec, self.fraction = rule, codec, fraction
        self._num_kept = int(codec == TOP_K)
        # What is left out is the first row that a node keeps; behind it lies what the rule has nodes keep.
        self.rows = replace(rule.rows, client=rule.rows.client + self._num_kept)

    def require(self, num_participants: int) -> None:
        self.rule.require(num_participants)

    def first_state(self, models: Array) -> Array:
        state: Array = self.rule.first_state(models)
        return state

    def terms(self, received: Array, state: Array) -> LocalTerms | None:
        size = len(received) // self.rows.down
        terms: LocalTerms | None = self.rule.terms(received, state[self._num_kept * size :])
        return terms

    def expected(self, model_absmax: Sequence[float]) -> tuple[float, ...]:
        found: tuple[float, ...] = self.rule.expected(model_absmax)
        return found

    def sent(self, rows: Array, learned: Sequence[slice]) -> Array:
        if self.codec != BF16:
            return rows
        rounded = rows.copy()
        for part in learned:
            rounded[part] = to_bfloat16(rows[part])
        return rounded

    def contribution(self, update: ClientUpdate) -> Array:
        size = len(update.trained)
        change = np.subtract(update.trained, update.received[:size], out=update.out)
        if self._num_kept:
            change += update.state[:size]
        # What is no number is left for the fabric to find.
        if np.isfinite(change).all():
            if self.codec == BF16:
                for part in update.learned:
                    change[part] = to_bfloat16(change[part])
            else:
                self._split(change, update.next_state[:size], update.learned)
        return change

    def _split(self, change: Array, left_out: Array, learned: Sequence[slice]) -> None:
        """Leave the largest entries in `change` and move all others to `left_out`."""
        left_out[:] = 0.0
        entries = np.concatenate([change[part] for part in learned])
        if not entries.size:
            return
        chosen, at = largest(entries, max(1, ceil(self.fraction * entries.size))), 0
        for part in learned:
            here = chosen[at : at + change[part].size]
            left_out[part] = np.where(here, 0.0, change[part])
            change[part] = np.where(here, change[part], 0.0)
            at += len(here)


class CodedMeans(_Coded, MeanAggregator):
    """Around a rule that needs means."""

    def finish(self, total: Means, previous: Array, out: Array, facts: RoundFacts) -> None:
        size = len(previous) // self.rows.server
        self.rule.finish(_Moved(total, previous[:size]), previous, out, facts)


class CodedUpdates(_Coded, UpdateAggregator):
    """Around a rule that needs every update."""

    def combine(self, updates: Sequence[Array], previous: Array, out: Array, facts: RoundFacts) -> None:
        size = len(previous) // self.rows.server
        self.rule.combine([previous[:size] + change for change in updates], previous, out, facts)


class _Moved:
    """Means of changes as means of models."""

    def __init__(self, changes: Means, model: Array) -> None:
        self._changes, self._model = changes, model

    def mean_part(self, start: int, stop: int, out: Array) -> Array:
        """The mean of the elements `start` to `stop`, written to the float64 array `out`."""
        found = self._changes.mean_part(start, stop, out)
        found += self._model[start:stop]
        return found


def coded(
    name: str, rule: MeanAggregator | UpdateAggregator, settings: Mapping[str, Any]
) -> MeanAggregator | UpdateAggregator:
    """The rule, or where ``inter_cluster_codec`` is lossy one around it.

    Args:
        name: of the rule.
        settings: the configuration's keys.

    Raises:
        ConfigError: C008 where nodes send something else than their models.
    """
    codec = settings.get("inter_cluster_codec")
    if codec not in LOSSY:
        return rule
    if type(rule).contribution is not Aggregator.contribution or rule.num_models > 1:
        raise ConfigError(
            "C008",
            f"inter_cluster_codec {codec} contradicts aggregation_strategy {name}, whose nodes send more than a model",
            place="inter_cluster_codec",
            allowed="none, zstd",
        )
    kind = CodedUpdates if isinstance(rule, UpdateAggregator) else CodedMeans
    return kind(rule, codec, float(settings.get("top_k_fraction", 1.0)))
