"""Local Ray clusters: they outlive their agent, are found again, and end without a trace."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from icrf.daemon import StateFolder
from icrf.errors import LocalError
from icrf.testing.waiting import until
from icrf_agent import keeper
from icrf_agent.local_ray import LocalRay

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

OBJECT_STORE_BYTES = 100 << 20

DRIVER = """
import os, sys
import ray

ray.init(address=sys.argv[1], namespace="test", log_to_driver=False)

@ray.remote
def where():
    return os.getsid(0), os.environ["OMP_NUM_THREADS"], ray.util.get_node_ip_address()

print(*ray.get(where.remote()), int(ray.cluster_resources()["CPU"]))
"""


@pytest.fixture
def state(tmp_path: Path) -> Iterator[StateFolder]:
    with StateFolder(tmp_path / "state") as folder:
        yield folder


@pytest.fixture
def ray_cluster(state: StateFolder) -> Iterator[LocalRay]:
    cluster = LocalRay()
    start(cluster, state)
    yield cluster
    cluster.stop()


def start(cluster: LocalRay, state: StateFolder, num_cpus: int = 1) -> str:
    return cluster.ensure(state.path, num_cpus, lock_file=state.lock_file, object_store_bytes=OBJECT_STORE_BYTES)


def drive(address: str, environment: dict[str, str]) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, address],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def assert_no_trace(cluster: LocalRay, state_dir: Path, session_id: int, temp_dir: Path) -> None:
    assert keeper.session_members(session_id) == []
    assert not temp_dir.exists()
    assert sorted(p.name for p in state_dir.iterdir()) == ["keeper.log", "lock"]


def test_a_cluster_lives_is_found_again_and_ends_without_a_trace(state: StateFolder, ray_cluster: LocalRay) -> None:
    assert not ray_cluster.reattached
    token = state.path / "ray.token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE((state.path / "keeper.json").stat().st_mode) == 0o600

    second = LocalRay()
    address = start(second, state)
    assert second.reattached
    assert second.session_id == ray_cluster.session_id
    assert json.loads((state.path / "keeper.json").read_text())["address"] == address

    session_id, temp_dir = second.session_id, second.temp_dir
    assert temp_dir is not None and temp_dir.is_dir()
    assert drive(address, second.environment()) == [str(session_id), "1", "127.0.0.1", "1"]

    second.stop()
    second.stop()
    assert_no_trace(second, state.path, session_id, temp_dir)


def test_a_killed_keeper_is_replaced_and_leaves_nothing(state: StateFolder, ray_cluster: LocalRay) -> None:
    session_id, temp_dir = ray_cluster.session_id, ray_cluster.temp_dir
    assert temp_dir is not None
    # Let Ray have its whole family running before its head goes.
    drive(f"127.0.0.1:{keeper_address(state.path)}", ray_cluster.environment())
    os.kill(session_id, signal.SIGKILL)
    until(lambda: session_id not in keeper.session_members(session_id))

    second = LocalRay()
    start(second, state)
    assert not second.reattached
    assert second.session_id != session_id
    assert keeper.session_members(session_id) == []
    assert not temp_dir.exists()
    second.stop()


def keeper_address(state_dir: Path) -> int:
    address: str = json.loads((state_dir / "keeper.json").read_text())["address"]
    return int(address.rpartition(":")[2])


def test_other_settings_replace_the_cluster(state: StateFolder, ray_cluster: LocalRay) -> None:
    first = ray_cluster.session_id
    second = LocalRay()
    start(second, state, num_cpus=2)
    assert not second.reattached
    assert keeper.session_members(first) == []
    second.stop()


def test_an_orphaned_cluster_ends_by_itself(tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "state")
    cluster = LocalRay()
    cluster.ensure(state.path, 1, lock_file=state.lock_file, object_store_bytes=OBJECT_STORE_BYTES, orphan_grace_s=1.0)
    session_id, temp_dir = cluster.session_id, cluster.temp_dir
    assert temp_dir is not None
    # Well beyond the grace with the lock held: still there.
    with pytest.raises(TimeoutError):
        until(lambda: keeper.session_members(session_id) == [], timeout_s=2.5)
    state.close()
    until(lambda: keeper.session_members(session_id) == [])
    assert_no_trace(cluster, state.path, session_id, temp_dir)
    cluster.stop()


def test_the_keeper_ends_when_ray_does(state: StateFolder, ray_cluster: LocalRay) -> None:
    session_id = ray_cluster.session_id
    head = next(p for p in keeper.session_members(session_id) if b"ray.scripts.scripts" in command(p))
    os.kill(head, signal.SIGKILL)
    until(lambda: keeper.session_members(session_id) == [])
    assert "ray start exited" in (state.path / "keeper.log").read_text()


def command(pid: int) -> bytes:
    return Path("/proc", str(pid), "cmdline").read_bytes()


def test_a_cluster_that_does_not_start_is_reported_with_rays_words(
    tmp_path: Path, state: StateFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_long = tmp_path / ("x" * 100)
    too_long.mkdir()
    monkeypatch.setenv("TMPDIR", str(too_long))
    cluster = LocalRay()
    with pytest.raises(LocalError) as caught:
        start(cluster, state)
    assert caught.value.code == "L008"
    assert "AF_UNIX path length" in str(caught.value)
    assert list(too_long.iterdir()) == []
    cluster.stop()


def test_a_cluster_that_fails_after_its_head_answered_is_reported(state: StateFolder) -> None:
    cluster = LocalRay()
    start(cluster, state, num_cpus=-1)
    until(lambda: not (state.path / "keeper.json").exists())
    with pytest.raises(LocalError) as caught:
        cluster.check()
    assert caught.value.code == "L008"
    assert "CPU" in str(caught.value)
    cluster.stop()


def test_a_cluster_that_is_too_slow_is_ended(state: StateFolder) -> None:
    cluster = LocalRay()
    with pytest.raises(LocalError, match=r"did not answer within 0\.3 s"):
        cluster.ensure(state.path, 1, lock_file=state.lock_file, object_store_bytes=OBJECT_STORE_BYTES, deadline_s=0.3)
    until(lambda: not (state.path / "keeper.json").exists())
    assert cluster.session_id == 0
    cluster.stop()


# ---------------------------------------------------------------- without Ray


def test_the_probe_of_the_lock_disturbs_nobody(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    assert keeper.lock_is_free(lock)
    lock.touch()
    assert keeper.lock_is_free(lock)
    with lock.open() as holder:
        fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert not keeper.lock_is_free(lock)


def test_ports_are_distinct_and_free() -> None:
    ports = keeper.free_ports(6)
    assert len(set(ports)) == 6
    assert not any(keeper.accepts(f"127.0.0.1:{port}") for port in ports)


def test_a_session_ends_with_processes_that_ignore_sigterm() -> None:
    stubborn = "trap '' TERM; sleep 600 & echo up; wait; sleep 600"
    process = subprocess.Popen(["bash", "-c", stubborn], stdout=subprocess.PIPE, start_new_session=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert process.pid in keeper.session_members(process.pid)
        assert keeper.end_session(process.pid)
        assert keeper.session_members(process.pid) == []
