"""Where the time of a round went, as it is reported and told where a run was submitted with ``profile``."""

from __future__ import annotations

from dataclasses import dataclass, field

# What a host does in a round, apart from nothing: nodes train; nodes evaluate; sums, rules, mixing, clipping and
# hashing; payloads put, got and waited for; whatever else its phases take.
TRAINING, EVALUATING, SUMMING, EXCHANGING, OTHER = "train", "evaluate", "sum", "exchange", "other"
HOST_PARTS = (TRAINING, EVALUATING, SUMMING, EXCHANGING, OTHER)


@dataclass(frozen=True)
class PhaseSpan:
    """When a cluster's phase of an attempt began and ended, in seconds since the cluster was asked for the attempt.

    Negative where it was begun ahead, before anybody asked.
    """

    name: str
    began_s: float
    ended_s: float


@dataclass(frozen=True)
class ClusterProfile:
    """What the hosts of one cluster did in one attempt.

    Attributes:
        hosts: host -> part, one of :data:`HOST_PARTS` -> seconds since the cluster was asked. No second counts twice.
        phases: in the order they ended.
    """

    hosts: dict[str, dict[str, float]] = field(default_factory=dict)
    phases: tuple[PhaseSpan, ...] = ()


@dataclass(frozen=True)
class RoundProfile:
    """Where the time of a committed round went.

    Attributes:
        working_s: from when the clusters were asked for the attempt that was committed to the last one's report; the
            commit comes after it (``commit_s`` of the round).
        plan_s: before the round, since the one before it: planning where nodes go.
        activate_s: likewise: reserving, and setting up the nodes.
        clusters: cluster -> what its hosts did.
        mediator_s: since the round before was decided on: deciding on what clusters reported of rounds, writing that
            into the journal, and handing the next orders to the clusters' streams. A part of it passes while clusters
            work: others, where there are several, and those that have begun the next round ahead.
    """

    working_s: float
    plan_s: float = 0.0
    activate_s: float = 0.0
    clusters: dict[str, ClusterProfile] = field(default_factory=dict)
    mediator_s: float = 0.0
