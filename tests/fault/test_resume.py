"""``fabric run --out DIR`` is killed in the middle; ``fabric run --resume DIR`` ends it with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from icrf.testing.waiting import until

from .bench import Bench, federation

pytestmark = pytest.mark.ray

COMMAND = [sys.executable, "-m", "icrf.cli", "run"]
ROUND_LIMIT_S = 120.0


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONUNBUFFERED": "1"}


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "rounds.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def interrupt(file: Path, out: Path, clusters: int, number: signal.Signals, after_rounds: int) -> None:
    """Start a run and send it a signal once it has committed some rounds."""
    flags = ["--clusters", str(clusters), "--out", str(out), "--plain"]
    log = out.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen([*COMMAND, str(file), *flags], stdout=output, stderr=output, env=environment())

    def committed() -> bool:
        assert process.poll() is None, log.read_text()
        return len(rounds_of(out)) >= after_rounds

    until(committed, ROUND_LIMIT_S)
    process.send_signal(number)
    process.wait(60)


def resume(out: Path) -> dict[str, Any]:
    done = subprocess.run(
        [*COMMAND, "--resume", str(out), "--json"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


def check(bench: Bench, folder: Path, clusters: int, number: signal.Signals) -> None:
    # Long enough that the signal comes in time.
    config = federation("star", num_rounds=12)
    expected = bench.reference(config)
    file, out = folder / "fed.yaml", folder / "out"
    file.write_text(config.to_yaml())
    interrupt(file, out, clusters, number, after_rounds=3)
    assert not (out / "summary.json").exists()
    summary = resume(out)
    assert summary["model_sha256"] == expected.info.model_sha256
    assert [line["round"] for line in rounds_of(out)] == list(range(1, 13))
    assert (out / "model.safetensors").exists() and (out / "report.html").exists()
    assert not (out / "state").exists()
    assert resume(out) == summary


def test_a_killed_run_is_resumed(bench: Bench, tmp_path: Path) -> None:
    check(bench, tmp_path, 2, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(("clusters", "number"), [(1, signal.SIGKILL), (1, signal.SIGTERM), (2, signal.SIGTERM)])
def test_a_run_is_resumed_however_it_was_ended(
    bench: Bench, tmp_path: Path, clusters: int, number: signal.Signals
) -> None:
    check(bench, tmp_path, clusters, number)
