"""Who serves which cluster: registration, leases and the slots that runs hold. Pure: time comes in with each call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from icrf.daemon import CLUSTER_NAME
from icrf.errors import AgentError, ConfigError, IcrfError, ProtocolError
from icrf.protocol import PROTOCOL_VERSION, ClusterInfo, Register


@dataclass
class Member:
    """One registered cluster."""

    info: ClusterInfo
    peer: str
    lease_until: float
    connected: bool = True
    slots_by_run: dict[str, int] = field(default_factory=dict)

    @property
    def free_slots(self) -> int:
        return self.info.capacity.num_slots - sum(self.slots_by_run.values())


class Membership:
    """The table of clusters, one agent per cluster name.

    Args:
        ttl_s: how long a cluster stays owned after the last heartbeat.
    """

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._members: dict[str, Member] = {}

    def register(self, request: Register, peer: str, now_s: float) -> IcrfError | None:
        """Admit an agent, or say why not. The same incarnation may come back as often as it likes."""
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
        if held and held.info.incarnation != request.incarnation and held.lease_until > now_s:
            return AgentError(
                "A001",
                f"cluster {request.cluster} is served by instance {held.info.incarnation[:8]} from {held.peer}, "
                f"lease {held.lease_until - now_s:.0f} s left",
                place="--cluster",
                value=request.cluster,
                hint="give this cluster another name, or stop the other agent first",
            )
        kept = held.slots_by_run if held and held.info.incarnation == request.incarnation else {}
        info = ClusterInfo(
            name=request.cluster,
            incarnation=request.incarnation,
            capacity=request.capacity,
            fingerprint=request.fingerprint,
            labels=dict(request.labels),
            address=request.address,
        )
        self._members[request.cluster] = Member(info, peer, now_s + self._ttl_s, slots_by_run=dict(kept))
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
        """The incarnation that holds a cluster now, if any does."""
        member = self._members.get(cluster)
        return member.info.incarnation if member is not None and member.lease_until > now_s else None

    def take(self, run_id: str, slots: Mapping[str, int]) -> None:
        """Account the slots of a run."""
        for cluster, count in slots.items():
            self._members[cluster].slots_by_run[run_id] = count

    def give_back(self, run_id: str, cluster: str) -> None:
        """Free what a run held on a cluster; harmless when it held nothing."""
        member = self._members.get(cluster)
        if member:
            member.slots_by_run.pop(run_id, None)

    def lacking(self, slots: Mapping[str, int]) -> str:
        """What a run with these slots has to wait for; empty when everything is free."""
        for cluster in sorted(slots):
            member = self._members.get(cluster)
            if member is None:
                return f"cluster {cluster} to register"
            if not member.connected:
                return f"cluster {cluster} to come back"
            if member.free_slots < slots[cluster]:
                users = ", ".join(run[:8] for run in sorted(member.slots_by_run))
                return f"{slots[cluster]} slots on {cluster} ({member.free_slots} free; held by {users})"
        return ""

    def clusters(self) -> list[ClusterInfo]:
        """All clusters by name, with their free slots."""
        return [replace(m.info, alive=m.connected, free_slots=m.free_slots) for _, m in sorted(self._members.items())]

    def names(self) -> set[str]:
        return set(self._members)
