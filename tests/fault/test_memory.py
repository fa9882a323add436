"""Memory runs out under hosts of a real Ray cluster: they are killed, and come back with fewer active nodes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from icrf.protocol import COMPLETED
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing import FabricEnvironment
from icrf.testing.inline import InlineFabric
from icrf.testing.processes import await_end
from icrf_agent.keeper import session_members

from .bench import Watch

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_NODES = 40
# All nodes would take 6 GB. What they may take, and what Ray and two hosts take without them.
ROOM_BYTES, RAY_BYTES, HOSTS_BYTES = 1_300_000_000, 1_000_000_000, 700_000_000
# The monitor looks at the whole machine: what others take or give back meanwhile must not decide.
OTHERS_BYTES = 1_200_000_000
GROUPS = Path("/sys/fs/cgroup/memory")
NODE = """
import numpy as np

from icrf import FederatedNode


class Hungry(FederatedNode):
    def setup(self):
        self.ballast = np.ones(150_000_000, np.uint8)
"""


def config(**keys: Any) -> FederationConfig:
    return FederationConfig.from_mapping(
        {
            "federation_id": "hungry",
            "federated_learning_schema": "DecentralizedFederatedLearning",
            "federated_learning_topology": "ring",
            "number_of_clients": NUM_NODES,
            "federated_learning_rounds": 3,
            "model_type": "logistic",
            **keys,
        }
    )


@pytest.fixture(scope="module")
def wanted() -> str:
    """What the federation learns where there is memory for all."""
    with InlineFabric(1) as fabric:
        run = fabric.port.submit(build_submission(config()))
        list(fabric.port.watch(run.run_id))
        return fabric.port.get(run.run_id).model_sha256


@pytest.fixture
def hungry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FederationConfig:
    (tmp_path / "hungry_node.py").write_text(NODE)
    monkeypatch.syspath_prepend(tmp_path)
    # Whatever is measured: the nodes are to run into the limit.
    return config(client_template="hungry_node:Hungry", resident_memory_mb=100_000)


def memory() -> tuple[int, int]:
    """Bytes that this machine has, and those that are in use."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(lines[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
    if free < 2 * (ROOM_BYTES + RAY_BYTES + HOSTS_BYTES):
        pytest.skip("this machine has too little free memory for a test of what happens without")
    return total, total - free


@pytest.fixture
def confine() -> Iterator[Callable[[list[int], int], None]]:
    """Lets processes, and those that they start from now on, take so many bytes more; the kernel kills one else."""
    group = GROUPS / f"icrf-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("no control group of memory can be made here")

    def move(pids: list[int], num_bytes: int) -> None:
        (group / "memory.limit_in_bytes").write_text(str(num_bytes))
        for pid in pids:
            (group / "cgroup.procs").write_text(str(pid))

    yield move
    for pid in map(int, (group / "cgroup.procs").read_text().split()):
        assert await_end(pid)
    group.rmdir()


def run_on(environment: FabricEnvironment, hungry: FederationConfig, wanted: str) -> None:
    with environment.connect() as fabric:
        outcome = Watch(fabric.submit(hungry)).outcome()
    assert outcome.info.status == COMPLETED, outcome.texts
    assert any("R006" in text and "memory ran out" in text for text in outcome.texts), outcome.texts
    assert outcome.info.model_sha256 == wanted


def test_hosts_that_rays_monitor_kills_finish_with_the_same_bits(hungry: FederationConfig, wanted: str) -> None:
    total, used = memory()
    limit = (used + RAY_BYTES + HOSTS_BYTES + ROOM_BYTES + OTHERS_BYTES) / total
    variables = {"RAY_memory_usage_threshold": f"{limit:.4f}", "RAY_memory_monitor_refresh_ms": "50"}
    with FabricEnvironment(1, slots=2, variables=variables) as environment:
        run_on(environment, hungry, wanted)


def test_hosts_that_the_kernel_kills_finish_with_the_same_bits(
    hungry: FederationConfig, wanted: str, confine: Callable[[list[int], int], None]
) -> None:
    memory()
    with FabricEnvironment(1, slots=2) as environment:
        raylet = environment.ray_pids("local-1", "raylet")[0]
        confine(session_members(os.getsid(raylet)), HOSTS_BYTES + ROOM_BYTES)
        run_on(environment, hungry, wanted)
