"""One cluster's side of recovery: whatever dies, the rounds go on and leave the bits of an undisturbed run.

Inline: the processes are played, and die on command.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from torch import nn

from icrf import values
from icrf.errors import IcrfError, NodeError
from icrf.exchange import MODEL, Transfer
from icrf.federation.node import FederatedNode
from icrf.ports import Arrival
from icrf.protocol import CENTRALIZED, DECENTRALIZED, HIERARCHICAL, Activate
from icrf.testing.round_driver import CLUSTER, RUN, SCHEMAS, RoundDriver, activation, restored
from icrf_agent.gateway_inproc import InProcessTransport, TransportHub
from icrf_agent.inline_substrate import InlineSubstrate
from icrf_agent.runtime import HostedRuntime


def drive(work: Callable[[RoundDriver, InlineSubstrate], Awaitable[None]], request: Activate, **options: Any) -> None:
    """Run `work` on an activated inline cluster."""

    async def main() -> None:
        substrate = InlineSubstrate()
        runtime = HostedRuntime(CLUSTER, substrate, **options)
        await runtime.start()
        driver = RoundDriver(runtime, request)
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

        async def work(driver: RoundDriver, substrate: InlineSubstrate) -> None:
            for number in (1, 2, 3):
                await driver.round(number)
            found[driver.request.flow] = driver.hashes

        drive(work, activation(flow))
    return found


def test_activating_again_waits_for_the_first_and_an_older_generation_is_refused() -> None:
    async def work(driver: RoundDriver, substrate: InlineSubstrate) -> None:
        runtime = driver.runtime
        await driver.round(1)
        first, second = await asyncio.gather(runtime.activate(driver.request), runtime.activate(driver.request))
        assert first == second
        await driver.round(2)
        newer = restored(driver.request, 0)
        await driver.activate(newer)
        await driver.round(1)
        with pytest.raises(IcrfError, match="P003"):
            await runtime.activate(replace(newer, generation=newer.generation - 1))

    drive(work, activation(DECENTRALIZED))


# ---------------------------------------------------------------- hosts


def test_a_host_without_state_is_set_up_again_and_the_round_is_retried(undisturbed: dict[str, dict[int, str]]) -> None:
    warned: list[str] = []

    async def work(driver: RoundDriver, substrate: InlineSubstrate) -> None:
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


@pytest.mark.parametrize(
    ("flow", "slot"),
    [(CENTRALIZED, 0), (DECENTRALIZED, 0), (DECENTRALIZED, 1), (HIERARCHICAL, 0), (HIERARCHICAL, 1)],
)
@pytest.mark.parametrize("num_slots", [2, 1])
def test_lost_state_is_restored_from_a_checkpoint_on_any_number_of_slots(
    undisturbed: dict[str, dict[int, str]], flow: str, slot: int, num_slots: int
) -> None:
    async def work(driver: RoundDriver, substrate: InlineSubstrate) -> None:
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


@pytest.mark.parametrize("keys", [{}, {"resident_nodes": 1}], ids=["all", "1"])
@pytest.mark.parametrize("flow", [CENTRALIZED, DECENTRALIZED])
def test_a_restored_node_knows_the_round_of_its_last_commit(flow: str, keys: dict[str, Any]) -> None:
    """Before any further round, and whether it is active or has to be made again."""

    async def told(driver: RoundDriver) -> list[int]:
        arguments = values.encode([[], {}], root="arguments")
        pings = [await driver.runtime.call_node(RUN, n.id, "ping", arguments) for n in driver.request.nodes]
        return [values.decode(ping)["round"] for ping in pings]

    async def work(driver: RoundDriver, substrate: InlineSubstrate) -> None:
        await driver.round(1)
        await driver.round(2)
        assert await told(driver) == [2] * 6
        checkpoint = await driver.runtime.checkpoint(RUN, 2)
        substrate.kill_host(RUN, 0)
        assert await driver.runtime.recover(RUN, await driver.fails(3)) == "restore"
        await driver.activate(restored(driver.request, 2), checkpoint)
        assert await told(driver) == [2] * 6

    drive(work, activation(flow, **keys))


def test_push_sum_goes_on_with_the_masses_of_its_round_after_a_restore() -> None:
    request = activation(DECENTRALIZED, federated_learning_topology="tree", mixing="push_sum")
    expected: dict[int, str] = {}

    async def whole(driver: RoundDriver, substrate: InlineSubstrate) -> None:
        for number in (1, 2, 3, 4):
            await driver.round(number)
        expected.update(driver.hashes)

    async def interrupted(driver: RoundDriver, substrate: InlineSubstrate) -> None:
        await driver.round(1)
        await driver.round(2)
        checkpoint = await driver.runtime.checkpoint(RUN, 2)
        substrate.kill_host(RUN, 0)
        assert await driver.runtime.recover(RUN, await driver.fails(3)) == "restore"
        await driver.activate(restored(driver.request, 2), checkpoint)
        await driver.round(3)
        await driver.round(4)
        assert driver.hashes == expected

    drive(whole, request)
    drive(interrupted, request)


@pytest.mark.parametrize("flow", [CENTRALIZED, DECENTRALIZED])
@pytest.mark.parametrize("private", [[], ["1.*"]])
def test_running_statistics_counters_and_private_keys_are_in_the_checkpoint(flow: str, private: list[str]) -> None:
    model = f"{__name__}:batch_norm"
    request = activation(flow, model_type=model, private_keys=private, learning_rate=0.01)

    async def work(driver: RoundDriver, substrate: InlineSubstrate) -> None:
        for number in (1, 2, 3):
            await driver.round(number)
            if number == 1:
                checkpoint = await driver.runtime.checkpoint(RUN, 1)
        undisturbed = dict(driver.hashes)
        substrate.kill_host(RUN, 0)
        assert await driver.runtime.recover(RUN, await driver.fails(4)) == "restore"
        await driver.activate(replace(restored(driver.request, 1), num_slots=1), checkpoint)
        for number in (2, 3):
            await driver.round(number)
        assert {n: driver.hashes[n] for n in (1, 2, 3)} == {n: undisturbed[n] for n in (1, 2, 3)}

    drive(work, request)


def batch_norm(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, num_classes))


@pytest.mark.parametrize("flow", SCHEMAS)
def test_without_a_checkpoint_the_run_starts_again_from_its_initial_state(
    undisturbed: dict[str, dict[int, str]], flow: str
) -> None:
    async def work(driver: RoundDriver, substrate: InlineSubstrate) -> None:
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

    async def work(driver: RoundDriver, substrate: InlineSubstrate) -> None:
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

    async def work(driver: RoundDriver, substrate: InlineSubstrate) -> None:
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

    async def work(driver: RoundDriver, substrate: InlineSubstrate) -> None:
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
    async def work(driver: RoundDriver, substrate: InlineSubstrate) -> None:
        assert await driver.runtime.recover(RUN, NodeError("U001", "ZeroDivisionError")) == ""
        assert await driver.runtime.recover("unknown", NodeError("U003", "died")) == "restore"

    drive(work, activation(CENTRALIZED))


# ---------------------------------------------------------------- manager, gateway, cluster


@pytest.mark.parametrize("flow", SCHEMAS)
def test_a_killed_manager_is_linked_again_and_forgets_the_attempt(
    undisturbed: dict[str, dict[int, str]], flow: str
) -> None:
    async def work(driver: RoundDriver, substrate: InlineSubstrate) -> None:
        await driver.round(1)
        start = driver.next_start(2)
        if flow != DECENTRALIZED:
            await driver.runtime.publish_model(RUN, start)
        else:
            await driver.runtime.train(RUN, start)
        substrate.kill_manager()

        async def go_on() -> None:
            await driver.runtime.train(RUN, start)
            await driver.runtime.aggregate(RUN, start)

        with pytest.raises(NodeError) as caught:
            await go_on()
        assert await driver.runtime.recover(RUN, caught.value) == "retry"
        with pytest.raises(IcrfError) as late:
            await go_on()
        assert late.value.code == "P003"
        await driver.round(2)
        await driver.round(3)
        assert driver.hashes == undisturbed[flow]

    drive(work, activation(flow))


@pytest.mark.parametrize("flow", SCHEMAS)
def test_a_run_in_the_middle_of_a_round_repeats_it_when_another_one_brings_back_the_manager(
    undisturbed: dict[str, dict[int, str]], flow: str
) -> None:
    async def work(driver: RoundDriver, substrate: InlineSubstrate) -> None:
        runtime, start = driver.runtime, driver.next_start(1)
        if flow != DECENTRALIZED:
            await runtime.publish_model(RUN, start)
        await runtime.train(RUN, start)
        substrate.kill_manager()
        await runtime.abort("another", 1, 1)
        with pytest.raises(IcrfError) as lost:
            await runtime.aggregate(RUN, start)
        # Anything else would be the run's own fault, and its end.
        assert await runtime.recover(RUN, lost.value) == "retry"
        for number in (1, 2, 3):
            await driver.round(number)
        assert driver.hashes == undisturbed[flow]

    drive(work, activation(flow))


@pytest.mark.parametrize("clusters", [(CLUSTER,), (CLUSTER, "b")], ids=["alone", "with-another"])
def test_a_manager_that_is_brought_back_while_nodes_train_costs_an_attempt_and_not_the_run(
    clusters: tuple[str, ...],
) -> None:
    started, go_on = threading.Event(), threading.Event()

    class Slow(FederatedNode):
        def train(self) -> dict[str, float]:
            started.set()
            go_on.wait(30.0)
            return super().train()

    async def work(driver: RoundDriver, substrate: InlineSubstrate) -> None:
        start = driver.next_start(1)
        training = asyncio.create_task(driver.runtime.train(RUN, start))
        await asyncio.to_thread(started.wait, 30.0)
        substrate.kill_manager()
        await driver.runtime.abort("another", 1, 1)
        go_on.set()
        with pytest.raises(IcrfError) as lost:
            await training
        assert await driver.runtime.recover(RUN, lost.value) == "retry"
        assert (await driver.runtime.train(RUN, driver.next_start(1))).nodes

    request = activation(DECENTRALIZED, clusters=clusters, client_template="local:Slow")
    drive(work, request, templates={"local:Slow": Slow})


def test_a_killed_gateway_comes_back_and_no_arrival_is_lost() -> None:
    async def main() -> None:
        hub = TransportHub()
        substrates = {n: InlineSubstrate(transport=lambda n=n: InProcessTransport(hub, n)) for n in "ab"}
        runtimes = {n: HostedRuntime(n, s) for n, s in substrates.items()}
        request = activation(CENTRALIZED, clusters=("a", "b"))
        drives = {n: RoundDriver(r, request) for n, r in runtimes.items()}
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
            await runtimes["b"]._phases.begin(runtimes["b"]._run(RUN), start)
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
    async def work(driver: RoundDriver, substrate: InlineSubstrate) -> None:
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
def test_a_restarted_agent_adopts_what_lives(undisturbed: dict[str, dict[int, str]], flow: str, tmp_path: Path) -> None:
    async def work(driver: RoundDriver, substrate: InlineSubstrate) -> None:
        await driver.round(1)
        if flow == DECENTRALIZED:
            await driver.runtime.train(RUN, driver.next_start(2))
        again = HostedRuntime(CLUSTER, substrate, notes=tmp_path)
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
        assert await again.adopt(driver.request) is None

    drive(work, activation(flow), notes=tmp_path)


def test_a_checkpoint_that_does_not_fit_is_refused_by_code() -> None:
    async def work(driver: RoundDriver, substrate: InlineSubstrate) -> None:
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
