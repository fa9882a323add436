"""What the fault tests share: federations, watchers of runs, and the comparison with the undisturbed run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from icrf.client import Run
from icrf.protocol import COMPLETED, RECOVERING, RoundResult, RunEvent, RunInfo
from icrf.spec import FederationConfig
from icrf.testing import FabricEnvironment

RUN_LIMIT_S = 180.0
NUM_ROUNDS = 5


def federation(flow: str, num_rounds: int = NUM_ROUNDS) -> FederationConfig:
    """A small federation over both clusters: ``star`` or ``ring``."""
    schema = "TraditionalFederatedLearning" if flow == "star" else "DecentralizedFederatedLearning"
    return FederationConfig.from_mapping(
        {
            "federation_id": f"fault-{flow}",
            "schema": schema,
            "federated_learning_topology": flow,
            "number_of_clients": 6,
            "federated_learning_rounds": num_rounds,
            "number_of_epochs": 4,
            "learning_rate": 0.1,
            "momentum": 0.9,
            "checkpoint_every": 2,
            "seed": 7,
        }
    )


@dataclass
class Outcome:
    """What the user of a run saw; times are wall-clock seconds at which an event came in."""

    info: RunInfo
    events: list[tuple[float, RunEvent]]

    @property
    def rounds(self) -> list[RoundResult]:
        return [event.round for _, event in self.events if event.round is not None]

    @property
    def texts(self) -> list[str]:
        return [event.text for _, event in self.events]

    def hashes(self) -> list[tuple[int, str]]:
        """(round, hash) of every commit, in the order in which they were told."""
        return [(r.number, r.model_sha256) for r in self.rounds]

    def saw(self, text: str) -> bool:
        return any(text in seen for seen in self.texts)

    def detected_s(self, since: float) -> float | None:
        """Seconds until the user was told that something is wrong; None if nothing was."""
        for at, event in self.events:
            if at >= since and (event.kind == "warning" or event.status == RECOVERING):
                return at - since
        return None

    def recovered_s(self, since: float) -> float:
        """Seconds until the first round after the user was told of it (else after the fault), or the end."""
        told = since + (self.detected_s(since) or 0.0)
        return next(at - since for at, event in self.events if at >= told and (event.round or event.kind == "end"))


class Watch:
    """Follows a run in a thread, so that the test can do harm meanwhile."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._events: list[tuple[float, RunEvent]] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._follow, name=f"watch-{run.id[:8]}", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        try:
            for event in self._run.events():
                self._events.append((time.time(), event))
        except BaseException as error:  # noqa: BLE001 - it is the test's to judge
            self._error = error

    @property
    def num_rounds(self) -> int:
        return sum(event.round is not None for _, event in list(self._events))

    def outcome(self, limit_s: float = RUN_LIMIT_S) -> Outcome:
        """Wait for the end."""
        self._thread.join(limit_s)
        seen = "\n".join(
            f"{at:.2f} {e.kind} {e.status} {e.text} {e.round.number if e.round else ''}" for at, e in self._events
        )
        assert not self._thread.is_alive(), f"the run did not end within {limit_s:.0f} s; the user saw\n{seen}"
        if self._error is not None:
            raise AssertionError(f"watching failed; the user saw\n{seen}") from self._error
        return Outcome(self._run.info(), self._events)


@dataclass
class Bench:
    """The fabric under test and what undisturbed runs on it gave."""

    environment: FabricEnvironment
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)
    _references: dict[str, Outcome] = field(default_factory=dict)

    def reference(self, config: FederationConfig) -> Outcome:
        """The undisturbed run of `config`, made once."""
        key = config.to_json()
        if key not in self._references:
            self.environment.arm("")
            with self.environment.connect() as fabric:
                found = Watch(fabric.submit(config)).outcome()
            assert found.info.status == COMPLETED, f"{found.info.error_json}\n{self.environment.tails()}"
            self._references[key] = found
        return self._references[key]

    def disturbed(
        self,
        config: FederationConfig,
        points: str,
        harm: Callable[[], None] | None = None,
        limit_s: float = RUN_LIMIT_S,
    ) -> Outcome:
        """A run of `config` with fail-points and, once it is submitted, `harm`. Checks that it is as if nothing was."""
        expected = self.reference(config)
        self.environment.wait_ready()
        self.environment.arm(points)
        with self.environment.connect() as fabric:
            watch = Watch(fabric.submit(config))
            try:
                if harm is not None:
                    harm()
                found = watch.outcome(limit_s)
            except BaseException as error:
                error.add_note(self.environment.tails(25))
                raise
        self.environment.wait_ready()
        assert found.info.status == COMPLETED, f"{found.info.error_json}\n{self.environment.tails(25)}"
        assert self.environment.fired() == sorted(p.removesuffix("!hold") for p in points.split(",")), "not fired"
        assert found.hashes() == expected.hashes(), "rounds differ from the undisturbed run"
        assert found.info.model_sha256 == expected.info.model_sha256
        return found

    def measured(self, what: str, outcome: Outcome, since: float, saw: str) -> None:
        """Keep a row of the table of measured recoveries."""
        detected = outcome.detected_s(since)
        shown = "not at all" if detected is None else f"{detected:.1f} s"
        self.rows.append((what, saw, shown, f"{outcome.recovered_s(since):.1f} s"))


def fired_at(environment: FabricEnvironment, point: str) -> float:
    """Wall-clock time at which a fail-point fired."""
    return (environment.folder / "failpoints" / point).stat().st_mtime
