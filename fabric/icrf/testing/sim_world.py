"""The world of a simulation: one clock, one source of randomness, one queue of pending things. Nothing else moves.

Whatever happens is a pending thing with a time; the seed decides the times, hence the order. The same seed gives the
same history, step by step.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

from icrf_mediator.effects import Now

T = TypeVar("T")

WALL_EPOCH_S = 1_700_000_000.0
TRACE_STEPS = 60


class SimulationFailed(AssertionError):
    """An invariant does not hold; the text says which, how to repeat the seed, and what happened last."""


@dataclass(frozen=True)
class Odds:
    """How likely each fault is under one seed.

    Attributes:
        budget: faults until the world heals for good.
        gap_s: mean time between two faults that strike from outside.
        weights: how likely each kind of these is.
        at_effect: chance that the mediator dies at one point between two effects.
        answer_lost: chance that the answer to a user is lost.
        drop: chance that a payload, or its acknowledgement, is lost.
        duplicate: chance that a payload comes again later.
        linger: chance that reports of a broken connection still arrive.
        slow: chance that a step takes much longer than usual.
    """

    budget: int
    gap_s: float
    weights: tuple[float, ...]
    at_effect: float
    answer_lost: float
    drop: float
    duplicate: float
    linger: float
    slow: float

    @classmethod
    def draw(cls, rng: random.Random, kinds: int) -> Odds:
        """Some seeds see no fault, some one kind only, some everything at once."""
        weights = [rng.choice((0.0, 0.2, 1.0)) for _ in range(kinds)]
        weights[rng.randrange(kinds)] += 1.0
        return cls(
            budget=rng.choice((0, 1, 2, 3, 4, 6, 8, 10)),
            gap_s=rng.choice((1.0, 4.0, 10.0, 30.0)),
            weights=tuple(weights),
            at_effect=rng.choice((0.0, 0.0, 0.005, 0.03)),
            answer_lost=rng.choice((0.0, 0.3)),
            drop=rng.choice((0.0, 0.05, 0.3)),
            duplicate=rng.choice((0.0, 0.1, 0.5)),
            linger=rng.choice((0.0, 0.5, 1.0)),
            slow=rng.choice((0.0, 0.05)),
        )


@dataclass(order=True)
class _Pending:
    at_s: float
    order: int
    what: Any = field(compare=False)
    action: Callable[[], None] = field(compare=False)


class World:
    """Time, chance and what is pending.

    Args:
        seed: decides everything.
        kinds: number of kinds of faults that strike from outside.
        echo: print every step as it is taken.
    """

    def __init__(self, seed: int, kinds: int, echo: bool = False) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.odds = Odds.draw(self.rng, kinds)
        self.budget = self.odds.budget
        self.now_s = 0.0
        self.steps = 0
        self.faults: Counter[str] = Counter()
        self.repeat = f"simulate({seed}, trace=True)"
        self._wall_shift_s = 0.0
        self._queue: list[_Pending] = []
        self._order = 0
        self._echo = echo
        self._trace: deque[tuple[float, Any]] = deque(maxlen=TRACE_STEPS)

    def concentrate(self, weights: Sequence[float], gap_s: float = 3.0) -> None:
        """Many faults from outside, of the kinds with a weight only, in this mean distance."""
        self.odds = replace(self.odds, weights=tuple(weights), budget=10, gap_s=gap_s, at_effect=0.0)
        self.budget = self.odds.budget

    # ------------------------------------------------------------ time

    def now(self) -> Now:
        """The time as the mediator's shell sees it; the wall clock jumps where a fault moved it."""
        return Now(self.now_s, WALL_EPOCH_S + self.now_s + self._wall_shift_s)

    def shift_wall_clock(self, by_s: float) -> None:
        """The wall clock of the mediator jumps; nothing but what is shown may depend on it."""
        self._wall_shift_s += by_s

    def at(self, time_s: float, what: Any, action: Callable[[], None]) -> None:
        """Do `action` at a time; things of equal times keep their order."""
        self._order += 1
        heapq.heappush(self._queue, _Pending(max(time_s, self.now_s), self._order, what, action))

    def after(self, delay_s: float, what: Any, action: Callable[[], None]) -> None:
        """Do `action` after a delay."""
        self.at(self.now_s + delay_s, what, action)

    def soon(self, low_s: float, high_s: float, what: Any, action: Callable[[], None]) -> None:
        """Do `action` after a random delay."""
        self.after(self.rng.uniform(low_s, high_s), what, action)

    def work_s(self, low_s: float, high_s: float) -> float:
        """How long some work takes; now and then far longer than usual."""
        taken_s = self.rng.uniform(low_s, high_s)
        return taken_s * 30.0 if self.chance(self.odds.slow) else taken_s

    def step(self) -> None:
        """The next pending thing happens."""
        pending = heapq.heappop(self._queue)
        self.now_s = pending.at_s
        self.steps += 1
        if pending.what is not None:
            self.log(pending.what)
        pending.action()

    # ------------------------------------------------------------ chance

    @property
    def healed(self) -> bool:
        """Whether no more faults come."""
        return self.budget <= 0

    def heal(self) -> None:
        """From now on no fault comes."""
        self.budget = 0

    def chance(self, probability: float) -> bool:
        """Whether something small goes wrong; never after the world has healed."""
        return not self.healed and probability > 0.0 and self.rng.random() < probability

    def fault(self, kind: str, probability: float = 1.0) -> bool:
        """Whether a fault of this kind strikes here; one that does is taken from the budget."""
        if self.healed or (probability < 1.0 and self.rng.random() >= probability):
            return False
        self.budget -= 1
        self.faults[kind] += 1
        self.log(("fault", kind))
        return True

    def pick(self, items: Sequence[T]) -> T:
        """One of them."""
        return self.rng.choice(items)

    # ------------------------------------------------------------ trace

    def log(self, what: Any) -> None:
        """Note a step; shown when the seed fails."""
        self._trace.append((self.now_s, what))
        if self._echo:
            print(_line(self.now_s, what))  # noqa: T201 - asked for by the caller

    def trace(self) -> str:
        """The last steps, one a line."""
        return "\n".join(_line(at_s, what) for at_s, what in self._trace)

    def fail(self, text: str) -> None:
        """An invariant is broken."""
        raise SimulationFailed(
            f"seed {self.seed}: {text}\n"
            f"repeat: icrf.testing.simulation.{self.repeat}  (step {self.steps}, "
            f"{self.now_s:.1f} s, faults {dict(self.faults)})\n{self.trace()}"
        )


class Pipe:
    """One direction of a connection: keeps the order of what goes in."""

    def __init__(self, world: World) -> None:
        self._world, self._clear_s = world, 0.0

    def carry(self, what: Any, action: Callable[[], None]) -> None:
        """Do `action` at the other end."""
        self._clear_s = max(self._clear_s, self._world.now_s + self._world.rng.uniform(0.001, 0.08))
        self._world.at(self._clear_s, what, action)

    def stall(self, for_s: float) -> None:
        """Hold back whatever goes in from now on."""
        self._clear_s = max(self._clear_s, self._world.now_s) + for_s


# ---------------------------------------------------------------- how steps are shown

_HIDDEN = frozenset(
    {"config_json", "nodes", "graph", "layout", "capacity", "fingerprint", "labels", "protocol_version"}
    | {"software_version", "federation", "resources", "num_elements", "dtype", "peers", "code_path"}
)


def _line(at_s: float, what: Any) -> str:
    parts = what if isinstance(what, tuple) else (what,)
    return f"{at_s:9.3f}  " + " ".join(_brief(part) for part in parts)


def _brief(value: Any) -> str:
    if is_dataclass(value) and not isinstance(value, type):
        shown = [
            f"{f.name}={_brief(getattr(value, f.name))}"
            for f in fields(value)
            if f.name not in _HIDDEN and getattr(value, f.name) not in ("", 0, (), b"", {}, None)
        ]
        return f"{type(value).__name__}({', '.join(shown)})"
    if isinstance(value, bytes):
        return value.hex()[:16]
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."
