"""Apple's pfl: its federated averaging in one process, with one model that all users share."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch.nn import functional

from benchmarks.cases import BATCH, LEARNING_RATE, Case, build_model, client_data, scale
from benchmarks.runner import Finished, Rounds, run

_NEVER = 10**9


class _Scaling(FederatedAveraging):  # type: ignore[misc]
    """Users whose local step is that of ``heavy``."""

    def train_one_user(self, initial_model_state: Any, model: Any, user_dataset: Any, central_context: Any) -> Any:
        scale(model.pytorch_model)
        return model.get_model_difference(initial_model_state), Metrics()


class _Clock(TrainingProcessCallback):  # type: ignore[misc]
    """A round lasts from the end of the one before, or from the start of the training, to its own end."""

    def __init__(self, rounds: Rounds) -> None:
        self._rounds, self._last = rounds, 0.0

    def on_train_begin(self, *, model: Any) -> Any:
        self._last = time.perf_counter()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
        now = time.perf_counter()
        self._rounds.add(now - self._last)
        self._last = now
        return False, Metrics()


def _trainable(task: str) -> Any:
    """The model with the two methods that pfl calls."""
    model = build_model(task)
    model.loss = lambda x, y, is_eval=False: functional.cross_entropy(model(x), y)
    model.metrics = lambda x, y, is_eval=True: {}
    return model


def pfl(case: Case, rounds: Rounds, options: Mapping[str, Any]) -> Finished:
    """Run the algorithm on the simulated backend."""
    torch.set_num_threads(1)
    model = _trainable(case.task)
    nothing = (torch.zeros(1, 1), torch.zeros(1))
    users = [Dataset(list(client_data(case, k) or nothing)) for k in range(case.clients)]
    sampler = get_user_sampler("minimize_reuse", list(range(case.clients)))
    cohort = FederatedDataset(users.__getitem__, sampler)
    backend = SimulatedBackend(training_data=cohort, val_data=cohort, postprocessors=[WeightByDatapoints()])
    algorithm = _Scaling() if case.task == "heavy" else FederatedAveraging()
    algorithm.run(
        NNAlgorithmParams(
            central_num_iterations=case.rounds + 1,
            evaluation_frequency=_NEVER,
            train_cohort_size=case.clients,
            val_cohort_size=None,
        ),
        backend,
        # The server takes the mean of the changes as it is.
        PyTorchModel(model, torch.optim.SGD, torch.optim.SGD(model.parameters(), lr=1.0)),
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=LEARNING_RATE, local_batch_size=BATCH),
        NNEvalHyperParams(local_batch_size=BATCH),
        callbacks=[_Clock(rounds)],
        send_metrics_to_platform=False,
    )
    return Finished(model.state_dict())


if __name__ == "__main__":
    run(pfl, "pfl", "torch", "numpy")
