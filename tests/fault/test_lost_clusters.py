"""A cluster of three is lost for good: its nodes go to the others, and the old owner that comes back is fenced."""

from __future__ import annotations

import pytest

from icrf.protocol import COMPLETED
from icrf.spec import FederationConfig
from icrf.testing import FabricEnvironment
from icrf.testing.waiting import until

from .bench import RUN_LIMIT_S, Watch, federation

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("flow", ["star", "ring"])
def test_nodes_of_a_lost_cluster_go_to_the_others_with_the_same_bits(flow: str) -> None:
    keeps = {"keep_optimizer_state": True} if flow == "ring" else {}
    config = FederationConfig.from_mapping({**federation(flow).model_dump(), **keeps, "on_cluster_loss": "reassign"})
    with FabricEnvironment(3, slots=1) as environment, environment.connect() as fabric:
        undisturbed = Watch(fabric.submit(config)).outcome(RUN_LIMIT_S)
        homes = fabric.plan(config).assignment
        # The one that makes the model.
        lost = homes["server" if flow == "star" else "client_0"]
        name = f"agent-{lost}@train:4"
        environment.arm(f"{name}!hold")
        watch = Watch(fabric.submit(config))
        environment.await_fired(name, RUN_LIMIT_S)
        environment.agents[lost].kill()
        outcome = watch.outcome(RUN_LIMIT_S)
        assert outcome.info.status == COMPLETED, outcome.texts
        assert outcome.saw(f"nodes move: {lost} -> ") and lost not in outcome.info.clusters
        assert outcome.hashes() == undisturbed.hashes()
        assert outcome.info.model_sha256 == undisturbed.info.model_sha256
        # Its hosts have lived on, as nobody could tell them.
        environment.agents[lost].start()
        environment.wait_ready()
        until(lambda: not environment.actor_pids(lost, "host"), RUN_LIMIT_S)
