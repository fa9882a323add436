"""Whether a federation fits on clusters: what each of them lacks, in sentences. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from icrf.gangs import RAY_UNITS, cpu_share, shortages
from icrf.protocol import KINDS_APART, ClusterInfo, Fingerprint, Resources


def slot_resources(config: Mapping[str, Any], cluster: ClusterInfo, num_slots: int) -> Resources:
    """What one of `num_slots` slots takes on this cluster.

    ``resources: uniform`` shares the cluster among all slots that its agent offers: at most one CPU a slot and, with
    ``device: cuda``, an equal part of one GPU, small enough that whole slots fit on each GPU. Otherwise the configured
    numbers are taken as they are.

    Args:
        config: the resolved configuration; its keys ``resources`` and ``device`` are read.
    """
    wanted: Any = config.get("resources") or "uniform"
    if isinstance(wanted, Mapping):
        return Resources(float(wanted.get("num_cpus", 1.0)), float(wanted.get("num_gpus", 0.0)))
    # A slot is a part of the cluster, not of the run: what the others may use stays free for them.
    capacity = cluster.capacity
    slots = max(1, num_slots, capacity.num_slots)
    machines, num_gpus = capacity.machines, 0.0
    if config.get("device") == "cuda" and capacity.num_gpus > 0:
        # Three GPUs among four slots are two slots a GPU: 3/4 of a GPU each would leave the fourth slot without.
        slots_per_gpu = math.ceil(slots / capacity.num_gpus)
        num_gpus = _ray_floor(min(1.0 / slots_per_gpu, capacity.num_gpus / slots))
        machines = tuple(machine for machine in machines if machine.num_gpus)
    return Resources(cpu_share(machines, slots), num_gpus)


def _ray_floor(amount: float) -> float:
    return math.floor(amount * RAY_UNITS + 1e-6) / RAY_UNITS


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
        device = config.get("device") or "cpu"
        for number, cluster in enumerate(used):
            apart = fingerprint_differences([used[0], cluster], device) if number else []
            found[cluster.name] += [*apart, *_mixed_gpus(cluster, device)]
    return {name: tuple(sentences) for name, sentences in found.items() if sentences}


def _lacks(config: Mapping[str, Any], cluster: ClusterInfo, num_slots: int) -> list[str]:
    capacity, name = cluster.capacity, cluster.name
    each = slot_resources(config, cluster, num_slots)
    found = []
    if capacity.num_slots < 1:
        found.append(f"cluster {name}: 1 slot needed, 0 slots in total")
    strategy = config.get("placement_group_strategy") or "PACK"
    found += [f"cluster {name}: {text}" for text in shortages(num_slots, each, capacity.machines, strategy)]
    if config.get("device") == "cuda" and capacity.num_gpus <= 0:
        found.append(f"cluster {name}: device cuda needs a GPU, 0 GPU in total")
    return found


def _mixed_gpus(cluster: ClusterInfo, device: str) -> list[str]:
    """Hosts of one cluster get whichever of its GPUs are free: these must compute alike."""
    kinds = cluster.fingerprint.device
    if device != "cuda" or KINDS_APART not in kinds:
        return []
    text = f"cluster {cluster.name}: numeric fingerprint differs within it, device {kinds}"
    return [f"{text}; determinism strict needs GPUs of one kind"]


def decisive(found: Fingerprint, device: str) -> Fingerprint:
    """What of a fingerprint decides the bits of a federation on this `device`: its GPUs, if any use is made of them."""
    return found if device == "cuda" else replace(found, device=device)


def fingerprint_differences(used: Sequence[ClusterInfo], device: str = "cpu") -> list[str]:
    """What makes the arithmetic of clusters differ from that of the first one, a sentence each.

    Args:
        device: that of the federation.
    """
    found = []
    for other in used[1:]:
        for field in fields(Fingerprint):
            here, there = (getattr(decisive(c.fingerprint, device), field.name) for c in (used[0], other))
            if here != there:
                found.append(
                    f"clusters {used[0].name} and {other.name}: numeric fingerprint differs in {field.name}, "
                    f"{here} against {there}; determinism strict needs it equal"
                )
    return found
