"""Where a run that goes on may live from now on: as few of its nodes as possible move. Pure.

A move takes slots like a queued run does: all or none, within quotas, and never those that a run in line waits for. By
choice nodes move only when the new assignment fits at once; those of a lost cluster wait until it does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from icrf.errors import IcrfError
from icrf.protocol import ClusterInfo, MeasuredLink
from icrf_mediator.admission import Admission, refuse_infeasible
from icrf_mediator.effects import Effects, Now
from icrf_mediator.feasibility import decisive
from icrf_mediator.holdings import Lack, known_as
from icrf_mediator.membership import Membership
from icrf_mediator.placement import Placement
from icrf_mediator.planning import assign_nodes, plan_of
from icrf_mediator.runs import RunMachine

# The generation, the clusters and the links between them.
_Asked = tuple[int, list[ClusterInfo], tuple[MeasuredLink, ...]]


class Moves:
    """Finds other clusters for runs.

    Args:
        members: the clusters, and what runs hold there.
        admission: who is in line.
        links: what is known of the links between clusters now.
    """

    def __init__(
        self, members: Membership, admission: Admission, links: Callable[[], tuple[MeasuredLink, ...]] = tuple
    ) -> None:
        self._members, self._admission, self._links = members, admission, links
        # Of every run that looks for clusters: what was asked for last, and what came of it.
        self._offers: dict[str, list[tuple[_Asked, Placement | str]]] = {}

    def serve(self, run: RunMachine, effects: Effects, now: Now) -> None:
        """Move a run that looks for other clusters, or tell it why it stays; harmless for all others."""
        if not run.looks_for_clusters(now):
            self._offers.pop(run.run_id, None)
            return
        run.wants(())
        try:
            found = self._found(run)
            if isinstance(found, str):
                run.stays(effects, now, found)
                return
            run.wants(_gains(run, found))
            if run.is_durable(effects, now):
                self._members.take(run.run_id, run.needs(found, run.held_since))
                run.move(effects, now, found)
        except IcrfError as error:
            # Going on may be impossible, such as a grid for a state that diverged.
            run.fail(effects, now, error)

    def _found(self, run: RunMachine) -> Placement | str:
        """Where the nodes of a run are to live, or why they stay; empty where they live well."""
        assert run.placement is not None
        everybody = self._members.clusters()
        missing = [c.name for c in everybody if c.name in run.clusters and not c.alive and run.waits_for(c.name)]
        if missing:
            return f"cluster {', '.join(missing)} is away"
        candidates = [c for c in everybody if c.alive and self._is_fit(run, c)]
        best = self._offered(run, candidates)
        if (lack := self._lack(run, best)) is None:
            return best
        # What is full does not keep nodes from what the run has already.
        found = self._offered(run, [c for c in candidates if c.name in run.clusters])
        if found and self._lack(run, found) is None:
            return found
        if isinstance(best, Placement) and not lack.aside:
            run.wants(_gains(run, best))
        return lack.text

    @staticmethod
    def _is_fit(run: RunMachine, cluster: ClusterInfo) -> bool:
        """Whether nodes may go to a cluster: it computes the same bits, and has nothing of the run left to release."""
        assert run.placement is not None
        if cluster.name not in run.clusters and run.holds(cluster.name):
            return False
        device, strict = str(run.config.get("device") or "cpu"), run.config.get("determinism") or "strict"
        return strict != "strict" or decisive(cluster.fingerprint, device) == run.placement.fingerprint

    def _offered(self, run: RunMachine, clusters: Sequence[ClusterInfo]) -> Placement | str:
        asked = run.generation, [replace(cluster, free_slots=0) for cluster in clusters], self._links()
        offers = self._offers.setdefault(run.run_id, [])
        for known, offer in offers:
            if known == asked:
                return offer
        offer = self._assigned(run, *asked[1:])
        self._offers[run.run_id] = [*offers[-1:], (asked, offer)]
        return offer

    @staticmethod
    def _assigned(
        run: RunMachine, clusters: Sequence[ClusterInfo], measured: Sequence[MeasuredLink]
    ) -> Placement | str:
        before = run.placement
        assert before is not None
        if not clusters:
            return "there is no other cluster that computes the same bits"
        submission = replace(run.submission, graph=run.graphs.after(run.info.rounds_done))
        previous = {node.id: before.cluster_of(index) for index, node in enumerate(submission.nodes)}
        try:
            chosen = run.by_choice
            found = assign_nodes(submission, clusters, measured, previous, improve=chosen, stay=not chosen)
            if [clusters[c].name for c in found.clusters] == list(previous.values()):
                return ""
            plan = plan_of(submission, clusters, found, measured)
            refuse_infeasible(plan)
        except IcrfError as error:
            return str(error)
        return Placement.of_plan(plan, found, clusters, run.config)

    def _lack(self, run: RunMachine, found: Placement | str) -> Lack | None:
        """What is not free of what nodes need elsewhere; None if nothing, or if they stay anyway."""
        if isinstance(found, str):
            return Lack(found, aside=True) if found else None
        lack = self._members.lacking(run.needs(found, run.held_since), run.run_id)
        if lack is not None:
            return lack
        for name in _gains(run, found):
            first = self._admission.first_in_line(name)
            if first is not None and run.comes_after(first):
                return Lack(f"{name} is wanted by {known_as(first.info.federation, first.run_id)}, which is in line")
        return None


def _gains(run: RunMachine, found: Placement) -> list[str]:
    """The clusters on which a run would have more slots than now."""
    held = run.placement.slots if run.placement is not None else {}
    return [name for name in found.clusters if found.slots[name] > held.get(name, 0)]
