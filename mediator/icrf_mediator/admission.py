"""Who may reserve next: one line per cluster, in the order of submission. Pure.

A run asks for all of its slots on all of its clusters at once, and waits without holding any. Who came first goes first
wherever two need the same cluster; who waits for a cluster that is away is not in line. So every wait in line is for a
run that is earlier in one and the same order, or that holds slots and will give them back, and no two can wait for each
other. A run that has lost a cluster is in line by its age where it lacks slots (``moves.py``). It keeps what it has
meanwhile, so it may wait for a run that waits for it; ``round_deadline_s`` ends that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from icrf.errors import IcrfError, ResourceError
from icrf.protocol import ClusterInfo, MeasuredLink, Plan, Submission
from icrf_mediator.assignment import Assignment
from icrf_mediator.effects import Effects, Now
from icrf_mediator.feasibility import decisive
from icrf_mediator.holdings import Lack, known_as
from icrf_mediator.membership import Membership
from icrf_mediator.placement import Placement
from icrf_mediator.runs import RunMachine

Planned = tuple[Plan, Assignment]
Planner = Callable[[Submission, Sequence[ClusterInfo], Sequence[MeasuredLink]], Planned]


class Admission:
    """Lets runs out of the queue.

    Args:
        members: the clusters, and what runs hold there.
        planner: makes the plans.
        links: what is known of the links between clusters now.
    """

    def __init__(
        self, members: Membership, planner: Planner, links: Callable[[], tuple[MeasuredLink, ...]] = tuple
    ) -> None:
        self._members, self._planner, self._links = members, planner, links
        # By cluster, who is first in line there.
        self._line: dict[str, RunMachine] = {}
        # Of every run that waits: its last plan, and the clusters and links that it was made for.
        self._plans: dict[str, tuple[tuple[tuple[ClusterInfo, ...], tuple[MeasuredLink, ...]], Planned]] = {}

    def admit(self, runs: Iterable[RunMachine], effects: Effects, now: Now) -> list[RunMachine]:
        """Start those queued runs, given in the order of submission, whose turn it is and for which there is room.

        Returns:
            The runs that have failed, because they turned out to be impossible.
        """
        failed = []
        line: dict[str, RunMachine] = {}
        self._line = line
        for run in runs:
            if not run.is_queued:
                self._plans.pop(run.run_id, None)
                for name in run.in_line_for:
                    line.setdefault(name, run)
                continue
            clusters = self._members.clusters()
            if not clusters:
                run.queued(effects, now, "a cluster to register (start a fabric-agent)")
                continue
            try:
                placement = run.placement or self._placed(run, clusters)
            except IcrfError as error:
                if run.expects_clusters(now):
                    run.queued(effects, now, f"clusters to register again; with those that have: {error.message}")
                    continue
                run.fail(effects, now, error)
                failed.append(run)
                continue
            lack = self._lack(run, placement, line, now)
            if lack is None:
                self._members.take(run.run_id, run.needs(placement, now.wall_s))
                by_name, device = {c.name: c for c in clusters}, str(run.config.get("device") or "cpu")
                fingerprints = {n: decisive(by_name[n].fingerprint, device) for n in placement.clusters}
                run.start(effects, now, placement, fingerprints)
                continue
            run.queued(effects, now, lack.text)
            if not lack.aside:
                for name in placement.clusters:
                    line.setdefault(name, run)
        return failed

    def _lack(self, run: RunMachine, placement: Placement, line: dict[str, RunMachine], now: Now) -> Lack | None:
        if absent := self._members.absent(placement.clusters):
            return absent
        if reason := run.not_yet(now):
            return Lack(reason)
        lack = self._members.lacking(run.needs(placement, now.wall_s))
        ahead = next((name for name in placement.clusters if name in line), None)
        if lack is None and ahead is not None:
            first = line[ahead]
            return Lack(f"its turn on {ahead}, behind {known_as(first.info.federation, first.run_id)}")
        return lack

    def first_in_line(self, cluster: str) -> RunMachine | None:
        """The run whose turn is next on a cluster, of those that wait for it."""
        first = self._line.get(cluster)
        return first if first is not None and (first.is_queued or cluster in first.in_line_for) else None

    def _placed(self, run: RunMachine, clusters: Sequence[ClusterInfo]) -> Placement:
        plan, assignment = self._planned(run, clusters)
        refuse_infeasible(plan)
        return Placement.of_plan(plan, assignment, clusters, run.config)

    def _planned(self, run: RunMachine, clusters: Sequence[ClusterInfo]) -> Planned:
        """The plan of a run that waits, made again only for other clusters or links."""
        measured = self._links()
        known = tuple(replace(cluster, free_slots=0) for cluster in clusters), measured
        if run.run_id not in self._plans or self._plans[run.run_id][0] != known:
            self._plans[run.run_id] = known, self._planner(run.submission, clusters, measured)
        return self._plans[run.run_id][1]


def refuse_infeasible(plan: Plan) -> None:
    """R001, or R004 where it is for the numbers' sake, unless a federation can run as planned."""
    if plan.feasible:
        return
    if any("fingerprint" in problem for problem in plan.problems):
        raise ResourceError(
            "R004",
            "; ".join(plan.problems),
            place="determinism",
            hint="use clusters with equal software and processors, or set determinism: recorded",
        )
    raise ResourceError(
        "R001", "; ".join(plan.problems), place="resources", hint="`fabric plan` shows what each cluster would hold"
    )
