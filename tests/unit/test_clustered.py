"""Several models in one federation: the rule by itself, the layout of many models, and what a configuration may say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from icrf.errors import ConfigError, ConfigErrors
from icrf.learning.aggregation import ClientUpdate, FedAvg, FedProx, Ifca, MeanAggregator, RoundFacts, build_aggregator
from icrf.learning.datasets import load_dataset
from icrf.learning.layout import Layout, model_names
from icrf.learning.models import build_model, register_model
from icrf.learning.training import evaluate, mean_loss
from icrf.protocol import CENTRALIZED, Rows, TensorSpec
from icrf.spec import FederationConfig
from icrf.submission import build_submission, flow_of
from icrf.update import ExactSum, choose_grid

Array = np.ndarray[Any, Any]
SIZES = (3, 5)
SIZE = sum(SIZES)
CLUSTERED = {
    "federation_id": "groups",
    "schema": "ClusterFederatedLearning",
    "federated_learning_topology": "star",
    "number_of_clients": 6,
    "number_of_models": 2,
}


def config_of(**keys: Any) -> FederationConfig:
    return FederationConfig.from_mapping({**CLUSTERED, **keys})


def draws(seed: int, count: int) -> list[Array]:
    generator = np.random.default_rng(seed)
    return [generator.normal(size=SIZE).astype(np.float32) for _ in range(count)]


def next_state(
    rule: MeanAggregator,
    models: Sequence[Array],
    trained: Sequence[Array],
    weights: Sequence[int],
    chosen: Sequence[int],
) -> list[Array]:
    """The models after a round in which node i made `trained[i]` of the model `chosen[i]`."""
    server = rule.first_state(np.concatenate(models))
    maxima = [float(abs(part).max()) for m in models for part in np.split(m, np.cumsum(SIZES)[:-1])]
    sizes = (*SIZES * rule.rows.up, *([rule.rows.scalars] if rule.rows.scalars else []))
    total = ExactSum(sizes, choose_grid(rule.expected(maxima), sum(weights)), sum(weights))
    nothing = np.empty(0, np.float32)
    for made, weight, choice in zip(trained, weights, chosen, strict=True):
        out = np.empty(rule.rows.up * SIZE + rule.rows.scalars, np.float32)
        update = ClientUpdate(models[choice], made, 1, nothing, nothing, out, choice)
        assert total.add(rule.contribution(update), weight) == ()
    out = np.empty_like(server)
    rule.finish(total, server, out, RoundFacts(1, len(trained), len(trained)))
    return np.split(out, len(models))


# ---------------------------------------------------------------- the rule


def test_each_model_is_the_weighted_mean_over_those_that_chose_it() -> None:
    models, trained, weights = draws(1, 3), draws(2, 5), [3, 1, 7, 2, 9]
    found = next_state(Ifca(FedAvg(), 3), models, trained, weights, chosen=[2, 0, 2, 0, 2])
    for k, members in {0: [1, 3], 2: [0, 2, 4]}.items():
        mean = np.average([trained[i].astype(np.float64) for i in members], 0, [weights[i] for i in members])
        np.testing.assert_allclose(found[k], mean, rtol=1e-7)
    assert found[1].tobytes() == models[1].tobytes()  # nobody chose it


def test_one_member_alone_makes_the_model_and_all_together_make_fedavg_bit_by_bit() -> None:
    models, trained, weights = draws(3, 2), draws(4, 4), [5, 2, 8, 1]
    alone = next_state(Ifca(FedAvg(), 2), models, trained, weights, chosen=[0, 0, 0, 1])
    assert alone[1].tobytes() == trained[3].tobytes()
    together = next_state(Ifca(FedAvg(), 2), models, trained, weights, chosen=[0] * 4)
    (fedavg,) = next_state(FedAvg(), models[:1], trained, weights, chosen=[0] * 4)
    assert together[0].tobytes() == fedavg.tobytes()


def test_models_do_not_disturb_each_other() -> None:
    """What group 0 makes has the same bits whatever the others send, and however large that is."""
    models, trained, weights = draws(5, 2), draws(6, 4), [5, 2, 8, 1]
    found = next_state(Ifca(FedAvg(), 2), models, trained, weights, chosen=[0, 1, 0, 1])
    other = [trained[0], 30 * trained[1], trained[2], -30 * trained[3]]
    again = next_state(Ifca(FedAvg(), 2), models, other, weights, chosen=[0, 1, 0, 1])
    assert again[0].tobytes() == found[0].tobytes()
    assert again[1].tobytes() != found[1].tobytes()


def test_a_model_follows_the_rule_of_the_configuration() -> None:
    settings = config_of(aggregation_strategy="FedProx", mu=0.3).model_dump()
    rule = build_aggregator("FedProx", settings, 2)
    assert isinstance(rule, Ifca) and isinstance(rule.within, FedProx)
    assert rule.rows == Rows(down=2, up=2, scalars=2, server=2)
    model = draws(7, 1)[0]
    terms = rule.terms(model, np.empty(0, np.float32))
    assert terms is not None and terms.mu == 0.3 and terms.anchor is model


@pytest.mark.parametrize("name", ["SCAFFOLD", "FedAvgM", "FedNova", "Median"])
def test_rules_that_are_no_fedavg_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"C008.*is no FedAvg"):
        build_aggregator(name, {"learning_rate": 0.1}, 2)


# ---------------------------------------------------------------- many models in one file


def test_the_names_of_many_models_sort_by_number() -> None:
    names = model_names(11)
    assert names[2] == "model_02" and list(names) == sorted(names)
    layout = Layout((TensorSpec("a", (2,), "float32"), TensorSpec("b", (1, 2), "float32")))
    many = layout.repeated(11)
    assert many.names[:3] == ("model_00.a", "model_00.b", "model_01.a")
    flat = np.arange(44, dtype=np.float32)
    assert many.to_state_dict(flat)["model_10.b"].tolist() == [[42, 43]]
    assert many.absmax(flat)[:4] == (1, 3, 5, 7)
    assert layout.repeated(1) is layout


def test_the_mean_loss_is_that_of_an_evaluation() -> None:
    data = load_dataset("digits")
    module = build_model("mlp", data.input_shape, data.num_classes, 7)
    found = mean_loss(module, data.train_x, data.train_y, functional.cross_entropy)
    assert found == pytest.approx(evaluate(module, data.train_x, data.train_y)["loss"], rel=1e-6)
    assert mean_loss(module, data.train_x[:0], data.train_y[:0], functional.cross_entropy) == 0.0
    assert module.training


# ---------------------------------------------------------------- what a configuration may say


def test_a_clustered_federation_is_a_star_that_learns_several_models() -> None:
    config = config_of()
    assert (config.num_models, flow_of(config)) == (2, CENTRALIZED)
    submission = build_submission(config)
    assert [node.id for node in submission.nodes[:2]] == ["server", "client_0"]
    assert submission.rows == Rows(down=2, up=2, scalars=2, server=2)


def test_the_number_of_models_changes_nothing_in_other_schemas() -> None:
    config = config_of(schema="TraditionalFederatedLearning")
    assert config.num_models == 1 and build_submission(config).rows == Rows()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"number_of_models": None}, "C016.*number_of_models is missing"),
        ({"number_of_models": 7}, r"C008.*number_of_models 7 > 6 nodes"),
        ({"number_of_models": 1}, "C007.*number_of_models"),
        ({"federated_learning_topology": "ring"}, "C008.*'ring' contradicts.*ClusterFederatedLearning"),
        ({"aggregation_strategy": "Krum", "num_byzantine": 1}, "C008.*Krum contradicts.*ClusterFederatedLearning"),
        ({"aggregation_strategy": "FedProx"}, "C016.*mu is missing"),
        ({"client_role": "train", "target_accuracy": 0.9}, "C008.*target_accuracy contradicts client_role"),
        ({"private_keys": ["hidden*"]}, "C012.*private_keys"),
        ({"first_choice": "best"}, "C010.*first_choice"),
    ],
)
def test_contradictions(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigErrors, match=message):
        config_of(**keys)


@register_model("test-same-start")
def same_start() -> nn.Module:
    module = nn.Linear(64, 10)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


def test_models_that_all_start_alike_are_refused() -> None:
    build_submission(config_of(schema="TraditionalFederatedLearning", model_type="test-same-start"))
    with pytest.raises(ConfigError, match=r"C018.*starts every model with the same weights"):
        build_submission(config_of(model_type="test-same-start"))
