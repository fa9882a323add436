"""Who serves which cluster: registration, leases and the slots that runs hold. Pure: time comes in with each call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from icrf.daemon import CLUSTER_NAME
from icrf.errors import AgentError, ConfigError, IcrfError, ProtocolError
from icrf.protocol import PROTOCOL_VERSION, Capacity, ClusterInfo, Register
from icrf_mediator.holdings import Holding, Lack, lack_on


@dataclass
class Member:
    """One registered cluster."""

    info: ClusterInfo
    peer: str
    lease_until: float
    agent_id: str = ""
    draining: bool = False
    connected: bool = True
    holdings: dict[str, Holding] = field(default_factory=dict)

    @property
    def free_slots(self) -> int:
        return self.info.capacity.num_slots - sum(held.slots for held in self.holdings.values())


class Membership:
    """The table of clusters, one agent per cluster name.

    Args:
        ttl_s: how long a cluster stays owned after the last heartbeat.
    """

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._members: dict[str, Member] = {}

    def register(self, request: Register, peer: str, now_s: float) -> IcrfError | None:
        """Admit an agent, or say why not.

        The same incarnation may come back as often as it likes. A new incarnation of the same agent takes over at once:
        the lock of its state folder proves that the old process is gone.
        """
        if CLUSTER_NAME.fullmatch(request.cluster) is None:
            shown = ascii(request.cluster[:80])
            return ConfigError("C013", f"{shown} is no cluster name", place="--cluster", allowed=CLUSTER_NAME.pattern)
        if request.protocol_version != PROTOCOL_VERSION:
            return ProtocolError(
                "P004",
                f"agent of cluster {request.cluster} speaks protocol {request.protocol_version}",
                allowed=f"protocol {PROTOCOL_VERSION}",
                hint=f"install the same icrf release as the mediator's (agent has {request.software_version})",
            )
        held = self._members.get(request.cluster)
        same = held is not None and (
            held.info.incarnation == request.incarnation or bool(request.agent_id and held.agent_id == request.agent_id)
        )
        if held and not same and held.lease_until > now_s:
            return AgentError(
                "A001",
                f"cluster {request.cluster} is served by instance {held.info.incarnation[:8]} from {held.peer}, "
                f"lease {held.lease_until - now_s:.0f} s left",
                place="--cluster",
                value=request.cluster,
                hint="give this cluster another name, or stop the other agent first",
            )
        kept = held.holdings if held and same else {}
        info = ClusterInfo(
            name=request.cluster,
            incarnation=request.incarnation,
            capacity=request.capacity,
            fingerprint=request.fingerprint,
            labels=dict(request.labels),
            address=request.address,
        )
        self._members[request.cluster] = Member(info, peer, now_s + self._ttl_s, request.agent_id, holdings=dict(kept))
        return None

    def heartbeat(self, cluster: str, incarnation: str, now_s: float) -> bool:
        """Renew the lease; False when this incarnation does not hold it."""
        member = self._members.get(cluster)
        if member is None or member.info.incarnation != incarnation:
            return False
        member.lease_until = now_s + self._ttl_s
        return True

    def disconnected(self, cluster: str, incarnation: str) -> None:
        """The control stream ended; the lease runs on, so that the agent may come back."""
        member = self._members.get(cluster)
        if member and member.info.incarnation == incarnation:
            member.connected = False

    def leave(self, cluster: str, incarnation: str) -> bool:
        """The agent said goodbye: its name is free at once."""
        member = self._members.get(cluster)
        if member is None or member.info.incarnation != incarnation:
            return False
        del self._members[cluster]
        return True

    def rebuilt(self, cluster: str, capacity: Capacity, address: str) -> None:
        """The cluster was built anew: what it offers now, and where its gateway is."""
        member = self._members[cluster]
        member.info = replace(member.info, capacity=capacity, address=address)

    def expire(self, now_s: float) -> list[str]:
        """Remove clusters whose lease ran out; their names."""
        lost = sorted(name for name, m in self._members.items() if m.lease_until <= now_s)
        for name in lost:
            del self._members[name]
        return lost

    def owns(self, cluster: str, incarnation: str) -> bool:
        """Whether this incarnation holds the cluster now."""
        member = self._members.get(cluster)
        return member is not None and member.info.incarnation == incarnation

    def holder(self, cluster: str, now_s: float) -> str | None:
        """Whose gateway a cluster's is now, if anybody's: the id of the agent, over all its lives, if it has one."""
        member = self._members.get(cluster)
        if member is None or member.lease_until <= now_s:
            return None
        return member.agent_id or member.info.incarnation

    def take(self, run_id: str, needs: Mapping[str, Holding]) -> None:
        """Account what a run holds by cluster, on the clusters that are there."""
        for cluster, need in needs.items():
            if cluster in self._members:
                self._members[cluster].holdings[run_id] = need

    def address(self, cluster: str) -> str:
        """Where the gateway of a cluster can be dialled; empty when only the relay reaches it."""
        member = self._members.get(cluster)
        return member.info.address if member else ""

    def incarnation(self, cluster: str) -> str:
        """The incarnation that holds a cluster."""
        return self._members[cluster].info.incarnation

    def drain(self, cluster: str) -> None:
        """The agent wants to leave: nothing new is placed on its cluster."""
        self._members[cluster].draining = True

    def draining(self) -> list[str]:
        """Clusters whose agents want to leave."""
        return sorted(name for name, m in self._members.items() if m.draining)

    def give_back(self, run_id: str, cluster: str) -> None:
        """Free what a run held on a cluster; harmless when it held nothing."""
        member = self._members.get(cluster)
        if member:
            member.holdings.pop(run_id, None)

    def lacking(self, needs: Mapping[str, Holding], run_id: str = "") -> Lack | None:
        """What a run that needs this, by cluster, has to wait for; None when everything is free.

        Args:
            run_id: whose holdings count as free.
        """
        if absent := self.absent(needs):
            return absent
        members = {cluster: self._members[cluster] for cluster in sorted(needs)}
        lacks = (
            lack_on(name, m.info.capacity, {r: h for r, h in m.holdings.items() if r != run_id}, needs[name])
            for name, m in members.items()
        )
        return min((lack for lack in lacks if lack), key=lambda lack: not lack.aside, default=None)

    def absent(self, clusters: Iterable[str]) -> Lack | None:
        """Which of these clusters takes nobody now, because its agent is away or leaves; None when all are there."""
        for cluster in sorted(clusters):
            member = self._members.get(cluster)
            if member is None:
                return Lack(f"cluster {cluster} to register", aside=True)
            if not member.connected:
                return Lack(f"cluster {cluster} to come back", aside=True)
            if member.draining:
                return Lack(f"cluster {cluster} to come back (its agent is leaving)", aside=True)
        return None

    def clusters(self) -> list[ClusterInfo]:
        """All clusters by name, with their free slots."""
        return [
            replace(m.info, alive=m.connected and not m.draining, free_slots=m.free_slots)
            for _, m in sorted(self._members.items())
        ]

    def agents(self) -> dict[str, str]:
        """Who serves each cluster: the id of the agent, over all its lives, or its one life where it has no id."""
        return {name: m.agent_id or m.info.incarnation for name, m in self._members.items()}

    def names(self) -> set[str]:
        return set(self._members)
