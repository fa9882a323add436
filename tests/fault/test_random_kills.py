"""The mediator dies at random, again and again, during one run: it gets through, with bounded state."""

from __future__ import annotations

import random

import pytest

from .bench import Bench, federation

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

NUM_ROUNDS, NUM_KILLS = 60, 20
PHASES = ("train", "exchange", "aggregate", "commit")
JOURNAL_LIMIT_BYTES = 16 << 20
# Two durable checkpoints are kept, one may be under way, each with at most one artifact per cluster.
ARTIFACT_LIMIT = 3 * 2


def test_twenty_random_kills_in_sixty_rounds(bench: Bench) -> None:
    environment = bench.environment
    dice = random.Random(2)
    # Fail-points and not moments: rounds are short, and a life that begins may commit a dozen before it is noticed.
    points = [f"mediator@{dice.choice(PHASES)}:{n}" for n in sorted(dice.sample(range(1, NUM_ROUNDS + 1), NUM_KILLS))]
    lives = environment.mediator.starts
    found = bench.disturbed(federation("star", NUM_ROUNDS), ",".join(points), limit_s=600.0)
    assert environment.mediator.starts == lives + NUM_KILLS
    state = environment.folder / "mediator"
    assert sum(path.stat().st_size for path in state.glob("journal.db*")) < JOURNAL_LIMIT_BYTES
    artifacts = [path.name for path in (state / "blobs" / found.info.run_id).glob("checkpoint*")]
    assert len(artifacts) <= ARTIFACT_LIMIT, artifacts
