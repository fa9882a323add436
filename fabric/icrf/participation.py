"""Who takes part in a round: a pure function of (seed, round, what the configuration says), never of where nodes live.

The mediator decides this for every attempt and writes it into the journal's rows, because the model of a round depends
on it. McMahan et al. (2017) draw max(C * K, 1) of K clients for each round and weight each by its samples over the
samples of all that were drawn; ``uniform`` is that draw. Code of a user's own is never run by the mediator: it is asked
on the user's machine when a federation is submitted, and its answers travel as the submission's schedule. What nodes
are active at all (:mod:`icrf.waves`, :mod:`icrf.criterion`) comes first: a share of the clients is a share of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from icrf.errors import ConfigError
from icrf.protocol import Submission, bitmap, nodes_that, sample_size
from icrf.registry import Registry
from icrf.seeds import stable_random_state
from icrf.waves import ALL, WAVES, Condition, Waves

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
        config: its configuration; the keys ``seed``, ``client_fraction``, ``sampled_clients``, ``activation`` and those
            of waves are read.
    """

    def __init__(self, submission: Submission, config: Mapping[str, Any]) -> None:
        self.clients = training(submission)
        self._num_nodes = len(submission.nodes)
        self._schedule = [bytes.fromhex(row) for row in submission.schedule]
        self._seed = int(config.get("seed") or 0)
        self._fraction, self._number = float(config.get("client_fraction") or 1.0), config.get("sampled_clients")
        self._waves = waves_of(config)

    @property
    def is_constant(self) -> bool:
        """Whether all that train take part in every round."""
        return self.draws and self.fewest(self.clients) == len(self.clients)

    @property
    def draws(self) -> bool:
        """Whether the participants are drawn, rather than chosen by a sampler of the user's own."""
        return not self._schedule

    def size(self, clients: Sequence[int]) -> int:
        """How many out of `clients` take part in a round; 0 of none."""
        return sample_size(len(clients), self._fraction, self._number) if clients else 0

    def fewest(self, clients: Sequence[int]) -> int:
        """How many out of `clients` take part in the round that has the fewest."""
        return self.size(self._active(1, clients))

    def note(self, number: int, metrics: Mapping[str, float]) -> None:
        """A round was committed with these metrics: what comes next may depend on them."""
        if self._waves is not None:
            self._waves.note(number, metrics)

    def _active(self, number: int, clients: Sequence[int]) -> Sequence[int]:
        """Those out of `clients` who are active in a round."""
        return clients if self._waves is None else clients[: self._waves.active(number)]

    def of_round(self, number: int, clients: Sequence[int] | None = None) -> bytes:
        """Bitmap of the nodes that train in a round; empty: all that have the role.

        All rounds before it have been noted.

        Args:
            clients: out of whom to draw, ascending; by default all that have the role.
        """
        if self._schedule:
            chosen = self._schedule[(number - 1) % len(self._schedule)]
            return b"" if chosen == bitmap(self.clients, self._num_nodes) else chosen
        among = self._active(number, self.clients if clients is None else tuple(clients))
        count = self.size(among)
        if count == len(self.clients):
            return b""
        return bitmap(draw(self._seed, number, among, count), self._num_nodes)


def draw(seed: int, number: int, among: Sequence[int], count: int) -> list[int]:
    """The `count` nodes that take part in round `number`, drawn out of `among`."""
    drawn = stable_random_state(seed, "participants", number).permutation(len(among))[:count]
    return [among[k] for k in drawn.tolist()]


def waves_of(config: Mapping[str, Any]) -> Waves | None:
    """The waves in which the nodes of a configuration become active; None where it has none."""
    if config.get("activation", ALL) != WAVES:
        return None
    text = config.get("wave_condition")
    return Waves(int(config["wave_size"]), int(config.get("wave_period") or 1), Condition.parse(text) if text else None)


def training(submission: Submission) -> tuple[int, ...]:
    """The nodes with the role ``train``, ascending."""
    return nodes_that("train", submission.nodes)


def schedule(
    sampler: str,
    node_ids: Sequence[str],
    active: Sequence[Sequence[int]],
    size: Callable[[int], int],
    seed: int,
) -> tuple[str, ...]:
    """Who takes part in each round out of the nodes that are active in it; a sampler of the user's own is asked.

    Args:
        sampler: ``uniform``, or registered name or ``module:attr`` of a :data:`Sampler`.
        node_ids: all nodes.
        active: the nodes that may take part in rounds 1, 2, ..., indices, ascending.
        size: how many are wanted out of so many.

    Returns:
        A bitmap in hexadecimal per round.

    Raises:
        ConfigError: C010 for an unknown name, C017 for code that cannot be loaded or that raises, C018 for an answer
            that cannot be used.
    """
    if sampler == UNIFORM:
        drawn_rows = (draw(seed, number, among, size(len(among))) for number, among in enumerate(active, start=1))
        return tuple(bitmap(row, len(node_ids)).hex() for row in drawn_rows)
    choose = SAMPLERS.get(sampler)
    rows = []
    for number, among in enumerate(active, start=1):
        index = {node_ids[i]: i for i in among}
        with SAMPLERS.calling(sampler, f"for round {number}"):
            drawn = choose(number, list(index), size(len(index)), stable_random_state(seed, sampler, number))
            found = [str(name) for name in drawn]
        strangers = [name for name in found if name not in index]
        if strangers or not found:
            raise _unusable(
                sampler, number, f"chose '{strangers[0]}', which does not train in it" if found else "chose nobody"
            )
        rows.append(bitmap([index[name] for name in found], len(node_ids)).hex())
    return tuple(rows)


def _unusable(sampler: str, number: int, what: str) -> ConfigError:
    return ConfigError(
        "C018",
        f"sampler '{sampler}' {what} for round {number}",
        place="client_sampler",
        allowed="ids out of those that it was given, at least one",
    )
