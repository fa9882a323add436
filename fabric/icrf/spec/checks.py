"""What a configuration must satisfy beyond the types of its keys: usable names, no contradictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from icrf.spec.choices import CHOICES, DECENTRALIZED, TRADITIONAL, not_built
from icrf.spec.problems import Problem

Values = Mapping[str, Any]
Check = Callable[[Values], Iterator[Problem]]

# Settings that not every optimizer has; given to another one they would be dropped silently.
_WITH_MOMENTUM = ("SGD", "RMSprop")
_WITHOUT_WEIGHT_DECAY = ("Rprop",)


class _Missing(Exception):
    """A check asked for a key whose value is itself in error."""


class _Sound(dict[str, Any]):
    """The values without error; asking for another ends the check that asks."""

    def __missing__(self, key: str) -> Any:
        raise _Missing(key)


def find_contradictions(values: Values) -> list[Problem]:
    """Run every check on `values`, the keys that are valid by themselves.

    A check that needs a key which is not there, or whose value has no code yet, is left out: there is a complaint
    about that key already.
    """
    problems = [*_unusable_names(values), *_only_today(values)]
    unusable = {problem.path[0] for problem in problems}
    sound = _Sound({key: value for key, value in values.items() if key not in unusable})
    for check in CHECKS:
        try:
            problems += check(sound)
        except _Missing:
            continue
    return problems


def _unusable_names(values: Values) -> Iterator[Problem]:
    for key, choice in CHOICES.items():
        value = values.get(key, [])
        for name in value if isinstance(value, list) else [value]:
            if problem := choice.problem(key, name):
                yield problem


def _only_today(values: Values) -> Iterator[Problem]:
    for key, works in (("client_fraction", 1.0), ("clustering_period", 0)):
        if key in values and values[key] != works:
            yield not_built(key, values[key], str(works))
    for key, wanted in (("do_cluster", False), ("aggregation_sample_scaling", True), ("store_node_models", False)):
        if values.get(key, wanted) is not wanted:
            yield not_built(key, not wanted, str(wanted).lower())
    if values.get("private_keys") and values.get("federated_learning_schema") == TRADITIONAL:
        yield not_built("private_keys", "...", f"[] with {TRADITIONAL}, any with {DECENTRALIZED}")
    if values.get("device") == "cuda":
        yield not_built("device", "cuda", "cpu")
    least, nodes = values.get("min_nodes"), values.get("number_of_clients")
    if least is not None and nodes is not None and least < nodes:
        yield not_built("min_nodes", least, f"null or {nodes}: a round needs all of its nodes")


def _min_nodes(values: Values) -> Iterator[Problem]:
    least, nodes = values["min_nodes"], values["number_of_clients"]
    if least is not None and least > nodes:
        yield Problem(
            "C008",
            ("min_nodes",),
            f"min_nodes {least} > {nodes} nodes (number_of_clients)",
            allowed=f"1 to {nodes}",
        )


def _schema_and_topology(values: Values) -> Iterator[Problem]:
    schema, topology = values["federated_learning_schema"], values["federated_learning_topology"]
    path = ("federated_learning_topology",)
    if schema == TRADITIONAL and topology != "star":
        yield Problem(
            "C008",
            path,
            f"federated_learning_topology '{topology}' contradicts federated_learning_schema {TRADITIONAL}",
            allowed="star",
            hint=f"For peers that learn from each other set federated_learning_schema: {DECENTRALIZED}.",
        )
    if schema == DECENTRALIZED and topology == "star":
        yield Problem(
            "C008",
            path,
            f"federated_learning_topology 'star' contradicts federated_learning_schema {DECENTRALIZED}",
            allowed="ring, mesh, custom, a registered name, module:attr",
            hint=f"For one server and its clients set federated_learning_schema: {TRADITIONAL}.",
        )


def _custom_matrix(values: Values) -> Iterator[Problem]:
    if values["federated_learning_topology"] == "custom" and not values["adjacency_matrix_file_name"]:
        yield Problem(
            "C016",
            ("federated_learning_topology",),
            "adjacency_matrix_file_name is missing: topology 'custom' is read from it",
            hint="Set it to a CSV file with one row of 0 and 1 per node, relative to this file's folder.",
        )


def _momentum(values: Values) -> Iterator[Problem]:
    if values["momentum"] != 0 and values["optimizer"] not in _WITH_MOMENTUM:
        yield _setting_without_effect("momentum", values["momentum"], values["optimizer"], "SGD or RMSprop")


def _weight_decay(values: Values) -> Iterator[Problem]:
    if values["weight_decay"] != 0 and values["optimizer"] in _WITHOUT_WEIGHT_DECAY:
        yield _setting_without_effect("weight_decay", values["weight_decay"], values["optimizer"], "another optimizer")


def _setting_without_effect(key: str, value: float, optimizer: str, instead: str) -> Problem:
    return Problem(
        "C008",
        (key,),
        f"{key} {value} contradicts optimizer {optimizer}, which has no {key}",
        allowed=f"0 with {optimizer}",
        hint=f"Use {instead}, or leave {key} out.",
    )


def _roles(values: Values) -> Iterator[Problem]:
    roles = values["client_role"].split("-")
    if "train" not in roles:
        yield Problem(
            "C008",
            ("client_role",),
            f"client_role '{values['client_role']}' leaves no node that trains",
            allowed="a role with 'train', e.g. train-eval-test",
            hint="To exchange models without training set number_of_epochs: 0.",
        )


def _server_template(values: Values) -> Iterator[Problem]:
    if values["federated_learning_schema"] == DECENTRALIZED and values["server_template"] is not None:
        yield Problem(
            "C008",
            ("server_template",),
            f"server_template contradicts federated_learning_schema {DECENTRALIZED}, which has no server",
            hint="Leave it out, or use client_template.",
        )


def _table(values: Values) -> Iterator[Problem]:
    if values["dataset_type"] not in ("csv", "parquet"):
        return
    for key, what in (("data_dir", "the table"), ("target_column", "the column with the class")):
        if not values[key]:
            yield Problem(
                "C016",
                (key,),
                f"{key} is missing: dataset_type '{values['dataset_type']}' needs it",
                hint=f"Set it to {what}.",
            )


CHECKS: tuple[Check, ...] = (
    _min_nodes,
    _schema_and_topology,
    _custom_matrix,
    _momentum,
    _weight_decay,
    _roles,
    _server_template,
    _table,
)
