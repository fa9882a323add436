"""What other assignment strategies would make of a federation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

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
) -> dict[str, Plan]:
    """A plan for each strategy, by its name; that of the submission itself comes first.

    Args:
        plan: makes a plan of a submission.
        strategies: names of assignment strategies.

    Raises:
        IcrfError: whatever `plan` raises.
    """
    first = plan(submission)
    config = json.loads(submission.config_json)
    found = {first.strategy: first}
    for name in strategies:
        if name not in found:
            changed = json.dumps({**config, "assignment_strategy": name})
            found[name] = plan(replace(submission, config_json=changed))
    return found


def alternatives(plans: Mapping[str, Plan]) -> dict[str, dict[str, Any]]:
    """What ``fabric plan --compare --json`` says of each strategy."""
    return {name: {key: getattr(plan, key) for key in _SHOWN} for name, plan in plans.items()}
