"""Flower's simulation: a ServerApp with FedAvg and a ClientApp on its own pool of Ray actors, one per core of two."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.cases import Case, build_model, client_data, train
from benchmarks.runner import Finished, Rounds, run

CORES = 2
OBJECT_STORE_BYTES = 4 * 10**9


@functools.cache
def _model(task: str) -> Any:
    """One model per process: what is built again for every message would be our doing, not Flower's."""
    import torch  # noqa: PLC0415 - in the actor

    torch.set_num_threads(1)
    return build_model(task)


_data = functools.cache(client_data)


def client_app(case: Case) -> ClientApp:
    """A client that loads what it gets, trains, and replies with its model and its samples."""

    def fit(message: Message, context: Context) -> Message:
        # The app is pickled with every message; what it keeps must be found by name in the process.
        from benchmarks.systems import flower  # noqa: PLC0415

        model = flower._model(case.task)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        samples = train(model, flower._data(case, int(context.node_config["partition-id"])))
        arrays, metrics = ArrayRecord(model.state_dict()), MetricRecord({"num-examples": samples})
        return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    app = ClientApp()
    app.train()(fit)
    return app


class _Timed(FedAvg):  # type: ignore[misc]
    """FedAvg; a round lasts from the choice of its clients to the average."""

    def __init__(self, rounds: Rounds, clients: int) -> None:
        super().__init__(
            fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
        )
        self._rounds, self._begin = rounds, 0.0

    def configure_train(self, *arguments: Any) -> Any:
        self._begin = time.perf_counter()
        return super().configure_train(*arguments)

    def aggregate_train(self, *arguments: Any) -> Any:
        found = super().aggregate_train(*arguments)
        self._rounds.add(time.perf_counter() - self._begin)
        return found


def average(case: Case, rounds: Rounds, grid: Grid) -> dict[str, Any]:
    """What the server does: all rounds, and the last weights."""
    result = _Timed(rounds, case.clients).start(
        grid=grid, initial_arrays=ArrayRecord(build_model(case.task).state_dict()), num_rounds=case.rounds + 1
    )
    return dict(result.arrays.to_torch_state_dict())


def flower(case: Case, rounds: Rounds, options: Mapping[str, Any]) -> Finished:
    """Run the simulation in this process."""
    weights: dict[str, Any] = {}

    def main(grid: Grid, context: Context) -> None:
        weights.update(average(case, rounds, grid))

    server = ServerApp()
    server.main()(main)
    run_simulation(
        server_app=server,
        client_app=client_app(case),
        num_supernodes=case.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {
                "num_cpus": CORES,
                "log_to_driver": False,
                "logging_level": "error",
                "object_store_memory": OBJECT_STORE_BYTES,
            },
        },
    )
    return Finished(weights)


if __name__ == "__main__":
    run(flower, "flwr", "ray", "torch", "numpy")
