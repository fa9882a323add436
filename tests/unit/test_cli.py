"""The command ``fabric``: what it prints, where, and how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from icrf.cli import Doors, app
from icrf.errors import LocalError, NodeError, ResourceError
from icrf.testing.scripted import Script, ScriptedMediator

FED = """\
federation_id: digits
federated_learning_schema: TraditionalFederatedLearning
federated_learning_topology: star
number_of_clients: 4
federated_learning_rounds: 3
"""


class Handle:
    """An embedded fabric that plays a script."""

    def __init__(self, port: ScriptedMediator) -> None:
        self.port = port
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


class Command:
    """Runs the command in a folder of its own, against a scripted mediator."""

    def __init__(self, folder: Path, script: Script | None = None) -> None:
        self.folder = folder
        self.file = folder / "fed.yaml"
        self.file.write_text(FED)
        self.port = ScriptedMediator(script)
        self.handle = Handle(self.port)
        self.asked: list[object] = []
        self.states: list[Path | None] = []

    def __call__(self, *arguments: str) -> Any:
        doors = Doors(
            remote=self._remote,
            local=self._local,
            plan_local=lambda submission, clusters: self.port.plan(submission),
            wall_s=lambda: 2000.0,
        )
        return CliRunner().invoke(app, list(arguments), obj=doors)

    def _remote(self, address: str, tls: Path | None) -> ScriptedMediator:
        self.asked.append(address)
        return self.port

    def _local(self, clusters: int, state_dir: Path | None, on_progress: Callable[[str], None]) -> Handle:
        self.asked.append(clusters)
        self.states.append(state_dir)
        for name in self.port.script.clusters:
            on_progress(f"cluster {name} ready")
        return self.handle


@pytest.fixture
def fabric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ICRF_MEDIATOR", raising=False)
    return Command(tmp_path)


def scripted(fabric: Command, script: Script) -> Command:
    """The same command with another script."""
    return Command(fabric.folder, script)


def last_json(result: Any) -> dict[str, Any]:
    """The last line of standard output."""
    value: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return value


# ---------------------------------------------------------------- run


def test_run_prints_one_line_per_round_and_leaves_its_folder(fabric: Command) -> None:
    result = fabric("run", "fed.yaml", "--clusters", "2")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [x.split()[1] for x in lines if x.startswith("round ")] == ["1/3", "2/3", "3/3"]
    assert "\x1b" not in result.stdout
    assert fabric.asked == [2]
    assert fabric.handle.closed == 1
    (folder,) = (fabric.folder / "runs").iterdir()
    assert (folder / "model.safetensors").exists()
    assert str(folder.relative_to(fabric.folder) / "report.html") in result.stdout


def test_with_json_standard_output_is_the_summary_alone(fabric: Command) -> None:
    result = fabric("run", "fed.yaml", "--json", "--out", "here")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 1
    assert last_json(result) == json.loads((fabric.folder / "here" / "summary.json").read_text())
    assert "round 3/3" in result.stderr


def test_overrides_reach_the_run(fabric: Command) -> None:
    result = fabric("run", "fed.yaml", "-o", "federated_learning_rounds=2", "-o", "seed=7", "--json")
    assert (last_json(result)["rounds"], last_json(result)["seed"]) == (2, 7)


def test_metrics_are_sent_on(fabric: Command) -> None:
    result = fabric("run", "fed.yaml", "--log", "csv:metrics.csv", "--log", "jsonl:rounds.jsonl")
    assert result.exit_code == 0, result.output
    assert len((fabric.folder / "metrics.csv").read_text().splitlines()) == 10
    assert len((fabric.folder / "rounds.jsonl").read_text().splitlines()) == 3


def test_metrics_cannot_go_where_nothing_is_known_and_nobody_follows(fabric: Command) -> None:
    result = fabric("run", "fed.yaml", "--log", "tensorbord:x/y")
    assert result.exit_code == 78 and "Did you mean 'tensorboard'?" in result.stderr
    assert fabric.asked == []
    result = fabric("submit", "fed.yaml", "--log", "csv:metrics.csv")
    assert result.exit_code == 2 and "L009 --log" in result.stderr
    result = fabric("submit", "fed.yaml", "--watch", "--log", "csv:metrics.csv")
    assert result.exit_code == 0 and (fabric.folder / "metrics.csv").exists()


def test_a_failed_run_exits_with_the_code_of_its_error(fabric: Command) -> None:
    error = ResourceError("R003", "slots were not ready within 60 s", place="us-east")
    failing = scripted(fabric, Script(num_rounds=1, error=error))
    result = failing("run", "fed.yaml", "--json")
    assert result.exit_code == 75
    assert "error R003 us-east: slots were not ready" in result.stderr
    assert last_json(result)["status"] == "FAILED"
    assert failing.handle.closed == 1


def test_ctrl_c_cancels_the_run_keeps_what_it_reached_and_closes_the_fabric(fabric: Command) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    held = Command(fabric.folder, Script(held=True, num_rounds=2))
    held.port = ScriptedMediator(held.port.script, on_idle=interrupt)
    held.handle = Handle(held.port)
    result = held("run", "fed.yaml", "--out", "out")
    assert result.exit_code == 130
    assert held.port.list_runs()[0].status == "CANCELLED"
    assert held.handle.closed == 1
    summary = json.loads((fabric.folder / "out" / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("CANCELLED", 2)


# ---------------------------------------------------------------- resume


def terminated(fabric: Command) -> Command:
    """A run with two of three rounds whose command was ended before the run was."""

    def end() -> None:
        raise SystemExit(143)

    begun = Command(fabric.folder, Script(held=True, num_rounds=2))
    begun.port = ScriptedMediator(begun.port.script, on_idle=end)
    begun.handle = Handle(begun.port)
    assert begun("run", "fed.yaml", "--out", "out", "--clusters", "2").exit_code == 143
    assert begun.states == [Path("out/state")]
    return begun


def finish(begun: Command) -> None:
    """Let the held run end."""
    begun.port.finish(begun.port.list_runs()[0].run_id)


def test_resume_goes_on_and_has_each_round_once(fabric: Command) -> None:
    begun = terminated(fabric)
    assert not (fabric.folder / "out" / "summary.json").exists()
    finish(begun)
    result = begun("run", "--resume", "out", "--json")
    assert result.exit_code == 0, result.output
    assert begun.asked == [2, 2]
    assert begun.states == [Path("out/state")] * 2
    lines = (fabric.folder / "out" / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2]
    assert last_json(result) == json.loads((fabric.folder / "out" / "summary.json").read_text())
    assert not (fabric.folder / "out" / "state").exists()


def test_a_completed_run_is_not_overwritten(fabric: Command) -> None:
    assert fabric("run", "fed.yaml", "--out", "out").exit_code == 0
    before = (fabric.folder / "out" / "model.safetensors").read_bytes()
    for command in (["run", "fed.yaml"], ["demo"], ["submit", "fed.yaml", "--watch"]):
        result = fabric(*command, "--out", "out")
        assert result.exit_code == 73, result.output
        assert "error L005 --out: out holds the completed run" in result.stderr
    assert (fabric.folder / "out" / "model.safetensors").read_bytes() == before


def test_resuming_what_has_ended_shows_its_summary_again(fabric: Command) -> None:
    assert fabric("run", "fed.yaml", "--out", "out").exit_code == 0
    result = fabric("run", "--resume", "out", "--json")
    assert result.exit_code == 0, result.output
    assert last_json(result) == json.loads((fabric.folder / "out" / "summary.json").read_text())
    assert fabric.asked == [1]


def test_resuming_a_failed_run_shows_its_error_again(fabric: Command) -> None:
    error = ResourceError("R003", "slots were not ready within 60 s", place="us-east")
    failing = scripted(fabric, Script(num_rounds=1, error=error))
    assert failing("run", "fed.yaml", "--out", "out").exit_code == 75
    result = failing("run", "--resume", "out")
    assert result.exit_code == 75
    assert "error R003 us-east: slots were not ready" in result.stderr
    assert failing.asked == [1]
    # It has ended: the folder may be used again.
    assert scripted(fabric, Script())("run", "fed.yaml", "--out", "out").exit_code == 0


def test_a_new_run_spares_one_that_can_go_on(fabric: Command) -> None:
    begun = terminated(fabric)
    result = begun("run", "fed.yaml", "--out", "out")
    assert result.exit_code == 65
    assert "error F005 --out: out holds a run that has not ended" in result.stderr
    assert "--resume out" in result.stderr


def test_resume_refuses_what_changes_the_run(fabric: Command) -> None:
    terminated(fabric)
    for flags in (["-o", "seed=1"], ["--out", "elsewhere"], ["--clusters", "3"], ["--profile"]):
        result = fabric("run", "--resume", "out", *flags)
        assert (result.exit_code, "error L009 --" in result.stderr) == (2, True), result.output
    assert fabric.asked == []


def test_nothing_to_resume(fabric: Command) -> None:
    for folder in ("runs/abc", "."):
        result = fabric("run", "fed.yaml", "--resume", folder)
        assert result.exit_code == 65
        assert f"error F001 --resume: {folder} holds no run to go on with" in result.stderr
    result = fabric("run")
    assert result.exit_code == 2
    assert "error L009 FED.yaml: a federation is needed" in result.stderr
    assert fabric.asked == []


# ---------------------------------------------------------------- refused before it starts


def test_a_wrong_model_is_refused_before_anything_starts(fabric: Command) -> None:
    result = fabric("run", "fed.yaml", "-o", "model_type=nowhere:model")
    assert result.exit_code == 78
    assert "error C017" in result.stderr
    assert fabric.asked == []


# ---------------------------------------------------------------- errors


def test_every_error_of_a_file_has_its_line(fabric: Command) -> None:
    fabric.file.write_text(FED + "learning_rat: 0.1\nbatch_size: 0\n")
    result = fabric("validate", "fed.yaml")
    assert result.exit_code == 78
    lines = [x for x in result.stderr.splitlines() if x.startswith("error ")]
    assert any("C005 fed.yaml:6" in x and "learning_rate" in x for x in lines)
    assert any("fed.yaml:7" in x for x in lines)


def test_an_error_is_json_too(fabric: Command) -> None:
    result = fabric("run", "missing.yaml", "--json")
    assert result.exit_code == 78
    assert last_json(result)["error"]["code"] == "C015" or last_json(result)["error"]["errors"][0]["code"] == "C015"


def test_a_single_error_of_a_file_is_the_error_of_the_json(fabric: Command) -> None:
    fabric.file.write_text(FED.replace("clients: 4", "clients: 0"))
    error = last_json(fabric("run", "fed.yaml", "--json"))["error"]
    assert (error["code"], error["place"]) == ("C007", "fed.yaml:4") and "number_of_clients" in error["message"]
    assert [one["code"] for one in error["errors"]] == ["C007"]
    fabric.file.write_text(FED.replace("clients: 4", "clients: 0").replace("rounds: 3", "rounds: no"))
    error = last_json(fabric("run", "fed.yaml", "--json"))["error"]
    assert (error["code"], [one["code"] for one in error["errors"]]) == ("C011", ["C007", "C006"])


def test_a_defect_is_one_numbered_line_and_a_traceback_only_with_debug(fabric: Command) -> None:
    def broken(address: str, tls: Path | None) -> ScriptedMediator:
        raise ValueError("no idea")

    for flags, traceback in (([], False), (["--debug"], True)):
        result = CliRunner().invoke(app, [*flags, "list"], obj=Doors(remote=broken))
        assert result.exit_code == 70
        assert "error X001 ValueError: no idea" in result.stderr
        assert "--debug" in result.stderr
        assert ("Traceback" in result.stderr) == traceback


def test_control_characters_of_an_error_do_not_reach_the_terminal(fabric: Command) -> None:
    error = NodeError("U001", "\x1b]0;owned\x07 boom", place="client_1")
    result = scripted(fabric, Script(num_rounds=0, error=error))("run", "fed.yaml")
    assert "\x1b" not in result.output
    assert "boom" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["run", "fed.yaml", "--nothing"], ["run", "fed.yaml", "--clusters", "0"], ["nothing"], ["show"]],
)
def test_wrong_usage_exits_with_2(fabric: Command, arguments: list[str]) -> None:
    assert fabric(*arguments).exit_code == 2


# ---------------------------------------------------------------- on a fabric


def test_submit_tells_the_id_and_watch_follows_it(fabric: Command) -> None:
    first = fabric("submit", "fed.yaml", "--mediator", "10.0.0.1:7443", "--json")
    assert first.exit_code == 0, first.output
    run_id = last_json(first)["run_id"]
    assert fabric.asked == ["10.0.0.1:7443"]
    watched = fabric("watch", run_id[:6])
    assert watched.exit_code == 0
    assert watched.stdout.count("round ") == 3
    assert not (fabric.folder / "runs").exists()


def test_submit_with_watch_leaves_the_folder(fabric: Command) -> None:
    result = fabric("submit", "fed.yaml", "--watch", "--json")
    assert last_json(result)["status"] == "COMPLETED"
    assert len(list((fabric.folder / "runs").iterdir())) == 1
    assert fabric.asked == ["127.0.0.1:7443"]
    assert fabric.port.closed == 1


def test_no_folder_of_this_machine_is_sent_to_a_fabric(fabric: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    submit = fabric.port.submit
    monkeypatch.setattr(fabric.port, "submit", lambda s: (sent.append(s.code_path), submit(s))[1])
    assert fabric("submit", "fed.yaml").exit_code == 0
    assert fabric("run", "fed.yaml").exit_code == 0
    assert sent == ["", str(fabric.folder)]


def test_an_output_folder_that_cannot_be_written_is_refused_before_anything_starts(fabric: Command) -> None:
    (fabric.folder / "file").write_text("")
    result = fabric("run", "fed.yaml", "--out", "file/run")
    assert result.exit_code == 73
    assert "error L005 --out" in result.stderr
    assert fabric.asked == []


def test_the_environment_names_the_mediator(fabric: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICRF_MEDIATOR", "10.1.1.1:1")
    assert fabric("list").exit_code == 0
    assert fabric.asked == ["10.1.1.1:1"]


def test_list_shows_a_line_per_run_newest_first(fabric: Command) -> None:
    ids = [last_json(fabric("submit", "fed.yaml", "--json"))["run_id"] for _ in range(2)]
    result = fabric("list", "--json")
    assert [run["run_id"] for run in json.loads(result.stdout)] == ids[::-1]
    lines = fabric("list").stdout.splitlines()
    assert lines[0].split()[:3] == ["run", "federation", "status"]
    assert [line.split()[0] for line in lines[1:]] == [i[:8] for i in ids[::-1]]
    assert "COMPLETED" in lines[1]


def test_show_says_what_a_run_waits_for(fabric: Command) -> None:
    held = scripted(fabric, Script(held=True, num_rounds=2))
    run_id = last_json(held("submit", "fed.yaml", "--json"))["run_id"]
    result = held("show", run_id[:8])
    assert result.exit_code == 0, result.output
    assert "round 3 on us-east" in result.stdout
    assert result.stdout.count("\nround ") == 2
    shown = last_json(held("show", run_id, "--json"))
    assert (shown["status"], shown["waiting_for"], len(shown["committed"])) == ("RUNNING", "round 3 on us-east", 2)


def test_cancel_ends_a_run_and_leaves_a_finished_one_alone(fabric: Command) -> None:
    held = scripted(fabric, Script(held=True))
    run_id = last_json(held("submit", "fed.yaml", "--json"))["run_id"]
    for _ in range(2):
        assert "CANCELLED" in held("cancel", run_id[:8]).stdout
    watched = held("watch", run_id)
    assert watched.exit_code == 75
    assert "error F003" in watched.stderr


def test_fetch_writes_the_folder_of_a_run_that_has_ended(fabric: Command) -> None:
    run_id = last_json(fabric("submit", "fed.yaml", "--json"))["run_id"]
    result = fabric("fetch", run_id[:8], "--out", "got", "--json")
    assert result.exit_code == 0, result.output
    assert (fabric.folder / "got" / "model.safetensors").exists()
    held = scripted(fabric, Script(held=True))
    run_id = last_json(held("submit", "fed.yaml", "--json"))["run_id"]
    assert held("fetch", run_id).exit_code == 65


def test_a_damaged_model_is_not_written(fabric: Command) -> None:
    damaged = scripted(fabric, Script(corrupt_model=True))
    result = damaged("run", "fed.yaml", "--out", "out")
    assert result.exit_code == 65
    assert "error P021" in result.stderr
    assert not (fabric.folder / "out" / "model.safetensors").exists()


def test_an_unknown_or_ambiguous_id_says_so(fabric: Command) -> None:
    assert fabric("show", "zzz").exit_code == 65
    assert "error F001" in fabric("show", "zzz").stderr


def test_an_unreachable_mediator_is_a_numbered_error(fabric: Command) -> None:
    def unreachable(address: str, tls: Path | None) -> ScriptedMediator:
        raise LocalError("L001", f"no mediator at {address}", hint="fabric-mediator serve starts one")

    result = CliRunner().invoke(app, ["list", "--json"], obj=Doors(remote=unreachable))
    assert result.exit_code == 69
    assert result.stderr.startswith("error L001 no mediator at 127.0.0.1:7443")
    assert last_json(result)["error"]["code"] == "L001"


# ---------------------------------------------------------------- plan, validate, demo, start-up


def test_plan_shows_placement_and_bytes_and_starts_nothing(fabric: Command) -> None:
    result = fabric("plan", "fed.yaml", "--json")
    assert result.exit_code == 0, result.output
    assert last_json(result).keys() >= {
        "assignment",
        "cut_edges",
        "bytes_inter_cluster_per_round",
        "slem",
        "rounds_to_consensus",
        "peak_memory_bytes",
        "feasible",
    }
    assert "server, client_1, client_3" in result.stderr
    assert fabric.asked == []
    assert fabric("plan", "fed.yaml", "--mediator", "a:1", "--clusters", "2").exit_code == 2


def test_validate_tells_where_each_value_comes_from(fabric: Command) -> None:
    result = fabric("validate", "fed.yaml", "-o", "seed=5")
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line.split()[-1] for line in result.stdout.splitlines() if line.strip()}
    assert rows["number_of_clients"] == "fed.yaml:4"
    assert rows["seed"] == "-o"
    assert rows["batch_size"] == "default"


def test_validate_reads_the_matrix_too(fabric: Command) -> None:
    (fabric.folder / "adj.csv").write_text("0,1\n1\n")
    text = FED.replace("TraditionalFederatedLearning", "DecentralizedFederatedLearning").replace(": star", ": custom")
    fabric.file.write_text(text + "adjacency_matrix_file_name: adj.csv\n")
    result = fabric("validate", "fed.yaml")
    assert result.exit_code == 65, result.output
    assert "T001" in result.stderr and "adj.csv" in result.stderr


def test_the_demo_explains_what_it_did(fabric: Command) -> None:
    result = fabric("demo", "--out", "out")
    assert result.exit_code == 0, result.output
    for text in ("cluster us-east ready", "flat star     would send", "Try next", "fabric run out/config.yaml"):
        assert text in result.stdout


def test_the_packaged_example_is_the_documented_one() -> None:
    root = Path(__file__).parents[2]
    packaged = root / "fabric" / "icrf" / "examples" / "digits-star.yaml"
    assert packaged.read_bytes() == (root / "docs" / "examples" / "digits-star.yaml").read_bytes()


def test_the_version_is_one_line(fabric: Command) -> None:
    result = fabric("--version")
    assert result.stdout.startswith("fabric ")
    assert result.exit_code == 0


@pytest.mark.parametrize("arguments", [["--help"], ["validate", "--help"]])
def test_light_commands_load_nothing_heavy(fabric: Command, arguments: list[str]) -> None:
    code = (
        "import sys, icrf.cli\n"
        f"try:\n    icrf.cli.app({arguments!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'ray', 'grpc', 'scipy', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
        cwd=fabric.folder,
        stdout=subprocess.DEVNULL,
    )
