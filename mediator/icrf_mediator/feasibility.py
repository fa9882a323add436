"""Whether a federation fits on clusters: what each of them lacks, in sentences. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from icrf.protocol import ClusterInfo, Fingerprint, Resources

# Ray counts resources in units of 1/10,000; more digits would round up and no longer fit.
_RAY_UNITS = 10_000


def slot_resources(config: Mapping[str, Any], cluster: ClusterInfo, num_slots: int) -> Resources:
    """What one of `num_slots` slots takes on this cluster.

    ``resources: uniform`` shares the cluster: at most one CPU a slot and, with ``device: cuda``, an equal part of one
    GPU, small enough that whole slots fit on each GPU. Otherwise the configured numbers are taken as they are.

    Args:
        config: the resolved configuration; its keys ``resources`` and ``device`` are read.
    """
    wanted: Any = config.get("resources") or "uniform"
    if isinstance(wanted, Mapping):
        return Resources(float(wanted.get("num_cpus", 1.0)), float(wanted.get("num_gpus", 0.0)))
    slots = max(1, num_slots)
    num_gpus = 0.0
    if config.get("device") == "cuda" and cluster.capacity.num_gpus > 0:
        # Three GPUs among four slots are two slots a GPU: 3/4 of a GPU each would leave the fourth slot without.
        slots_per_gpu = math.ceil(slots / cluster.capacity.num_gpus)
        num_gpus = _ray_floor(min(1.0 / slots_per_gpu, cluster.capacity.num_gpus / slots))
    return Resources(_ray_floor(min(1.0, cluster.capacity.num_cpus / slots)), num_gpus)


def _ray_floor(amount: float) -> float:
    return math.floor(amount * _RAY_UNITS + 1e-6) / _RAY_UNITS


def lacking(
    config: Mapping[str, Any], clusters: Sequence[ClusterInfo], slots: Mapping[str, int]
) -> dict[str, tuple[str, ...]]:
    """Why the federation cannot run, one sentence each, by cluster; of no cluster in particular under an empty name.

    Args:
        config: the resolved configuration.
        slots: slots by cluster, of those that host nodes.
    """
    if not clusters:
        return {"": ("no cluster is registered: start a fabric-agent",)}
    used = [cluster for cluster in clusters if cluster.name in slots]
    found = {cluster.name: _lacks(config, cluster, slots[cluster.name]) for cluster in used}
    if (config.get("determinism") or "strict") == "strict":
        for other in used[1:]:
            found[other.name] += fingerprint_differences([used[0], other])
    return {name: tuple(sentences) for name, sentences in found.items() if sentences}


def _lacks(config: Mapping[str, Any], cluster: ClusterInfo, num_slots: int) -> list[str]:
    capacity, name = cluster.capacity, cluster.name
    each = slot_resources(config, cluster, num_slots)
    found = []
    if capacity.num_slots < 1:
        found.append(f"cluster {name}: 1 slot needed, 0 slots in total")
    for per_slot, total, unit in ((each.num_cpus, capacity.num_cpus, "CPU"), (each.num_gpus, capacity.num_gpus, "GPU")):
        needed = num_slots * per_slot
        if needed > total + 1e-9:
            found.append(
                f"cluster {name}: {num_slots} slots x {per_slot:g} {unit} = {needed:g} {unit} needed, "
                f"{total:g} {unit} in total"
            )
    if config.get("device") == "cuda" and capacity.num_gpus <= 0:
        found.append(f"cluster {name}: device cuda needs a GPU, 0 GPU in total")
    if config.get("placement_group_strategy") == "STRICT_SPREAD" and num_slots > capacity.num_ray_nodes:
        found.append(
            f"cluster {name}: STRICT_SPREAD needs {num_slots} Ray nodes for {num_slots} slots, "
            f"{capacity.num_ray_nodes} in total"
        )
    return found


def fingerprint_differences(used: Sequence[ClusterInfo]) -> list[str]:
    """What makes the arithmetic of clusters differ from that of the first one, a sentence each."""
    found = []
    for other in used[1:]:
        for field in fields(Fingerprint):
            here, there = (getattr(c.fingerprint, field.name) for c in (used[0], other))
            if here != there:
                found.append(
                    f"clusters {used[0].name} and {other.name}: numeric fingerprint differs in {field.name}, "
                    f"{here} against {there}; determinism strict needs it equal"
                )
    return found
