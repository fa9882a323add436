"""Lian et al. 2017 (arXiv 1705.09056): D-PSGD follows the spectral gap where data differ, hardly where they do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from icrf.federation.node import FederatedNode

from .bench import PEERS, TWO_THOUSAND, Outcome, Row, needs_fashion_mnist, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), needs_fashion_mnist]

NODES, ROUNDS = 16, 100
# From the largest spectral gap to the smallest.
GRAPHS: dict[str, dict[str, Any]] = {
    "complete": {"federated_learning_topology": "mesh"},
    "torus": {"federated_learning_topology": "torus"},
    "k=4": {"federated_learning_topology": "k_connected", "k_value": 4},
    "ring": {"federated_learning_topology": "ring"},
}
# The last state of every node; nodes of an inline fabric live in this process.
STATES: dict[int, np.ndarray] = {}


class Watched(FederatedNode):
    """Shows its state after every round."""

    def aggregate(self, state: np.ndarray) -> np.ndarray:
        STATES[self.context.index] = np.array(state, np.float64)
        return state


def gossip(graph: str, **keys: Any) -> tuple[Outcome, float]:
    """A run, and the distance of its nodes from their mean: root mean square over the nodes."""
    STATES.clear()
    outcome = run(
        clusters=2,
        templates={"local:Watched": Watched},
        **PEERS,
        **GRAPHS[graph],
        client_template="local:Watched",
        number_of_clients=NODES,
        federated_learning_rounds=ROUNDS,
        evaluate_every=ROUNDS,
        evaluate_clients=True,
        client_role="train-test",
        dataset_type=TWO_THOUSAND,
        model_type="logistic",
        batch_size=2_000,  # one step on all of a node's samples
        learning_rate=0.1,
        **keys,
    )
    states = np.stack([STATES[index] for index in sorted(STATES)])
    assert len(states) == NODES
    return outcome, float(np.sqrt(np.square(states - states.mean(axis=0)).sum(axis=1).mean()))


def test_with_sorted_labels_distance_and_loss_follow_the_spectral_gap(row: Row) -> None:
    found = {graph: gossip(graph, data_distribution_kind="shards", shards_per_node=1) for graph in GRAPHS}
    gaps = [1 - outcome.plan.slem for outcome, _ in found.values()]
    distances = [distance for _, distance in found.values()]
    losses = [outcome.curve("test_loss")[-1] for outcome, _ in found.values()]
    row(
        "D-PSGD, arXiv 1705.09056",
        f"2,000 images of Fashion-MNIST sorted by label, {NODES} nodes, one step a round, {ROUNDS} rounds: "
        f"{' < '.join(GRAPHS)} by distance to consensus and by the nodes' mean test loss",
        "no figure; the spectral gap (" + ", ".join(f"{gap:.3f}" for gap in gaps) + ") orders them",
        f"distance {', '.join(f'{d:.3f}' for d in distances)}; loss {', '.join(f'{loss:.3f}' for loss in losses)}",
    )
    assert gaps == sorted(gaps, reverse=True)
    assert distances == sorted(distances) and losses == sorted(losses)
    assert distances[0] < 1e-3 < distances[1]
    assert len(set(losses)) == len(losses)


def test_with_equal_data_the_graph_hardly_matters(row: Row) -> None:
    accuracies = {graph: gossip(graph, data_distribution_kind="iid")[0].curve()[-1] for graph in GRAPHS}
    row(
        "D-PSGD, arXiv 1705.09056",
        f"the same with equal data: test accuracy of the mean model for {', '.join(GRAPHS)}",
        "no figure; differs little",
        ", ".join(f"{accuracy:.2%}" for accuracy in accuracies.values()),
    )
    assert max(accuracies.values()) - min(accuracies.values()) <= 0.01
    assert min(accuracies.values()) > 0.6
