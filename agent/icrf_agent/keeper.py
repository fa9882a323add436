"""The keeper of a local Ray cluster: ``python -m icrf_agent.keeper --state DIR --num-cpus N ...``.

A cluster made by ``ray.init()`` dies with its driver, and a restarted agent must find its hosts alive. So a small
process in a session of its own runs ``ray start --head --block`` on loopback with its own folder, ports and token,
and ends it as a whole: by SIGTERM, when Ray ends by itself, or when no agent has held the lock for a while. Whatever
Ray starts stays in the keeper's session, which is how all of it is found again; ``/proc`` is needed (Linux).

Only the standard library is used: the keeper stays below 20 MB and has nothing of Ray in it that could fail.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

LOOPBACK = "127.0.0.1"
STATE_NAME, TOKEN_NAME, LOG_NAME = "keeper.json", "ray.token", "keeper.log"
# How long a driver of the cluster waits for its head; the cluster's own processes have other limits. A lost GCS is the
# agent's to notice and to mend: Ray's own way is to end the process without an exception. One that is dead before the
# agent is connected must be noticed too: left alone, Ray tries 20 times (the second setting) for 40 s (the third) each.
PATIENCE = {
    "RAY_gcs_rpc_server_reconnect_timeout_s": "3600",
    "RAY_gcs_server_port_wait_time_s": "1",
    "RAY_py_gcs_connect_timeout_s": "5",
}

# Below the range from which kernels take the ports of outgoing connections, above the one Ray takes by default.
PORT_RANGE = range(20_000, 32_000)
PORT_FLAGS = (
    "--port",
    "--ray-client-server-port",
    "--dashboard-agent-listen-port",
    "--dashboard-agent-grpc-port",
    "--metrics-export-port",
    "--runtime-env-agent-port",
)

# Ray appends about 64 characters for its unix sockets, whose paths end at 107.
MAX_TEMP_DIR_CHARACTERS = 40
# Enough for workers; the agents beside a raylet would hang for longer once it is gone.
TERM_GRACE_S = 1.0
KILL_GRACE_S = 10.0
POLL_S = 0.2
LOG_TAIL_LINES = 15

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def ray_environment(token_path: str) -> dict[str, str]:
    """What every process of the cluster and every driver that joins it needs in its environment."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": token_path,
        # The only switch that keeps Ray on the loopback interface.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def session_members(session_id: int) -> list[int]:
    """Process ids of the living processes of a session, in ascending order; zombies do not count."""
    members = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = Path("/proc", entry, "stat").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        # The second field is the program's name in parentheses and may itself hold spaces and parentheses.
        state, _, _, session = stat.rpartition(")")[2].split()[:4]
        if int(session) == session_id and state not in "ZX":
            members.append(int(entry))
    return sorted(members)


def end_session(session_id: int, spare: int = 0) -> bool:
    """End every process of a session but `spare`: SIGTERM, after a second SIGKILL. Whether none is left."""

    def others() -> list[int]:
        return [pid for pid in session_members(session_id) if pid != spare]

    for number, grace_s in ((signal.SIGTERM, TERM_GRACE_S), (signal.SIGKILL, KILL_GRACE_S)):
        deadline = time.monotonic() + grace_s
        signalled: set[int] = set()
        while living := others():
            # A process may be started while its siblings end: look again until the session is empty.
            for pid in set(living) - signalled:
                _signal(pid, number)
            signalled.update(living)
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
            _reap()
        if not living:
            return True
    return not others()


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _reap() -> None:
    """Collect ended children, among them processes that Ray left to their next living ancestor."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def accepts(address: str, timeout_s: float = 1.0) -> bool:
    """Whether something listens at ``HOST:PORT``."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=timeout_s).close()
    except OSError:
        return False
    return True


def free_ports(count: int) -> list[int]:
    """Distinct ports of :data:`PORT_RANGE` that nobody listens on."""
    found: list[int] = []
    for port in random.SystemRandom().sample(PORT_RANGE, len(PORT_RANGE)):
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise SystemExit(f"keeper: no {count} free ports between {PORT_RANGE.start} and {PORT_RANGE.stop}")


def write_atomically(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file that readers see whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(fd, "w") as file:
        file.write(text)
    temporary.rename(path)


def lock_is_free(path: Path) -> bool:
    """Whether no agent holds the lock; the probe lets go of it at once."""
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def ray_command(options: argparse.Namespace, temp_dir: Path) -> tuple[list[str], str]:
    """The ``ray start`` command line and the address at which the cluster will be found."""
    ports = free_ports(len(PORT_FLAGS))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--node-ip-address={LOOPBACK}", "--include-dashboard=false", f"--temp-dir={temp_dir}"]
    command += [f"{flag}={port}" for flag, port in zip(PORT_FLAGS, ports, strict=True)]
    # 0 lets each worker take a free port; the default range is the same one on every cluster of this machine.
    command += ["--min-worker-port=0", "--max-worker-port=0"]
    command += [f"--num-cpus={options.num_cpus}", f"--num-gpus={options.num_gpus}"]
    command += [f"--object-store-memory={options.object_store_bytes}"]
    return command, f"{LOOPBACK}:{ports[0]}"


class Keeper:
    """Runs one local Ray cluster in this process's session until there is a reason to end it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._state_dir: Path = options.state
        self._stopping = False
        self._token_path = self._state_dir / TOKEN_NAME
        self._temp_dir = self._make_temp_dir()

    def _make_temp_dir(self) -> Path:
        inside = self._state_dir / "ray"
        if len(str(inside)) > MAX_TEMP_DIR_CHARACTERS:
            return Path(tempfile.mkdtemp(prefix="icrf-"))
        inside.mkdir(exist_ok=True)
        return inside

    def run(self) -> int:
        """Serve; returns the exit code: 0 when told to stop or orphaned, 1 when Ray failed."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        # What Ray leaves behind becomes our child, so that it can be collected and is no zombie of init's.
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        write_atomically(self._token_path, secrets.token_hex(32))
        command, address = ray_command(self._options, self._temp_dir)
        self._announce("")
        ray = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, env=self._environment(), preexec_fn=_die_with(os.getpid())
        )
        try:
            why, code = self._watch(ray, address)
        finally:
            # Its polite end drains for up to 30 s; killed, it takes the processes it started along at once.
            ray.kill()
            clean = end_session(os.getpid(), spare=os.getpid())
            ray.wait()
        self._say(f"ended: {why}" + ("" if clean else "; processes are left"))
        if code:
            self._say(self._log_tails())
        shutil.rmtree(self._temp_dir, ignore_errors=True)
        self._token_path.unlink(missing_ok=True)
        # Last, so that whatever is left after a kill can still be found by it.
        (self._state_dir / STATE_NAME).unlink(missing_ok=True)
        return code

    def _environment(self) -> dict[str, str]:
        # RAY_ADDRESS of some other cluster would be taken for this one's; an agent that renews its cluster has PATIENCE
        # in its environment, which is for drivers.
        foreign = {"RAY_ADDRESS", *PATIENCE}
        environment = {name: value for name, value in os.environ.items() if name not in foreign}
        # Hosts inherit one thread from here; raylets give a lost GCS 10 s.
        environment.update(OMP_NUM_THREADS="1", RAY_gcs_rpc_server_reconnect_timeout_s="10")
        return environment | ray_environment(str(self._token_path))

    def _watch(self, ray: subprocess.Popen[bytes], address: str) -> tuple[str, int]:
        announced, free_since = False, time.monotonic()
        grace_s: float = self._options.orphan_grace_s
        while not self._stopping:
            if ray.poll() is not None:
                return f"ray start exited with code {ray.returncode}", 1
            if not announced and accepts(address):
                self._announce(address)
                announced = True
            if not lock_is_free(self._options.lock):
                free_since = time.monotonic()
            elif time.monotonic() - free_since > grace_s:
                return f"no agent for {grace_s:g} s", 0
            time.sleep(POLL_S)
        return "told to stop", 0

    def _announce(self, address: str) -> None:
        """Write ``keeper.json``; the address stays empty until the cluster answers there."""
        state = {
            "pid": os.getpid(),
            "session_id": os.getsid(0),
            "address": address,
            "token_path": str(self._token_path),
            "temp_dir": str(self._temp_dir),
            "settings": self._options.settings,
        }
        write_atomically(self._state_dir / STATE_NAME, json.dumps(state, indent=1))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def _say(self, text: str) -> None:
        # Standard error is the log file in the state folder.
        sys.stderr.write(f"keeper: {text}\n")
        sys.stderr.flush()

    def _log_tails(self) -> str:
        """The last lines of Ray's own logs, before they are removed with the temp folder."""
        parts = []
        for name in ("gcs_server.out", "gcs_server.err", "raylet.out", "raylet.err"):
            path = self._temp_dir / "session_latest" / "logs" / name
            if path.exists() and (lines := path.read_text(errors="replace").splitlines()):
                parts += [f"-- {name}", *lines[-LOG_TAIL_LINES:]]
        return "\n".join(parts) or "Ray wrote no log"


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl failed")


def _die_with(keeper: int) -> Callable[[], None]:
    """A `preexec_fn`: SIGKILL for ``ray start`` should the keeper be killed; Ray's own processes die with it."""

    def set_death_signal() -> None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:
            os._exit(1)

    return set_death_signal


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The keeper's command line; `settings` is what a running keeper is compared with before it is used again."""
    parser = argparse.ArgumentParser(prog="icrf_agent.keeper", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--state", type=Path, required=True, help="folder for keeper.json, token and log")
    parser.add_argument("--lock", type=Path, required=True, help="the agent's lock file")
    parser.add_argument("--num-cpus", type=int, required=True)
    parser.add_argument("--num-gpus", type=int, default=0)
    parser.add_argument("--object-store-bytes", type=int, required=True)
    parser.add_argument("--orphan-grace-s", type=float, default=120.0)
    options = parser.parse_args(arguments)
    options.state = options.state.resolve()
    options.settings = [options.num_cpus, options.num_gpus, options.object_store_bytes]
    return options


def main() -> int:
    """Entry point. The process must lead a session of its own."""
    options = parse_arguments()
    if os.getsid(0) != os.getpid():
        os.setsid()
    return Keeper(options).run()


if __name__ == "__main__":
    sys.exit(main())
