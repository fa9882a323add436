"""One cluster's side of recovery: whatever dies, the rounds go on and leave the bits of an undisturbed run.

The runtime is driven round by round, as its agent would. Inline, where processes are played and die on command; and
on a real Ray cluster, where this file is also the program of the agent's lives (see the end).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from icrf.daemon import StateFolder
from icrf.errors import IcrfError, NodeError
from icrf.exchange import MODEL, Transfer
from icrf.federation.node import FederatedNode
from icrf.ports import Arrival
from icrf.protocol import CENTRALIZED, DECENTRALIZED, Activate, Activated, PeerAddress, Reserve, Resources, StartRound
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.update import choose_grid
from icrf_agent import keeper
from icrf_agent.cluster_gateway import GatewaySettings
from icrf_agent.gateway_inproc import InProcessTransport, TransportHub
from icrf_agent.inline_substrate import InlineSubstrate
from icrf_agent.local_ray import LocalRay
from icrf_agent.runtime import HostedRuntime

SCHEMAS = {
    CENTRALIZED: ("TraditionalFederatedLearning", "star"),
    DECENTRALIZED: ("DecentralizedFederatedLearning", "ring"),
}
CLUSTER, RUN = "a", "run-1"
OBJECT_STORE_BYTES = 100 << 20


def activation(flow: str, num_slots: int = 2, clusters: tuple[str, ...] = (CLUSTER,), **settings: Any) -> Activate:
    """Six nodes; on several clusters they alternate."""
    schema, topology = SCHEMAS[flow]
    config = FederationConfig.from_mapping(
        {
            "federation_id": "recovery",
            "federated_learning_schema": schema,
            "federated_learning_topology": topology,
            "number_of_clients": 6 if flow == DECENTRALIZED else 5,
            "federated_learning_rounds": 3,
            "dataset_type": "digits",
            **settings,
        }
    )
    s = build_submission(config)
    assignment = tuple(n % len(clusters) for n in range(len(s.nodes)))
    peers = tuple(PeerAddress(name, "") for name in clusters)
    return Activate(
        RUN, 1, "recovery", s.config_json, s.flow, s.nodes, s.graph, s.layout, clusters, assignment, 0, peers, num_slots
    )


@dataclass
class Drive:
    """Runs rounds on one cluster, as the mediator and the agent would order them."""

    runtime: HostedRuntime
    request: Activate
    absmax: tuple[float, ...] = ()
    total: int = 0
    attempt: int = 0
    hashes: dict[int, str] = field(default_factory=dict)

    async def activate(self, request: Activate | None = None, checkpoint: bytes = b"") -> Activated:
        self.request = request or self.request
        r = self.request
        await self.runtime.reserve(
            Reserve(r.run_id, r.generation, r.federation, r.num_slots, Resources(), "PACK", deadline_s=60.0)
        )
        found = await self.runtime.activate(r, checkpoint)
        self.knows(found)
        return found

    def knows(self, found: Activated) -> None:
        self.absmax, self.attempt = found.absmax, 0
        self.total = sum(n for _, n in found.num_samples) or self.total
        self.hashes[self.request.restore_round] = found.model_hash or found.state_hashes.hex()

    def next_start(self, number: int) -> StartRound:
        self.attempt += 1
        grid = choose_grid(self.absmax, self.total)
        return StartRound(RUN, self.request.generation, number, self.attempt, "", grid, self.total, evaluate=False)

    async def round(self, number: int) -> str:
        start = self.next_start(number)
        if self.request.flow == CENTRALIZED:
            await self.runtime.publish_model(RUN, start)
        await self.runtime.train(RUN, start)
        report = await self.runtime.aggregate(RUN, start)
        assert not report.overflow
        self.absmax, self.attempt = report.absmax, 0
        self.hashes[number] = report.model_hash or report.state_hashes.hex()
        return self.hashes[number]

    async def fails(self, number: int) -> IcrfError:
        """Run a round that must fail by a death."""
        with pytest.raises(IcrfError) as caught:
            await self.round(number)
        assert caught.value.code in {"U003", "P003"}, caught.value
        return caught.value


def restored(request: Activate, number: int) -> Activate:
    return replace(request, generation=request.generation + 1, restore_round=number, checkpoint=f"checkpoint/{number}")


def drive(work: Callable[[Drive, InlineSubstrate], Awaitable[None]], request: Activate, **options: Any) -> None:
    """Run `work` on an activated inline cluster."""

    async def main() -> None:
        substrate = InlineSubstrate()
        runtime = HostedRuntime(CLUSTER, substrate, **options)
        await runtime.start()
        driver = Drive(runtime, request)
        try:
            await driver.activate()
            await work(driver, substrate)
        finally:
            await runtime.close()

    asyncio.run(main())


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, dict[int, str]]:
    """Flow -> round -> hash."""
    found = {}
    for flow in SCHEMAS:

        async def work(driver: Drive, substrate: InlineSubstrate) -> None:
            for number in (1, 2, 3):
                await driver.round(number)
            found[driver.request.flow] = driver.hashes

        drive(work, activation(flow))
    return found


# ---------------------------------------------------------------- hosts


def test_a_host_without_state_is_set_up_again_and_the_round_is_retried(undisturbed: dict[str, dict[int, str]]) -> None:
    warned: list[str] = []

    async def work(driver: Drive, substrate: InlineSubstrate) -> None:
        await driver.round(1)
        substrate.kill_host(RUN, 1)
        error = await driver.fails(2)
        assert error.code == "U003"
        assert await driver.runtime.recover(RUN, error) == "retry"
        await driver.round(2)
        await driver.round(3)
        assert driver.hashes == undisturbed[CENTRALIZED]

    drive(work, activation(CENTRALIZED), warn=lambda run_id, text: warned.append(text))
    assert len(warned) == 1
    assert "death 1" in warned[0]


@pytest.mark.parametrize(("flow", "slot"), [(CENTRALIZED, 0), (DECENTRALIZED, 0), (DECENTRALIZED, 1)])
@pytest.mark.parametrize("num_slots", [2, 1])
def test_lost_state_is_restored_from_a_checkpoint_on_any_number_of_slots(
    undisturbed: dict[str, dict[int, str]], flow: str, slot: int, num_slots: int
) -> None:
    async def work(driver: Drive, substrate: InlineSubstrate) -> None:
        await driver.round(1)
        checkpoint = await driver.runtime.checkpoint(RUN, 1)
        await driver.round(2)
        substrate.kill_host(RUN, slot)
        error = await driver.fails(3)
        assert await driver.runtime.recover(RUN, error) == "restore"
        # Nobody has restored it yet: asked again, the answer is the same.
        assert await driver.runtime.recover(RUN, error) == "restore"
        driver.hashes.clear()
        await driver.activate(replace(restored(driver.request, 1), num_slots=num_slots), checkpoint)
        await driver.round(2)
        await driver.round(3)
        assert driver.hashes == {n: undisturbed[flow][n] for n in (1, 2, 3)}

    drive(work, activation(flow))


@pytest.mark.parametrize("flow", SCHEMAS)
def test_without_a_checkpoint_the_run_starts_again_from_its_initial_state(
    undisturbed: dict[str, dict[int, str]], flow: str
) -> None:
    async def work(driver: Drive, substrate: InlineSubstrate) -> None:
        await driver.round(1)
        substrate.kill_host(RUN, 0)
        assert await driver.runtime.recover(RUN, await driver.fails(2)) == "restore"
        await driver.activate(restored(driver.request, 0))
        for number in (1, 2, 3):
            await driver.round(number)
        assert driver.hashes == undisturbed[flow]

    drive(work, activation(flow))


def test_a_round_in_flight_ends_at_once_and_the_dead_host_changes_nothing_any_more() -> None:
    started, go_on = threading.Event(), threading.Event()

    class Slow(FederatedNode):
        def train(self) -> dict[str, float]:
            started.set()
            go_on.wait(30.0)
            return {"loss": 1.0}

    async def work(driver: Drive, substrate: InlineSubstrate) -> None:
        failing = asyncio.create_task(driver.fails(1))
        await asyncio.to_thread(started.wait, 30.0)
        substrate.kill_host(RUN, 0)
        substrate.kill_host(RUN, 1)
        error = await asyncio.wait_for(failing, 10.0)
        go_on.set()
        words = await asyncio.gather(*(driver.runtime.recover(RUN, error) for _ in range(3)))
        assert words == ["restore"] * 3

    drive(work, activation(DECENTRALIZED, client_template="local:Slow"), templates={"local:Slow": Slow})


def test_concurrent_recoveries_count_one_death_once() -> None:
    warned: list[str] = []

    async def work(driver: Drive, substrate: InlineSubstrate) -> None:
        substrate.kill_host(RUN, 1)
        error = await driver.fails(1)
        words = await asyncio.gather(*(driver.runtime.recover(RUN, error) for _ in range(4)))
        assert words == ["retry"] * 4
        await driver.round(1)

    drive(work, activation(CENTRALIZED), warn=lambda run_id, text: warned.append(text))
    assert len(warned) == 1


def test_a_host_that_dies_three_times_in_a_round_is_quarantined_by_the_name_of_its_node() -> None:
    substrates: list[InlineSubstrate] = []

    class Poison(FederatedNode):
        def train(self) -> dict[str, float]:
            if self.context.round == 2 and self.id == "client_4":
                substrates[0].kill_host(RUN, 1)
                # An own process would not come back from here.
                raise RuntimeError("dead")
            return super().train()

    async def work(driver: Drive, substrate: InlineSubstrate) -> None:
        substrates.append(substrate)
        await driver.round(1)
        for _ in range(2):
            assert await driver.runtime.recover(RUN, await driver.fails(2)) == "retry"
        error = await driver.fails(2)
        for _ in range(2):
            with pytest.raises(NodeError) as caught:
                await driver.runtime.recover(RUN, error)
            assert caught.value.code == "U004"
            assert "client_" in caught.value.place
            assert CLUSTER in caught.value.place

    drive(work, activation(CENTRALIZED, client_template="local:Poison"), templates={"local:Poison": Poison})


def test_an_error_that_is_no_death_is_the_runs_own() -> None:
    async def work(driver: Drive, substrate: InlineSubstrate) -> None:
        assert await driver.runtime.recover(RUN, NodeError("U001", "ZeroDivisionError")) == ""
        assert await driver.runtime.recover("unknown", NodeError("U003", "died")) == "restore"

    drive(work, activation(CENTRALIZED))


# ---------------------------------------------------------------- manager, gateway, cluster


@pytest.mark.parametrize("flow", SCHEMAS)
def test_a_killed_manager_is_linked_again_and_forgets_the_attempt(
    undisturbed: dict[str, dict[int, str]], flow: str
) -> None:
    async def work(driver: Drive, substrate: InlineSubstrate) -> None:
        await driver.round(1)
        start = driver.next_start(2)
        if flow == CENTRALIZED:
            await driver.runtime.publish_model(RUN, start)
        else:
            await driver.runtime.train(RUN, start)
        substrate.kill_manager()
        with pytest.raises(NodeError) as caught:
            await driver.runtime.train(RUN, start)
        assert await driver.runtime.recover(RUN, caught.value) == "retry"
        with pytest.raises(IcrfError) as late:
            await driver.runtime.train(RUN, start)
        assert late.value.code == "P003"
        await driver.round(2)
        await driver.round(3)
        assert driver.hashes == undisturbed[flow]

    drive(work, activation(flow))


def test_a_killed_gateway_comes_back_and_no_arrival_is_lost() -> None:
    async def main() -> None:
        hub = TransportHub()
        substrates = {n: InlineSubstrate(transport=lambda n=n: InProcessTransport(hub, n)) for n in "ab"}
        runtimes = {n: HostedRuntime(n, s) for n, s in substrates.items()}
        request = activation(CENTRALIZED, clusters=("a", "b"))
        drives = {n: Drive(r, request) for n, r in runtimes.items()}
        for name, runtime in runtimes.items():
            await runtime.start()
            await drives[name].activate()
        came: asyncio.Queue[Arrival] = asyncio.Queue()
        gate = asyncio.Event()
        gate.set()

        async def listen() -> None:
            async for arrival in runtimes["b"].arrivals():
                await came.put(arrival)
                await gate.wait()

        listening = asyncio.create_task(listen())
        sender = drives["a"]
        sender.absmax, sender.total = drives["a"].absmax, sum(d.total for d in drives.values())

        async def send() -> int:
            start = sender.next_start(1)
            await runtimes["b"]._begin(RUN, start)
            await runtimes["a"].publish_model(RUN, start)
            await runtimes["a"].send_payload(RUN, start, Transfer(MODEL, 0, 0, 1, ()))
            return start.attempt

        try:
            gate.clear()
            assert await send() == (await came.get()).header.attempt
            # Accepted, but its notice dies with the gateway.
            accepted = await send()
            substrates["b"].kill_gateway()
            gate.set()
            assert (await asyncio.wait_for(came.get(), 10.0)).header.attempt == accepted
            # And one that is sent while the gateway is away.
            substrates["b"].kill_gateway()
            assert await send() == (await asyncio.wait_for(came.get(), 10.0)).header.attempt
            assert came.empty()
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            for runtime in runtimes.values():
                await runtime.close()

    asyncio.run(main())


@pytest.mark.parametrize("flow", SCHEMAS)
def test_a_lost_cluster_is_rebuilt_empty_and_loads_the_checkpoint(
    undisturbed: dict[str, dict[int, str]], flow: str
) -> None:
    async def work(driver: Drive, substrate: InlineSubstrate) -> None:
        await driver.round(1)
        checkpoint = await driver.runtime.checkpoint(RUN, 1)
        losing = asyncio.create_task(driver.runtime.lost())
        await asyncio.sleep(0)
        substrate.kill_cluster()
        assert "killed" in await asyncio.wait_for(losing, 10.0)
        error = await driver.fails(2)
        assert await driver.runtime.recover(RUN, error) == "restore"
        await driver.runtime.rebuild()
        with pytest.raises(IcrfError) as gone:
            await driver.runtime.checkpoint(RUN, 1)
        assert gone.value.code == "F006"
        await driver.activate(restored(driver.request, 1), checkpoint)
        await driver.round(2)
        await driver.round(3)
        assert driver.hashes == undisturbed[flow]

    drive(work, activation(flow))


# ---------------------------------------------------------------- the agent, checkpoints


@pytest.mark.parametrize("flow", SCHEMAS)
def test_a_restarted_agent_adopts_what_lives(undisturbed: dict[str, dict[int, str]], flow: str) -> None:
    async def work(driver: Drive, substrate: InlineSubstrate) -> None:
        await driver.round(1)
        if flow == DECENTRALIZED:
            await driver.runtime.train(RUN, driver.next_start(2))
        again = HostedRuntime(CLUSTER, substrate)
        await again.start()
        assert await again.adopt(replace(driver.request, generation=7)) is None
        assert await again.adopt(replace(driver.request, run_id="another")) is None
        held = await again.adopt(driver.request)
        assert held is not None
        assert (held.run_id, held.generation) == (RUN, 1)
        assert (held.round, held.attempt) == ((2, 1) if flow == DECENTRALIZED else (1, 1))
        driver.runtime = again
        await driver.round(2)
        await driver.round(3)
        assert driver.hashes == undisturbed[flow]
        substrate.kill_host(RUN, 1)
        assert await HostedRuntime(CLUSTER, substrate).start()
        assert await again.adopt(driver.request) is None

    drive(work, activation(flow))


def test_a_checkpoint_that_does_not_fit_is_refused_by_code() -> None:
    async def work(driver: Drive, substrate: InlineSubstrate) -> None:
        await driver.round(1)
        good = await driver.runtime.checkpoint(RUN, 1)
        rows = safetensors.numpy.load(good)
        metadata = {"round": "1"}

        async def code(data: bytes, number: int = 1) -> str:
            with pytest.raises(IcrfError) as caught:
                await driver.activate(restored(driver.request, number), data)
            return caught.value.code

        assert await code(b"") == "W010"
        assert await code(good[:-5]) == "W010"
        assert await code(good, number=2) == "W010"
        assert await code(safetensors.numpy.save({**rows, "x": rows["0"]}, metadata)) == "W010"
        without = {k: v for k, v in rows.items() if k != "3"}
        assert await code(safetensors.numpy.save(without, metadata)) == "W010"
        assert await code(safetensors.numpy.save({**rows, "3": rows["3"][:-1]}, metadata)) == "W010"
        bad = rows["3"].copy()
        bad[0] = np.nan
        assert await code(safetensors.numpy.save({**rows, "3": bad}, metadata)) == "W020"
        with pytest.raises(IcrfError) as gone:
            await driver.runtime.checkpoint(RUN, 9)
        assert gone.value.code in {"F005", "F006"}

    drive(work, activation(DECENTRALIZED))


# ---------------------------------------------------------------- real processes


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


async def _kill(actor: Any) -> None:
    """SIGKILL for the process of an actor."""
    os.kill(await actor.handle.pid.remote(), signal.SIGKILL)


async def _first_life(driver: Drive) -> dict[str, Any]:
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


async def _second_life(driver: Drive, ray: LocalRay) -> dict[str, Any]:
    """Adopt; then the head is killed while a call waits, and the state of round 2 is loaded into a new cluster."""
    held = await driver.runtime.adopt(driver.request)
    assert held is not None
    checkpoint = await driver.runtime.checkpoint(RUN, 2)
    assert driver.runtime._shared is not None
    gateway = driver.runtime._shared.gateway
    assert gateway is not None
    waiting = asyncio.create_task(gateway.call("next_arrivals", 600.0))
    losing = asyncio.create_task(driver.runtime.lost())
    for pid in keeper.session_members(ray.session_id):
        if b"gcs_server" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    reason = await asyncio.wait_for(losing, 30.0)
    with pytest.raises(NodeError) as caught:
        await waiting
    assert await driver.runtime.recover(RUN, caught.value) == "restore"
    await driver.runtime.rebuild()
    await driver.activate(restored(driver.request, 2), checkpoint)
    await driver.round(3)
    return {"held": [held.run_id, held.generation, held.round], "hashes": driver.hashes, "reason": reason}


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
    runtime = HostedRuntime(CLUSTER, RaySubstrate(address, settings, renew=renew), notes=state / "notes")
    await runtime.start()
    request = activation(flow)
    remembered = state / "generation"
    if life == "first":
        found = await _first_life(Drive(runtime, request))
        remembered.write_text(str(found["generation"]))
    else:
        generation = int(remembered.read_text())
        request = replace(request, generation=generation, restore_round=generation - 1)
        try:
            found = await _second_life(Drive(runtime, request), ray)
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
