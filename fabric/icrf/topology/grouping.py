"""Which nodes form a group of a hierarchy: functions of the configuration and the data, never of where nodes live.

A grouping declares what it needs as parameters; they are injected by name: ``num_clients``, ``num_groups``,
``client_ids``, ``label_counts`` (training samples per client and label, shape (num_clients, num_labels)), and any key
of the configuration. It returns a group for each client, 0 to num_groups - 1::

    @register_grouping("odd_and_even")
    def odd_and_even(num_clients: int) -> list[int]: ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import linkage

from icrf.errors import ConfigError
from icrf.registry import Registry
from icrf.topology.builders import inject, parameters_of

IntArray = np.ndarray[Any, np.dtype[np.int64]]
Grouping = Callable[..., Sequence[int]]

GROUPINGS: Registry[Grouping] = Registry("grouping")

# All distances between more clients would take over a gigabyte.
MAX_COMPARED = 10_000


def register_grouping(name: str) -> Callable[[Grouping], Grouping]:
    """Decorator: make a function known as `name` for ``group_by``."""
    return GROUPINGS.register(name)


def wants_labels(name: str) -> bool:
    """Whether a grouping looks at the data."""
    return "label_counts" in parameters_of(GROUPINGS, name)


def group_clients(name: str, num_clients: int, num_groups: int, parameters: Mapping[str, Any]) -> tuple[int, ...]:
    """The group of each client; group 0 is that of the first client, and so on in the order of first members.

    Args:
        name: a name of :data:`GROUPINGS` or ``module:attr``.
        parameters: what may be injected beside the two numbers.

    Raises:
        ConfigError: C010 or C017 about the name, C016 or C017 about its parameters, C008 more groups than clients, C018
            for an answer that cannot be used.
    """
    if num_groups > num_clients:
        raise ConfigError(
            "C008",
            f"number_of_groups {num_groups} > {num_clients} clients",
            place="number_of_groups",
            allowed=f"1 to {num_clients}",
        )
    arguments = inject(GROUPINGS, name, {**parameters, "num_clients": num_clients, "num_groups": num_groups})
    with GROUPINGS.calling(name):
        returned = GROUPINGS.get(name)(**arguments)
    found = _whole_numbers(name, returned)
    if len(found) != num_clients:
        raise _unusable(name, f"returned {len(found)} groups for {num_clients} clients")
    if strangers := sorted(set(found) - set(range(num_groups))):
        raise _unusable(name, f"returned group {strangers[0]}")
    if empty := sorted(set(range(num_groups)) - set(found)):
        raise _unusable(name, f"left group {empty[0]} empty")
    number = {group: k for k, group in enumerate(dict.fromkeys(found))}
    return tuple(number[group] for group in found)


def _whole_numbers(name: str, returned: Any) -> list[int]:
    """What a grouping has returned, as numbers; C018 for anything else."""
    try:
        found = np.asarray(returned)
    except ValueError:  # rows of different lengths
        found = np.empty((0, 0))
    if found.ndim != 1 or found.dtype.kind not in "iuf":
        raise _unusable(name, f"returned {type(returned).__name__}", repr(returned)[:80])
    for value in found[~(np.isfinite(found) & (found == np.floor(found)))]:
        raise _unusable(name, f"returned {value}")
    return [int(value) for value in found]


def _unusable(name: str, what: str, value: str | None = None) -> ConfigError:
    allowed = "a group per client, 0 to number_of_groups - 1, none of them empty"
    return ConfigError("C018", f"grouping '{name}' {what}", place=GROUPINGS.key, value=value, allowed=allowed)


@register_grouping("contiguous")
def contiguous(num_clients: int, num_groups: int) -> list[int]:
    """Clients in the order of their numbers, cut into groups whose sizes differ by one at most."""
    parts = np.array_split(np.arange(num_clients), num_groups)
    return [group for group, part in enumerate(parts) for _ in part]


@register_grouping("labels")
def labels(label_counts: IntArray, num_groups: int) -> list[int]:
    """Communities of clients with similar labels: agglomerative clustering by average linkage.

    The distance of two clients is that of Hellinger between their shares of labels. The two closest clusters are
    joined until `num_groups` are left, as Briggs et al. 2020 (arXiv 2004.11791) do with updates instead of labels.

    Raises:
        ConfigError: C008 for more than 10,000 clients.
    """
    num_clients = len(label_counts)
    if num_clients > MAX_COMPARED:
        raise ConfigError(
            "C008",
            f"group_by 'labels' compares all pairs of {num_clients} clients",
            place="group_by",
            allowed=f"at most {MAX_COMPARED} clients",
            hint="take contiguous, or a function of your own",
        )
    if num_clients == 1:
        return [0]
    shares = label_counts / label_counts.sum(axis=1, keepdims=True)
    # Rounded, so that distances which are equal on paper are equal: of those the first pair is joined first.
    joins = linkage(np.sqrt(shares).round(12), method="average")
    members: dict[int, list[int]] = {k: [k] for k in range(num_clients)}
    for step, (one, other, *_) in enumerate(joins[: num_clients - num_groups].tolist()):
        members[num_clients + step] = members.pop(int(one)) + members.pop(int(other))
    group = {node: k for k, nodes in enumerate(members.values()) for node in nodes}
    return [group[node] for node in range(num_clients)]
