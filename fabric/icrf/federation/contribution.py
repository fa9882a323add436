"""What each client contributes to a federation: Shapley values over coalitions that train in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from icrf.errors import ConfigError, RunError
from icrf.federation.message import Message
from icrf.federation.node import FederatedNode, NodeContext
from icrf.learning.contribution import Contributions, shapley
from icrf.learning.datasets import configured_dataset
from icrf.learning.flat_module import FlatModule
from icrf.learning.models import build_model
from icrf.learning.partition import configured_partition
from icrf.learning.rng import derive_seed, global_randomness
from icrf.learning.training import LocalTrainer, evaluate, to_tensor
from icrf.registry import load_attr
from icrf.spec import FederationConfig
from icrf.spec.choices import TRADITIONAL
from icrf.submission import default_nodes, flow_of

Array = np.ndarray[Any, Any]

# What would make a round something else than the average of all clients' models.
_AT_THEIR_DEFAULTS = (
    "client_fraction",
    "sampled_clients",
    "client_sampler",
    "activation",
    "aggregation_sample_scaling",
    "clip_norm",
    "private_keys",
    "server_template",
)


def contributions(
    config: FederationConfig,
    *,
    client_template: type[FederatedNode] | None = None,
    metric: str = "accuracy",
    permutations: int = 200,
) -> Contributions:
    """The Shapley values of a star's clients, in client order; the utility is a test metric of the final model.

    Every coalition runs the federation's rounds in this process, with the data that its members have in the whole
    federation; the empty coalition has the initial model. Up to 12 clients take 2^n such runs and are exact, more are
    estimated from `permutations` random orders, with standard errors. Meant for small models.

    Args:
        config: a traditional federation with FedAvg.
        client_template: class of the clients; None: the configuration's. They have no messages here.
        metric: a metric of the evaluation; ``accuracy``, ``loss`` or one of ``metrics``.

    Raises:
        ConfigError: C008 for another kind of federation, or one whose clients do not all count in full; C010 for an
            unknown metric or a class that is not found, C017 for one that cannot be loaded.
    """
    wanted = (TRADITIONAL, "FedAvg")
    if (config.federated_learning_schema, config.aggregation_strategy) != wanted:
        raise ConfigError(
            "C008",
            "contributions are those to federated averaging",
            place="federated_learning_schema",
            value=f"{config.federated_learning_schema} with {config.aggregation_strategy}",
            allowed=" with ".join(wanted),
        )
    for key in _AT_THEIR_DEFAULTS:
        found, allowed = getattr(config, key), FederationConfig.model_fields[key].get_default(call_default_factory=True)
        if found != allowed:
            message = "coalitions train with all of their clients in every round, and average whole models"
            raise ConfigError("C008", message, place=key, value=found, allowed=repr(allowed))
    if client_template is None:
        client_template = (
            load_attr(config.client_template, "client_template") if config.client_template else FederatedNode
        )
    game = CoalitionGame(config, client_template, metric)
    return shapley(config.number_of_clients, game, permutations=permutations, seed=config.seed)


class CoalitionGame:
    """The utility of a coalition of clients: what their model scores on the test data. Called with client numbers."""

    def __init__(self, config: FederationConfig, template: type[FederatedNode], metric: str) -> None:
        self._config, self._template, self._metric = config, template, metric
        self._data = data = configured_dataset(config)
        seed = derive_seed(config.seed, 0, 0, "model")
        self._model = FlatModule(build_model(config.model_type, data.input_shape, data.num_classes, seed))
        self._initial: Array = self._model.snapshot()
        self._parts = configured_partition(config, data, config.number_of_clients)
        test_x, test_y = data.test_part()
        self._test = to_tensor(test_x), to_tensor(test_y)
        self._specs = default_nodes(config, flow_of(config))

    def __call__(self, coalition: frozenset[int]) -> float:
        nodes = [self._node(1 + client) for client in sorted(coalition)]
        weights = [node.num_samples for node in nodes]
        flat = self._initial
        for number in range(1, self._config.federated_learning_rounds + 1 if nodes else 1):
            flat = self._round(number, nodes, weights, flat)
        self._model.load(flat)
        with global_randomness(derive_seed(self._config.seed, 0, 0, "global evaluate")):
            found = evaluate(self._model.module, *self._test, metrics=self._config.metrics)
        if self._metric not in found:
            raise ConfigError("C010", f"metric '{self._metric}' unknown", place="metric", allowed=", ".join(found))
        return found[self._metric]

    def _round(self, number: int, nodes: Sequence[FederatedNode], weights: Sequence[int], flat: Array) -> Array:
        """One round of federated averaging: the mean in float64, rounded once."""
        total = np.zeros(len(flat), np.float64)
        for node, weight in zip(nodes, weights, strict=True):
            node.enter_round(number)
            self._model.load(flat)
            with self._randomness(node, "train"):
                node.train()
            total += weight * self._model.flat.astype(np.float64)
        mean: Array = (total / sum(weights)).astype(flat.dtype)
        self._model.layout.settle(mean)
        return mean

    def _node(self, index: int) -> FederatedNode:
        """A fresh client, set up as a host would do it."""
        spec = self._specs[index]
        features, labels = self._data.train_part(self._parts[index - 1])
        node = self._template(node_id=spec.id, role=spec.role, config=self._config)
        node.context = NodeContext(
            index=index,
            cluster="local",
            own_actor=False,
            train_data=(to_tensor(features), to_tensor(labels)),
            test_data=self._test,
            model=self._model,
            trainer=LocalTrainer(),
            mailbox=_Nobody(),
        )
        self._model.load(self._initial)
        for hook in ("build", "setup"):
            with self._randomness(node, hook):
                getattr(node, hook)()
        return node

    def _randomness(self, node: FederatedNode, method: str) -> Any:
        context = node.context
        return global_randomness(derive_seed(self._config.seed, context.index, context.round, f"global {method}"))


class _Nobody:
    """The mailbox of a client that trains in a coalition: there is nobody to write to."""

    def publish(self, message: Message, to: Sequence[str] | str | None) -> int:
        raise RunError("F005", f"{message.sender_id} cannot send in a coalition", place=message.sender_id)

    def sync(self, node_id: str, wait_s: float) -> list[Message]:
        return []

    def get_neighbors(self, node_id: str) -> list[str]:
        return []
