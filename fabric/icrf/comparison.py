"""What other assignment strategies would make of a federation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from icrf.errors import IcrfError
from icrf.protocol import Plan, Submission

COMPARED = ("locality", "metis", "louvain", "capacity", "round_robin", "random")

# What a comparison shows of each plan.
_SHOWN = (
    "cut_edges",
    "bytes_inter_cluster_per_round",
    "bytes_inter_cluster_total",
    "peak_memory_bytes",
    "feasible",
)


def compare_plans(
    plan: Callable[[Submission], Plan], submission: Submission, strategies: Sequence[str] = COMPARED
) -> dict[str, Plan | IcrfError]:
    """A plan for each strategy, or why it makes none, by its name; the plan of the submission itself comes first.

    Args:
        plan: makes a plan of a submission.
        strategies: names of assignment strategies.

    Raises:
        IcrfError: what `plan` raises for the submission itself.
    """
    first = plan(submission)
    config = json.loads(submission.config_json)
    found: dict[str, Plan | IcrfError] = {first.strategy: first}
    for name in strategies:
        if name not in found:
            changed = json.dumps({**config, "assignment_strategy": name})
            try:
                found[name] = plan(replace(submission, config_json=changed))
            except IcrfError as error:
                found[name] = error
    return found


def alternatives(plans: Mapping[str, Plan | IcrfError]) -> dict[str, dict[str, Any]]:
    """What ``fabric plan --compare --json`` says of each strategy: of one that makes no plan, the ``error``."""
    return {
        name: {"error": plan.to_dict()} if isinstance(plan, IcrfError) else {key: getattr(plan, key) for key in _SHOWN}
        for name, plan in plans.items()
    }
