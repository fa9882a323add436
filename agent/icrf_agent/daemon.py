"""The agent as a process: everything wired together, served until it is told to stop, left in order."""

from __future__ import annotations

import asyncio
import logging
import uuid

from icrf import failpoints
from icrf.daemon import stop_on_signals
from icrf.errors import EXIT_TRY_AGAIN
from icrf.protocol import Warned
from icrf.wire.agent_link import GrpcAgentLink
from icrf_agent.cluster_gateway import GatewaySettings
from icrf_agent.journal import AgentJournal
from icrf_agent.ray_substrate import RaySubstrate
from icrf_agent.runtime import HostedRuntime
from icrf_agent.service import AgentIdentity, AgentService
from icrf_agent.settings import AgentSettings

log = logging.getLogger("icrf.agent")


async def serve_agent(settings: AgentSettings, stop: asyncio.Event) -> int:
    """Serve a cluster until `stop`: what the command ``fabric-agent`` runs.

    Returns:
        The exit code: 0, or 75 when rounds since the last checkpoint will have to run again.
    """
    failpoints.set_role(f"agent-{settings.cluster}")
    journal = AgentJournal(settings.state_dir / "runs")
    incarnation = uuid.uuid4().hex
    # The gateway outlives the agent, whose next life takes it over.
    gateway = GatewaySettings(settings.cluster, journal.agent_id, settings.advertise, settings.mediator, settings.tls)
    substrate = RaySubstrate(settings.ray_address, gateway, settings.num_slots, settings.quota, renew=settings.renew)
    link = GrpcAgentLink(settings.mediator, on_state=lambda text: log.info("%s", text), tls=settings.tls)
    runtime = HostedRuntime(
        settings.cluster,
        substrate,
        allow=settings.allow,
        notes=settings.state_dir / "hosts",
        warn=lambda run_id, text: link.report(Warned(run_id, text)),
    )
    identity = AgentIdentity(settings.cluster, incarnation, dict(settings.labels), journal.agent_id)
    agent = AgentService(identity, link, runtime, journal)
    stopping = asyncio.create_task(stop.wait())
    code = 0
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
        elif not await agent.drain():
            log.warning("left without the mediator's consent: rounds since the last checkpoint will run again")
            code = EXIT_TRY_AGAIN
    finally:
        stopping.cancel()
        await agent.stop()
    return code
