"""Hosts as actors of a Ray cluster, in detached placement groups; see ``runtime.Substrate``.

Everything that is shared is detached, so that it outlives the agent: the topology manager, the gateway and the hosts.
Payloads are put by those actors and never by the agent, whose objects would die with it.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from icrf.errors import IcrfError, LocalError, ResourceError, RunError
from icrf.federation.node import FederatedNode
from icrf.learning.fingerprint import numeric_fingerprint
from icrf.ports import ClusterFacts
from icrf.protocol import Capacity, Reserve
from icrf.registry import load_attr
from icrf.spec import FederationConfig
from icrf_agent.cluster_gateway import GatewaySettings
from icrf_agent.host_nodes import LOCAL_TEMPLATE, HostSetup
from icrf_agent.ray_actors import GatewayActor, HostActor, ManagerActor, RayActor, answer, own_actor_class
from icrf_agent.runtime import Actor, Shared

log = logging.getLogger("icrf.agent")

NUM_THREADS = 1


@dataclass
class RaySubstrate:
    """A Ray cluster.

    Args:
        address: ``HOST:PORT`` of the GCS; None if this process is connected already.
        gateway: how other clusters reach this one; None for a fabric of one cluster.
        num_slots: most hosts at once; None: one per CPU.
    """

    address: str | None
    gateway: GatewaySettings | None = None
    num_slots: int | None = None
    _groups: dict[str, PlacementGroup] = field(default_factory=dict)
    _hosts: dict[str, list[Any]] = field(default_factory=dict)
    _shared: list[Any] = field(default_factory=list)
    _gateway: RayActor | None = None
    _resources: dict[str, float] = field(default_factory=dict)
    _nodes: int = 1

    async def start(self, cluster: str) -> tuple[ClusterFacts, Shared]:
        if self.address is not None:
            # On the main thread, where Ray wants it; nothing else runs yet that this could hold up.
            self._connect(self.address)
        self._resources = dict(await asyncio.to_thread(ray.cluster_resources))
        nodes = await asyncio.to_thread(ray.nodes)
        self._nodes = max(1, sum(1 for node in nodes if node["Alive"]))
        manager = self._share(ManagerActor, f"{cluster}/topology-manager", 16, cluster)
        if self.gateway is not None:
            handle = self._share(GatewayActor, f"{cluster}/gateway", 32, self.gateway, manager)
            name = f"gateway of {cluster}"
            await answer(handle.open.remote(), name, "open")
            self._gateway = RayActor(handle, name)
        return self._facts(), Shared(RayActor(manager, f"topology manager of {cluster}"), self._gateway)

    def _share(self, kind: type, name: str, num_threads: int, *arguments: Any) -> Any:
        """Start a threaded detached actor; L008 where one of that name lives already."""
        options = {"namespace": "icrf", "lifetime": "detached", "num_cpus": 0, "max_concurrency": num_threads}
        try:
            handle = ray.remote(kind).options(name=name, **options).remote(*arguments)
        except ValueError as error:
            raise LocalError(
                "L008",
                f"the Ray cluster has an actor '{name}' already",
                place="--ray-address",
                value=name,
                hint="another agent serves this Ray cluster under this name, or one was killed and left it",
            ) from error
        self._shared.append(handle)
        return handle

    def _connect(self, address: str) -> None:
        try:
            ray.init(
                address=address,
                namespace="icrf",
                log_to_driver=False,
                logging_level="error",
                configure_logging=False,
            )
        except Exception as error:  # Ray raises anything here: sockets, version checks, authentication
            raise LocalError(
                "L008",
                f"cannot use the Ray cluster at {address}: {type(error).__name__}: {str(error).splitlines()[0]}",
                place="--ray-address",
                value=address,
                hint="is it running, of the same Ray version, and readable with this machine's token?",
            ) from error

    def _facts(self) -> ClusterFacts:
        cpus = float(self._resources.get("CPU", 0.0))
        gpus = float(self._resources.get("GPU", 0.0))
        slots = self.num_slots if self.num_slots is not None else max(1, int(cpus))
        capacity = Capacity(slots, cpus, gpus, int(self._resources.get("memory", 0)), self._nodes)
        return ClusterFacts(capacity, numeric_fingerprint("cpu", NUM_THREADS))

    async def reserve(self, request: Reserve) -> None:
        if request.run_id in self._groups:
            return
        bundle = {"CPU": request.resources.num_cpus}
        if request.resources.num_gpus:
            bundle["GPU"] = request.resources.num_gpus
        self._require_feasible(request, bundle)
        group = placement_group(
            [dict(bundle) for _ in range(request.num_slots)],
            strategy=request.strategy,
            lifetime="detached",
            name=f"icrf-{request.run_id}-{request.generation}",
        )
        self._groups[request.run_id] = group
        released = RunError("F005", f"run {request.run_id[:8]} was released while it was reserving")
        try:
            ready = await asyncio.to_thread(group.wait, request.deadline_s)
        except Exception as error:  # Ray raises the bare class when the group is removed meanwhile
            if self._groups.get(request.run_id) is group:
                raise
            raise released from error
        if self._groups.get(request.run_id) is not group:
            raise released
        if not ready:
            await self.release(request.run_id)
            free = await asyncio.to_thread(ray.available_resources)
            raise ResourceError(
                "R003",
                f"{request.num_slots} slots of {_spell(bundle)} were not free within {request.deadline_s:.0f} s",
                value=_spell({k: free.get(k, 0.0) for k in bundle}),
                hint="another program holds them; wait for it or use fewer slots",
            )

    def _require_feasible(self, request: Reserve, bundle: dict[str, float]) -> None:
        for name, each in bundle.items():
            needed, total = each * request.num_slots, self._resources.get(name, 0.0)
            if needed > total + 1e-9:
                raise ResourceError(
                    "R001",
                    f"{request.num_slots} slots x {each:g} {name} = {needed:g} {name} needed, {total:g} in total",
                    place="resources",
                )
        if request.strategy == "STRICT_SPREAD" and request.num_slots > self._nodes:
            raise ResourceError(
                "R001",
                f"STRICT_SPREAD of {request.num_slots} slots over {self._nodes} Ray nodes",
                place="placement_group_strategy",
            )

    async def create_host(self, setup: HostSetup, name: str, slot: int) -> Actor:
        run_id = setup.activation.run_id
        group = self._groups.get(run_id)
        if group is None or slot >= len(group.bundle_specs):
            raise RunError("F005", f"no slot {slot} is reserved for {name}", place=name)
        bundle = group.bundle_specs[slot]
        kind: type = HostActor
        if len(setup.nodes) == 1:
            kind = own_actor_class(_template_of(setup), setup.nodes[0])
        handle = (
            ray.remote(kind)
            .options(
                name=name,
                namespace=run_id,
                lifetime="detached",
                num_cpus=bundle.get("CPU", 0),
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=slot),
            )
            .remote(self._shared[0])
        )
        self._hosts.setdefault(run_id, []).append(handle)
        return RayActor(handle, name)

    async def release(self, run_id: str) -> None:
        hosts, group = self._hosts.pop(run_id, []), self._groups.pop(run_id, None)
        await asyncio.to_thread(_end, hosts, group)

    async def close(self) -> None:
        gateway, self._gateway = self._gateway, None
        shared, self._shared = self._shared, []
        try:
            for run_id in {*self._groups, *self._hosts}:
                await self.release(run_id)
            if gateway is not None:
                await gateway.call("close")
        except IcrfError as error:
            log.warning("%s did not close in order: %s", gateway.name if gateway else "a run", error)
        finally:
            await asyncio.to_thread(_end, shared, None)
            if self.address is not None:
                await asyncio.to_thread(ray.shutdown)


def _end(actors: list[Any], group: PlacementGroup | None) -> None:
    if not ray.is_initialized():
        return
    for actor in actors:
        ray.kill(actor)
    if group is not None:
        remove_placement_group(group)


def _template_of(setup: HostSetup) -> type:
    """The class of the host's only node; only its method names matter here."""
    role = setup.activation.nodes[setup.nodes[0]].role
    config = FederationConfig.from_json(setup.activation.config_json)
    name = config.server_template if "aggregate" in role.split("-") else config.client_template
    if not name:
        return FederatedNode
    return setup.templates[name] if name.startswith(LOCAL_TEMPLATE) else load_attr(name)


def _spell(resources: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
