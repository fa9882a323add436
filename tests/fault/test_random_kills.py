"""The mediator dies at random, again and again, during one run: it gets through, with bounded state."""

from __future__ import annotations

import random
import time

import pytest

from icrf.protocol import COMPLETED

from .bench import Bench, Watch, federation

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

NUM_ROUNDS, NUM_KILLS = 60, 20
JOURNAL_LIMIT_BYTES = 16 << 20
# Two durable checkpoints are kept, one may be under way, each with at most one artifact per cluster.
ARTIFACT_LIMIT = 3 * 2


def test_twenty_random_kills_in_sixty_rounds(bench: Bench) -> None:
    environment, config = bench.environment, federation("star", NUM_ROUNDS)
    expected = bench.reference(config)
    environment.wait_ready()
    environment.arm("")
    dice = random.Random(2)
    with environment.connect() as fabric:
        watch = Watch(fabric.submit(config))
        for kill in range(NUM_KILLS):
            # Random moments, but each within a life that has committed something: this tests safety, not luck.
            reached = watch.num_rounds
            deadline = time.monotonic() + 60.0
            while watch.num_rounds <= reached and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(dice.uniform(0.0, 0.3))
            assert watch.num_rounds < NUM_ROUNDS, f"the run was over after {kill} kills"
            environment.mediator.kill()
            environment.mediator.wait_ready(supervised=True)
        found = watch.outcome(600.0)
    assert found.info.status == COMPLETED, f"{found.info.error_json}\n{environment.tails(25)}"
    assert found.hashes() == expected.hashes()
    state = environment.folder / "mediator"
    assert sum(path.stat().st_size for path in state.glob("journal.db*")) < JOURNAL_LIMIT_BYTES
    artifacts = [path.name for path in (state / "blobs" / found.info.run_id).glob("checkpoint*")]
    assert len(artifacts) <= ARTIFACT_LIMIT, artifacts
