"""Runs one system on one case in a process of its own and brings back what it found."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.catalogue import System
from benchmarks.environments import ROOT, python_of, why_not
from benchmarks.memory import Family, MemoryWatch

RUN_LIMIT_S = 900.0
_SHOWN_LINES = 15

# One thread per process, as every system here trains: more of them only fight over the cores. Ray stays on loopback.
_SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
}


def measure(system: System, case: Case) -> dict[str, Any]:
    """One run: what :func:`benchmarks.runner.run` found and the peak memory, or why there is nothing."""
    if not system.takes(case):
        return {"unavailable": f"not for {case.name}"}
    if problem := why_not(system.environment):
        return {"unavailable": problem}
    with tempfile.TemporaryDirectory(prefix="icrf-bench-") as folder:
        return _measure(system, case, Path(folder))


def _measure(system: System, case: Case, folder: Path) -> dict[str, Any]:
    family, out, log = Family(), folder / "found.json", folder / "log"
    path = os.pathsep.join(filter(None, [str(ROOT / "scripts"), os.environ.get("PYTHONPATH")]))
    job = {"case": asdict(case), "options": dict(system.options), "out": str(out), "started": time.time()}
    command = [str(python_of(system.environment)), "-m", f"benchmarks.systems.{system.module}", json.dumps(job)]
    try:
        with log.open("wb") as told, MemoryWatch(family) as memory:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **_SETTINGS, **family.environment, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=told,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(RUN_LIMIT_S)
            except subprocess.TimeoutExpired:
                return {"failed": f"not done after {RUN_LIMIT_S:.0f} s"}
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
    finally:
        family.end()
    if code or not out.exists():
        tail = log.read_text(errors="replace").strip().splitlines()[-_SHOWN_LINES:]
        return {"failed": f"exit {code}: {' / '.join(tail)}"}
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return {**found, "private_mb": memory.private_bytes / 1e6, "resident_mb": memory.resident_bytes / 1e6}
