"""Code of a user's own that cannot work is refused before anything starts, by the key and the name that he wrote."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from torch import nn

from icrf.errors import ConfigError, IcrfError
from icrf.learning.metrics import measure
from icrf.spec import FederationConfig
from icrf.submission import check_configuration
from icrf.topology import HybridAdjacencyMatrix, mixing_matrix, weigh
from icrf.topology.grouping import GROUPINGS, group_clients

STAR = {"schema": "TraditionalFederatedLearning", "federated_learning_topology": "star"}
RING = {"schema": "DecentralizedFederatedLearning", "federated_learning_topology": "ring"}
GROUPS = {"schema": "HierarchicalFederatedLearning", "federated_learning_topology": "hierarchy", "number_of_groups": 2}


def checked(shape: dict[str, Any], **keys: Any) -> str:
    """The refusal of a configuration, in words."""
    config = {
        "number_of_clients": 4,
        "federated_learning_rounds": 2,
        "federation_id": "x",
        "dataset_type": "digits",
        "model_type": "mlp",
    }
    with pytest.raises(IcrfError) as caught:
        check_configuration(FederationConfig.from_mapping({**config, **shape, **keys}))
    return str(caught.value)


def exits() -> None:
    sys.exit(0)


def asks(round_number: int, ids: list[str], count: int, random_state: Any) -> None:
    sys.exit(0)


def fails() -> None:
    raise RuntimeError("boom")


KEYS = [
    (GROUPS, "group_by"),
    (STAR, "model_type"),
    (RING, "federated_learning_topology"),
    (RING, "mixing"),
    (STAR, "data_distribution_kind"),
    (STAR, "aggregation_strategy"),
]


@pytest.mark.parametrize(("shape", "key"), KEYS)
def test_code_that_raises_or_would_end_the_command_is_named(shape: dict[str, Any], key: str) -> None:
    for name, what in (("exits", "SystemExit: 0"), ("fails", "RuntimeError: boom")):
        found = checked(shape, **{key: f"{__name__}:{name}"})
        assert found.startswith(f"C017 {key}: ") and f"'{__name__}:{name}' raised {what}" in found


def test_a_sampler_that_would_end_the_command_is_named() -> None:
    found = checked(STAR, client_sampler=f"{__name__}:asks")
    assert found == f"C017 client_sampler: sampler '{__name__}:asks' raised SystemExit: 0 for round 1"


@pytest.mark.parametrize(("shape", "key"), [*KEYS, (STAR, "client_sampler"), (STAR, "metrics"), (STAR, "dataset_type")])
def test_code_that_cannot_be_imported_is_named(shape: dict[str, Any], key: str) -> None:
    name = "no_such_module_of_mine:thing"
    assert checked(shape, **{key: [name] if key == "metrics" else name}).startswith(f"C017 {key}: cannot load '{name}'")


@pytest.mark.parametrize(
    ("shape", "key"), [(GROUPS, "group_by"), (RING, "federated_learning_topology"), (RING, "mixing")]
)
def test_what_is_no_function_is_named(shape: dict[str, Any], key: str) -> None:
    assert checked(shape, **{key: "math:pi"}).startswith(f"C017 {key}: ")


@pytest.mark.parametrize("shape_and_key", [(STAR, "metrics"), (STAR, "model_type"), (STAR, "dataset_type")])
def test_a_number_is_no_function(shape_and_key: tuple[dict[str, Any], str]) -> None:
    shape, key = shape_and_key
    assert checked(shape, **{key: ["math:pi"] if key == "metrics" else "math:pi"}).startswith(f"C017 {key}: ")


def test_a_data_set_that_would_end_the_command_is_named() -> None:
    found = checked(STAR, dataset_type=f"{__name__}:exits")
    assert found.startswith("C017 dataset_type: ") and f"'{__name__}:exits' raised SystemExit: 0" in found


def score(scores: Any, labels: Any) -> float:
    sys.exit(f"{len(labels)} samples")


def test_a_metric_that_raises_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        measure([f"{__name__}:score"], np.zeros((3, 2)), np.zeros(3, np.int64))
    assert str(caught.value) == f"C017 metrics: metric '{__name__}:score' raised SystemExit: 3 samples"


# ---------------------------------------------------------------- groups


def as_text(num_clients: int) -> list[str]:
    return ["0", "1"] * (num_clients // 2)


def as_halves(num_clients: int) -> list[float]:
    return [0.5] * (num_clients - 1) + [1]


def as_nan(num_clients: int) -> list[float]:
    return [float("nan")] * num_clients


def as_infinite(num_clients: int) -> list[float]:
    return [0, float("inf")] * (num_clients // 2)


def as_nothing() -> None:
    return None


def as_mapping(num_clients: int) -> dict[int, int]:
    return {client: client % 2 for client in range(num_clients)}


def as_columns(num_clients: int) -> Any:
    return np.zeros((num_clients, 1))


def as_ragged(num_clients: int) -> list[list[int]]:
    return [[0], [0, 1]]


def from_one(num_clients: int) -> list[int]:
    return [1 + client % 2 for client in range(num_clients)]


def all_in_one(num_clients: int) -> list[int]:
    return [0] * num_clients


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (as_text, "returned list"),
        (as_halves, "returned 0.5"),
        (as_nan, "returned nan"),
        (as_infinite, "returned inf"),
        (as_nothing, "returned NoneType"),
        (as_mapping, "returned dict"),
        (as_columns, "returned ndarray"),
        (as_ragged, "returned list"),
        (from_one, "returned group 2"),
        (all_in_one, "left group 1 empty"),
    ],
)
def test_groups_that_cannot_be_used_are_refused(function: Callable[..., Any], what: str) -> None:
    name = f"{__name__}:{function.__name__}"
    found = checked(GROUPS, group_by=name)
    assert found.startswith(f"C018 group_by: grouping '{name}' {what}")
    assert "allowed: a group per client, 0 to number_of_groups - 1, none of them empty" in found


def test_whole_numbers_of_numpy_are_groups() -> None:
    for dtype in (np.float64, np.uint8, np.int32):
        GROUPINGS.add(
            f"test-{dtype.__name__}", lambda num_clients, dtype=dtype: (np.arange(num_clients) % 2).astype(dtype)
        )
        assert group_clients(f"test-{dtype.__name__}", 4, 2, {}) == (0, 1, 0, 1)


# ---------------------------------------------------------------- graphs and weights


def a_word() -> str:
    return "ring"


def ragged() -> list[list[int]]:
    return [[0, 1], [1]]


def objects() -> Any:
    return np.array([[object(), None], [None, object()]])


def with_nan(num_nodes: int) -> Any:
    return np.full((num_nodes, num_nodes), np.nan)


def nan_weights(adjacency: Any) -> Any:
    return np.asarray(adjacency) * np.nan


def looped(num_nodes: int) -> Any:
    return np.ones((num_nodes, num_nodes))


def loop_of_networkx(num_nodes: int) -> Any:
    return nx.Graph([(k, k) for k in range(num_nodes)])


@pytest.mark.parametrize("key", ["federated_learning_topology", "mixing"])
def test_what_is_no_matrix_is_named(key: str) -> None:
    for function in (a_word, ragged, objects):
        found = checked(RING, **{key: f"{__name__}:{function.__name__}"})
        assert found.startswith(f"C018 {key}: ") and f"'{__name__}:{function.__name__}' returned" in found


def test_a_matrix_that_is_no_graph_is_named() -> None:
    for function, code in ((with_nan, "T002"), (looped, "T005"), (loop_of_networkx, "T005")):
        name = f"{__name__}:{function.__name__}"
        assert checked(RING, federated_learning_topology=name).startswith(f"{code} topology '{name}'")
    assert checked(RING, mixing=f"{__name__}:nan_weights").startswith(f"T013 mixing '{__name__}:nan_weights'")


def by_hand(adjacency: Any) -> Any:
    """Metropolis-Hastings as one writes it on a dense matrix."""
    edges = np.asarray(adjacency, float)
    degree = edges.sum(axis=1)
    weights = edges / (1 + np.maximum.outer(degree, degree))
    assert len(adjacency) == len(weights)
    return weights + np.diag(1 - weights.sum(axis=1))


def test_a_rule_may_take_the_graph_for_a_dense_matrix() -> None:
    graph = HybridAdjacencyMatrix.from_edges(4, [(0, 1), (1, 2), (2, 3), (3, 1)])
    found = mixing_matrix(weigh(graph, f"{__name__}:by_hand", {}), f"{__name__}:by_hand").toarray()
    assert np.allclose(found, mixing_matrix(weigh(graph, "metropolis_hastings", {}), "metropolis_hastings").toarray())
    with pytest.raises(ValueError, match="copy"):
        graph.__array__(copy=False)


# ---------------------------------------------------------------- models


def lazy(num_classes: int) -> Any:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))


def without_numbers(num_classes: int) -> Any:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
    with torch.no_grad():
        model[1].bias.fill_(float("nan"))
    return model


def test_a_model_that_cannot_start_is_named() -> None:
    found = checked(STAR, model_type=f"{__name__}:lazy")
    assert found.startswith(f"C018 model_type: model '{__name__}:lazy' has a lazy tensor 1.weight")
    found = checked(STAR, model_type=f"{__name__}:without_numbers")
    assert found.startswith("W020 model_type: ") and "1.bias" in found and "without_numbers" in found
