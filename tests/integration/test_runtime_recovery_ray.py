"""One cluster's side of recovery on a real Ray cluster: SIGKILL for everything, and the same bits.

This file is also the program of the agent's lives, which are processes of their own.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from icrf.daemon import StateFolder
from icrf.errors import NodeError
from icrf.protocol import CENTRALIZED
from icrf.testing.round_driver import CLUSTER, RUN, SCHEMAS, RoundDriver, activation, restored
from icrf_agent import keeper
from icrf_agent.cluster_gateway import GatewaySettings
from icrf_agent.inline_substrate import InlineSubstrate
from icrf_agent.local_ray import LocalRay
from icrf_agent.runtime import HostedRuntime

OBJECT_STORE_BYTES = 100 << 20


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, dict[int, str]]:
    """Flow -> round -> hash, computed inline."""

    async def run(flow: str) -> dict[int, str]:
        runtime = HostedRuntime(CLUSTER, InlineSubstrate())
        await runtime.start()
        driver = RoundDriver(runtime, activation(flow))
        await driver.activate()
        for number in (1, 2, 3):
            await driver.round(number)
        await runtime.close()
        return driver.hashes

    return {flow: asyncio.run(run(flow)) for flow in SCHEMAS}


@pytest.fixture
def ray_cluster(tmp_path: Path) -> Iterator[tuple[Path, LocalRay, str]]:
    with StateFolder(tmp_path / "state") as state:
        cluster = LocalRay()
        address = cluster.ensure(state.path, 2, lock_file=state.lock_file, object_store_bytes=OBJECT_STORE_BYTES)
        yield state.path, cluster, address
        cluster.stop()


def live(state: Path, ray: LocalRay, address: str, life: str, flow: str) -> dict[str, Any]:
    """One life of an agent as a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, life, address, str(state), flow],
        env={**os.environ, **ray.environment()},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.ray
@pytest.mark.timeout(240)
@pytest.mark.parametrize("flow", SCHEMAS)
def test_on_ray_every_death_leaves_the_same_bits(
    undisturbed: dict[str, dict[int, str]], ray_cluster: tuple[Path, LocalRay, str], flow: str
) -> None:
    state, ray, address = ray_cluster
    first = live(state, ray, address, "first", flow)
    assert first["words"] == {
        "manager": "retry",
        "gateway": "retry",
        "host": "retry" if flow == CENTRALIZED else "restore",
    }
    second = live(state, ray, address, "second", flow)
    assert second["held"] == [RUN, first["generation"], 2]
    hashes = {int(n): h for n, h in {**first["hashes"], **second["hashes"]}.items()}
    assert hashes == undisturbed[flow]


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_a_cluster_that_dies_while_it_comes_up_is_started_again(ray_cluster: tuple[Path, LocalRay, str]) -> None:
    state, ray, address = ray_cluster
    found = live(state, ray, address, "unlucky", CENTRALIZED)
    assert found["address"] != address
    assert found["slots"] == 2


async def _kill(actor: Any) -> None:
    """SIGKILL for the process of an actor."""
    os.kill(await actor.handle.pid.remote(), signal.SIGKILL)


async def _first_life(driver: RoundDriver) -> dict[str, Any]:
    """Round 1, deaths, round 2; then this process ends without a word."""
    words = {}
    await driver.activate()
    await driver.round(1)
    checkpoint = await driver.runtime.checkpoint(RUN, 1)
    assert driver.runtime._shared is not None
    await _kill(driver.runtime._shared.manager)
    words["manager"] = await driver.runtime.recover(RUN, await driver.fails(2))
    gateway = driver.runtime._shared.gateway
    assert gateway is not None
    address = await gateway.call("address")
    await _kill(gateway)
    with pytest.raises(NodeError) as caught:
        await gateway.call("next_arrivals", 30.0)
    words["gateway"] = await driver.runtime.recover(RUN, caught.value)
    assert await gateway.call("address") == address
    await _kill(driver.runtime._runs[RUN].hosts[1])
    words["host"] = await driver.runtime.recover(RUN, await driver.fails(2))
    if words["host"] == "restore":
        await driver.activate(restored(driver.request, 1), checkpoint)
    await driver.round(2)
    return {"words": words, "hashes": driver.hashes, "generation": driver.request.generation}


async def _second_life(driver: RoundDriver, ray: LocalRay) -> dict[str, Any]:
    """Adopt; then the head is killed while a call waits, and the state of round 2 is loaded into a new cluster."""
    held = await driver.runtime.adopt(driver.request)
    assert held is not None
    checkpoint = await driver.runtime.checkpoint(RUN, 2)
    assert driver.runtime._shared is not None
    gateway = driver.runtime._shared.gateway
    assert gateway is not None
    waiting = asyncio.create_task(gateway.call("next_arrivals", 600.0))
    losing = asyncio.create_task(driver.runtime.lost())
    _kill_head(ray)
    reason = await asyncio.wait_for(losing, 30.0)
    with pytest.raises(NodeError) as caught:
        await waiting
    assert await driver.runtime.recover(RUN, caught.value) == "restore"
    await driver.runtime.rebuild()
    await driver.activate(restored(driver.request, 2), checkpoint)
    await driver.round(3)
    return {"held": [held.run_id, held.generation, held.round], "hashes": driver.hashes, "reason": reason}


def _kill_head(ray: LocalRay) -> None:
    for pid in keeper.session_members(ray.session_id):
        if b"gcs_server" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)


async def _unlucky_life(substrate: Any, runtime: HostedRuntime, ray: LocalRay) -> dict[str, Any]:
    """The head dies before the agent has connected."""
    _kill_head(ray)
    try:
        facts = await runtime.start()
        await runtime.close()
    finally:
        await asyncio.to_thread(ray.stop)
    return {"address": substrate.address, "slots": facts.capacity.num_slots}


async def _main(life: str, address: str, state: Path, flow: str) -> None:
    from icrf_agent.ray_substrate import RaySubstrate  # noqa: PLC0415 - Ray belongs into this process only

    ray = LocalRay()

    def renew() -> str:
        ray.stop()
        found = ray.ensure(state, 2, lock_file=state / "lock", object_store_bytes=OBJECT_STORE_BYTES)
        os.environ.update(ray.environment())
        return found

    ray.ensure(state, 2, lock_file=state / "lock", object_store_bytes=OBJECT_STORE_BYTES)
    settings = GatewaySettings(CLUSTER, uuid.uuid4().hex, "127.0.0.1:0", None)
    substrate = RaySubstrate(address, settings, renew=renew)
    runtime = HostedRuntime(CLUSTER, substrate, notes=state / "notes")
    if life == "unlucky":
        sys.stdout.write(json.dumps(await _unlucky_life(substrate, runtime, ray)) + "\n")
        return
    await runtime.start()
    request = activation(flow)
    remembered = state / "generation"
    if life == "first":
        found = await _first_life(RoundDriver(runtime, request))
        remembered.write_text(str(found["generation"]))
    else:
        generation = int(remembered.read_text())
        request = replace(request, generation=generation, restore_round=generation - 1)
        try:
            found = await _second_life(RoundDriver(runtime, request), ray)
            await runtime.close()
        finally:
            await asyncio.to_thread(ray.stop)
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    if life == "first":
        # Killed rather than ended: nothing is closed.
        os._exit(0)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4]))
