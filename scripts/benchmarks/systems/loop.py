"""The floor: federated averaging in a plain PyTorch loop, one process, one model that all clients share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.cases import Case, build_model, client_data, train
from benchmarks.runner import Finished, Rounds, run


class Share:
    """Some of the clients, trained one after the other; their weighted sum."""

    def __init__(self, case: Case, clients: Iterable[int]) -> None:
        self.model = build_model(case.task)
        self._state = list(self.model.state_dict().values())
        self._data = [client_data(case, k) for k in clients]

    def round(self, weights: list[Any]) -> tuple[list[Any], int]:
        """Train all from `weights`; the sum of what came of it times the samples, and the samples of all."""
        sums: list[Any] = []
        total = 0
        for data in self._data:
            for mine, theirs in zip(self._state, weights, strict=True):
                mine.copy_(theirs)
            samples = train(self.model, data)
            total += samples
            if sums:
                for part, mine in zip(sums, self._state, strict=True):
                    part.add_(mine, alpha=samples)
            else:
                sums = [mine * samples for mine in self._state]
        return sums, total


def loop(case: Case, rounds: Rounds, options: Mapping[str, Any]) -> Finished:
    """Average in this process."""
    import torch  # noqa: PLC0415 - loading it is part of the start

    torch.set_num_threads(1)
    share = Share(case, range(case.clients))
    names = list(share.model.state_dict())
    weights = [tensor.clone() for tensor in share.model.state_dict().values()]
    for _ in range(case.rounds + 1):
        with rounds.one():
            sums, total = share.round(weights)
            weights = [part.div_(total) for part in sums]
    return Finished(dict(zip(names, weights, strict=True)))


if __name__ == "__main__":
    run(loop, "torch", "numpy")
