"""What a configuration must satisfy beyond the types of its keys: usable names, no contradictions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from icrf.preconditions import VECTORIZED_OPTIMIZERS, WITH_NUM_BYZANTINE, fewest_updates, most_byzantine, most_selected
from icrf.protocol import parts_of
from icrf.spec.choices import (
    CHOICES,
    CLUSTERED,
    COSINE_SIMILARITY,
    DECENTRALIZED,
    HIERARCHICAL,
    HIERARCHY,
    STATIC,
    TRADITIONAL,
    WITH_SERVER,
    in_groups,
    not_built,
)
from icrf.spec.codec_checks import codec_problems
from icrf.spec.participation_checks import PARTICIPATION_CHECKS, fewest_participants
from icrf.spec.problems import Check, Problem, Values, too_many
from icrf.spec.rule_settings import unread_settings
from icrf.waves import ALL

# Settings that not every optimizer has; given to another one they would be dropped silently.
_WITH_MOMENTUM = ("SGD", "RMSprop")
_WITHOUT_WEIGHT_DECAY = ("Rprop",)
_WITH_K_VALUE = ("k_connected", "random_regular", "small_world")
_UNDIRECTED_MIXING = ("metropolis_hastings", "lazy_metropolis", "max_degree", "uniform", "sample_weighted")

# Mixing rules that every host computes from the graph alone, and that keep no mass of earlier rounds.
_ADAPTABLE_MIXING = ("metropolis_hastings", "lazy_metropolis", "max_degree", "uniform")
# A dense matrix is what strategies get; those that compare all pairs of nodes are at their end sooner.
_MOST_ADAPTED, _MOST_COMPARED = 20_000, 5_000


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
    if values.get("store_node_models", False) is not False:
        yield not_built("store_node_models", True, "false")


def _communities(values: Values) -> Iterator[Problem]:
    if not values["do_cluster"]:
        return
    strategy, schema = values["assignment_strategy"], values["federated_learning_schema"]
    other = f"assignment_strategy '{strategy}', which does not look at data" if strategy != "locality" else ""
    if in_groups(schema, values["federated_learning_topology"]):
        other = f"federated_learning_schema {schema}, whose groups are kept whole; group_by labels looks at data"
    if other:
        yield Problem("C008", ("do_cluster",), f"do_cluster contradicts {other}", allowed="false")


def _device(values: Values) -> Iterator[Problem]:
    share = getattr(values["resources"], "num_gpus", None)
    if values["device"] == "cuda" and share == 0:
        text = "device 'cuda' contradicts resources.num_gpus 0: a slot would see no GPU"
        yield Problem(
            "C008", ("device",), text, allowed="resources: uniform, or a num_gpus, e.g. 0.25 for 4 hosts a GPU"
        )
    if share is not None and share > 1 and not float(share).is_integer():
        text = f"resources.num_gpus {share:g} is neither a part of a GPU nor several whole ones"
        yield Problem("C007", ("resources",), text, allowed="0 to 1, 2, 3, ...")


def _optimizer_state(values: Values) -> Iterator[Problem]:
    key, schema = "keep_optimizer_state", values["federated_learning_schema"]
    if values[key] and schema != DECENTRALIZED:
        yield not_built(key, True, f"false with {schema}; aggregation_strategy DiLoCo keeps it by itself")
    elif values[key] and values["optimizer"] not in ("SGD", "Adam", "AdamW"):
        yield not_built(key, True, f"false with optimizer {values['optimizer']}; with SGD, Adam and AdamW also true")


def _schema_and_topology(values: Values) -> Iterator[Problem]:
    schema, topology = values["federated_learning_schema"], values["federated_learning_topology"]
    path = ("federated_learning_topology",)
    if schema == HIERARCHICAL and topology != HIERARCHY:
        yield Problem(
            "C008",
            path,
            f"federated_learning_topology '{topology}' contradicts federated_learning_schema {HIERARCHICAL}",
            allowed=HIERARCHY,
        )
    if schema in WITH_SERVER and topology != "star" and not in_groups(schema, topology):
        yield Problem(
            "C008",
            path,
            f"federated_learning_topology '{topology}' contradicts federated_learning_schema {schema}",
            allowed=f"star, {HIERARCHY} for communities" if schema == CLUSTERED else "star",
            hint=f"For peers that learn from each other set federated_learning_schema: {DECENTRALIZED}.",
        )
    if schema == DECENTRALIZED and topology in ("star", HIERARCHY):
        wanted = (
            f"groups with a server each set federated_learning_schema: {HIERARCHICAL}"
            if topology == HIERARCHY
            else f"one server and its clients set federated_learning_schema: {TRADITIONAL}"
        )
        yield Problem(
            "C008",
            path,
            f"federated_learning_topology '{topology}' contradicts federated_learning_schema {DECENTRALIZED}",
            allowed="ring, mesh, k_connected, custom, ..., a registered name, module:attr",
            hint=f"For {wanted}.",
        )


def _hierarchy(values: Values) -> Iterator[Problem]:
    schema = values["federated_learning_schema"]
    if not in_groups(schema, values["federated_learning_topology"]):
        return
    if schema == CLUSTERED and values["group_by"] == "contiguous":
        yield Problem(
            "C008",
            ("group_by",),
            f"group_by 'contiguous' contradicts federated_learning_schema {CLUSTERED}: its groups follow from data",
            allowed="labels, a registered name, module:attr",
            hint=f"For groups by number set federated_learning_schema: {HIERARCHICAL}.",
        )
    if schema == CLUSTERED and values["number_of_models"] is not None:
        text = "number_of_models contradicts federated_learning_topology 'hierarchy', where every group has a model"
        yield Problem("C008", ("number_of_models",), text, allowed="null", hint="Set number_of_groups.")
    groups, clients = values["number_of_groups"], values["number_of_clients"]
    if groups > clients:
        yield too_many("number_of_groups", groups, clients, "clients (number_of_clients)")
    built: dict[str, object] = {
        "aggregation_strategy": "FedAvg",
        "client_fraction": 1.0,
        "sampled_clients": None,
        "client_sampler": "uniform",
        "activation": ALL,
        "min_nodes": None,
        "private_keys": [],
    }
    for key, only in built.items():
        if values[key] != only:
            shown = "null" if only is None else str(only)
            yield not_built(key, values[key], f"{shown} with federated_learning_topology {HIERARCHY}")


def _custom_matrix(values: Values) -> Iterator[Problem]:
    if values["federated_learning_topology"] == "custom" and not values["adjacency_matrix_file_name"]:
        yield Problem(
            "C016",
            ("federated_learning_topology",),
            "adjacency_matrix_file_name is missing: topology 'custom' is read from it",
            hint="Set it to a CSV file with one row of 0 and 1 per node, relative to this file's folder.",
        )


def _neighbours(values: Values) -> Iterator[Problem]:
    topology = values["federated_learning_topology"]
    if topology in _WITH_K_VALUE and values["k_value"] is None:
        yield Problem(
            "C016",
            ("federated_learning_topology",),
            f"k_value is missing: topology '{topology}' has that many neighbours per node",
            hint="Set it to a number from 2 to the number of nodes less one.",
        )


def _custom_weights(values: Values) -> Iterator[Problem]:
    if values["mixing"] == "custom" and not values["mixing_matrix_file_name"]:
        yield Problem(
            "C016",
            ("mixing",),
            "mixing_matrix_file_name is missing: mixing 'custom' is read from it",
            hint="Set it to a CSV file with one row of weights per node, relative to this file's folder.",
        )


def _directed(values: Values) -> Iterator[Problem]:
    topology, mixing = values["federated_learning_topology"], values["mixing"]
    peers = values["federated_learning_schema"] == DECENTRALIZED
    what = "directed: true" if values["directed"] else f"topology '{topology}'"
    if peers and (values["directed"] or topology == "exponential") and mixing in _UNDIRECTED_MIXING:
        yield Problem(
            "C008",
            ("mixing",),
            f"mixing '{mixing}' needs edges both ways; {what} has edges in one direction",
            allowed="push_sum, custom, a registered name, module:attr",
            hint="Set mixing: push_sum, which keeps the mean on directed graphs.",
        )


def _adaptation(values: Values) -> Iterator[Problem]:
    key, mixing, nodes = "topology_adaptation_strategy", values["mixing"], values["number_of_clients"]
    strategy, schema = values[key], values["federated_learning_schema"]
    if strategy == STATIC:
        return
    if schema != DECENTRALIZED:
        yield Problem(
            "C008",
            (key,),
            f"{key} '{strategy}' contradicts federated_learning_schema {schema}, whose graph is given",
            allowed=STATIC,
            hint=f"For peers, whose graph may change, set federated_learning_schema: {DECENTRALIZED}.",
        )
        return
    if mixing not in _ADAPTABLE_MIXING:
        yield not_built("mixing", mixing, f"{', '.join(_ADAPTABLE_MIXING)} with {key} {strategy}")
    most = _MOST_COMPARED if strategy == COSINE_SIMILARITY else _MOST_ADAPTED
    if nodes > most:
        yield too_many("number_of_clients", nodes, most, f"nodes that {key} {strategy} can link")


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


def _vectorize(values: Values) -> Iterator[Problem]:
    width, optimizer = values["vectorize"], values["optimizer"]
    if isinstance(width, int) and optimizer not in VECTORIZED_OPTIMIZERS:
        yield Problem(
            "C008",
            ("vectorize",),
            f"vectorize {width} contradicts optimizer {optimizer}, which trains one node after the other",
            allowed=f"off with {optimizer}",
            hint=f"Use {', '.join(VECTORIZED_OPTIMIZERS[:-1])} or {VECTORIZED_OPTIMIZERS[-1]}, or set vectorize: off.",
        )


def _roles(values: Values) -> Iterator[Problem]:
    if "train" not in parts_of(values["client_role"]):
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


# Local optimizers that a rule understands; others work with any.
_LOCAL_OPTIMIZERS = {"SCAFFOLD": ("SGD",), "FedNova": ("SGD",), "DiLoCo": ("SGD", "Adam", "AdamW")}


def _aggregation(values: Values) -> Iterator[Problem]:
    rule = values["aggregation_strategy"]
    if values["federated_learning_schema"] == DECENTRALIZED:
        for key, only in (("aggregation_strategy", "FedAvg"), ("clip_norm", None)):
            if values[key] != only:
                yield _without_server(key, f"{key} {values[key]}", "null" if only is None else only)
    if values["federated_learning_schema"] not in WITH_SERVER:
        return
    if rule == "FedProx" and values["mu"] is None:
        yield _needs(rule, "mu", "mu: 0.01, the weight of its proximal term")
    optimizers = _LOCAL_OPTIMIZERS.get(rule)
    if optimizers and values["optimizer"] not in optimizers:
        text = f"optimizer {values['optimizer']} contradicts aggregation_strategy {rule}"
        yield Problem("C008", ("optimizer",), text, allowed=", ".join(optimizers))
    if rule == "SCAFFOLD" and values["clip_norm"] is not None:
        text = "clip_norm contradicts aggregation_strategy SCAFFOLD, which reads gradients off the unclipped update"
        yield Problem("C008", ("clip_norm",), text, allowed="null with SCAFFOLD")


def _without_server(key: str, what: str, allowed: str) -> Problem:
    text = f"{what} contradicts federated_learning_schema {DECENTRALIZED}, where no server combines updates"
    hint = f"Leave it out, which keeps the mix with the neighbours (mixing), or set schema: {TRADITIONAL}."
    return Problem("C008", (key,), text, allowed=allowed, hint=hint)


def _fewest_participants(values: Values) -> int:
    """How few nodes may contribute to a round."""
    if values["min_nodes"] is not None:
        return int(values["min_nodes"])
    return fewest_participants(values, values["number_of_clients"])


def _byzantine(values: Values) -> Iterator[Problem]:
    rule, bad, nodes = values["aggregation_strategy"], values["num_byzantine"], _fewest_participants(values)
    if values["federated_learning_schema"] != TRADITIONAL or rule not in WITH_NUM_BYZANTINE:
        return
    if bad is None:
        yield _needs(rule, "num_byzantine", "num_byzantine: 1, how many participants may send anything")
        return
    fewest, selected = fewest_updates(rule, bad), values["num_selected"]
    if nodes < fewest:
        text = f"num_byzantine {bad} contradicts {nodes} participants in a round: {rule} needs {fewest} for it"
        most = most_byzantine(rule, nodes)
        allowed = (
            f"0 to {most}" if most > 0 else "0" if most == 0 else f"{fewest_updates(rule, 0)} participants or more"
        )
        yield Problem("C008", ("num_byzantine",), text, allowed=allowed)
    elif rule == "MultiKrum" and selected is not None and selected > (most := most_selected(nodes, bad)):
        text = f"num_selected {selected} contradicts {nodes} participants in a round and num_byzantine {bad}"
        yield Problem("C008", ("num_selected",), text, allowed=f"1 to {most}")


def _needs(rule: str, key: str, example: str) -> Problem:
    text = f"{key} is missing: aggregation_strategy {rule} needs it"
    return Problem("C016", ("aggregation_strategy",), text, hint=f"Set {example}.")


_TABLES = ("csv", "parquet")
# Data sets whose files come with no package: only the configuration says where they are.
_FOLDERS = ("mnist", "cifar10")


def _data(values: Values) -> Iterator[Problem]:
    kind = values["dataset_type"]
    needed = {}
    if kind in _FOLDERS:
        needed = {"data_dir": "the folder with its files"}
    elif kind in _TABLES:
        needed = {"data_dir": "the table", "target_column": "the column with the class"}
        yield from _target_column(values)
    for key, what in needed.items():
        if not values[key]:
            yield Problem(
                "C016",
                (key,),
                f"{key} is missing: dataset_type '{kind}' needs it",
                hint=f"Set it to {what}.",
            )


def _target_column(values: Values) -> Iterator[Problem]:
    target = values["target_column"]
    others = {"ignored_columns": values["ignored_columns"], "group_column": [values["group_column"]]}
    for key, found in others.items():
        if target and target in found:
            text = f"{key} '{target}' contradicts target_column '{target}', which holds the class"
            yield Problem("C008", (key,), text, allowed="a column besides target_column")


# Rules that a clustered federation averages each of its models by; those of one's own are asked later.
_PER_MODEL = ("FedAvg", "FedProx")


def _models(values: Values) -> Iterator[Problem]:
    number, nodes, rule = values["number_of_models"], values["number_of_clients"], values["aggregation_strategy"]
    schema, topology = values["federated_learning_schema"], values["federated_learning_topology"]
    if schema != CLUSTERED or in_groups(schema, topology):
        return
    if number is None:
        yield Problem(
            "C016",
            ("federated_learning_schema",),
            f"number_of_models is missing: {CLUSTERED} learns that many models",
            hint="Set number_of_models: 2, or as many as there are groups of clients with similar data.",
        )
    elif number > nodes:
        yield too_many(
            "number_of_models", number, nodes, "nodes (number_of_clients), each of which trains one", least=2
        )
    if rule not in _PER_MODEL and rule in CHOICES["aggregation_strategy"].built:
        text = f"aggregation_strategy {rule} contradicts federated_learning_schema {CLUSTERED}"
        yield Problem("C008", ("aggregation_strategy",), text, allowed=", ".join((*_PER_MODEL, "a FedAvg of your own")))
    if values["target_accuracy"] is not None and "test" not in parts_of(values["client_role"]):
        text = f"target_accuracy contradicts client_role '{values['client_role']}': with {CLUSTERED} clients measure it"
        yield Problem("C008", ("target_accuracy",), text, allowed="null without 'test' in client_role")
    if values["private_keys"]:
        yield not_built("private_keys", values["private_keys"], f"[] with {CLUSTERED}")


CHECKS: tuple[Check, ...] = (
    _aggregation,
    unread_settings,
    _models,
    _byzantine,
    _communities,
    *PARTICIPATION_CHECKS,
    codec_problems,
    _optimizer_state,
    _schema_and_topology,
    _hierarchy,
    _custom_matrix,
    _neighbours,
    _custom_weights,
    _directed,
    _adaptation,
    _momentum,
    _weight_decay,
    _vectorize,
    _device,
    _roles,
    _server_template,
    _data,
)
