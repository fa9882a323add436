"""The plain loop over two processes: each trains every second client and hands back one weighted sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.cases import Case, build_model
from benchmarks.runner import Finished, Rounds, run
from benchmarks.systems.loop import Share

WORKERS = 2


def _work(case: Case, worker: int, tasks: Any, sums: Any) -> None:
    import torch  # noqa: PLC0415 - loading it is part of the start

    torch.set_num_threads(1)
    share = Share(case, range(worker, case.clients, WORKERS))
    # Weights come and sums go as tensors in shared memory; None ends the worker.
    while (weights := tasks.get()) is not None:
        sums.put(share.round(weights))


def pool(case: Case, rounds: Rounds, options: Mapping[str, Any]) -> Finished:
    """Average what the workers hand back."""
    import torch  # noqa: PLC0415
    from torch import multiprocessing  # noqa: PLC0415

    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    sums, tasks = context.Queue(), [context.Queue() for _ in range(WORKERS)]
    workers = [context.Process(target=_work, args=(case, k, tasks[k], sums), daemon=True) for k in range(WORKERS)]
    for worker in workers:
        worker.start()
    state = build_model(case.task).state_dict()
    weights = list(state.values())
    for _ in range(case.rounds + 1):
        with rounds.one():
            for queue in tasks:
                queue.put(weights)
            parts = [sums.get() for _ in workers]
            total = sum(samples for _, samples in parts)
            whole, *others = [part for part, _ in parts]
            for other in others:
                for mine, theirs in zip(whole, other, strict=True):
                    mine.add_(theirs)
            weights = [part.div_(total) for part in whole]
    found = dict(zip(state, [part.clone() for part in weights], strict=True))
    for queue, worker in zip(tasks, workers, strict=True):
        queue.put(None)
        worker.join()
    return Finished(found)


if __name__ == "__main__":
    run(pool, "torch", "numpy")
