"""Nodes that are active in the rounds in which a criterion of the user's own names them.

A criterion is a function that declares what it decides by as parameters; they are injected by name::

    @icrf.register_criterion("by_night")
    def by_night(round_number, node_ids):
        return [node_id for k, node_id in enumerate(node_ids) if (round_number + k) % 3 == 0]

================  =============================================================================
``round_number``  from 1 on
``node_ids``      the names of the nodes that train, in node order
``roles``         theirs, such as ``train-eval-test``
``num_samples``   how many training samples they were dealt, int64, shape (len(node_ids),)
``random_state``  a ``numpy.random.RandomState`` that depends on seed and round alone
================  =============================================================================

and any key of the configuration, such as ``placement`` with the labels that nodes are pinned to. It returns names, or
for each of `node_ids` whether it is active; somebody must be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from icrf.errors import ConfigError
from icrf.protocol import NodeSpec, nodes_that
from icrf.registry import Registry
from icrf.seeds import stable_random_state
from icrf.topology.builders import inject

Criterion = Callable[..., Any]

CRITERIA: Registry[Criterion] = Registry("criterion")
_NUM_SAMPLES = "num_samples"


def register_criterion(name: str) -> Callable[[Criterion], Criterion]:
    """Decorator: make a criterion, see :mod:`icrf.criterion`, known as `name` for ``activation``."""
    return CRITERIA.register(name)


def active_by_round(
    criterion: str,
    nodes: Sequence[NodeSpec],
    num_samples: Callable[[], np.ndarray[Any, np.dtype[np.int64]]],
    parameters: Mapping[str, Any],
) -> list[tuple[int, ...]]:
    """Ask a criterion which nodes are active in each round.

    Args:
        criterion: registered name or ``module:attr``.
        nodes: all nodes of the federation; those without the role ``train`` are not asked about.
        num_samples: makes the sample counts of all of them, shape (len(nodes),); called if the criterion wants them.
        parameters: the keys of the configuration; ``federated_learning_rounds`` and ``seed`` are read.

    Returns:
        Node indices, ascending, for rounds 1, 2, ...

    Raises:
        ConfigError: C010 for an unknown name, C016 or C017 about its parameters, C017 for code that cannot be loaded or
            that raises, C018 for an answer that cannot be used.
    """
    trains = list(nodes_that("train", nodes))
    index = {nodes[i].id: i for i in trains}
    facts: dict[str, Any] = {**parameters, "node_ids": tuple(index), "roles": tuple(nodes[i].role for i in trains)}
    of_round = ("round_number", "random_state")
    asked = inject(CRITERIA, criterion, {**facts, **dict.fromkeys((*of_round, _NUM_SAMPLES), 0)})
    if _NUM_SAMPLES in asked:
        counts = num_samples()[trains]
        counts.setflags(write=False)
        facts[_NUM_SAMPLES] = counts
    facts = {name: facts[name] for name in asked if name not in of_round}
    decide = CRITERIA.get(criterion)
    rows = []
    for number in range(1, parameters["federated_learning_rounds"] + 1):
        state = stable_random_state(parameters["seed"], criterion, number)
        here = {name: value for name, value in zip(of_round, (number, state), strict=True) if name in asked}
        with CRITERIA.calling(criterion, f"for round {number}"):
            found = list(decide(**facts, **here))
        rows.append(_answer(criterion, number, found, index))
    return rows


def _answer(criterion: str, number: int, found: Sequence[Any], index: Mapping[str, int]) -> tuple[int, ...]:
    """The nodes that an answer names, ascending; C018 if it cannot be used."""
    if len(found) == len(index) and all(isinstance(part, bool | np.bool_) for part in found):
        found = [name for name, active in zip(index, found, strict=True) if active]
    strangers = [name for name in found if not isinstance(name, str) or name not in index]
    if strangers or not found:
        what = f"named {strangers[0]!r}, which does not train" if strangers else "named nobody"
        raise ConfigError(
            "C018",
            f"criterion '{criterion}' {what} for round {number}",
            place=CRITERIA.key,
            allowed="ids of nodes that train, at least one, or a truth value for each of them",
        )
    return tuple(sorted({index[name] for name in found}))
