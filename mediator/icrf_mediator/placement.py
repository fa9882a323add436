"""Where a run lives: its assignment under a generation, and the instructions that put it there. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from icrf.ports import Write
from icrf.protocol import (
    DECENTRALIZED,
    Activate,
    ClusterInfo,
    Fingerprint,
    Graph,
    Instruction,
    LinkBytes,
    MixingReport,
    PeerAddress,
    Plan,
    Reserve,
    Resources,
    Submission,
    nodes_that,
)
from icrf_mediator.assignment import Assignment
from icrf_mediator.feasibility import decisive, slot_resources

# Of the nodes that move from one cluster to another so many are named.
_NAMED = 4


@dataclass(frozen=True)
class Placement:
    """An assignment of all nodes to clusters.

    Attributes:
        plan: the plan it came from; its clusters are those that have nodes.
        assignment: index into ``plan.clusters`` per node.
        resources: what one slot takes, by cluster.
        fingerprint: what decides the bits, of the first cluster; under ``strict`` determinism that of all.
    """

    plan: Plan
    assignment: tuple[int, ...]
    resources: dict[str, Resources]
    fingerprint: Fingerprint

    @classmethod
    def of_plan(
        cls, plan: Plan, assignment: Assignment, clusters: Sequence[ClusterInfo], config: Mapping[str, Any]
    ) -> Placement:
        """What a feasible plan for `clusters` has come to, without those that get no nodes."""
        by_name = {c.name: c for c in clusters}
        used = sorted({clusters[c].name for c in assignment.clusters})
        plan = replace(plan, clusters=tuple(used), slots={name: plan.slots[name] for name in used})
        position = {name: k for k, name in enumerate(used)}
        where = tuple(position[clusters[c].name] for c in assignment.clusters)
        resources = {name: slot_resources(config, by_name[name], plan.slots[name]) for name in used}
        fingerprint = decisive(by_name[used[0]].fingerprint, str(config.get("device") or "cpu"))
        return cls(plan, where, resources, fingerprint)

    @property
    def clusters(self) -> tuple[str, ...]:
        return self.plan.clusters

    @property
    def slots(self) -> dict[str, int]:
        return dict(self.plan.slots)

    def cluster_of(self, node: int) -> str:
        return self.clusters[self.assignment[node]]

    def members(self) -> dict[str, tuple[int, ...]]:
        """Node indices per cluster, ascending."""
        found: dict[str, list[int]] = {c: [] for c in self.clusters}
        for node, position in enumerate(self.assignment):
            found[self.clusters[position]].append(node)
        return {c: tuple(nodes) for c, nodes in found.items()}

    def keepers(self, submission: Submission) -> dict[str, tuple[int, ...]]:
        """Per cluster the nodes with a state of their own, whose hashes together are the identity of a round."""
        members = self.members()
        if submission.flow == DECENTRALIZED:
            return members
        aggregate = frozenset(nodes_that("aggregate", submission.nodes))
        return {c: tuple(i for i in nodes if i in aggregate) for c, nodes in members.items()}

    def coordinator(self, submission: Submission) -> int:
        """Index of the cluster that makes the global or consensus model."""
        aggregating = () if submission.flow == DECENTRALIZED else nodes_that("aggregate", submission.nodes)
        return self.assignment[aggregating[0] if aggregating else 0]

    def stateful(self, submission: Submission) -> tuple[str, ...]:
        """The clusters that hold committed state: those of the aggregators; all where every node keeps some, or may."""
        if submission.rows.anybody_keeps:
            return self.clusters
        return tuple(cluster for cluster, nodes in self.keepers(submission).items() if nodes)

    def reserve(
        self, run_id: str, generation: int, federation: str, strategy: str, within_s: float
    ) -> dict[str, Instruction]:
        """Reserve for every cluster."""
        return {
            c: Reserve(run_id, generation, federation, self.slots[c], self.resources[c], strategy, within_s)
            for c in self.clusters
        }

    def activate(
        self,
        run_id: str,
        generation: int,
        federation: str,
        submission: Submission,
        peers: Sequence[PeerAddress],
        restore: tuple[int, Mapping[str, tuple[str, ...]]],
        graph: Graph,
    ) -> dict[str, Instruction]:
        """Activate for every cluster; `restore` is the round to start from and its artifacts by cluster, `graph` the
        one that is in force after it."""
        round_number, artifacts = restore
        return {
            cluster: Activate(
                run_id=run_id,
                generation=generation,
                federation=federation,
                config_json=submission.config_json,
                flow=submission.flow,
                nodes=submission.nodes,
                graph=graph,
                layout=submission.layout,
                rows=submission.rows,
                clusters=self.clusters,
                assignment=self.assignment,
                peers=tuple(peers),
                num_slots=self.slots[cluster],
                code_path=submission.code_path,
                restore_round=round_number,
                checkpoints=artifacts.get(cluster, ()),
                initial_graph=None if graph == submission.graph else submission.graph,
            )
            for cluster in self.clusters
        }

    def row(self, run_id: str, generation: int, instead_of: Placement | None = None) -> Write:
        """The journal row of this placement under a generation; with the one before, where that is gone back to if
        there is no room for this."""
        row = self._parts()
        if instead_of is not None:
            row["instead_of"] = instead_of._parts()
        return Write("assignments", (run_id, generation), row)

    def _parts(self) -> dict[str, Any]:
        return {
            "clusters": list(self.clusters),
            "assignment": list(self.assignment),
            "plan": asdict(self.plan),
            "resources": {name: asdict(each) for name, each in self.resources.items()},
            "fingerprint": asdict(self.fingerprint),
        }

    @classmethod
    def from_row(cls, row: Any) -> Placement:
        """The inverse of :meth:`row`."""
        plan = dict(row["plan"])
        plan["clusters"], plan["problems"] = tuple(plan["clusters"]), tuple(plan["problems"])
        plan["links"] = tuple(LinkBytes(**link) for link in plan["links"])
        plan["mixing"] = MixingReport(**plan["mixing"]) if plan.get("mixing") else None
        resources = {name: Resources(**each) for name, each in row["resources"].items()}
        return cls(Plan(**plan), tuple(row["assignment"]), resources, Fingerprint(**row["fingerprint"]))


def moved(before: Placement, after: Placement, node_ids: Sequence[str]) -> str:
    """Which nodes live elsewhere, in words."""
    found: dict[tuple[str, str], list[str]] = {}
    for node, node_id in enumerate(node_ids):
        if (way := (before.cluster_of(node), after.cluster_of(node)))[0] != way[1]:
            found.setdefault(way, []).append(node_id)
    ways = [
        f"{source} -> {target} ({', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''})"
        for (source, target), names in sorted(found.items())
    ]
    return f"{sum(map(len, found.values()))} of {len(node_ids)} nodes move: {'; '.join(ways)}"
