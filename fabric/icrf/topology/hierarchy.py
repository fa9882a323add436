"""Groups of nodes with an aggregator each, as the graph says them: a star per group, and a star among the aggregators.

Groups are a matter of the graph alone, never of where nodes live. Liu et al. 2020, "Client-Edge-Cloud Hierarchical
Federated Learning" (arXiv 1905.06641).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from icrf.errors import ConfigError, RoutingError
from icrf.protocol import parts_of
from icrf.topology.hybrid import SHOWN, HybridAdjacencyMatrix


@dataclass(frozen=True)
class Hierarchy:
    """Who aggregates whom.

    Attributes:
        aggregators: node indices, ascending; the first is the root, which aggregates the groups too.
        group_of: node that trains -> its aggregator, in node order.
    """

    aggregators: tuple[int, ...]
    group_of: dict[int, int]

    @property
    def root(self) -> int:
        return self.aggregators[0]

    @cached_property
    def members(self) -> dict[int, tuple[int, ...]]:
        """Aggregator -> the nodes of its group that train, ascending."""
        found: dict[int, list[int]] = {aggregator: [] for aggregator in self.aggregators}
        for node, aggregator in self.group_of.items():
            found[aggregator].append(node)
        return {aggregator: tuple(nodes) for aggregator, nodes in found.items()}

    @classmethod
    def of(cls, adjacency: HybridAdjacencyMatrix, roles: Sequence[str], names: Sequence[str] = ()) -> Hierarchy:
        """Read it off a graph.

        Args:
            roles: dash-separated words per node; ``train`` makes a member of a group, ``aggregate`` an aggregator.
            names: of the nodes, for messages; by default their indices.

        Raises:
            ConfigError: C008 no aggregator, one that trains itself, a group of nobody, or a node between two groups.
            RoutingError: P011 an edge that is missing or has one direction only.
        """
        names = names or [str(i) for i in range(len(roles))]
        words = [parts_of(role) for role in roles]
        aggregators = tuple(i for i, role in enumerate(words) if "aggregate" in role)
        if not aggregators:
            raise _unusable("no node aggregates", "a node with the role aggregate per group")
        both = [i for i in aggregators if "train" in words[i]]
        if both:
            raise _unusable(f"{names[both[0]]} aggregates and trains", "aggregators that do not train")
        known = frozenset(aggregators)
        group_of: dict[int, int] = {}
        for index, role in enumerate(words):
            if "train" not in role:
                continue
            above = [int(j) for j in adjacency.out_neighbors(index) if int(j) in known]
            if len(above) != 1:
                raise _unusable(f"{names[index]} sends to {len(above)} aggregators", "one aggregator for each node")
            group_of[index] = above[0]
        ways = [(a, i) for i, a in group_of.items()]
        ways += [way for a in aggregators[1:] for way in ((a, aggregators[0]), (aggregators[0], a))]
        missing = [f"{names[i]}->{names[j]}" for i, j in ways if not adjacency.has_edge(i, j)]
        if missing:
            raise RoutingError(
                "P011",
                f"no edge {', '.join(missing[:SHOWN])}",
                allowed="edges both ways between a node and its aggregator, and between the root and every aggregator",
            )
        found = cls(aggregators, group_of)
        empty = [names[a] for a, members in found.members.items() if not members]
        if empty:
            raise _unusable(f"nobody trains in the group of {empty[0]}", "a node that trains in every group")
        return found


def hierarchy_of_groups(groups: Sequence[int]) -> HybridAdjacencyMatrix:
    """The graph of G groups: node 0 aggregates group 0 and is the root, then come the clients, then the aggregators of
    groups 1 to G-1. So clients have the indices that they have in a star, and train with the same randomness.

    Args:
        groups: group of each client, in 0 to G-1.
    """
    of = np.asarray(groups, dtype=np.int64)
    clients = np.arange(1, len(of) + 1)
    above = np.where(of == 0, 0, len(of) + of)
    others = np.arange(len(of) + 1, len(of) + int(of.max()) + 1)
    stars = np.stack([above, clients], axis=1)
    among = np.stack([np.zeros_like(others), others], axis=1)
    return HybridAdjacencyMatrix.from_edges(len(of) + len(others) + 1, np.concatenate([stars, among]))


def _unusable(found: str, allowed: str) -> ConfigError:
    return ConfigError("C008", f"no hierarchy: {found}", place="nodes", allowed=allowed)
