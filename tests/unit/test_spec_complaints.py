"""Complaints about a configuration say what would do."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from icrf.errors import ConfigErrors
from icrf.learning.aggregation import AGGREGATORS
from icrf.preconditions import WITH_NUM_BYZANTINE
from icrf.spec import FederationConfig
from icrf.spec.choices import CHOICES
from icrf.spec.rule_settings import READ_BY

STAR = {"federation_id": "fed", "schema": "TraditionalFederatedLearning", "federated_learning_topology": "star"}
RING = {"federation_id": "fed", "schema": "DecentralizedFederatedLearning", "federated_learning_topology": "ring"}
KRUM = {"aggregation_strategy": "Krum", "num_byzantine": 4}
CSV = {"dataset_type": "csv", "data_dir": "d", "target_column": "y"}
CLUSTERED = {"schema": "ClusterFederatedLearning", "number_of_models": 9, "number_of_clients": 8}


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        (CLUSTERED, "C008 x: number_of_models 9 > 8 nodes .*; allowed: 2 to 8$"),
        (
            {**KRUM, "number_of_clients": 10},
            "C008 x: num_byzantine 4 contradicts 10 .* needs 11 for it; allowed: 0 to 3$",
        ),
        ({**KRUM, "number_of_clients": 3}, "C008 x: num_byzantine 4 contradicts 3 .*; allowed: 0$"),
        ({**KRUM, "number_of_clients": 2}, "C008 x: .*; allowed: 3 participants or more$"),
        ({"sampled_clients": 3, "min_nodes": 5}, r"C008 x: min_nodes 5 > 3 .* \(sampled_clients\)"),
        ({"client_fraction": 0.3, "min_nodes": 5}, r"C008 x: min_nodes 5 > 3 .* \(client_fraction\)"),
        ({"metrics": {"a": "b"}}, "C006 x: metrics: expected a list of text, got a mapping"),
        ({"metrics": ["macro_f1", {"a": "b"}]}, "C006 x: metrics.1: expected text, got a mapping"),
        ({"number_of_clients": frozenset()}, "C006 x: .*, got a value of type frozenset"),
        ({**RING, "federated_learning_topology": "hierarchy"}, "C008 x: .*set federated_learning_schema: Hierarchical"),
        ({**RING, "federated_learning_topology": "star"}, "C008 x: .*set federated_learning_schema: Traditional"),
        ({"dataset_type": "csv", "target_column": "y"}, "C016 x: data_dir is missing: dataset_type 'csv' needs it"),
        ({"dataset_type": "mnist"}, "C016 x: data_dir is missing: dataset_type 'mnist' needs it"),
        ({"dataset_type": "cifar10"}, "C016 x: data_dir is missing: dataset_type 'cifar10' needs it"),
        ({"mu": 0.1}, "C008 x: mu 0.1 contradicts aggregation_strategy FedAvg, .*; allowed: null. .* use FedProx"),
        ({**RING, "num_byzantine": 1}, "C008 x: num_byzantine 1 contradicts .* use TrimmedMean or Krum or MultiKrum"),
        (
            {**KRUM, "num_byzantine": 1, "num_selected": 2},
            "C008 x: num_selected 2 contradicts .* use MultiKrum",
        ),
        ({"aggregation_strategy": "FedAdagrad", "server_beta2": 0.9}, "C008 x: server_beta2 0.9 .*; allowed: 0.99. "),
        ({**CSV, "ignored_columns": ["a", "y"]}, "C008 x: ignored_columns 'y' contradicts target_column 'y'"),
        ({**CSV, "group_column": "y"}, "C008 x: group_column 'y' contradicts target_column 'y'"),
    ],
)
def test_complaints_say_what_would_do(keys: dict[str, object], error: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        FederationConfig.from_mapping({**STAR, **keys}, source="x")
    (found,) = caught.value.errors
    assert re.match(error, str(found))


@pytest.mark.parametrize("rule", CHOICES["aggregation_strategy"].built)
def test_a_setting_is_refused_by_the_rules_that_do_not_take_it_unless_it_is_the_default(rule: str) -> None:
    taken = inspect.signature(AGGREGATORS.get(rule)).parameters
    needed = {"mu": 0.5} if rule == "FedProx" else {"num_byzantine": 1} if rule in WITH_NUM_BYZANTINE else {}
    keys = {**STAR, "aggregation_strategy": rule, "number_of_clients": 10, **needed}
    defaults = FederationConfig.model_fields
    for key, (default, readers) in READ_BY.items():
        assert default == defaults[key].default and (rule in readers) == (key in taken)
        assert FederationConfig.from_mapping({key: default, **keys}).aggregation_strategy == rule
        other = 1 if key.startswith("num_") else 0.5
        if key in taken:
            FederationConfig.from_mapping({**keys, key: other})
            continue
        with pytest.raises(ConfigErrors) as caught:
            FederationConfig.from_mapping({**keys, key: other})
        (error,) = caught.value.errors
        assert f"{key} {other} contradicts aggregation_strategy {rule}, " in str(error) and error.code == "C008"


def test_a_rule_of_ones_own_may_read_any_setting() -> None:
    keys = {"aggregation_strategy": "my_rules:Mine", "mu": 0.5, "tau": 2.0, "num_byzantine": 3}
    assert FederationConfig.from_mapping({**STAR, **keys}).tau == 2.0


def test_a_deadline_of_null_is_the_default() -> None:
    assert FederationConfig.from_mapping({**STAR, "round_deadline_s": None}).round_deadline_s == 600.0
    assert {"type": "null"} in FederationConfig.model_json_schema()["properties"]["round_deadline_s"]["anyOf"]


def test_the_page_calls_nothing_unbuilt_that_is_built() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    built = {f"`{name}`" for choice in CHOICES.values() for name in choice.built}
    lines = [line for line in page.splitlines() if "not built" in line]
    assert not [line for line in lines if any(name in line for name in built)]
