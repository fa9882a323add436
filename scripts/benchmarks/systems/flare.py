"""NVIDIA FLARE's simulator with its FedAvg recipe; this module is also the script that each client runs.

The server is not ours to time: a round lasts from the first client's receipt of its model to that of the next round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.cases import Case, build_model, client_data, parse_case, train
from benchmarks.runner import Finished, Rounds, run


class Net(nn.Sequential):  # type: ignore[misc]
    """The task's model as a class: the recipe names it, the server builds it."""

    def __init__(self, task: str) -> None:
        super().__init__(*build_model(task))
        self.task = task


def client(case: Case, notes: Path) -> None:
    """What runs at a client: note when a model came, train it, send it back; the first one keeps the last model."""
    import nvflare.client as flare  # noqa: PLC0415 - the driver does not need it
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)
    flare.init()
    number = int(flare.get_site_name().rpartition("-")[2]) - 1
    model, data = build_model(case.task), client_data(case, number)
    while flare.is_running() and (received := flare.receive()) is not None:
        with (notes / f"client-{number}").open("a", encoding="utf-8") as log:
            log.write(json.dumps([received.current_round, time.time()]) + "\n")
        model.load_state_dict({name: torch.as_tensor(value) for name, value in received.params.items()})
        # The model of one round more is the one that the others end with.
        if number == 0 and received.current_round == case.rounds + 1:
            torch.save(model.state_dict(), notes / "model.pt")
        samples = train(model, data)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        flare.send(flare.FLModel(params=weights, meta={"NUM_STEPS_CURRENT_ROUND": samples}))


def flare(case: Case, rounds: Rounds, options: Mapping[str, Any]) -> Finished:
    """Run the simulator, all clients at once, for one round more than is measured."""
    import torch  # noqa: PLC0415
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe  # noqa: PLC0415 - only in its environment
    from nvflare.recipe import SimEnv  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes"
        notes.mkdir()
        recipe = FedAvgRecipe(
            name="bench",
            model={"class_path": "benchmarks.systems.flare.Net", "args": {"task": case.task}},
            min_clients=case.clients,
            num_rounds=case.rounds + 2,
            train_script=str(Path(__file__).resolve()),
            train_args=f"--case {case.name} --rounds {case.rounds} --notes {notes}",
        )
        recipe.execute(SimEnv(num_clients=case.clients, num_threads=case.clients, workspace_root=f"{folder}/simulator"))
        begun: dict[int, float] = {}
        for log in notes.glob("client-*"):
            for number, at in map(json.loads, log.read_text(encoding="utf-8").splitlines()):
                begun[number] = min(at, begun.get(number, at))
        times = [begun[number] for number in sorted(begun)]
        for begin, end in itertools.pairwise(times):
            rounds.add(end - begin)
        # All of that was over when it was read.
        rounds.first_done, rounds.processor_s = times[1], []
        return Finished(torch.load(notes / "model.pt", weights_only=True))


def _as_client() -> bool:
    """Where the simulator runs this file as a client's script, do that."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--case")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--notes", type=Path)
    found, _ = parser.parse_known_args()
    if found.case:
        client(parse_case(found.case, found.rounds), found.notes)
    return bool(found.case)


if __name__ == "__main__" and not _as_client():
    run(flare, "nvflare", "torch", "numpy")
