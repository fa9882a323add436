"""A fabric of daemons that was set up with ``fabric-mediator certs``, by its command lines, over real Ray clusters."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from icrf.protocol import COMPLETED
from icrf.spec import load_config
from icrf.submission import build_submission
from icrf.testing import InlineFabric

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

STAR = "digits-star.yaml"


def reference(file: Path) -> str:
    """The model of a federation on one cluster, without sockets."""
    with InlineFabric(1) as fabric:
        run = fabric.port.submit(build_submission(load_config(file)))
        for _ in fabric.port.watch(run.run_id):
            pass
        info = fabric.port.get(run.run_id)
    assert info.status == COMPLETED, info.error_json
    return info.model_sha256


def refused(done: Any) -> str:
    """The one line of a command that must have failed for want of the right certificate."""
    assert done.code == 77, done.err
    (line,) = done.err.splitlines()
    return str(line)


def issued(commands: Any, *arguments: str) -> Path:
    """The folder of a new certificate."""
    done = commands("fabric-mediator", "certs", "issue", *arguments)
    assert done.code == 0, done.err
    return Path(done.out.partition(" in ")[2].partition(", for ")[0])


@pytest.mark.slow
def test_certificates_from_the_first_command_to_the_model(make_commands: Any, examples: Path) -> None:
    commands = make_commands()
    made = commands("fabric-mediator", "certs", "init")
    assert made.code == 0, made.err
    assert "PRIVATE" not in made.out
    again = commands("fabric-mediator", "certs", "init")
    assert (again.code, again.err.count("\n")) == (73, 1) and again.err.startswith("S005 ")
    certs = commands.folder / "state" / "icrf" / "certs"
    agents = {name: issued(commands, name) for name in ("eu-west", "us-east")}
    ann = issued(commands, "--user", "ann")

    serve = ("serve", "--listen", "127.0.0.1:0", "--tls-dir", certs / "mediator")
    mediator = commands.start("fabric-mediator", *serve)
    ready = mediator.until("serving on")
    assert f"(TLS, certificate of {certs / 'mediator'})" in ready
    commands.environment["ICRF_MEDIATOR"] = address = ready.partition(" serving on ")[2].split(" ")[0]

    plain = refused(commands("fabric", "list"))
    assert plain.startswith(f"error S003 {address}: the mediator wants TLS") and "--tls-dir" in plain
    not_a_user = refused(commands("fabric", "list", "--tls-dir", agents["eu-west"]))
    assert "names cluster eu-west, which may not call ListRuns" in not_a_user
    posing = ("--cluster", "us-east", "--tls-dir", agents["eu-west"])
    assert "names cluster eu-west, not cluster us-east" in refused(commands("fabric-agent", *posing))

    running = {}
    for name, folder in agents.items():
        own = ("--cluster", name, "--cpus", 1, "--object-store-mb", 128, "--advertise", "127.0.0.1:0")
        running[name] = commands.start("fabric-agent", *own, "--tls-dir", folder)
    for agent in running.values():
        agent.until("connected to the mediator")
    commands.environment["ICRF_TLS_DIR"] = str(ann)
    done = commands("fabric", "submit", examples / STAR, "--watch", "--json")
    assert done.code == 0, done.err
    assert (done.json["status"], done.json["clusters"]) == ("COMPLETED", 2)
    assert done.json["bytes_inter_cluster"] > 0
    assert done.json["model_sha256"] == reference(examples / STAR)
    assert len(json.loads(commands("fabric", "list", "--json").out.splitlines()[-1])) == 1

    # Who has all that was logged has no key.
    logged = "".join(daemon.out + daemon.err for daemon in commands.started)
    keys = [line for key in certs.rglob("key.pem") for line in key.read_text().splitlines()]
    assert len(keys) > 10 and not [line for line in keys if line in logged]
    for daemon in (*running.values(), mediator):
        assert daemon.end(signal.SIGTERM) == 0, daemon.err
    assert commands.left() == []
