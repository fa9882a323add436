"""Letters between clusters, each applied once and in order: the delivery state machine of one run on one cluster. Pure.

A letter is numbered by its sender and belongs to an attempt of a round. It stays with the sending cluster until the
receiving one has said that it has it, and is sent again until then; so it may arrive twice, late, or after letters that
were sent behind it. The receiving cluster keeps it once, and opens it when its round has been committed, in the order
of (sender, number). Whoever loses what it held has the attempt voided, and its letters are written again in the next
one: a letter of an attempt that is over, or void, is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

Position = tuple[int, int]
"""Round and attempt."""


@dataclass(frozen=True)
class Letter:
    """One user message on its way: sender index (-1: the supervisor), its sequence number, and the encoded message."""

    sender: int
    sequence: int
    message: bytes


Addressed = tuple[Letter, tuple[int, ...]]
"""A letter and the indices of its recipients."""

Outgoing = tuple[int, tuple[int, ...], bytes]
"""An encoded message that has no number yet: its sender, the recipients, and the message."""


class Delivery:
    """What one cluster holds of a run's letters.

    Attributes:
        position: the newest attempt that was begun.
    """

    def __init__(self) -> None:
        self.position: Position = (0, 0)
        self._void: set[Position] = set()
        self._staged: dict[Position, dict[tuple[int, int], Addressed]] = {}
        # By cluster, each with its number on that edge, which only grows.
        self._outbox: dict[Position, dict[int, dict[int, Addressed]]] = {}
        self._numbers: Counter[int] = Counter()

    def is_void(self, position: Position) -> bool:
        """Whether an attempt was aborted."""
        return position in self._void

    def is_open(self, position: Position) -> bool:
        """Whether letters of an attempt count: it is the present one, or one to come."""
        return position >= self.position and position not in self._void

    # ------------------------------------------------------------ sending

    def post(self, position: Position, cluster: int, letter: Letter, recipients: Sequence[int]) -> None:
        """A letter for nodes of another cluster, by that cluster's index."""
        self._numbers[cluster] += 1
        edge = self._outbox.setdefault(position, {}).setdefault(cluster, {})
        edge[self._numbers[cluster]] = (letter, tuple(recipients))

    def pending(self, position: Position) -> dict[int, tuple[int, list[Addressed]]]:
        """What is not acknowledged yet: for each cluster's index the number of its last letter, and the letters."""
        posted = self._outbox.get(position, {})
        return {cluster: (max(edge), list(edge.values())) for cluster, edge in sorted(posted.items()) if edge}

    def acknowledge(self, position: Position, cluster: int, number: int) -> None:
        """A cluster has everything up to that number; saying it twice, or late, is harmless."""
        edge = self._outbox.get(position, {}).get(cluster, {})
        for known in [n for n in edge if n <= number]:
            del edge[known]

    # ------------------------------------------------------------ receiving

    def stage(self, position: Position, letter: Letter, recipients: Sequence[int]) -> bool:
        """Keep a letter until its round has been committed; False if it is here already."""
        letters = self._staged.setdefault(position, {})
        key = (letter.sender, letter.sequence)
        known = key in letters
        letters.setdefault(key, (letter, tuple(recipients)))
        return not known

    def staged(self, number: int) -> list[Addressed]:
        """What a committed round has left here, in order, before the next one opens it."""
        attempts = [position for position in self._staged if position[0] == number]
        letters = self._staged[max(attempts)] if attempts else {}
        return [letters[key] for key in sorted(letters)]

    # ------------------------------------------------------------ rounds

    def begin(self, position: Position) -> list[Addressed]:
        """A newer attempt opens; returns what the rounds before it have left for its nodes, in order.

        Only the last attempt of a round can have been committed; the letters of the others vanish.
        """
        opened: list[Addressed] = []
        for number in sorted({p[0] for p in self._staged if p[0] < position[0]}):
            opened += self.staged(number)
        for held in (self._staged, self._outbox):
            for stale in [p for p in held if p < position]:
                del held[stale]
        self.position = position
        self._void = {p for p in self._void if p >= position}
        return opened

    def abort(self, position: Position) -> None:
        """Void an attempt: nothing of it is accepted or kept."""
        self._void.add(position)
        self._staged.pop(position, None)
        self._outbox.pop(position, None)
