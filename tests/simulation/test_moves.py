"""Long histories of runs whose nodes move: to clusters that come, and away from those that are lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from icrf.protocol import ClusterInfo
from icrf.testing.simulation import SimulationFailed, simulate
from icrf_mediator.checkpoints import Checkpoints
from icrf_mediator.moves import Moves
from icrf_mediator.placement import Placement
from icrf_mediator.run_base import RunBase
from icrf_mediator.run_setup import RunSetup

MUST_CATCH_WITHIN = 100
GAP_S = 25.0


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often nodes moved by choice, and because of a loss."""
    found: Counter[str] = Counter()
    original = RunSetup.move

    def move(run: RunSetup, *arguments: Any) -> None:
        found["choice" if run.by_choice else "loss"] += 1
        original(run, *arguments)

    monkeypatch.setattr(RunSetup, "move", move)
    yield found


def histories(*kinds: str, seeds: int = MUST_CATCH_WITHIN, crowded: bool = False) -> None:
    for seed in range(seeds):
        simulate(seed, kinds=kinds, gap_s=GAP_S, moving=True, crowded=crowded)


@pytest.mark.parametrize(
    "kinds",
    [
        ("line is cut", "agent dies", "mediator is killed"),
        ("agent drains", "cluster dies", "host dies", "manager dies"),
        ("line is cut", "payloads are cut", "reports stall", "report is replayed", "mediator is paused"),
    ],
    ids=lambda kinds: kinds[0],
)
def test_runs_whose_nodes_move_end_as_without_faults(kinds: tuple[str, ...], moved: Counter[str]) -> None:
    histories(*kinds, seeds=15)
    assert moved["choice"] > 5 and moved["loss"] > 5


def test_they_do_so_where_other_programs_take_the_slots(moved: Counter[str]) -> None:
    histories("line is cut", "mediator is killed", seeds=10, crowded=True)
    assert moved["choice"] > 2 and moved["loss"] > 2


def caught(*kinds: str) -> str:
    """The first violation."""
    with pytest.raises(SimulationFailed) as failure:
        histories(*kinds)
    assert "moving=True" in str(failure.value)
    return str(failure.value).splitlines()[0]


def wrap(patch: pytest.MonkeyPatch, owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by one that is handed the original first."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: around(original, *args, **kwargs))


def test_a_mediator_that_forgets_where_states_were_kept_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_the_same_name(original: Any, self: Checkpoints, number: int, placement: Any, submission: Any) -> Any:
        kept = self.durable.get(number, {})
        return {name: (kept[name],) if name in kept else () for name in placement.clusters}

    wrap(monkeypatch, Checkpoints, "parts", of_the_same_name)
    assert "I12" in caught("line is cut")


def test_a_mediator_that_moves_pinned_nodes_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icrf_mediator.planning.resolve_pins", lambda placement, ids, clusters: {})
    assert "I4" in caught("line is cut")


def test_a_mediator_that_leaves_reservations_behind_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunBase, "has_left", lambda self, cluster: self.terminal)
    assert "I11" in caught("line is cut", "agent dies")


def test_a_mediator_that_gives_up_what_it_has_not_heard_of_yet_wastes_no_round(moved: Counter[str]) -> None:
    """A mediator that was restarted waits a lease for clusters to come back before their nodes move."""
    for seed in range(12):
        simulate(seed, kinds=("mediator is killed",), gap_s=60.0, moving=True)
    assert moved["loss"] <= moved["choice"]


def test_a_move_into_what_is_still_being_released_never_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    withheld: list[str] = []

    def fit(original: Any, run: Any, cluster: ClusterInfo) -> bool:
        if cluster.name not in run.clusters and run.holds(cluster.name):
            withheld.append(cluster.name)
        return bool(original(run, cluster))

    def move(original: Any, run: RunSetup, effects: Any, now: Any, placement: Placement) -> None:
        new = set(placement.clusters) - set(run.clusters)
        assert not {cluster for cluster in new if run.holds(cluster)}
        original(run, effects, now, placement)

    original = Moves._is_fit
    monkeypatch.setattr(Moves, "_is_fit", staticmethod(lambda run, cluster: fit(original, run, cluster)))
    wrap(monkeypatch, RunSetup, "move", move)
    histories("line is cut", "agent drains", seeds=12)
    assert withheld
