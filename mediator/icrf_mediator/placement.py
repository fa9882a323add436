"""Where a run lives: its assignment under a generation, and the instructions that put it there. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from icrf.ports import Write
from icrf.protocol import (
    DECENTRALIZED,
    Activate,
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


@dataclass(frozen=True)
class Placement:
    """An assignment of all nodes to clusters.

    Attributes:
        plan: the plan it came from; its clusters are those that have nodes.
        assignment: index into ``plan.clusters`` per node.
        resources: what one slot takes, by cluster.
    """

    plan: Plan
    assignment: tuple[int, ...]
    resources: dict[str, Resources]

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
        restore: tuple[int, dict[str, str]],
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
                checkpoint=artifacts.get(cluster, ""),
                initial_graph=None if graph == submission.graph else submission.graph,
            )
            for cluster in self.clusters
        }

    def row(self, run_id: str, generation: int) -> Write:
        """The journal row of this placement under a generation."""
        return Write(
            "assignments",
            (run_id, generation),
            {
                "clusters": list(self.clusters),
                "assignment": list(self.assignment),
                "plan": asdict(self.plan),
                "resources": {name: asdict(each) for name, each in self.resources.items()},
            },
        )

    @classmethod
    def from_row(cls, row: Any) -> Placement:
        """The inverse of :meth:`row`."""
        plan = dict(row["plan"])
        plan["clusters"], plan["problems"] = tuple(plan["clusters"]), tuple(plan["problems"])
        plan["links"] = tuple(LinkBytes(**link) for link in plan["links"])
        plan["mixing"] = MixingReport(**plan["mixing"]) if plan.get("mixing") else None
        resources = {name: Resources(**each) for name, each in row["resources"].items()}
        return cls(Plan(**plan), tuple(row["assignment"]), resources)
