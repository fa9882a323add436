"""``fabric-agent`` as a process: what it refuses, and the life of the Ray cluster it starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from icrf.daemon import StateFolder
from icrf_agent import keeper
from icrf_agent.cli import app


def refused(*flags: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, flags)
    return result.exit_code, result.stderr


def test_bad_names_and_addresses(tmp_path: Path) -> None:
    state = ("--state", str(tmp_path))
    assert refused("--cluster", "US_East", *state)[0] == 78
    for flags, shown in (
        (("--mediator", "127.0.0.1"), "L003 --mediator"),
        (("--ray-address", "http://127.0.0.1:1"), "L003 --ray-address"),
        (("--advertise", "::1:7"), "L003 --advertise"),
        (("--ray-address", "127.0.0.1:1", "--cpus", "2"), "L009 --cpus"),
        (("--ray-address", "127.0.0.1:1", "--object-store-mb", "200"), "L009 --object-store-mb"),
        (("--label", "zone"), "--label"),
        (("--label", "zone=a", "--label", "zone=b"), "--label"),
        (("--allow", "os"), "--allow"),
        (("--slots", "0"), "--slots"),
        ((), "--cluster"),
    ):
        cluster = ("--cluster", "eu") if flags else ()
        code, err = refused(*cluster, *state, *flags)
        assert (code, shown in err) == (2, True), (flags, code, err)
    code, err = refused("--cluster", "eu", *state, "--mediator", "mediator.example:7443")
    assert code == 78 and "L002" in err


def test_a_second_agent_of_a_cluster(tmp_path: Path) -> None:
    with StateFolder(tmp_path):
        code, err = refused("--cluster", "eu", "--state", str(tmp_path))
    assert code == 73
    assert f"locked by pid {os.getpid()}" in err


# The agent's service stands in the way of testing the command alone: this one says what it was given and waits.
AGENT = """
import os, sys, types

async def serve_agent(settings, stop):
    assert "ray" not in sys.modules
    assert os.path.exists(os.environ["RAY_AUTH_TOKEN_PATH"])
    print(settings.cluster, settings.ray_address, settings.num_slots, settings.quota, flush=True)
    print(dict(settings.labels), settings.allow, settings.advertise, flush=True)
    await stop.wait()
    return 5

daemon = types.ModuleType("icrf_agent.daemon")
daemon.serve_agent = serve_agent
sys.modules["icrf_agent.daemon"] = daemon
from icrf_agent.cli import main
main()
"""


def agent(state: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", AGENT, "--cluster", "us-east", "--state", str(state), "--cpus", "1", *flags]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_a_local_cluster_survives_its_agents_crash_and_ends_with_its_agent(tmp_path: Path) -> None:
    state = tmp_path / "state"
    flags = ("--object-store-mb", "100", "--label", "zone=a", "--allow", "my.mod:Node", "--slots", "3", "--quota", "2")
    with agent(state, *flags) as first:
        assert line(first).startswith("cluster us-east: starting a local Ray cluster (1 CPUs) ... ")
        kept = json.loads((state / keeper.STATE_NAME).read_text())
        assert line(first) == f"us-east {kept['address']} 3 2"
        assert line(first) == "{'zone': 'a'} ('my.mod:Node',) None"
        first.send_signal(signal.SIGKILL)
    assert keeper.session_members(kept["session_id"]) != []

    with agent(state, *flags) as second:
        assert line(second).endswith("s (found it running)")
        assert line(second).startswith(f"us-east {kept['address']} ")
        second.send_signal(signal.SIGTERM)
        assert second.wait() == 5
        assert second.stderr is not None
        assert second.stderr.read() == ""
    assert keeper.session_members(kept["session_id"]) == []
    assert sorted(p.name for p in state.iterdir()) == ["keeper.log", "lock"]
