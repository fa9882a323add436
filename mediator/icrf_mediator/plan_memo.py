"""Plans that were made ahead, in another thread than the one that needs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from icrf.protocol import ClusterInfo, MeasuredLink, Plan, Submission
from icrf_mediator.assignment import Assignment
from icrf_mediator.planning import make_plan

_Known = tuple[tuple[ClusterInfo, ...], tuple[MeasuredLink, ...]]


class PlanMemo:
    """:func:`make_plan` that remembers its last few results, so that they can be made ahead in another thread.

    Planning 100,000 nodes takes seconds, which the mediator's loop does not have. Thread-safe.
    """

    def __init__(self, size: int = 8) -> None:
        self._kept: deque[tuple[Submission, _Known, tuple[Plan, Assignment]]] = deque(maxlen=size)

    def __call__(
        self, submission: Submission, clusters: Sequence[ClusterInfo], measured: Sequence[MeasuredLink] = ()
    ) -> tuple[Plan, Assignment]:
        """See :func:`make_plan`. What is free just now makes no difference to a plan, and none here."""
        known = tuple(replace(cluster, free_slots=0) for cluster in clusters), tuple(measured)
        for kept, under, outcome in tuple(self._kept):
            if kept is submission and under == known:
                return outcome
        outcome = make_plan(submission, *known)
        self._kept.append((submission, known, outcome))
        return outcome
