"""ICRF through its public face: an embedded fabric with one local Ray cluster or several, and a star on it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import BATCH, LEARNING_RATE, Case
from benchmarks.runner import Finished, Rounds, Unavailable, run

_PARTS = "benchmarks.icrf_parts"
_TASKS = {
    "digits": {"dataset_type": "digits", "data_distribution_kind": "in_turn", "model_type": "small_model"},
    "tiny": {"dataset_type": "tiny", "data_distribution_kind": "in_batches", "model_type": "small_model"},
    "heavy": {
        "dataset_type": "heavy",
        "data_distribution_kind": "one_each",
        "model_type": "large_model",
        "client_template": "Scaling",
    },
}


def configuration(case: Case, keys: Mapping[str, Any]) -> dict[str, Any]:
    """The case as a configuration, with what one system sets besides."""
    return {
        "federation_id": "bench",
        "federated_learning_schema": "TraditionalFederatedLearning",
        "federated_learning_topology": "star",
        "number_of_clients": case.clients,
        "federated_learning_rounds": case.rounds + 1,
        "number_of_epochs": 1,
        "batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "shuffle": False,
        # No round but the last is evaluated: nobody evaluates here.
        "evaluate_every": case.rounds + 1,
        **{key: f"{_PARTS}:{name}" for key, name in _TASKS[case.task].items()},
        **keys,
    }


def _split(found: Sequence[Any]) -> dict[str, float]:
    """Median seconds of the parts of the rounds after the first; of what the mediator took, the mean."""
    parts = ("train_s", "exchange_s", "commit_s")
    split = {part: statistics.median(getattr(result, part) for result in found[1:]) for part in parts}
    if profiles := [result.profile for result in found[1:] if result.profile]:
        split["mediator_s"] = statistics.mean(profile.mediator_s for profile in profiles)
    return split


def fabric(
    case: Case, rounds: Rounds, options: Mapping[str, Any], profile: bool = False, clusters: int = 1
) -> Finished:
    """Run the federation; a round lasts from one commit to the next, as a user sees them."""
    import icrf  # noqa: PLC0415 - loading it is part of the start

    unknown = sorted(set(options) - set(icrf.FederationConfig.model_fields))
    if unknown:
        raise Unavailable(f"this version has no key {', '.join(unknown)}")
    config = icrf.FederationConfig.from_mapping(configuration(case, options))
    found = []
    with icrf.connect(clusters=clusters) as there:
        submitted = there.submit(config, code_path=str(Path(__file__).resolve().parents[2]), profile=profile)
        last = time.perf_counter()
        for result in submitted.rounds():
            now = time.perf_counter()
            rounds.add(now - last)
            last = now
            found.append(result)
        weights = submitted.result().state_dict()
    return Finished(weights, _split(found))


if __name__ == "__main__":
    run(fabric, "icrf", "ray", "torch", "numpy")
