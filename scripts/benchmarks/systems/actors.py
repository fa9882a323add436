"""The letter of "a client is an actor": a Ray process per client, each with a model and its data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from benchmarks.cases import Case, build_model, client_data, train
from benchmarks.runner import Finished, Rounds, run

CORES = 2
OBJECT_STORE_BYTES = 4 * 10**9


class Client:
    """What lives in an actor."""

    def __init__(self, case: Case, client: int) -> None:
        import torch  # noqa: PLC0415 - in the actor

        torch.set_num_threads(1)
        self._model, self._data = build_model(case.task), client_data(case, client)

    def fit(self, weights: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Train from `weights` (arrays by name); the new ones and the samples."""
        import torch  # noqa: PLC0415

        own = self._model.state_dict()
        for name, array in weights.items():
            own[name].copy_(torch.tensor(array))
        samples = train(self._model, self._data)
        return {name: tensor.numpy().copy() for name, tensor in own.items()}, samples


def actors(case: Case, rounds: Rounds, options: Mapping[str, Any]) -> Finished:
    """Put the weights once a round, call all, average as they come."""
    ray.init(
        num_cpus=CORES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=OBJECT_STORE_BYTES,
    )
    remote = ray.remote(num_cpus=0)(Client)
    clients = [remote.remote(case, k) for k in range(case.clients)]
    weights = {name: tensor.numpy() for name, tensor in build_model(case.task).state_dict().items()}
    for _ in range(case.rounds + 1):
        with rounds.one():
            reference = ray.put(weights)
            waiting = [client.fit.remote(reference) for client in clients]
            sums: dict[str, Any] = {}
            total = 0
            while waiting:
                (done,), waiting = ray.wait(waiting, num_returns=1)
                trained, samples = ray.get(done)
                total += samples
                for name, array in trained.items():
                    # What comes out of the object store cannot be written to.
                    sums[name] = array * samples if name not in sums else _added(sums[name], array, samples)
            weights = {name: array / total for name, array in sums.items()}
    ray.shutdown()
    return Finished(weights)


def _added(total: Any, array: Any, samples: int) -> Any:
    total += array if samples == 1 else array * samples
    return total


if __name__ == "__main__":
    run(actors, "ray", "torch", "numpy")
