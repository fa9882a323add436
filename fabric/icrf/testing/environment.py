"""A whole fabric of real processes on this machine: one mediator, N agents, each with a Ray cluster of its own.

::

    with FabricEnvironment(2, supervise=True) as environment, environment.connect() as fabric:
        run = fabric.submit(config)
        environment.mediator.kill()
        assert run.result().model_sha256 == expected

Everything is started with the commands that an operator uses, and whatever is killed, nothing is left at the end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from icrf import failpoints as points
from icrf.client import Fabric, connect
from icrf.errors import LocalError
from icrf.testing.daemons import Daemon, Supervisor
from icrf.testing.processes import ACTORS, actors, await_end, end_all, programs, send
from icrf.testing.waiting import until
from icrf_agent.keeper import STATE_NAME, ray_environment, session_members

MARK = "ICRF_TEST"
START_S = 120.0
STOP_S = 30.0
OBJECT_STORE_MB = 128
RAY_PROGRAMS = ("gcs_server", "raylet")

_SERVING = re.compile(r"serving on (\S+) ")
_CONNECTED = re.compile(r"connected to the mediator")


class FabricEnvironment:
    """Starts the fabric; a context manager.

    Args:
        clusters: how many, or their names.
        slots: hosts per cluster; None: one per CPU of a cluster.
        cpus: CPUs per cluster, as Ray counts them; None: an equal share of this machine, but enough for `slots`.
        relay: payloads go through the mediator instead of from agent to agent.
        state_dir: where states and logs lie; a temporary folder by default. It is kept if it is named.
        failpoints: see :mod:`icrf.failpoints`; `arm` changes them later.
        supervise: start daemons again that die.
        variables: what all of its processes have in their environment besides.
        beside: another environment whose Ray clusters are used, one by one, instead of clusters of its own.

    Attributes:
        address: ``HOST:PORT`` of the mediator, the same over all its lives.
        mediator: its process.
        agents: the agents' processes by cluster name.

    Raises:
        IcrfError: with the end of a log, if something does not come up; nothing is left running then.
    """

    def __init__(
        self,
        clusters: int | Sequence[str] = 2,
        *,
        slots: int | None = None,
        cpus: int | None = None,
        relay: bool = False,
        state_dir: Path | None = None,
        failpoints: str = "",
        supervise: bool = False,
        variables: Mapping[str, str] | None = None,
        beside: FabricEnvironment | None = None,
    ) -> None:
        names = [f"local-{k + 1}" for k in range(clusters)] if isinstance(clusters, int) else list(clusters)
        self._owns_dir = state_dir is None
        # Short on purpose: sockets lie below it.
        self.folder = Path(tempfile.mkdtemp(prefix="icrf-")) if state_dir is None else Path(state_dir).resolve()
        self._mark = uuid.uuid4().hex
        self._slots, self._relay, self._variables = slots, relay, dict(variables or {})
        others = [beside._keeper(name) for name in beside.agents] if beside is not None else []
        self._joined = dict(zip(names, others, strict=False))
        self._cpus = cpus or max(slots or 1, (os.cpu_count() or 1) // len(names))
        self._points = self.folder / "failpoints"
        self._points.mkdir(parents=True, exist_ok=True)
        points.arm(self._points, failpoints)
        self._listen = "127.0.0.1:0"
        self._supervisor: Supervisor | None = None
        self.mediator = self._daemon("fabric-mediator", self._mediator_command, _SERVING, "L001")
        self.agents: dict[str, Daemon] = {
            name: self._daemon(
                f"agent-{name}", lambda name=name: self._agent_command(name), _CONNECTED, "A003", self._joined.get(name)
            )
            for name in names
        }
        try:
            self._start(supervise)
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        return self._listen

    @property
    def daemons(self) -> tuple[Daemon, ...]:
        """The mediator and the agents."""
        return (self.mediator, *self.agents.values())

    def connect(self) -> Fabric:
        """A connection of the SDK; the caller closes it."""
        return connect(self.address)

    # ------------------------------------------------------------ faults

    def arm(self, text: str) -> None:
        """Let living and future processes fire at these fail-points; forgets which have fired."""
        points.arm(self._points, text)

    def fired(self) -> list[str]:
        """The names of the fail-points that have fired since `arm`."""
        return points.fired(self._points)

    def await_fired(self, name: str, timeout_s: float = 60.0) -> None:
        """Wait until a fail-point has fired; L008 if it does not."""
        try:
            until(lambda: name in self.fired(), timeout_s)
        except TimeoutError:
            raise LocalError(
                "L008", f"fail-point {name} did not fire within {timeout_s:.0f} s", hint=self.tails()
            ) from None

    def release(self, name: str) -> None:
        """Let a process go on that a fail-point with ``!hold`` has stopped."""
        points.release(self._points, name)

    def ray_pids(self, cluster: str, what: str) -> list[int]:
        """Processes of a cluster's Ray that run the program `what`: ``gcs_server`` or ``raylet``."""
        if what not in RAY_PROGRAMS:
            raise LocalError("L009", f"no program of Ray: {what}", allowed=", ".join(RAY_PROGRAMS))
        return programs(self._session(cluster), what)

    def actor_pids(self, cluster: str, what: str) -> list[int]:
        """The workers of a cluster that are ``manager``, ``gateway`` or ``host``, oldest first."""
        if what not in ACTORS:
            raise LocalError("L009", f"no actor of a cluster: {what}", allowed=", ".join(ACTORS))
        return actors(self._session(cluster), what)

    def actor_pid(self, cluster: str, what: str, index: int = 0, *, timeout_s: float = 10.0) -> int:
        """One of :meth:`actor_pids`; waits for it, as it may just be restarting.

        Raises:
            LocalError: L008 if there is none within `timeout_s`.
        """
        try:
            return until(lambda: self.actor_pids(cluster, what)[index:], timeout_s)[0]
        except TimeoutError:
            found = self.actor_pids(cluster, what)
            message = f"no {what} {index} on cluster {cluster}"
            raise LocalError("L008", message, value=found, hint=self.tails()) from None

    def kill_actor(self, cluster: str, what: str, index: int = 0) -> int:
        """SIGKILL for one worker; returns its process id once it is gone."""
        return self._kill(self.actor_pid(cluster, what, index))

    def kill_ray(self, cluster: str, what: str = "gcs_server") -> int:
        """SIGKILL for a program of a cluster's Ray; returns its process id once it is gone."""
        return self._kill(self.ray_pids(cluster, what)[0])

    def _kill(self, pid: int) -> int:
        send(pid, signal.SIGKILL)
        if not await_end(pid):
            raise LocalError("L008", f"process {pid} does not end")
        return pid

    # ------------------------------------------------------------ start and end

    def wait_ready(self, timeout_s: float = START_S) -> None:
        """Wait until every daemon serves."""
        for daemon in self.daemons:
            daemon.wait_ready(timeout_s, supervised=self._supervisor is not None)

    def tails(self, lines: int = 12) -> str:
        """The last lines of every log, for messages."""
        return "\n".join(f"-- {d.name}\n" + "\n".join(d.log().splitlines()[-lines:]) for d in self.daemons)

    def close(self) -> None:
        """End every process and remove what was written; harmless when called twice."""
        if self._supervisor is not None:
            self._supervisor.close()
        # First the agents, all at once: an orderly leave needs the mediator.
        for agent in self.agents.values():
            if agent.alive:
                send(agent.pid, signal.SIGTERM)
        for daemon in (*self.agents.values(), self.mediator):
            daemon.terminate(STOP_S)
        folders = [state["temp_dir"] for name in self.agents if (state := self._keeper(name))]
        end_all(MARK, self._mark)
        for path in folders:
            shutil.rmtree(path, ignore_errors=True)
        if self._owns_dir:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------ inside

    def _start(self, supervise: bool) -> None:
        self.mediator.start()
        self._listen = self.mediator.wait_ready(START_S)[1]
        for agent in self.agents.values():
            agent.start()
        for agent in self.agents.values():
            agent.wait_ready(START_S)
        if supervise:
            self._supervisor = Supervisor(self.daemons)

    def _daemon(
        self, name: str, command: object, ready: re.Pattern[str], code: str, joined: Mapping[str, str] | None = None
    ) -> Daemon:
        environment = {
            **os.environ,
            # Whatever this process can import, the daemons can.
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            MARK: self._mark,
            points.VARIABLE: points.FROM_FILE,
            points.FOLDER_VARIABLE: str(self._points),
            **self._variables,
            **(ray_environment(joined["token_path"]) if joined else {}),
        }
        environment.pop("RAY_ADDRESS", None)
        return Daemon(name, command, environment, self.folder / f"{name}.log", ready, code)  # type: ignore[arg-type]

    def _mediator_command(self) -> list[str]:
        command = [sys.executable, "-m", "icrf_mediator.cli", "serve", "--listen", self._listen]
        return [*command, "--state", str(self.folder / "mediator")]

    def _agent_command(self, name: str) -> list[str]:
        command = [sys.executable, "-m", "icrf_agent.cli", "--cluster", name, "--mediator", self.address]
        if name in self._joined:
            command += ["--ray-address", self._joined[name]["address"]]
        else:
            command += ["--ray-address", "local", "--cpus", str(self._cpus), "--object-store-mb", str(OBJECT_STORE_MB)]
        command += ["--state", str(self.folder / f"agent-{name}"), "--trust-submitter"]
        if self._slots is not None:
            command += ["--slots", str(self._slots)]
        return command if self._relay else [*command, "--advertise", "127.0.0.1:0"]

    def _keeper(self, cluster: str) -> dict[str, str]:
        path = self.folder / f"agent-{cluster}" / STATE_NAME
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def _session(self, cluster: str) -> int:
        session = int(self._keeper(cluster).get("session_id", 0))
        if not session or not session_members(session):
            raise LocalError("L008", f"cluster {cluster} has no living Ray", hint=self.tails())
        return session
