"""What a report of an agent must look like before the core acts on it. Pure.

An agent that sends nonsense ends its own run with P001 or W030 and a name to look at; it never ends the mediator.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from icrf.errors import IcrfError, error_from_dict, error_from_json, make_error
from icrf.protocol import CENTRALIZED, Activated, ClusterProfile, Graph, RoundReport
from icrf.topology import HybridAdjacencyMatrix, require_usable

HASH_BYTES = 32
MAX_SAMPLES = 2**31 - 1
_NUMERATOR = re.compile(r"-?[0-9]{1,400}")
_MODEL_HASH = re.compile(r"[0-9a-f]{64}")


class ReportChecks:
    """The checks of one run.

    Args:
        flow: ``centralized``, ``decentralized`` or ``hierarchical``.
        num_tensors: tensors that are summed, see :meth:`icrf.protocol.Rows.num_summed`.
        members: node indices per cluster.
        keepers: node indices with a state of their own, per cluster.
    """

    def __init__(
        self,
        flow: str,
        num_tensors: int,
        members: dict[str, tuple[int, ...]],
        keepers: dict[str, tuple[int, ...]],
    ) -> None:
        self._centralized = flow == CENTRALIZED
        self._num_tensors = num_tensors
        self._members = members
        self._keepers = keepers

    def activated(self, cluster: str, report: Activated) -> None:
        """Raise P001 or W030 unless this can be what `cluster` has set up."""
        here = set(self._members[cluster])
        for node, samples in report.num_samples:
            if node not in here:
                raise _malformed(cluster, "num_samples", f"node {node} does not live there")
            if not 0 <= samples <= MAX_SAMPLES:
                raise make_error(
                    "W030",
                    f"cluster {cluster}: node {node} has {samples} samples",
                    place="num_samples",
                    allowed=f"0 to {MAX_SAMPLES}",
                )
        self._state(cluster, report)

    def round_report(self, cluster: str, report: RoundReport) -> None:
        """Raise P001 unless this can be the outcome of an attempt on `cluster`."""
        if any(not 0 <= tensor < self._num_tensors for tensor in report.overflow):
            raise _malformed(cluster, "overflow", f"{self._num_tensors} tensors, found {report.overflow[:5]}")
        if report.overflow:
            return
        self._state(cluster, report)
        if _bits(report.participants) & ~_bitmap(self._members[cluster]):
            raise _malformed(cluster, "participants", "a node that does not live there")
        for name, part in report.metric_sums.items():
            if part.weight < 1 or not _NUMERATOR.fullmatch(part.numerator):
                raise _malformed(cluster, f"metric_sums[{name}]", "no exact sum")
        for place, found in {"metrics": report.metrics, **report.node_metrics}.items():
            if not all(math.isfinite(value) for value in found.values()):
                where = place if found is report.metrics else f"node_metrics[{place}]"
                raise _malformed(cluster, where, "a value that is not finite")
        if report.profile is not None:
            _check_profile(cluster, report.profile)

    def _state(self, cluster: str, report: Activated | RoundReport) -> None:
        """The hashes and maxima of a new state."""
        makes_state = bool(self._keepers[cluster])
        if makes_state or report.absmax:
            if len(report.absmax) != self._num_tensors:
                raise _malformed(cluster, "absmax", f"{len(report.absmax)} values for {self._num_tensors} tensors")
            if not all(math.isfinite(value) for value in report.absmax):
                raise make_error("W020", f"cluster {cluster}: the state is not finite", place="absmax")
        if self._centralized:
            if makes_state and not _MODEL_HASH.fullmatch(report.model_hash):
                raise _malformed(cluster, "model_hash", "no sha256")
        elif len(report.state_hashes) != HASH_BYTES * len(self._keepers[cluster]):
            found = f"{len(report.state_hashes)} bytes for {len(self._keepers[cluster])} nodes"
            raise _malformed(cluster, "state_hashes", found)


def check_graph(cluster: str, report: RoundReport, decides: bool, graph: Graph, config: Mapping[str, Any]) -> None:
    """Raise P001 unless a cluster that decides on the next graph, and nobody else, has sent one; T0xx for one on which
    these peers cannot go on.

    Args:
        graph: the one in force.
    """
    if (report.graph is not None) != decides:
        raise _malformed(cluster, "graph", "none" if decides else "a graph that nobody has asked for")
    if report.graph is not None and report.graph != graph:
        if report.graph.weights or report.graph.self_weights:
            raise _malformed(cluster, "graph", "a graph with weights")
        require_usable(HybridAdjacencyMatrix.from_graph(report.graph), graph.num_nodes, config)


def error_of(cluster: str, error_json: str) -> IcrfError:
    """The error that an agent reported; it names its cluster, whether or not the agent thought of that."""
    error = error_from_json(error_json)
    if cluster in str(error):
        return error
    return error_from_dict({**error.to_dict(), "message": f"cluster {cluster}: {error.message}"})


def _check_profile(cluster: str, profile: ClusterProfile) -> None:
    """Raise P001 unless all times are numbers."""
    seconds = [value for found in profile.hosts.values() for value in found.values()]
    seconds += [value for span in profile.phases for value in (span.began_s, span.ended_s)]
    if not all(math.isfinite(value) for value in seconds):
        raise _malformed(cluster, "profile", "a value that is not finite")


def _malformed(cluster: str, place: str, found: str) -> IcrfError:
    return make_error("P001", f"malformed report of cluster {cluster}: {found}", place=place)


def _bitmap(nodes: Sequence[int]) -> int:
    packed = bytearray(max(nodes, default=-1) // 8 + 1)
    for node in nodes:
        packed[node // 8] |= 1 << (node % 8)
    return _bits(packed)


def _bits(packed: bytes | bytearray) -> int:
    return int.from_bytes(packed, "little")
