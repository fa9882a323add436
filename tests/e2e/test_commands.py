"""``fabric``, ``fabric-mediator`` and ``fabric-agent`` by their command lines, over real Ray clusters."""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

import icrf

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

STAR = "digits-star.yaml"
RING = "digits-ring.yaml"
LocalRun = Callable[[str, int], dict[str, Any]]


def summary(done: Any) -> dict[str, Any]:
    """The summary of a command that must have succeeded."""
    assert done.code == 0, done.err
    found: dict[str, Any] = done.json
    assert found["status"] == "COMPLETED"
    return found


# ---------------------------------------------------------------- on this machine


@pytest.fixture(scope="module")
def here(make_commands: Any) -> Any:
    return make_commands()


@pytest.fixture(scope="module")
def local_run(here: Any, examples: Path) -> LocalRun:
    """The summary of an embedded fabric's run by (configuration, clusters), each run once."""

    @functools.cache
    def run(name: str, clusters: int) -> dict[str, Any]:
        out = f"{name}-{clusters}"
        found = summary(here("fabric", "run", examples / name, "--clusters", clusters, "--out", out, "--json"))
        assert here.left() == []
        assert found == json.loads((here.folder / out / "summary.json").read_text())
        return found

    return run


@pytest.mark.parametrize(("name", "accuracy"), [(STAR, 0.95), (RING, 0.93)])
def test_one_cluster_and_two_give_the_same_bits(local_run: LocalRun, name: str, accuracy: float) -> None:
    one, two = local_run(name, 1), local_run(name, 2)
    assert one["model_sha256"] == two["model_sha256"] != ""
    assert one["accuracy"] == two["accuracy"] >= accuracy
    assert (one["clusters"], two["clusters"]) == (1, 2)
    assert one["bytes_inter_cluster"] == 0 < two["bytes_inter_cluster"]
    assert (one["rounds"], two["rounds"]) == (15, 15)


def test_a_run_leaves_its_folder(here: Any, local_run: LocalRun) -> None:
    two = local_run(RING, 2)
    local_run(RING, 1)
    folder = here.folder / f"{RING}-2"
    names = [
        "config.yaml",
        "model.safetensors",
        "nodes.jsonl",
        "plan.json",
        "report.html",
        "rounds.jsonl",
        "summary.json",
    ]
    assert sorted(path.name for path in folder.iterdir()) == names
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [r["round"] for r in rounds] == list(range(1, 16))
    assert sum(r["bytes_inter_cluster"] for r in rounds) == two["bytes_inter_cluster"]
    assert [r["round"] for r in rounds if "accuracy" in r["metrics"]] == [5, 10, 15]
    plan = json.loads((folder / "plan.json").read_text())
    assert set(plan["assignment"].values()) == {"local-1", "local-2"}
    # The states of all nodes, not only their mean, are the same on one cluster.
    alone = (here.folder / f"{RING}-1" / "rounds.jsonl").read_text().splitlines()
    assert [r["model_sha256"] for r in rounds] == [json.loads(line)["model_sha256"] for line in alone]


@pytest.mark.slow
@pytest.mark.parametrize("name", [STAR, RING])
def test_three_clusters_give_the_same_bits_too(here: Any, local_run: LocalRun, examples: Path, name: str) -> None:
    three = summary(here("fabric", "run", examples / name, "--clusters", 3, "--json"))
    assert three["model_sha256"] == local_run(name, 1)["model_sha256"]
    assert three["clusters"] == 3
    assert here.left() == []


@pytest.mark.parametrize(("clusters", "number", "code"), [(1, signal.SIGINT, 130), (2, signal.SIGINT, 130)])
def test_an_interrupted_run_leaves_no_process(
    make_commands: Any, examples: Path, clusters: int, number: signal.Signals, code: int
) -> None:
    commands = make_commands()
    long = ("-o", "federated_learning_rounds=100000", "--out", "out")
    running = commands.start("fabric", "run", examples / STAR, "--clusters", clusters, *long)
    running.until("2/100000")
    assert running.end(number, group=True) == code
    assert commands.left() == []
    kept = json.loads((commands.folder / "out" / "summary.json").read_text())
    assert kept["status"] == "CANCELLED" and kept["rounds"] >= 2
    assert "Traceback" not in running.err


# ---------------------------------------------------------------- bad input


def error_of(done: Any) -> dict[str, Any]:
    """The one error of a command that must have failed; the line for people says the same."""
    found: dict[str, Any] = done.json["error"]
    (found,) = found.get("errors") or [found]
    assert f"error {found['code']}" in done.err
    assert len([line for line in done.err.splitlines() if line.startswith("error ")]) == 1
    return found


def changed(examples: Path, folder: Path, name: str, **values: str) -> Path:
    """A copy of an example with lines added."""
    path = folder / f"changed-{'-'.join(values)}.yaml"
    lines = [f"{key}: {value}" for key, value in values.items()]
    kept = [x for x in (examples / name).read_text().splitlines() if x.partition(":")[0] not in values]
    path.write_text("\n".join([*kept, *lines, ""]))
    return path


@pytest.mark.parametrize(
    ("key", "value", "code", "allowed", "hint"),
    [
        ("learning_rat", "0.1", "C005", "", "learning_rate"),
        ("federated_learning_rounds", "'ten'", "C006", "integer", ""),
        ("batch_size", "0", "C007", "1", ""),
        ("learning_rate", ".nan", "C009", "", ""),
        ("aggregation_strategy", "FedAvgg", "C010", "FedAvg", "FedAvg"),
    ],
)
def test_a_bad_configuration_is_refused_before_anything_starts(
    here: Any, examples: Path, key: str, value: str, code: str, allowed: str, hint: str
) -> None:
    file = changed(examples, here.folder, STAR, **{key: value})
    done = here("fabric", "run", file, "--json")
    error = error_of(done)
    line = len(file.read_text().splitlines())
    assert (done.code, error["code"]) == (78, code)
    assert error["place"].startswith(f"{file.name}:{line}") or error["place"].startswith(f"{file}:{line}")
    assert allowed in str(error["allowed"]) + error["message"]
    assert hint in error["message"] + str(error["hint"])
    assert here.left() == []


@pytest.mark.parametrize(
    ("matrix", "code", "shown"),
    [
        ("0,1,1\n1,0\n1,1,0\n", "T001", "row 2"),
        ("0,1\n1,0\n1,1\n", "T001", "3"),
        ("0,x,1\n1,0,1\n1,1,0\n", "T002", "'x'"),
        ("0,1,0\n1,0,0\n0,0,0\n", "T006", ""),
    ],
)
def test_a_bad_matrix_is_refused_with_its_place(here: Any, examples: Path, matrix: str, code: str, shown: str) -> None:
    (here.folder / "bad.csv").write_text(matrix)
    values = {"adjacency_matrix_file_name": "bad.csv", "number_of_clients": "3"}
    file = changed(examples, here.folder, "digits-custom.yaml", **values)
    done = here("fabric", "run", file, "--json")
    error = error_of(done)
    assert (done.code, error["code"]) == (65, code)
    assert "bad.csv" in error["place"] + error["message"]
    assert shown in error["place"] + error["message"]


def test_more_than_this_machine_has(here: Any, examples: Path) -> None:
    asked = ("-o", "resources={num_cpus: 4000}")
    done = here("fabric", "plan", examples / RING, *asked)
    assert done.code == 69
    assert "4000 CPU" in done.out


def test_a_mediator_that_does_not_answer(here: Any, examples: Path) -> None:
    for command in (("submit", examples / RING), ("list",), ("show", "abc")):
        done = here("fabric", *command, "--mediator", "127.0.0.1:1", "--json")
        error = error_of(done)
        assert (done.code, error["code"], error["place"]) == (69, "L001", "127.0.0.1:1")
        assert error["value"]  # gRPC's words for the reason
        assert "check that it runs" in error["hint"]


# ---------------------------------------------------------------- on a fabric


@dataclass
class Standing:
    """A mediator and two agents."""

    commands: Any
    mediator: Any
    address: str
    agents: dict[str, Any]

    def fabric(self, *arguments: object) -> Any:
        return self.commands("fabric", *arguments, "--json")

    def start_agents(self, *flags: object) -> None:
        """Start both agents at once and wait until the mediator has them."""
        for name in ("eu", "us"):
            own = ("--cluster", name, "--cpus", 1, "--object-store-mb", 128)
            self.agents[name] = self.commands.start("fabric-agent", *own, *flags)
        for agent in self.agents.values():
            agent.until("connected to the mediator")

    def stop_agents(self) -> None:
        for agent in self.agents.values():
            assert agent.end(signal.SIGTERM) == 0, agent.err
            assert "Traceback" not in agent.err

    def addresses(self) -> list[str]:
        with icrf.connect(self.address) as fabric:
            return [cluster.address for cluster in fabric.clusters()]


@pytest.fixture(scope="module")
def standing(make_commands: Any) -> Iterator[Standing]:
    commands = make_commands()
    mediator = commands.start("fabric-mediator", "serve", "--listen", "127.0.0.1:0")
    address = mediator.until("serving on").partition(" serving on ")[2].split(" ")[0]
    commands.environment["ICRF_MEDIATOR"] = address
    found = Standing(commands, mediator, address, {})
    found.start_agents()
    yield found
    commands.close()


class TestStanding:
    """In this order: the last tests end what the first ones use."""

    relayed: ClassVar[dict[str, Any]] = {}

    def test_through_the_relay(self, standing: Standing, local_run: LocalRun, examples: Path) -> None:
        assert standing.addresses() == ["", ""]
        done = standing.fabric("submit", examples / RING, "--watch", "--out", "relayed")
        found = summary(done)
        assert found["model_sha256"] == local_run(RING, 1)["model_sha256"]
        assert found["cluster_names"] == ["eu", "us"]
        TestStanding.relayed = found

    def test_list_show_and_fetch(self, standing: Standing, local_run: LocalRun) -> None:
        (listed,) = standing.fabric("list").json
        assert (listed["run_id"], listed["status"], listed["rounds_done"]) == (self.relayed["run_id"], "COMPLETED", 15)
        shown = standing.fabric("show", self.relayed["run_id"][:6]).json
        assert shown["model_sha256"] == local_run(RING, 1)["model_sha256"]
        assert [r["round"] for r in shown["committed"]] == list(range(1, 16))
        fetched = standing.fabric("fetch", self.relayed["run_id"][:6], "--out", "fetched")
        assert summary(fetched)["model_sha256"] == shown["model_sha256"]
        folder = standing.commands.folder
        for name in ("model.safetensors", "rounds.jsonl"):
            assert (folder / "fetched" / name).read_bytes() == (folder / "relayed" / name).read_bytes()
        watched = standing.fabric("watch", self.relayed["run_id"])
        assert summary(watched)["accuracy"] == listed["accuracy"]

    def test_cancel(self, standing: Standing, examples: Path) -> None:
        submitted = standing.fabric("submit", examples / RING, "-o", "federated_learning_rounds=100000").json
        run_id = submitted["run_id"]
        early = standing.fabric("fetch", run_id)
        assert (early.code, error_of(early)["code"]) == (65, "F005")
        assert standing.fabric("cancel", run_id[:8]).json["status"] == "CANCELLED"
        assert standing.fabric("cancel", run_id).json["status"] == "CANCELLED"
        watched = standing.fabric("watch", run_id)
        assert (watched.code, watched.json["status"]) == (75, "CANCELLED")

    @pytest.mark.parametrize("command", ["show", "watch", "cancel", "fetch"])
    def test_a_run_that_does_not_exist(self, standing: Standing, command: str) -> None:
        done = standing.fabric(command, "no-such-run")
        error = error_of(done)
        assert (done.code, error["code"]) == (65, "F001")
        assert "no-such-run" in error["message"]

    def test_more_than_the_fabric_has(self, standing: Standing, examples: Path) -> None:
        before = len(standing.fabric("list").json)
        done = standing.fabric("submit", examples / RING, "-o", "resources={num_cpus: 64}", "--watch")
        error = error_of(done)
        assert (done.code, error["code"], error["place"]) == (69, "R001", "resources")
        assert "cluster us: 1 slots x 64 CPU = 64 CPU needed, 1 CPU in total" in error["message"]
        assert "fabric plan" in error["hint"]
        assert len(standing.fabric("list").json) == before

    def test_a_port_in_use(self, standing: Standing) -> None:
        done = standing.commands(
            "fabric-mediator", "serve", "--listen", standing.address, "--state", standing.commands.folder / "other"
        )
        assert done.code == 73
        assert done.err.startswith("L004 --listen: port ") and "choose another port" in done.err

    def test_a_state_folder_in_use(self, standing: Standing) -> None:
        for command in (("fabric-mediator", "serve", "--listen", "127.0.0.1:0"), ("fabric-agent", "--cluster", "us")):
            done = standing.commands(*command)
            assert done.code == 73
            assert done.err.startswith("L006 --state: state folder ") and "name another folder" in done.err

    def test_a_second_agent_of_the_same_name(self, standing: Standing, local_run: LocalRun, examples: Path) -> None:
        flags = ("--cluster", "us", "--cpus", 1, "--object-store-mb", 128)
        done = standing.commands("fabric-agent", *flags, "--state", standing.commands.folder / "second")
        assert done.code == 69
        assert "A001 --cluster: cluster us is served by" in done.err
        assert "another name" in done.err
        # The first one is as it was, its place at the relay included.
        again = summary(standing.fabric("submit", examples / STAR, "--watch"))
        assert again["model_sha256"] == local_run(STAR, 1)["model_sha256"]

    def test_from_gateway_to_gateway(self, standing: Standing, local_run: LocalRun, examples: Path) -> None:
        standing.stop_agents()
        standing.start_agents("--advertise", "127.0.0.1:0")
        assert all(address.startswith("127.0.0.1:") for address in standing.addresses())
        found = summary(standing.fabric("submit", examples / RING, "--watch"))
        assert found["model_sha256"] == local_run(RING, 2)["model_sha256"]
        # A relayed payload is counted once, as one that came directly is.
        assert found["bytes_inter_cluster"] == self.relayed["bytes_inter_cluster"]

    def test_sigterm_ends_every_process(self, standing: Standing) -> None:
        standing.stop_agents()
        assert len(standing.commands.left()) == 1  # the mediator
        assert standing.mediator.end(signal.SIGTERM) == 0
        assert standing.mediator.err == "" or "Traceback" not in standing.mediator.err
        assert standing.commands.left() == []
