"""What was measured between clusters, and measuring it anew, one link of a cluster at a time. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from itertools import permutations
from math import isfinite

from icrf.errors import AgentError, ProtocolError
from icrf.ports import Write
from icrf.protocol import CallDone, LinkMeasured, MeasuredLink, MeasureLink, PeerAddress
from icrf_mediator.effects import Effects, Now
from icrf_mediator.membership import Membership

TABLE = "links"
# An agent gives up by itself before that: one that is late will not answer any more.
ANSWER_S = 60.0


@dataclass(frozen=True)
class _Open:
    """A link that is being measured."""

    link: MeasuredLink
    until_s: float


@dataclass
class _Sweep:
    """One measuring of all links.

    Attributes:
        waiting: links whose turn comes when neither end measures anything.
        under_way: by the name of the measurement.
        calls: whom to answer when all is measured.
    """

    waiting: list[tuple[str, str]]
    under_way: dict[str, _Open] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)


class Links:
    """The table of links.

    A figure holds for the two agents that it was measured between, over all lives of theirs: a cluster that another
    agent serves under the same name may be anywhere.

    Args:
        members: the clusters that are there.
    """

    def __init__(self, members: Membership) -> None:
        self._members = members
        self._known: dict[tuple[str, str], tuple[MeasuredLink, tuple[str, str]]] = {}
        self._sweep: _Sweep | None = None

    def restore(self, writes: Iterable[Write]) -> None:
        """Take over what an earlier life of the mediator has measured."""
        for write in writes:
            row = dict(write.row)
            source, target = row.pop("agents")
            link = MeasuredLink(**row)
            self._known[link.source, link.target] = link, (source, target)

    def known(self) -> tuple[MeasuredLink, ...]:
        """What holds between the clusters that are there, by source and target."""
        agents = self._members.agents()
        return tuple(
            link
            for (source, target), (link, measured) in sorted(self._known.items())
            if (agents.get(source), agents.get(target)) == measured
        )

    def measure(self, effects: Effects, now: Now, call_id: str) -> None:
        """Begin to measure all links, or join whoever does; `call_id` is answered when it is done.

        Raises:
            AgentError: A005 for fewer than two clusters.
        """
        if self._sweep is None:
            names = sorted(self._present())
            if len(names) < 2:
                hint = "start a fabric-agent" if not names else "start the agent of another one"
                raise AgentError("A005", f"{len(names)} cluster(s) connected: there is no link", hint=hint)
            self._sweep = _Sweep(list(permutations(names, 2)))
        self._sweep.calls.append(call_id)
        self._go_on(effects, now)

    def measured(self, effects: Effects, now: Now, cluster: str, report: LinkMeasured) -> None:
        """An agent has measured, or could not; late answers are dropped."""
        found = self._sweep and self._sweep.under_way.get(report.measurement)
        if self._sweep is None or not found or found.link.source != cluster:
            return
        del self._sweep.under_way[report.measurement]
        error = report.error_json or _implausible(report)
        figures = (0.0, 0.0) if error else (report.bytes_per_s, report.rtt_s)
        self._keep(effects, now, found.link, *figures, error=error)
        self._go_on(effects, now)

    def tick(self, effects: Effects, now: Now) -> None:
        """Let time pass: who has left, or is late, is not waited for."""
        if self._sweep is None:
            return
        present = self._present()
        for name, item in list(self._sweep.under_way.items()):
            gone = {item.link.source, item.link.target} - present
            if not gone and now.monotonic_s < item.until_s:
                continue
            del self._sweep.under_way[name]
            if not gone:
                text = f"the agent of {item.link.source} did not say within {ANSWER_S:.0f} s what it measured"
                self._keep(effects, now, item.link, 0.0, 0.0, error=AgentError("A003", text).to_json())
        self._go_on(effects, now)

    # ------------------------------------------------------------ inside

    def _present(self) -> set[str]:
        return {cluster.name for cluster in self._members.clusters() if cluster.alive}

    def _go_on(self, effects: Effects, now: Now) -> None:
        sweep = self._sweep
        if sweep is None:
            return
        busy = {end for item in sweep.under_way.values() for end in (item.link.source, item.link.target)}
        present = self._present()
        waiting, sweep.waiting = sweep.waiting, []
        for source, target in waiting:
            if not {source, target} <= present:
                continue
            if busy & {source, target}:
                sweep.waiting.append((source, target))
                continue
            busy |= {source, target}
            self._begin(effects, now, sweep, source, target)
        if not sweep.waiting and not sweep.under_way:
            effects.answers += [CallDone("", call_id) for call_id in sweep.calls]
            self._sweep = None

    def _begin(self, effects: Effects, now: Now, sweep: _Sweep, source: str, target: str) -> None:
        address = self._members.address(target)
        # The first call's id makes it unlike any of another sweep.
        name = f"{sweep.calls[0]}/{source}/{target}"
        link = MeasuredLink(source, target, 0.0, 0.0, relayed=not address)
        sweep.under_way[name] = _Open(link, now.monotonic_s + ANSWER_S)
        effects.send(source, MeasureLink(name, PeerAddress(target, address)))

    def _keep(
        self, effects: Effects, now: Now, link: MeasuredLink, bytes_per_s: float, rtt_s: float, *, error: str
    ) -> None:
        link = replace(link, bytes_per_s=bytes_per_s, rtt_s=rtt_s, measured_at=now.wall_s, error_json=error)
        agents = self._members.agents()
        ends = agents.get(link.source, ""), agents.get(link.target, "")
        self._known[link.source, link.target] = link, ends
        effects.writes.append(Write(TABLE, (link.source, link.target), {**asdict(link), "agents": list(ends)}))


def _implausible(report: LinkMeasured) -> str:
    """Why figures cannot be believed, as an error's JSON; empty if they can."""
    if isfinite(report.bytes_per_s) and report.bytes_per_s > 0.0 and isfinite(report.rtt_s) and report.rtt_s >= 0.0:
        return ""
    found = f"{report.bytes_per_s} bytes/s, {report.rtt_s} s"
    return ProtocolError("P001", "an agent has measured what cannot be", place="LinkMeasured", value=found).to_json()
