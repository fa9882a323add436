"""The shell around the agent's core: it carries instructions to the cluster's runtime and outcomes to the mediator.

One asyncio loop; the core is called synchronously, every action runs as its own task.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from icrf import __version__
from icrf.daemon import stop_on_signals
from icrf.errors import IcrfError, InternalError, error_from_json
from icrf.ports import AgentLink, ClusterFacts, ClusterRuntime, PhaseReport
from icrf.protocol import (
    PROTOCOL_VERSION,
    Activate,
    CallDone,
    CallNode,
    Goodbye,
    Heartbeat,
    Instruction,
    Lease,
    ModelStored,
    Register,
    Reject,
    Release,
    Released,
    Reserve,
    Reserved,
    SendMessage,
    StoreModel,
)
from icrf.wire.agent_link import GrpcAgentLink
from icrf_agent.cluster_gateway import GatewaySettings
from icrf_agent.core import Action, Advance, AgentCore, Discard, Perform, Say, failure
from icrf_agent.ray_substrate import RaySubstrate
from icrf_agent.round_machine import AGGREGATE, EVALUATE, PUBLISH, SEND, TRAIN
from icrf_agent.runtime import HostedRuntime
from icrf_agent.settings import AgentSettings

log = logging.getLogger("icrf.agent")

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class AgentIdentity:
    """Who this agent is; a new incarnation at every start."""

    cluster: str
    incarnation: str
    labels: dict[str, str] = field(default_factory=dict)
    num_slots: int | None = None


class AgentService:
    """Serves one cluster until it is stopped or refused.

    Args:
        identity: cluster name, incarnation and labels.
        link: the control stream to the mediator.
        runtime: the cluster that computes.
    """

    def __init__(self, identity: AgentIdentity, link: AgentLink, runtime: ClusterRuntime) -> None:
        self._identity, self._link, self._runtime = identity, link, runtime
        self._core = AgentCore(identity.cluster)
        self._tasks: set[asyncio.Task[None]] = set()
        self._facts: ClusterFacts | None = None
        self._heartbeat: asyncio.Task[None] | None = None
        self._refusal: IcrfError | None = None
        self.registered = asyncio.Event()

    async def start(self) -> ClusterFacts:
        """Start the runtime; the cluster's capacity and fingerprint."""
        self._facts = await self._runtime.start()
        self._spawn(self._watch_arrivals())
        return self._facts

    async def serve(self) -> None:
        """Serve until `stop`; raises the mediator's refusal (A001, A002, P004) if there was one."""
        await self._link.run(self._register, self._deliver)
        if self._refusal:
            raise self._refusal

    async def stop(self) -> None:
        """Say goodbye, end all tasks, close link and runtime; harmless when called twice."""
        self._link.report(Goodbye(self._identity.incarnation, "stopped"))
        await self._link.close()
        tasks = [t for t in (*self._tasks, self._heartbeat) if t is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._heartbeat = None
        await self._runtime.close()

    # ------------------------------------------------------------ the link

    def _register(self) -> Register:
        assert self._facts is not None
        return Register(
            cluster=self._identity.cluster,
            incarnation=self._identity.incarnation,
            protocol_version=PROTOCOL_VERSION,
            software_version=__version__,
            capacity=self._facts.capacity,
            fingerprint=self._facts.fingerprint,
            labels=dict(self._identity.labels),
            address=self._facts.gateway_address,
        )

    def _deliver(self, instruction: Instruction) -> None:
        if isinstance(instruction, Lease):
            self.registered.set()
            if self._heartbeat is None:
                self._heartbeat = asyncio.create_task(self._beat(instruction.heartbeat_s))
        elif isinstance(instruction, Reject):
            self._refusal = error_from_json(instruction.error_json)
            self.registered.set()
        self._act(self._core.instructed(instruction, time.monotonic()))

    async def _beat(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            self._link.report(Heartbeat(self._identity.incarnation))

    async def _watch_arrivals(self) -> None:
        async def watch() -> None:
            async for arrival in self._runtime.arrivals():
                self._act(self._core.arrived(arrival, time.monotonic()))

        try:
            await guarded(watch)
        except IcrfError as error:
            # Deaf to other clusters, this one would keep every round waiting until its deadline.
            log.error("cluster %s receives no payloads any more: %s", self._identity.cluster, error)
            self._refusal = error
            await self._link.close()

    # ------------------------------------------------------------ actions

    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Say):
                self._link.report(action.report)
            elif isinstance(action, Perform):
                self._spawn(self._perform(action.instruction))
            elif isinstance(action, Advance):
                self._spawn(self._advance(action))
            elif isinstance(action, Discard):
                self._spawn(self._runtime.abort(action.run_id, action.round, action.attempt))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the agent failed", exc_info=task.exception())

    async def _advance(self, action: Advance) -> None:
        began = time.monotonic()
        try:
            result = await guarded(lambda: self._run_step(action))
        except IcrfError as error:
            log.warning("round %d on %s: %s", action.start.round, self._identity.cluster, error)
            self._act(self._core.step_failed(action.start, error))
            return
        now = time.monotonic()
        self._act(self._core.step_done(action.start, action.step, result, now - began, now))

    async def _run_step(self, action: Advance) -> PhaseReport | None:
        start, step, runtime = action.start, action.step, self._runtime
        if step.kind == TRAIN:
            return await runtime.train(start.run_id, start)
        if step.kind == AGGREGATE:
            return await runtime.aggregate(start.run_id, start)
        if step.kind == EVALUATE:
            return await runtime.evaluate(start.run_id, start)
        if step.kind == PUBLISH:
            await runtime.publish_model(start.run_id, start)
        elif step.kind == SEND and step.transfer is not None:
            await runtime.send_payload(start.run_id, start, step.transfer)
        return None

    async def _perform(self, instruction: Instruction) -> None:
        try:
            await guarded(lambda: self._carry_out(instruction))
        except IcrfError as error:
            log.warning("%s on %s: %s", type(instruction).__name__, self._identity.cluster, error)
            if isinstance(instruction, CallNode | SendMessage):
                self._link.report(CallDone(instruction.run_id, instruction.call_id, error_json=error.to_json()))
            elif isinstance(instruction, StoreModel):
                self._link.report(
                    ModelStored(
                        instruction.run_id, instruction.generation, instruction.round, error_json=error.to_json()
                    )
                )
            elif report := failure(instruction, error):
                self._link.report(report)

    async def _carry_out(self, instruction: Instruction) -> None:
        runtime, report = self._runtime, self._link.report
        if isinstance(instruction, Reserve):
            await runtime.reserve(instruction)
            report(Reserved(instruction.run_id, instruction.generation))
        elif isinstance(instruction, Activate):
            report(await runtime.activate(instruction))
        elif isinstance(instruction, Release):
            await runtime.release(instruction.run_id)
            report(Released(instruction.run_id, instruction.generation))
        elif isinstance(instruction, CallNode):
            value = await runtime.call_node(
                instruction.run_id, instruction.node_id, instruction.method, instruction.arguments
            )
            artifact = f"call/{instruction.call_id}"
            await self._link.upload(instruction.run_id, artifact, chunks_of(value))
            report(CallDone(instruction.run_id, instruction.call_id, artifact))
        elif isinstance(instruction, SendMessage):
            await runtime.send_message(instruction.run_id, instruction.recipients, instruction.message)
            report(CallDone(instruction.run_id, instruction.call_id))
        elif isinstance(instruction, StoreModel):
            await self._store_model(instruction)

    async def _store_model(self, order: StoreModel) -> None:
        model = await self._runtime.final_model(order.run_id, order.round)
        artifact = "model.safetensors"
        await self._link.upload(order.run_id, artifact, chunks_of(model.safetensors))
        self._link.report(ModelStored(order.run_id, order.generation, order.round, artifact, model.sha256))


def chunks_of(data: bytes) -> Any:
    """Slices of at most 1 MiB."""
    view = memoryview(data)
    return (bytes(view[i : i + CHUNK_BYTES]) for i in range(0, len(view), CHUNK_BYTES))


async def guarded(work: Callable[[], Awaitable[Any]]) -> Any:
    """Run `work`; whatever is no IcrfError becomes X001, with its traceback in the log and not on the wire."""
    try:
        return await work()
    except (IcrfError, asyncio.CancelledError):
        raise
    except Exception as error:  # the last line of defence of a daemon: nothing may end a task in silence
        log.exception("unexpected")
        raise InternalError(
            "X001", f"{type(error).__name__}: {error}", hint="the agent's log has the traceback"
        ) from error


async def serve_agent(settings: AgentSettings, stop: asyncio.Event) -> int:
    """Serve a cluster until `stop`: what the command ``fabric-agent`` runs. Returns the exit code."""
    incarnation = uuid.uuid4().hex
    gateway = GatewaySettings(settings.cluster, incarnation, settings.advertise, settings.mediator)
    substrate = RaySubstrate(settings.ray_address, gateway, settings.num_slots)
    runtime = HostedRuntime(settings.cluster, substrate, allow=settings.allow)
    link = GrpcAgentLink(settings.mediator, on_state=lambda text: log.info("%s", text))
    identity = AgentIdentity(settings.cluster, incarnation, dict(settings.labels))
    agent = AgentService(identity, link, runtime)
    stopping = asyncio.create_task(stop.wait())
    try:
        facts = await agent.start()
        # Ray puts a handler of its own in front when it connects.
        stop_on_signals(stop)
        log.info(
            "cluster %s: %d slots, %g CPUs, gateway %s",
            settings.cluster,
            facts.capacity.num_slots,
            facts.capacity.num_cpus,
            facts.gateway_address or "through the relay",
        )
        serving = asyncio.create_task(agent.serve())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            await serving
    finally:
        stopping.cancel()
        await agent.stop()
    return 0
