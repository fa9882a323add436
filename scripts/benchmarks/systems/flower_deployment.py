"""Flower as it is deployed over sites: a SuperLink, a SuperNode per client, the apps of its simulation, on loopback.

Its state, the app and all logs lie in the folder that this process was started in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from benchmarks.cases import Case
from benchmarks.runner import Finished, Rounds, run
from benchmarks.sockets import free_ports, is_open
from benchmarks.systems.flower import average

LIMIT_S = 600.0
_POLL_S = 0.2
_END_S = 10.0
_SHOWN = 600

_APP = """
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.systems.flower import client_app
from benchmarks.systems.flower_deployment import server_app

case = Case(**{case})
# Flower looks for one assignment each.
client = client_app(case)
server = server_app(case, Path({folder!r}))
"""
_PROJECT = """
[project]
name = "bench"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "bench"

[tool.flwr.app.components]
serverapp = "bench_app:server"
clientapp = "bench_app:client"

[tool.flwr.app.config]
"""
_CONNECTION = """
[superlink]
default = "bench"

[superlink.bench]
address = "127.0.0.1:{port}"
insecure = true
"""


def server_app(case: Case, folder: Path) -> ServerApp:
    """A server that leaves its rounds and the last weights in a folder."""
    app = ServerApp()

    def main(grid: Grid, context: Context) -> None:
        rounds = Rounds(0.0, case.rounds + 1)
        torch.save(average(case, rounds, grid), folder / "model.pt")
        told = {"seconds": rounds.seconds, "first_done": rounds.first_done, "processor_s": rounds.processor_s}
        (folder / "rounds.part").write_text(json.dumps(told), encoding="utf-8")
        # Whoever waits for it finds all of it.
        (folder / "rounds.part").rename(folder / "rounds.json")

    app.main()(main)
    return app


class _Deployment:
    """Its programs, by the names of their logs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._environment = {**os.environ, "FLWR_HOME": str(folder / "home")}
        self._programs = Path(sys.executable).parent
        # The SuperLink finds those that it starts by name.
        self._environment["PATH"] = os.pathsep.join((str(self._programs), os.environ.get("PATH", "")))
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, program: str, *arguments: str) -> None:
        """Start one of them."""
        with (self._folder / f"{name}.log").open("wb") as log:
            self._started[name] = subprocess.Popen(
                [str(self._programs / program), *arguments],
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_until(self, is_so: Any, what: str) -> None:
        """Poll until something is so.

        Raises:
            SystemExit: it takes too long, or a program has failed.
        """
        deadline = time.monotonic() + LIMIT_S
        while not is_so():
            failed = [name for name, process in self._started.items() if process.poll()]
            if failed or time.monotonic() > deadline:
                raise SystemExit(f"{what} did not come: {self._words(failed or list(self._started))}")
            time.sleep(_POLL_S)

    def _words(self, names: list[str]) -> str:
        logs = ((name, (self._folder / f"{name}.log").read_text(errors="replace")[-_SHOWN:]) for name in names)
        return " ".join(f"{name}: {' '.join(text.split())}" for name, text in logs)

    def end(self) -> None:
        """End what was started here; what that has started, the caller of this process ends."""
        for process in self._started.values():
            process.terminate()
        for process in self._started.values():
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def _deployed(case: Case, folder: Path) -> Iterator[_Deployment]:
    """A SuperLink that knows as many SuperNodes as there are clients."""
    port, *others = free_ports(1 + case.clients)
    (folder / "home").mkdir()
    (folder / "home" / "config.toml").write_text(_CONNECTION.format(port=port), encoding="utf-8")
    there = _Deployment(folder)
    try:
        at = ("--insecure", "--host", "127.0.0.1", "--port")
        there.start("superlink", "flower-superlink", *at, str(port), "--disable-runtime-dependency-installation")
        there.wait_until(lambda: is_open(port), "the SuperLink")
        for k, own in enumerate(others):
            node = f"partition-id={k} num-partitions={case.clients}"
            link = ("--superlink", f"127.0.0.1:{port}")
            there.start(f"supernode{k}", "flower-supernode", *at, str(own), *link, "--node-config", node)
        yield there
    finally:
        there.end()


def flower_deployment(case: Case, rounds: Rounds, options: Mapping[str, Any]) -> Finished:
    """Send the app and wait for what it leaves; the server waits for its nodes by itself."""
    folder, app = Path.cwd(), Path.cwd() / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(_PROJECT, encoding="utf-8")
    (app / "bench_app.py").write_text(_APP.format(case=asdict(case), folder=str(folder)), encoding="utf-8")
    told = folder / "rounds.json"
    with _deployed(case, folder) as there:
        there.start("run", "flwr", "run", str(app), "bench", "--stream")
        there.wait_until(told.exists, "the end of the rounds")
    found = json.loads(told.read_text(encoding="utf-8"))
    rounds.seconds, rounds.first_done, rounds.processor_s = (
        found[name] for name in ("seconds", "first_done", "processor_s")
    )
    return Finished(torch.load(folder / "model.pt", weights_only=True))


if __name__ == "__main__":
    run(flower_deployment, "flwr", "torch", "numpy")
