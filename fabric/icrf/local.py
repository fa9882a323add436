"""Composition root of embedded fabrics: mediator and clusters on this machine, for as long as this process lives.

One cluster runs in this process: mediator core, agent core and a local Ray, wired together without sockets. From two
on there is one agent process per cluster, because a process can drive only one Ray; they dial the mediator, which
stays in this process, over gRPC on loopback. Everything above the ports is the same.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from icrf.daemon import MonotonicClock, StateFolder
from icrf.errors import AgentError, LocalError
from icrf.loop_thread import LoopThread
from icrf.ports import MediatorPort
from icrf.protocol import Capacity, ClusterInfo, Fingerprint, Plan, Submission
from icrf.wan import WanLines, WanShape
from icrf.wire.tls import ENVIRONMENT as TLS_ENVIRONMENT
from icrf_mediator.blobs import FolderBlobs
from icrf_mediator.inprocess import InProcessLink, InProcessMediator
from icrf_mediator.planning import make_plan
from icrf_mediator.server import MediatorServer
from icrf_mediator.service import MediatorService
from icrf_mediator.store_sqlite import SqliteStore

Progress = Callable[[str], None]

AGENT_START_S = 180.0
AGENT_STOP_S = 90.0
ORPHAN_GRACE_S = 2.0
OBJECT_STORE_BYTES = 1 << 30
_ENVIRONMENT = {
    # Without it Ray binds the machine's outer interface even for a cluster of one process.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}


def cluster_names(clusters: int) -> list[str]:
    """``local-1``, ``local-2``, ..."""
    return [f"local-{k + 1}" for k in range(clusters)]


def cpus_per_cluster(clusters: int) -> int:
    """An equal share of this machine, at least one."""
    return max(1, (os.cpu_count() or 1) // clusters)


def machine_gpus() -> int:
    """GPUs of this machine that processes may use; clusters on one machine share them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return sum(part.strip() not in ("", "-1") for part in visible.split(","))
    return sum(1 for _ in Path("/proc/driver/nvidia/gpus").glob("*"))


def plan_local(submission: Submission, clusters: int) -> Plan:
    """A dry run over `clusters` local clusters; starts nothing."""
    cpus = cpus_per_cluster(clusters)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // clusters
    same = Fingerprint("", "", "", 1, "cpu")
    infos = [
        ClusterInfo(name, "", Capacity(cpus, float(cpus), float(machine_gpus()), memory), same, free_slots=cpus)
        for name in cluster_names(clusters)
    ]
    return make_plan(submission, infos)[0]


def open_local(
    clusters: int = 1,
    *,
    state_dir: Path | None = None,
    on_progress: Progress | None = None,
    wan: WanShape | None = None,
) -> LocalFabric:
    """Start an embedded fabric; `on_progress` is told each step when it is done."""
    return LocalFabric(clusters, state_dir=state_dir, on_progress=on_progress, wan=wan)


class LocalFabric:
    """An embedded fabric.

    Args:
        clusters: how many local Ray clusters.
        state_dir: where journal, models and logs lie; a temporary folder by default. Runs that an earlier fabric of as
            many clusters has left unfinished there go on.
        on_progress: told what has just become true.
        wan: puts a line like this between every cluster and the rest; None: they are as near as one machine is.

    Raises:
        LocalError: L009 for a line with one cluster, where nothing would pass it.

    Attributes:
        port: the mediator.
        templates: node classes of this process by ``local:NAME``; only a single cluster can take them.
    """

    def __init__(
        self,
        clusters: int,
        *,
        state_dir: Path | None = None,
        on_progress: Progress | None = None,
        wan: WanShape | None = None,
    ) -> None:
        if wan is not None and clusters == 1:
            raise LocalError(
                "L009", "a line between clusters needs two of them", place="--wan", hint="add --clusters 2"
            )
        self._say = on_progress or (lambda text: None)
        self._owns_dir = state_dir is None
        self._dir = Path(tempfile.mkdtemp(prefix="icrf-")) if state_dir is None else Path(state_dir)
        self._closed = False
        self._clusters: _OneCluster | _AgentProcesses | None = None
        self.templates: dict[str, type] = {}
        self._state = StateFolder(self._dir / "mediator")
        self._store = SqliteStore(self._state.path / "journal.db")
        self._thread = LoopThread("icrf-fabric")
        blobs = FolderBlobs(self._state.path / "blobs")
        self._lines = None if wan is None else WanLines(cluster_names(clusters), wan)
        reach = None if self._lines is None else self._lines.reach
        self._service = MediatorService(self._store, blobs, MonotonicClock(), reach=reach)
        self.port: MediatorPort = InProcessMediator(self._service, self._thread.loop)
        _at_exit(weakref.WeakMethod(self.close))
        try:
            self._thread.call(self._service.start())
            self._clusters = (
                _OneCluster(self._thread, self._service, self.templates, self._dir / "ray-token")
                if clusters == 1
                else _AgentProcesses(self._thread, self._service, clusters, self._dir, self._lines)
            )
            self._clusters.start(self._say)
        except BaseException:
            self.close()
            raise

    @property
    def takes_classes(self) -> bool:
        """Whether node classes of this process can run: only where no cluster boundary is crossed."""
        return isinstance(self._clusters, _OneCluster)

    def node_handle(self, run_id: str, index: int) -> tuple[Any, bool] | None:
        """The actor of a node's host and whether the node has it alone; None from another process."""
        return self._clusters.node_handle(run_id, index) if isinstance(self._clusters, _OneCluster) else None

    def close(self) -> None:
        """End all processes and threads; harmless when called twice."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._clusters is not None:
                self._clusters.close()
        finally:
            self._thread.call(self._service.stop())
            self._thread.close()
            if self._lines is not None:
                self._lines.close()
            self._store.close()
            self._state.close()
            if self._owns_dir:
                shutil.rmtree(self._dir, ignore_errors=True)


def _at_exit(close: weakref.WeakMethod[Callable[[], None]]) -> None:
    """Close a fabric that its program left open.

    ``atexit`` is too late: by then Python has shut the thread pools that an orderly end needs. Its own pools are ended
    by this hook of ``threading``, which runs the newest callback first.
    """

    def call() -> None:
        if (method := close()) is not None:
            method()

    register: Callable[[Callable[[], None]], Any] = getattr(threading, "_register_atexit", atexit.register)
    register(call)


class _OneCluster:
    """Agent core and a Ray of this process."""

    def __init__(self, thread: LoopThread, service: MediatorService, templates: dict[str, type], token: Path) -> None:
        self._thread, self._service, self._templates, self._token = thread, service, templates, token
        self._agent: Any = None
        self._serving: Any = None
        self._runtime: Any = None
        self._owns_ray = False

    def start(self, say: Progress) -> None:
        """Start Ray unless this process has one, then the agent."""
        self._prepare_environment()
        # Ray reads its environment when it is imported, and it takes seconds: only now.
        import ray  # noqa: PLC0415

        if not ray.is_initialized():
            ray.init(
                num_cpus=os.cpu_count(),
                include_dashboard=False,
                namespace="icrf",
                log_to_driver=False,
                logging_level="error",
                configure_logging=False,
                object_store_memory=OBJECT_STORE_BYTES,
            )
            self._owns_ray = True
        say("local Ray cluster ready")
        self._thread.call(self._start_agent())

    def _prepare_environment(self) -> None:
        """Loopback, one thread and a token of this fabric's own, as far as Ray was not imported before."""
        imported = sys.modules.get("ray._private.ray_constants")
        if imported is not None:
            # Too late for the environment: this is the value that Ray has read from it, and that it asks when it binds.
            imported.ENABLE_RAY_CLUSTER = False  # type: ignore[attr-defined]
            return
        self._token.write_text(secrets.token_hex(32))
        self._token.chmod(0o600)
        tokens = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self._token)}
        for key, value in {**_ENVIRONMENT, **tokens}.items():
            os.environ.setdefault(key, value)

    async def _start_agent(self) -> None:
        from icrf_agent.ray_substrate import RaySubstrate  # noqa: PLC0415 - imports Ray, see start
        from icrf_agent.runtime import HostedRuntime  # noqa: PLC0415
        from icrf_agent.service import AgentIdentity, AgentService  # noqa: PLC0415

        name = cluster_names(1)[0]
        self._runtime = HostedRuntime(name, RaySubstrate(None), templates=self._templates)
        identity = AgentIdentity(name, uuid.uuid4().hex)
        self._agent = AgentService(identity, InProcessLink(lambda: self._service), self._runtime)
        await self._agent.start()
        self._serving = asyncio.create_task(self._agent.serve())
        await self._agent.registered.wait()

    def node_handle(self, run_id: str, index: int) -> tuple[Any, bool]:
        """See :meth:`LocalFabric.node_handle`."""
        actor, alone = self._runtime.actor_of(run_id, index)
        return actor.handle, alone

    def close(self) -> None:
        """Stop the agent, and Ray if it was started here."""
        try:
            if self._agent is not None:
                self._thread.call(self._stop_agent())
        finally:
            if self._owns_ray:
                import ray  # noqa: PLC0415 - see start

                ray.shutdown()

    async def _stop_agent(self) -> None:
        await self._agent.stop()
        if self._serving is not None:
            await asyncio.gather(self._serving, return_exceptions=True)


class _AgentProcesses:
    """The mediator's server and one agent process per cluster."""

    def __init__(
        self, thread: LoopThread, service: MediatorService, clusters: int, folder: Path, lines: WanLines | None
    ) -> None:
        self._thread, self._service, self._folder, self._lines = thread, service, folder, lines
        self._names = cluster_names(clusters)
        self._cpus = cpus_per_cluster(clusters)
        self._server: MediatorServer | None = None
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, say: Progress) -> None:
        """Start all agents at once and wait until the last one has registered."""
        began = time.monotonic()
        self._server = self._thread.call(self._serve())
        say(f"mediator on {self._server.address}")
        for name in self._names:
            _take_over(self._state_of(name))
            mediator = self._server.address
            way = mediator if self._lines is None else self._lines.way_out(name, mediator)
            self._processes[name] = self._spawn(name, way)
        waiting = set(self._names)
        while waiting:
            registered = {info.name for info in self._thread.call(self._service.clusters())}
            for name in sorted(waiting & registered):
                say(f"cluster {name} ready")
            waiting -= registered
            for name in waiting:
                self._require_alive(name, began)
            if waiting:
                time.sleep(0.05)

    async def _serve(self) -> MediatorServer:
        server = MediatorServer(self._service, "127.0.0.1:0")
        await server.start()
        return server

    def _spawn(self, name: str, mediator: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "icrf_agent.cli", "--cluster", name, "--mediator", mediator]
        command += ["--ray-address", "local", "--cpus", str(self._cpus), "--gpus", str(machine_gpus())]
        command += ["--advertise", "127.0.0.1:0"]
        command += ["--state", str(self._state_of(name)), "--die-with-parent", "--trust-submitter"]
        with self._log(name).open("wb") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Nothing that these processes say leaves the machine, whatever the user's certificate is for.
                env={**{k: v for k, v in os.environ.items() if k != TLS_ENVIRONMENT}, **_ENVIRONMENT},
                # Ctrl-C is for this process, which ends its agents in order: a signal of the terminal besides would be
                # their second one, at which they drop everything, their clusters too.
                start_new_session=True,
            )

    def _state_of(self, name: str) -> Path:
        return self._folder / f"agent-{name}"

    def _log(self, name: str) -> Path:
        return self._folder / f"agent-{name}.log"

    def _require_alive(self, name: str, began: float) -> None:
        code = self._processes[name].poll()
        if code is None and time.monotonic() - began < AGENT_START_S:
            return
        tail = self._log(name).read_text(errors="replace").strip().splitlines()[-5:]
        what = f"exited with {code}" if code is not None else f"did not register within {AGENT_START_S:.0f} s"
        raise AgentError("A003", f"the agent of cluster {name} {what}: {' | '.join(tail)}", place=name)

    def close(self) -> None:
        """SIGTERM to all agents, which end their clusters; then stop serving."""
        for process in self._processes.values():
            process.terminate()
        stuck = [name for name, process in self._processes.items() if not _ended(process)]
        if self._server is not None:
            self._thread.call(self._server.stop(1.0))
        if stuck:
            raise LocalError(
                "L008", f"agents of {', '.join(stuck)} did not end within {AGENT_STOP_S:.0f} s and were killed"
            )


def _take_over(state: Path) -> None:
    """Wait for the agent that an earlier fabric left in this folder when it was killed.

    It has noticed by itself and wants to leave in order, for which it lacks the mediator: a second SIGTERM ends it at
    once. Its cluster lives on for the agent that comes next. The folder belongs to this fabric alone, whose lock the
    caller holds, so whoever holds the agent's lock is such a leftover.
    """
    deadline = time.monotonic() + AGENT_STOP_S
    told = time.monotonic()
    while True:
        try:
            StateFolder(state).close()
        except LocalError as error:
            if error.code != "L006" or time.monotonic() > deadline:
                raise
        else:
            return
        if time.monotonic() - told > ORPHAN_GRACE_S:
            told = time.monotonic()
            _terminate((state / "lock").read_text())
        time.sleep(0.05)


def _terminate(holder: str) -> None:
    try:
        os.kill(int(holder), signal.SIGTERM)
    except (ValueError, ProcessLookupError):
        return  # it has just ended, or is writing its id


def _ended(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(AGENT_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    return True
