"""How a cluster's resources are split over slots."""

from __future__ import annotations

from collections.abc import Mapping

from icrf.errors import ConfigError
from icrf.protocol import Plan
from icrf.spec import FederationConfig


def get_resources_split(
    num_nodes: int, split_strategy: str = "uniform", *, num_cpus: float, num_gpus: float = 0.0
) -> list[dict[str, float]]:
    """Equal shares of a cluster for `num_nodes` nodes.

    Args:
        num_nodes: how many shares.
        split_strategy: ``uniform``, the only one.
        num_cpus: CPUs to split; no share is larger than 1.
        num_gpus: GPUs to split.

    Returns:
        One bundle per node, as Ray spells them: ``{"CPU": ..., "GPU": ...}``.

    Raises:
        ConfigError: C010 unknown strategy, C007 nothing to split.
    """
    if split_strategy != "uniform":
        raise ConfigError("C010", f"split strategy '{split_strategy}' unknown", allowed="uniform")
    if num_nodes < 1 or num_cpus <= 0:
        raise ConfigError("C007", f"{num_cpus:g} CPUs for {num_nodes} nodes", allowed="at least 1 node and some CPU")
    bundle = {"CPU": min(1.0, num_cpus / num_nodes)}
    if num_gpus > 0:
        bundle["GPU"] = min(1.0, num_gpus / num_nodes)
    return [dict(bundle) for _ in range(num_nodes)]


def resources_view(plan: Plan | None, config: FederationConfig) -> dict[str, dict[str, float]]:
    """CPUs and GPUs by cluster and in total; empty before anything is reserved."""
    if plan is None:
        return {}
    each = config.resources
    cpus = 1.0 if isinstance(each, str) else each.num_cpus
    gpus = 0.0 if isinstance(each, str) else each.num_gpus
    view = {name: {"CPU": slots * cpus, "GPU": slots * gpus} for name, slots in plan.slots.items()}
    return {"all": _total(view), **view}


def _total(view: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {kind: sum(share[kind] for share in view.values()) for kind in ("CPU", "GPU")}
