"""Where ``fabric run --out DIR`` keeps what it needs to go on: ``DIR/state``, until the run is complete.

The folder holds the embedded fabric (journal, checkpoints, the agents' state and logs) and ``run.json``, which names
the run. A run counts as unfinished until ``DIR/summary.json`` tells its end.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from icrf.daemon import StateFolder
from icrf.errors import RunError
from icrf.model_file import write_file

_NOTE = "run.json"


@dataclass(frozen=True)
class Unfinished:
    """A run that can go on, and how many clusters it needs."""

    run_id: str
    clusters: int


def state_folder(out: Path) -> Path:
    """Where the state of the run in `out` lies."""
    return out / "state"


def new_state(out: Path) -> Path:
    """An empty place for the state of a new run.

    Raises:
        LocalError: L006 if a command that runs there has it.
        RunError: F005 if a run is there that has not ended: it would be lost.
    """
    state = state_folder(out)
    if state.exists():
        StateFolder(state / "mediator").close()
        if find_unfinished(out) is not None:
            raise RunError(
                "F005",
                f"{out} holds a run that has not ended",
                place="--out",
                hint=f"go on with --resume {out}, or remove {state}",
            )
        remove_state(state)
    return state


def remember(state: Path, run: Unfinished) -> None:
    """Note which run the state belongs to."""
    state.mkdir(parents=True, exist_ok=True)
    write_file(state / _NOTE, json.dumps(asdict(run)).encode())


def find_unfinished(out: Path) -> Unfinished | None:
    """The run of `out` that has not ended; None if there is none."""
    note = state_folder(out) / _NOTE
    if not note.exists():
        return None
    found = Unfinished(**json.loads(note.read_text(encoding="utf-8")))
    summary = read_summary(out)
    return None if summary is not None and summary.get("run_id") == found.run_id else found


def read_summary(out: Path) -> dict[str, Any] | None:
    """``summary.json`` of a run that has ended; None if there is none."""
    path = out / "summary.json"
    if not path.exists():
        return None
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return summary


def remove_state(state: Path) -> None:
    """Forget how to go on."""
    shutil.rmtree(state, ignore_errors=True)
