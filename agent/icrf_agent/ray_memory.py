"""Whether a process of a Ray cluster was ended because memory ran out: what Ray's monitor and this machine's kernel
know."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ray._private import gcs_utils, state


class MemoryKills:
    """Tells which workers were killed for memory; asked after their deaths.

    Ray says it of what its own monitor has killed, on all machines of its cluster. The kernel only counts its kills,
    and only this machine's count is read: a worker that ended without a word while the count grew is taken for one of
    them, wherever it ran, and kills on other machines of the Ray cluster are not seen. To be wrong about it costs
    speed, not bits.
    """

    def __init__(self) -> None:
        self._counted = kernel_kills()

    def among(self, workers: Collection[str]) -> frozenset[str]:
        """Which of these workers, by Ray's id in hexadecimal, were killed for memory. Blocks."""
        counted, kernel = self._counted, kernel_kills()
        self._counted = kernel
        reasons = {"NODE_OUT_OF_MEMORY"}
        if kernel > counted:
            reasons.add("SYSTEM_ERROR")
        return frozenset(worker for worker, reason in _ended(workers).items() if reason in reasons)


def kernel_kills() -> int:
    """How many processes the kernel has killed on this machine because memory ran out; 0 where it does not tell."""
    try:
        counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    except OSError:
        return 0
    return int(counts.get("oom_kill", 0))


def _ended(workers: Collection[str]) -> dict[str, str]:
    """Why these workers have ended, of those that Ray still knows."""
    found = {}
    # The public API asks the dashboard, which a cluster need not have; this is the table that it reads.
    for row in state.state._connect_and_get_accessor().get_worker_table():
        data = gcs_utils.WorkerTableData.FromString(row)
        worker = data.worker_address.worker_id.hex()
        if worker in workers and not data.is_alive:
            reasons = data.DESCRIPTOR.fields_by_name["exit_type"].enum_type
            found[worker] = reasons.values_by_number[data.exit_type].name
    return found
