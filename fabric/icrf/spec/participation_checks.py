"""What a configuration says about who takes part in its rounds, checked for contradictions."""

from __future__ import annotations

from collections.abc import Iterator

from icrf.protocol import sample_size
from icrf.spec.choices import DECENTRALIZED, TRADITIONAL, not_built
from icrf.spec.problems import Check, Problem, Values, too_many
from icrf.waves import WAVES, Condition

# Their server keeps nothing but the model, and contributions are models, which can be averaged with older ones.
_WITH_LATE_UPDATES = ("FedAvg", "FedProx")


def _sampled_clients(values: Values) -> Iterator[Problem]:
    number, nodes = values["sampled_clients"], values["number_of_clients"]
    if number is not None and number > nodes:
        yield too_many("sampled_clients", number, nodes, "nodes (number_of_clients)")
    if number is not None and values["client_fraction"] != 1.0:
        yield Problem(
            "C008",
            ("sampled_clients",),
            f"sampled_clients {number} contradicts client_fraction {values['client_fraction']}",
            allowed="one of the two",
        )


def _min_nodes(values: Values) -> Iterator[Problem]:
    least, nodes = values["min_nodes"], values["number_of_clients"]
    if least is None:
        return
    taking_part = fewest_participants(values, nodes)
    if least > nodes:
        yield too_many("min_nodes", least, nodes, "nodes (number_of_clients)")
    elif least > taking_part:
        reason = "client_fraction" if values["sampled_clients"] is None else "sampled_clients"
        reason = "wave_size" if values["activation"] == WAVES else reason
        yield too_many("min_nodes", least, taking_part, f"that take part in a round ({reason})")
    elif least < nodes and values["federated_learning_schema"] == DECENTRALIZED:
        yield not_built("min_nodes", least, f"null or {nodes}: every peer mixes with all of its neighbours")


def fewest_participants(values: Values, num_clients: int) -> int:
    """How many of so many clients are chosen for the round that has the fewest, as far as a configuration says."""
    active = num_clients
    if values["activation"] == WAVES and values["wave_size"] is not None:
        active = min(active, values["wave_size"])
    return sample_size(active, values["client_fraction"], values["sampled_clients"])


def _waves(values: Values) -> Iterator[Problem]:
    size, condition, kind = values["wave_size"], values["wave_condition"], values["activation"]
    if condition is not None and Condition.parse(condition) is None:
        allowed = "a metric, a sign out of >=, <=, > and <, and a number, e.g. accuracy >= 0.6"
        yield Problem("C007", ("wave_condition",), f"'{condition}' is no condition", allowed=allowed)
    if kind != WAVES:
        return
    if size is None:
        hint = "Set it to how many clients a wave has."
        yield Problem("C016", ("activation",), "wave_size is missing: activation 'waves' needs it", hint=hint)
    if condition is not None and values["client_sampler"] != "uniform":
        text = "wave_condition contradicts client_sampler, which is asked before anything is measured"
        yield Problem("C008", ("wave_condition",), text, allowed="null, or client_sampler: uniform")


def _cluster_loss(values: Values) -> Iterator[Problem]:
    if values["on_cluster_loss"] == "exclude" and values["min_nodes"] is None:
        yield Problem(
            "C008",
            ("on_cluster_loss",),
            "on_cluster_loss 'exclude' contradicts min_nodes null, which wants all nodes in every round",
            hint="Set min_nodes to the fewest nodes that make a round valid.",
        )


def _late_updates(values: Values) -> Iterator[Problem]:
    key, rule = "late_updates", values["aggregation_strategy"]
    if values[key] == "drop":
        return
    if values["federated_learning_schema"] != TRADITIONAL:
        yield not_built(key, values[key], f"drop; with federated_learning_schema {TRADITIONAL} also weigh")
    elif rule not in _WITH_LATE_UPDATES:
        yield not_built(key, values[key], f"drop with aggregation_strategy {rule}; {', '.join(_WITH_LATE_UPDATES)}")
    elif values["min_nodes"] is None:
        yield Problem(
            "C008",
            (key,),
            f"{key} '{values[key]}' contradicts min_nodes null: no round goes on without a late cluster",
            hint="Set min_nodes to the fewest nodes that make a round valid.",
        )
    moves = values["clustering_period"] or values["on_cluster_loss"] == "reassign"
    if moves:
        other = "clustering_period" if values["clustering_period"] else "on_cluster_loss 'reassign'"
        text = f"{key} '{values[key]}' contradicts {other}: what a late cluster owes cannot move with its nodes"
        yield Problem("C008", (key,), text, allowed="drop")


PARTICIPATION_CHECKS: tuple[Check, ...] = (_sampled_clients, _min_nodes, _waves, _cluster_loss, _late_updates)
