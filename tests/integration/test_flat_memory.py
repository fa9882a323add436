"""A thousand rounds on two real Ray clusters: no process and no object store is fuller for them.

References to payloads are owned by a round and freed with it, whatever holds them: hosts, topology managers, gateways.
What may grow are the records of the rounds, a few kilobytes each in the mediator and its agents.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from icrf.federation.base import FederatedBase
from icrf.spec import FederationConfig
from icrf.testing import FabricEnvironment
from icrf.testing.processes import private_bytes
from icrf_agent.keeper import STATE_NAME, ray_environment

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

EARLY, LATE = 200, 1000
# Of one process from the early to the late look. A payload of a round that one of them kept would be 60 MB by then:
# 9,610 weights of 8 bytes.
GROWTH_BYTES = 12 << 20
# What an owner lets go of it tells the store in bunches: between rounds some objects of the last one may be left. One
# more per round would be 800 by then.
MORE_OBJECTS = 16
MORE_BYTES = 2 << 20

# Asks the raylet itself, as a driver of the cluster.
ASK = """
import json, sys
import ray
from ray._private.internal_api import node_stats

ray.init(address=sys.argv[1], namespace="icrf", log_to_driver=False, logging_level="error", configure_logging=False)
(node,) = ray.nodes()
found = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=True)
print(json.dumps([found.store_stats.num_local_objects, found.store_stats.object_store_bytes_used]))
"""


@dataclass(frozen=True)
class Store:
    """What lies in the object store of a cluster."""

    objects: int
    used_bytes: int


@dataclass(frozen=True)
class Look:
    """What the fabric holds between two rounds: private bytes of its processes, and its object stores."""

    processes: dict[str, int]
    stores: dict[str, Store]


def store_of(environment: FabricEnvironment, cluster: str) -> Store:
    state = json.loads((environment.folder / f"agent-{cluster}" / STATE_NAME).read_text())
    told = subprocess.run(
        [sys.executable, "-c", ASK, state["address"]],
        env={**os.environ, **ray_environment(state["token_path"])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    return Store(*json.loads(told.stdout.splitlines()[-1]))


def look_at(environment: FabricEnvironment) -> Look:
    pids = {daemon.name: daemon.pid for daemon in environment.daemons}
    for cluster in environment.agents:
        for what in ("manager", "gateway", "host"):
            pids[f"{what} of {cluster}"] = environment.actor_pid(cluster, what)
        for what in ("gcs_server", "raylet"):
            (pids[f"{what} of {cluster}"],) = environment.ray_pids(cluster, what)
    processes = {f"{name} (pid {pid})": private_bytes(pid) for name, pid in pids.items()}
    return Look(processes, {cluster: store_of(environment, cluster) for cluster in environment.agents})


@pytest.fixture(scope="module")
def environment() -> Iterator[FabricEnvironment]:
    with FabricEnvironment(2, slots=1) as found:
        yield found


@pytest.mark.parametrize(
    "keys",
    [
        {"schema": "TraditionalFederatedLearning", "federated_learning_topology": "star"},
        {"schema": "DecentralizedFederatedLearning", "federated_learning_topology": "ring"},
    ],
    ids=["star", "ring"],
)
def test_a_thousand_rounds_leave_nothing_behind(environment: FabricEnvironment, keys: dict[str, str]) -> None:
    size = {"number_of_clients": 6, "federated_learning_rounds": LATE, "model_type": "mlp", "evaluate_every": 50}
    config = FederationConfig.from_mapping({"federation_id": "flat", "learning_rate": 0.1, **size, **keys})
    with environment.connect() as fabric:
        base = FederatedBase(config, fabric=fabric)
        base.train(rounds=EARLY, blocking=True)
        early = look_at(environment)
        assert base.train(rounds=LATE - EARLY).result().rounds_done == LATE
        late = look_at(environment)
        base.stop()
    assert early.processes.keys() == late.processes.keys()
    grown = {name: late.processes[name] - before for name, before in early.processes.items()}
    assert max(grown.values()) <= GROWTH_BYTES, grown
    for cluster, before in early.stores.items():
        after = late.stores[cluster]
        assert after.objects <= before.objects + MORE_OBJECTS, (cluster, before, after)
        assert after.used_bytes <= before.used_bytes + MORE_BYTES, (cluster, before, after)
