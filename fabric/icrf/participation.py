"""Who takes part in a round: a pure function of (seed, round, what the configuration says), never of where nodes live.

The mediator decides this for every attempt and writes it into the journal's rows, because the model of a round depends
on it. McMahan et al. (2017) draw max(C * K, 1) of K clients for each round and weight each by its samples over the
samples of all that were drawn; ``uniform`` is that draw. Code of a user's own is never run by the mediator: it is asked
on the user's machine when a federation is submitted, and its answers travel as the submission's schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from icrf.errors import ConfigError
from icrf.protocol import Submission, bitmap, nodes_that, sample_size
from icrf.registry import Registry
from icrf.seeds import stable_random_state

UNIFORM = "uniform"

Sampler = Callable[[int, Sequence[str], int, np.random.RandomState], Sequence[str]]
"""``(round, ids of the nodes that train, how many are wanted, random numbers of this round) -> ids that take part``.

Rounds count from 1; ids come in node order. It may return more or fewer than wanted, but somebody.
"""

SAMPLERS: Registry[Sampler] = Registry("sampler")


def register_sampler(name: str) -> Callable[[Sampler], Sampler]:
    """Decorator: make a :data:`Sampler` known as `name` for ``client_sampler``."""
    return SAMPLERS.register(name)


class Participation:
    """The rule of one federation.

    Args:
        submission: its nodes and its schedule.
        config: its configuration; the keys ``seed``, ``client_fraction`` and ``sampled_clients`` are read.
    """

    def __init__(self, submission: Submission, config: Mapping[str, Any]) -> None:
        self.clients = training(submission)
        self._num_nodes = len(submission.nodes)
        self._schedule = [bytes.fromhex(row) for row in submission.schedule]
        self._seed = int(config.get("seed") or 0)
        self._fraction, self._number = float(config.get("client_fraction") or 1.0), config.get("sampled_clients")

    @property
    def is_constant(self) -> bool:
        """Whether all that train take part in every round."""
        return self.draws and self.size(self.clients) == len(self.clients)

    @property
    def draws(self) -> bool:
        """Whether the participants are drawn, rather than chosen by a sampler of the user's own."""
        return not self._schedule

    def size(self, clients: Sequence[int]) -> int:
        """How many out of `clients` take part in a round; 0 of none."""
        return sample_size(len(clients), self._fraction, self._number) if clients else 0

    def of_round(self, number: int, clients: Sequence[int] | None = None) -> bytes:
        """Bitmap of the nodes that train in a round; empty: all that have the role.

        Args:
            clients: out of whom to draw, ascending; by default all that have the role.
        """
        if self._schedule:
            chosen = self._schedule[(number - 1) % len(self._schedule)]
            return b"" if chosen == bitmap(self.clients, self._num_nodes) else chosen
        among = self.clients if clients is None else tuple(clients)
        count = self.size(among)
        if count == len(self.clients):
            return b""
        drawn = stable_random_state(self._seed, "participants", number).permutation(len(among))[:count]
        return bitmap([among[k] for k in drawn.tolist()], self._num_nodes)


def training(submission: Submission) -> tuple[int, ...]:
    """The nodes with the role ``train``, ascending."""
    return nodes_that("train", submission.nodes)


def schedule(
    sampler: str, node_ids: Sequence[str], clients: Sequence[int], count: int, rounds: int, seed: int
) -> tuple[str, ...]:
    """Ask a sampler of the user's own who takes part in rounds 1 to `rounds`.

    Args:
        sampler: registered name or ``module:attr`` of a :data:`Sampler`.
        node_ids: all nodes.
        clients: indices of those that train.
        count: how many are wanted.

    Returns:
        A bitmap in hexadecimal per round.

    Raises:
        ConfigError: C010 for an unknown name, C017 for code that cannot be loaded or that raises, C018 for an answer
            that cannot be used.
    """
    choose = SAMPLERS.get(sampler)
    index = {node_ids[i]: i for i in clients}
    rows = []
    for number in range(1, rounds + 1):
        with SAMPLERS.calling(sampler, f"for round {number}"):
            drawn = choose(number, list(index), count, stable_random_state(seed, sampler, number))
            found = [str(name) for name in drawn]
        strangers = [name for name in found if name not in index]
        if strangers or not found:
            raise _unusable(
                sampler, number, f"chose '{strangers[0]}', which does not train" if found else "chose nobody"
            )
        rows.append(bitmap([index[name] for name in found], len(node_ids)).hex())
    return tuple(rows)


def _unusable(sampler: str, number: int, what: str) -> ConfigError:
    return ConfigError(
        "C018",
        f"sampler '{sampler}' {what} for round {number}",
        place="client_sampler",
        allowed="ids of nodes that train, at least one",
    )
