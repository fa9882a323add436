"""Communities by labels, and where they are placed."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icrf.errors import ConfigError
from icrf.protocol import Capacity, ClusterInfo, Fingerprint, Submission
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.topology import HybridAdjacencyMatrix, build_topology, label_communities
from icrf.topology.communities import MAX_PROPAGATED
from icrf_mediator.assignment import Hints, assign
from icrf_mediator.planning import check_submission, make_plan


def clusters_of(*slots: int) -> list[ClusterInfo]:
    fingerprint = Fingerprint("2.13", "AVX2", "on", 1, "cpu")
    return [ClusterInfo(f"c{i}", "x", Capacity(s, 4.0, 0.0, 0), fingerprint) for i, s in enumerate(slots)]


def planted(num_nodes: int, kinds: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Histograms of nodes of which each kind has two labels of its own, and the kinds."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, kinds, num_nodes)
    counts = rng.poisson(1, (num_nodes, 2 * kinds))
    for node, own in enumerate(kind):
        counts[node, 2 * own : 2 * own + 2] += 40
    return counts, kind


def same_partition(one: np.ndarray, other: np.ndarray) -> bool:
    pairs = set(zip(one.tolist(), other.tolist(), strict=True))
    return len(pairs) == len(set(one.tolist())) == len(set(other.tolist()))


def test_nodes_with_the_same_labels_are_one_community() -> None:
    counts, kind = planted(60, 4)
    found = label_communities(counts, 0)
    assert same_partition(np.array(found), kind) and found[0] == 0
    assert found == label_communities(counts, 0)


def test_how_much_a_node_has_makes_no_difference() -> None:
    counts, _ = planted(40, 3)
    assert label_communities(counts, 0) == label_communities(counts * np.arange(1, 41)[:, None], 0)


def test_large_federations_fall_back_on_means() -> None:
    counts, kind = planted(MAX_PROPAGATED + 1, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = np.array(label_communities(counts, 0))
    # As many as there are labels: no community mixes kinds, or hardly.
    assert 3 <= len(set(found.tolist())) <= 6
    mixed = sum(len(set(kind[found == community].tolist())) > 1 for community in set(found.tolist()))
    assert mixed == 0


def test_nodes_that_are_all_alike_are_one_community() -> None:
    assert label_communities(np.full((5, 3), 7), 0) == (0,) * 5
    assert label_communities(np.zeros((2, 3), dtype=int), 0) == (0, 0)
    assert label_communities(np.array([[3, 0], [0, 3], [5, 0]]), 0) == (0, 1, 0)


def test_noise_hides_small_differences_and_follows_the_seed() -> None:
    counts, kind = planted(60, 3)
    assert same_partition(np.array(label_communities(counts, 0, noise=1.0)), kind)
    loud = label_communities(counts, 0, noise=500.0)
    assert not same_partition(np.array(loud), kind)
    assert loud == label_communities(counts, 0, noise=500.0) != label_communities(counts, 1, noise=500.0)


# ---------------------------------------------------------------- placement


def test_communities_lie_whole_where_they_fit_and_edges_come_second() -> None:
    ring = build_topology("ring", 12, {})
    communities = tuple(node % 3 for node in range(12))
    found = assign("locality", ring, clusters_of(1, 1, 1), {}, Hints(communities=communities))
    assert same_partition(np.array(found.clusters), np.array(communities))
    name = f"c{found.clusters[0]}"
    assert found.explanation[0] == f"community 0: 4 of the 4 nodes with labels like its own are on {name}"


def test_a_community_that_fits_nowhere_is_divided_along_its_edges() -> None:
    # One community of a ring on two clusters: what is left is the cut.
    order = np.random.default_rng(3).permutation(40)
    ring = HybridAdjacencyMatrix.from_edges(40, np.stack([order, np.roll(order, 1)], axis=1))
    found = assign("locality", ring, clusters_of(1, 1), {}, Hints(communities=(0,) * 40))
    assert np.bincount(found.clusters).tolist() == [20, 20] and ring.cut_edges(found.clusters) <= 6


@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_shares_and_pins_hold_with_communities(num_nodes: int, num_clusters: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, num_nodes, (2 * num_nodes, 2))
    adjacency = HybridAdjacencyMatrix.from_edges(num_nodes, pairs[pairs[:, 0] != pairs[:, 1]])
    clusters = clusters_of(*[2] * num_clusters)
    pins = {0: frozenset({num_clusters - 1})}
    communities = tuple(rng.integers(-1, 4, num_nodes).tolist())
    found = assign("locality", adjacency, clusters, pins, Hints(communities=communities))
    assert found.clusters[0] == num_clusters - 1 and all(found.explanation)
    sizes = [Counter(found.clusters)[c] for c in range(num_clusters)]
    assert max(sizes) - min(sizes) <= 1


# ---------------------------------------------------------------- the way there


def submission_of(**keys: object) -> Submission:
    config = {
        "federation_id": "fed",
        "federated_learning_schema": "DecentralizedFederatedLearning",
        "federated_learning_topology": "ring",
        "number_of_clients": 9,
        "dataset_type": "digits",
        "model_type": "logistic",
        "data_distribution_kind": "pathological",
        **keys,
    }
    return build_submission(FederationConfig.from_mapping(config))


def test_a_submission_brings_communities_and_the_plan_follows_them() -> None:
    sent = submission_of(do_cluster=True)
    assert len(sent.communities) == 9 and len(set(sent.communities)) > 1
    plan, _ = make_plan(sent, clusters_of(1, 1, 1))
    assert all("labels like its own" in reason for reason in plan.explanation.values())
    assert submission_of().communities == ()
    with pytest.raises(ConfigError, match="C008 communities: communities of 2 nodes for 9"):
        check_submission(replace(sent, communities=(0, 1)))
