"""Hosts as actors of a Ray cluster, in detached placement groups; see ``substrate.Substrate``.

Everything that is shared is detached, so that it outlives the agent: the topology manager, the gateway and the hosts.
Payloads are put by those actors and never by the agent, whose objects would die with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from icrf.errors import IcrfError, LocalError, NodeError, ResourceError, RunError
from icrf.federation.node import FederatedNode
from icrf.gangs import shortages
from icrf.learning.fingerprint import numeric_fingerprint
from icrf.ports import ClusterFacts
from icrf.protocol import KINDS_APART, Capacity, Reserve, Resources
from icrf.registry import load_attr
from icrf.spec import FederationConfig
from icrf_agent.cluster_gateway import GatewaySettings
from icrf_agent.host_nodes import LOCAL_TEMPLATE, HostSetup
from icrf_agent.keeper import accepts
from icrf_agent.ray_actors import (
    CONTROL,
    DEATHS,
    GatewayActor,
    HostActor,
    ManagerActor,
    RayActor,
    actor_id,
    answer,
    own_actor_class,
)
from icrf_agent.ray_calls import POLL_S, RayCalls
from icrf_agent.ray_memory import MemoryKills
from icrf_agent.ray_probe import ClusterWatch, answers, until_gone
from icrf_agent.substrate import Actor, Shared

log = logging.getLogger("icrf.agent")

NUM_THREADS = 1
NAMESPACE = "icrf"
# What Ray puts before the kind of a machine's GPUs where it names it as a resource.
_KIND = "accelerator_type:"
# An actor that was just killed is back within a few seconds; loading torch takes most of them.
PROBE_S = 20.0
REBUILD_DEADLINE_S = 600.0
# Each takes at most about 15 s with what `keeper.PATIENCE` sets, and is made only while the head's port is open.
CONNECT_TRIES = 4


@dataclass
class RaySubstrate:
    """A Ray cluster.

    Args:
        address: ``HOST:PORT`` of the GCS; None if this process is connected already.
        gateway: how other clusters reach this one; None for a fabric of one cluster.
        num_slots: most hosts at once; None: one per CPU.
        quota: most slots that one federation may hold at once; None: all.
        renew: called (in a thread) when the cluster has died; returns the ``HOST:PORT`` of the one to use from then
            on, after it has set what that one needs in the environment. None: wait for the same address.
    """

    address: str | None
    gateway: GatewaySettings | None = None
    num_slots: int | None = None
    quota: int | None = None
    renew: Callable[[], str] | None = None
    _groups: dict[str, PlacementGroup] = field(default_factory=dict)
    _watch: ClusterWatch = field(default_factory=ClusterWatch)
    _calls: RayCalls = field(init=False)
    _shared: list[Any] = field(default_factory=list)
    _kills: MemoryKills = field(default_factory=MemoryKills)
    _resources: dict[str, float] = field(default_factory=dict)
    _nodes: tuple[Resources, ...] = ()

    def __post_init__(self) -> None:
        self._calls = RayCalls(self._watch)

    async def start(self, cluster: str) -> tuple[ClusterFacts, Shared]:
        try:
            return await self._begin(cluster)
        except Exception as error:  # whatever Ray raises while it comes up; of the second try it gets out
            if self.renew is None:
                raise
            # Ray's head answers before all of Ray is up, and a part that fails then takes the rest along.
            log.warning("the Ray cluster of %s did not come up (%s); starting another", cluster, error)
            return await self.rebuild(cluster)

    async def _begin(self, cluster: str) -> tuple[ClusterFacts, Shared]:
        if self.address is not None and not ray.is_initialized():
            # On the main thread, where Ray wants it; nothing else runs yet that this could hold up.
            self._connect(self.address)
        logging.getLogger("ray.actor").addFilter(_is_news)
        self._resources = dict(await self._calls.run(ray.cluster_resources))
        nodes = await self._calls.run(ray.nodes)
        self._nodes = tuple(_offered(node["Resources"]) for node in nodes if node["Alive"])
        manager = await self._shared_actor(
            ManagerActor, f"{cluster}/topology-manager", (cluster,), 16, lambda actor: _is_up(actor.pid.remote())
        )
        self._shared = [manager]
        gateway: Actor | None = None
        if self.gateway is not None:
            wanted = (replace(self.gateway, incarnation=""), actor_id(manager))

            async def fits(actor: Any) -> bool:
                settings, works_for = await actor.describe.remote()
                return (replace(settings, incarnation=""), works_for) == wanted

            handle = await self._shared_actor(GatewayActor, f"{cluster}/gateway", (self.gateway, manager), 32, fits)
            self._shared.append(handle)
            gateway = RayActor(handle, f"gateway of {cluster}", self._watch)
            await self.open_gateway("")
        return self._facts(), Shared(RayActor(manager, f"topology manager of {cluster}", self._watch), gateway)

    async def _shared_actor(
        self, kind: type, name: str, arguments: tuple[Any, ...], width: int, fits: Callable[[Any], Awaitable[bool]]
    ) -> Any:
        """The living actor of that name if it answers and fits, else a new one in its place."""
        living = await self._calls.find(name, NAMESPACE)
        if living is not None:
            if await _holds(fits(living)):
                return living
            log.warning("%s does not answer or is of other settings; it is replaced", name)
            await self._calls.run(ray.kill, living)
        options = {"name": name, "namespace": NAMESPACE, "num_cpus": 0, "max_concurrency": width, **_LASTING}
        if kind is GatewayActor:
            # On the agent's machine, which has the address that peers dial and the certificate.
            here = await self._calls.run(lambda: ray.get_runtime_context().get_node_id())
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(here, soft=True)
        return await self._calls.create(ray.remote(kind).options(**options), arguments)

    async def open_gateway(self, address: str) -> str:
        found: str = await answer(self._shared[1].open.remote(address), self._watch, "gateway", "open")
        return found

    async def revive(self, actor: Actor, hung: bool) -> None:
        """Ray restarts by itself what has died."""
        if hung and isinstance(actor, RayActor):
            await self._calls.run(_restart, actor.handle)

    def _connect(self, address: str) -> None:
        # A cluster of the agent's own has Ray try once; a head that is slow but there is asked again.
        tries = CONNECT_TRIES if self.renew is not None else 1
        for left in reversed(range(tries)):
            # Ray itself would try for long, and take no signal meanwhile.
            if not accepts(address):
                raise LocalError(
                    "L008", f"nothing listens at {address}", place="--ray-address", hint="is the Ray cluster running?"
                )
            try:
                ray.init(
                    address=address,
                    namespace=NAMESPACE,
                    log_to_driver=False,
                    logging_level="error",
                    configure_logging=False,
                )
            except Exception as error:  # Ray raises anything here: sockets, version checks, authentication
                if left and isinstance(error, ConnectionError):
                    log.info("the Ray head at %s does not answer yet: %s", address, error)
                    ray.shutdown()
                    continue
                raise LocalError(
                    "L008",
                    f"cannot use the Ray cluster at {address}: {type(error).__name__}: {str(error).splitlines()[0]}",
                    place="--ray-address",
                    value=address,
                    hint="is it running, of the same Ray version, and readable with this machine's token?",
                ) from error
            return

    def _facts(self) -> ClusterFacts:
        cpus = float(self._resources.get("CPU", 0.0))
        gpus = float(self._resources.get("GPU", 0.0))
        slots = self.num_slots if self.num_slots is not None else max(1, int(cpus))
        memory = int(self._resources.get("memory", 0))
        capacity = Capacity(slots, cpus, gpus, memory, self._nodes, min(self.quota or 0, slots))
        return ClusterFacts(capacity, numeric_fingerprint(device_of(self._resources), NUM_THREADS))

    async def reserve(self, request: Reserve) -> None:
        bundle = {"CPU": request.resources.num_cpus}
        if request.resources.num_gpus:
            bundle["GPU"] = request.resources.num_gpus
        bundles = [dict(bundle) for _ in range(request.num_slots)]
        group = await self._group_of(request.run_id)
        if group is not None and group.bundle_specs != bundles:
            await self.release(request.run_id)
            group = None
        if group is None:
            self._require_feasible(request)
            group = placement_group(
                bundles, strategy=request.strategy, lifetime="detached", name=_group_name(request.run_id)
            )
            self._groups[request.run_id] = group
        if not await self._becomes_ready(request, group):
            await self.release(request.run_id)
            free = await self._calls.run(ray.available_resources)
            holders = ", ".join(await self._calls.run(_holders)) or "tasks and actors without a placement group"
            left = _spell({k: free.get(k, 0.0) for k in bundle})
            raise ResourceError(
                "R003",
                f"{request.num_slots} slots of {_spell(bundle)} were not free within {request.deadline_s:g} s",
                value=f"{left} free",
                hint=f"on this Ray cluster, resources are held by {holders}",
            )

    async def _becomes_ready(self, request: Reserve, group: PlacementGroup) -> bool:
        """Whether the group has all its bundles before the deadline; F005 if the run is released meanwhile."""
        released = RunError("F005", f"run {request.run_id[:8]} was released while it was reserving")
        try:
            ready = bool(await self._calls.run(group.wait, request.deadline_s))
        except Exception as error:  # Ray raises the bare class when the group is removed meanwhile
            if self._groups.get(request.run_id) is group:
                raise
            raise released from error
        if self._groups.get(request.run_id) is not group:
            raise released
        return ready

    async def _group_of(self, run_id: str) -> PlacementGroup | None:
        """The reservation of a run, also one that an earlier life of the agent has made."""
        if run_id not in self._groups:
            found = await self._calls.run(_find_group, _group_name(run_id))
            if found is not None:
                self._groups[run_id] = found
        return self._groups.get(run_id)

    def _require_feasible(self, request: Reserve) -> None:
        found = shortages(request.num_slots, request.resources, self._nodes, request.strategy)
        if found:
            raise ResourceError("R001", "; ".join(found), place="resources")

    async def create_host(self, setup: HostSetup, name: str, slot: int) -> Actor:
        run_id = setup.activation.run_id
        living = await self._calls.find(name, run_id)
        if living is not None:
            if await self._serves(living, slot):
                return RayActor(living, name, self._watch)
            await self._calls.run(ray.kill, living)
        group = await self._group_of(run_id)
        if group is None or slot >= len(group.bundle_specs):
            raise RunError("F005", f"no slot {slot} is reserved for {name}", place=name)
        bundle = group.bundle_specs[slot]
        kind: type = HostActor
        if len(setup.nodes) == 1:
            kind = own_actor_class(_template_of(setup), setup.nodes[0])
        options = ray.remote(concurrency_groups={CONTROL: 1})(kind).options(
            name=name,
            namespace=run_id,
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=slot),
            **_LASTING,
        )
        return RayActor(await self._calls.create(options, (self._shared[0], slot, setup.notes)), name, self._watch)

    async def find_host(self, run_id: str, name: str, slot: int) -> Actor | None:
        living = await self._calls.find(name, run_id)
        if living is None or not await self._serves(living, slot) or await self._group_of(run_id) is None:
            return None
        return RayActor(living, name, self._watch)

    async def _serves(self, host: Any, slot: int) -> bool:
        wanted = (slot, actor_id(self._shared[0]))

        async def fits() -> bool:
            about: tuple[int, str] = await host.host_about.remote()
            return about == wanted

        return await _holds(fits())

    async def keep_hosts(self, run_id: str, names: Collection[str]) -> None:
        await self._calls.run(_end_hosts, run_id, frozenset(names), self._watch)

    async def release(self, run_id: str) -> None:
        if self._watch.reason:
            self._groups.pop(run_id, None)
            return
        group = await self._group_of(run_id)
        self._groups.pop(run_id, None)
        try:
            await self._calls.run(_release, run_id, group, self._watch)
        except NodeError:
            # With the cluster gone, nothing of the run is left on it.
            if not self._watch.reason:
                raise

    async def starved(self, lives: Collection[str]) -> frozenset[str]:
        return await self._calls.run(self._kills.among, lives)

    async def lost(self) -> str:
        """Never returns for a cluster of this process that nobody could renew: it dies with the process."""
        if self.address is None and self.renew is None:
            await asyncio.Event().wait()
        reason = await until_gone(self.address or ray.get_runtime_context().gcs_address)
        self._watch.lose(reason)
        return reason

    async def rebuild(self, cluster: str) -> tuple[ClusterFacts, Shared]:
        self._watch.lose("it is being replaced")
        self._groups.clear()
        self._shared = []
        await asyncio.to_thread(ray.shutdown)
        if self.renew is not None:
            self.address = await asyncio.to_thread(self.renew)
        _forget_token()
        await self._await_head()
        self._watch = ClusterWatch()
        self._calls = RayCalls(self._watch)
        return await self._begin(cluster)

    async def _await_head(self) -> None:
        if self.address is None:
            return
        deadline = time.monotonic() + REBUILD_DEADLINE_S
        while not await answers(self.address):
            if time.monotonic() > deadline:
                raise LocalError(
                    "L008",
                    f"no Ray cluster at {self.address} for {REBUILD_DEADLINE_S:.0f} s",
                    place="--ray-address",
                    value=self.address,
                )
            await asyncio.sleep(POLL_S)
        await asyncio.to_thread(self._connect, self.address)

    async def close(self) -> None:
        shared, self._shared = self._shared, []
        try:
            if not self._watch.reason and ray.is_initialized():
                await self._end_all(shared)
        finally:
            if not await self._calls.settle():
                log.warning("calls of Ray do not return; they are left behind")
            self._watch.lose("it was left")
            if self.address is not None:
                await asyncio.to_thread(ray.shutdown)

    async def _end_all(self, shared: list[Any]) -> None:
        try:
            for run_id in list(self._groups):
                await self.release(run_id)
            if len(shared) > 1:
                await _holds(_closed(shared[1]))
        finally:
            await self._calls.run(_end, shared)


# Detached, and restarted (empty) by Ray as often as it dies; calls that were in flight fail and are not repeated. Calls
# leave no events behind: Ray's head keeps those of the last 100,000, hundreds of megabytes after some thousand rounds.
_LASTING: dict[str, Any] = {
    "lifetime": "detached",
    "max_restarts": -1,
    "max_task_retries": 0,
    "enable_task_events": False,
}


def _is_news(record: logging.LogRecord) -> bool:
    """Ray warns at every host that it ends with its placement group, which is just what is wanted."""
    return "restartable detached actor with a placement group" not in record.getMessage()


def _forget_token() -> None:
    """Ray reads its token once per process, but a new cluster has another one."""
    loader = getattr(ray._raylet, "AuthenticationTokenLoader", None)
    if loader is not None:
        loader.instance().reset_cache()


def _group_name(run_id: str) -> str:
    return f"icrf-{run_id}"


def _holders() -> list[str]:
    """Who holds a part of the cluster through a placement group, with what it takes; foreign programs too."""
    found = []
    for group in placement_group_table().values():
        if group["state"] == "CREATED":
            bundles = group["bundles"].values()
            taken = {unit: sum(bundle.get(unit, 0.0) for bundle in bundles) for unit in ("CPU", "GPU")}
            found.append(
                f"{group['name'] or 'a group without a name'} ({_spell({u: n for u, n in taken.items() if n})})"
            )
    return sorted(found)


def _offered(resources: Mapping[str, float]) -> Resources:
    return Resources(float(resources.get("CPU", 0.0)), float(resources.get("GPU", 0.0)))


def _find_group(name: str) -> PlacementGroup | None:
    try:
        return get_placement_group(name)
    except ValueError:
        return None


async def _is_up(reference: Any) -> bool:
    await reference
    return True


async def _closed(gateway: Any) -> bool:
    (await gateway.invoke.remote("close")).take()
    return True


async def _holds(condition: Awaitable[bool]) -> bool:
    """Whether a question to an actor is answered in time, and with yes; a dead one gets one more chance."""
    try:
        return await asyncio.wait_for(condition, PROBE_S)
    except (TimeoutError, IcrfError, *DEATHS) as error:
        log.info("an actor does not answer: %s", error)
        return False


def _end(actors: list[Any]) -> None:
    for actor in actors:
        ray.kill(actor)


def _restart(actor: Any) -> None:
    ray.kill(actor, no_restart=False)


def _end_hosts(run_id: str, spared: Collection[str], watch: ClusterWatch) -> None:
    for entry in ray.util.list_named_actors(all_namespaces=True):
        if watch.reason:
            return  # hosts of the cluster that took the place of this one are not meant
        if entry["namespace"] == run_id and entry["name"] not in spared:
            try:
                ray.kill(ray.get_actor(entry["name"], namespace=run_id))
            except ValueError:
                continue  # it has ended meanwhile


def _release(run_id: str, group: PlacementGroup | None, watch: ClusterWatch) -> None:
    _end_hosts(run_id, (), watch)
    if group is not None and not watch.reason:
        remove_placement_group(group)


def device_of(resources: Mapping[str, float]) -> str:
    """What there is to compute on, for the numeric fingerprint: ``cpu``, or ``cuda:`` and what Ray calls the GPUs.

    Args:
        resources: of the cluster, as Ray counts them.
    """
    if not resources.get("GPU"):
        return "cpu"
    kinds = [name.removeprefix(_KIND) for name in sorted(resources) if name.startswith(_KIND)]
    return f"cuda:{KINDS_APART.join(kinds) or 'unnamed'}"


def _template_of(setup: HostSetup) -> type:
    """The class of the host's only node; only its method names matter here."""
    spec = setup.activation.nodes[setup.nodes[0]]
    config = FederationConfig.from_json(setup.activation.config_json)
    key = "server_template" if "aggregate" in spec.role_parts else "client_template"
    name: str | None = getattr(config, key)
    if not name:
        return FederatedNode
    return setup.templates[name] if name.startswith(LOCAL_TEMPLATE) else load_attr(name, key)


def _spell(resources: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
