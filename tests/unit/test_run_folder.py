"""The folder that a run leaves, and the report in it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from icrf.client import Fabric, Run
from icrf.errors import LocalError, NodeError
from icrf.model_file import tensor_sha256
from icrf.protocol import COMPLETED, RoundResult
from icrf.report import MAX_ROWS, ReportData, curve_svg, render
from icrf.run_folder import RunFolder, default_folder, plan_from_dict, plan_to_dict, summarize
from icrf.spec import FederationConfig, load_config
from icrf.testing.scripted import Script, ScriptedMediator, scripted_round
from icrf.topology import check_mixing

KEYS: dict[str, Any] = {
    "federation_id": "digits",
    "federated_learning_schema": "TraditionalFederatedLearning",
    "federated_learning_topology": "star",
    "number_of_clients": 4,
    "federated_learning_rounds": 3,
}
SUMMARY_KEYS = {
    "federation",
    "status",
    "rounds",
    "clusters",
    "accuracy",
    "loss",
    "model_sha256",
    "bytes_inter_cluster",
    "bytes_intra_cluster",
    "wall_s",
}
ROUND_KEYS = {
    "round",
    "wall_s",
    "train_s",
    "exchange_s",
    "commit_s",
    "metrics",
    "bytes_inter_cluster",
    "participants",
    "model_sha256",
}


def submit(script: Script | None = None, **changes: object) -> Run:
    """A run that follows `script`."""
    return Fabric(ScriptedMediator(script)).submit(FederationConfig.from_mapping({**KEYS, **changes}))


def test_a_completed_run_leaves_everything(tmp_path: Path) -> None:
    run = submit()
    assert run.save(tmp_path / "out") == tmp_path / "out"
    found = {p.name for p in (tmp_path / "out").iterdir()}
    assert found == {
        "config.yaml",
        "plan.json",
        "rounds.jsonl",
        "model.safetensors",
        "summary.json",
        "report.html",
    }
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary.keys() >= SUMMARY_KEYS
    assert "rounds_to_target" not in summary
    assert (summary["status"], summary["rounds"], summary["clusters"]) == (COMPLETED, 3, 2)
    assert summary["model_sha256"] == tensor_sha256((tmp_path / "out" / "model.safetensors").read_bytes())
    assert summary["bytes_inter_cluster"] == 3 * 40_000
    assert summary["wall_s"] == 12.5


def test_rounds_have_a_line_each_with_the_documented_keys(tmp_path: Path) -> None:
    lines = [json.loads(x) for x in (submit().save(tmp_path) / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert all(line.keys() >= ROUND_KEYS for line in lines)


def test_the_saved_configuration_runs_again_as_it_was(tmp_path: Path) -> None:
    submit(learning_rate=0.001).save(tmp_path)
    again = load_config(tmp_path / "config.yaml", environment={})
    assert again == FederationConfig.from_mapping({**KEYS, "learning_rate": 0.001})


def test_a_target_is_part_of_the_summary_even_where_it_was_missed() -> None:
    info = submit(target_accuracy=0.9).info()
    assert summarize(info, [])["rounds_to_target"] is None
    assert summarize(replace(info, rounds_to_target=2), [])["rounds_to_target"] == 2


def test_a_failed_run_leaves_its_rounds_and_its_error_but_no_model(tmp_path: Path) -> None:
    error = NodeError("U001", "boom\nTraceback: task.py:3", place="client_1 on us-east")
    folder = submit(Script(num_rounds=2, error=error)).save(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["error"]["code"]) == ("FAILED", "U001")
    assert len((folder / "rounds.jsonl").read_text().splitlines()) == 2
    assert not (folder / "model.safetensors").exists()
    page = (folder / "report.html").read_text()
    assert "task.py:3" in page
    assert "client_1 on us-east" in page


def test_a_folder_never_mixes_two_runs(tmp_path: Path) -> None:
    submit().save(tmp_path)
    submit(Script(num_rounds=1, error=NodeError("U001", "boom"))).save(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert len((tmp_path / "rounds.jsonl").read_text().splitlines()) == 1


def test_rounds_are_on_disk_while_the_run_goes_on(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.add_round(scripted_round(1, ("a",)))
        assert json.loads((tmp_path / "rounds.jsonl").read_text())["round"] == 1


def test_values_that_json_has_no_word_for_become_null(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.add_round(replace(scripted_round(1, ("a",)), metrics={"loss": float("nan"), "accuracy": float("inf")}))
    assert json.loads((tmp_path / "rounds.jsonl").read_text())["metrics"] == {"loss": None, "accuracy": None}


def test_a_folder_that_cannot_be_written_is_an_error_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalError) as caught:
        RunFolder(tmp_path / "file" / "run")
    assert caught.value.code == "L005"


def test_a_plan_survives_its_json() -> None:
    run = submit()
    plan = run.plan()
    assert plan is not None
    report = check_mixing(csr_matrix(np.full((3, 3), 1 / 3)))
    for one in (plan, replace(plan, mixing=report), replace(plan, mixing=replace(report, rounds_to_consensus=-1))):
        assert plan_from_dict(json.loads(json.dumps(plan_to_dict(one)))) == one


def test_a_plan_without_peers_has_no_spectrum() -> None:
    plan = submit().plan()
    assert plan is not None and plan.mixing is None
    written = plan_to_dict(plan)
    assert (written["slem"], written["rounds_to_consensus"], written["mixing"]) == (None, None, None)
    for rounds in (1, -1):
        mixing = replace(check_mixing(csr_matrix(np.full((3, 3), 1 / 3))), rounds_to_consensus=rounds)
        written = plan_to_dict(replace(plan, mixing=mixing, slem=0.0, rounds_to_consensus=rounds))
        expected = None if rounds < 0 else rounds
        assert (written["slem"], written["rounds_to_consensus"]) == (0.0, expected)
        assert written["mixing"]["rounds_to_consensus"] == expected


def test_the_default_folder_is_named_by_the_short_id() -> None:
    assert default_folder("0123456789abcdef") == Path("runs/01234567")


# ---------------------------------------------------------------- the report


def page_of(rounds: list[RoundResult], **summary: object) -> str:
    """A report about `rounds` of a run with a hostile name."""
    info = replace(submit().info(), federation="<script>alert('x')</script> & \x1b[31mred")
    config = {**KEYS, "data_dir": "]]><img src=x onerror=alert(1)>"}
    return render(ReportData({**summarize(info, rounds), **summary}, rounds, config))


@pytest.mark.parametrize("num_rounds", [0, 1, 2, 3, 50])
def test_the_report_is_well_formed_whatever_the_run_did(num_rounds: int) -> None:
    rounds = [scripted_round(n, ("a", "b")) for n in range(1, num_rounds + 1)]
    tree = ElementTree.fromstring(page_of(rounds))
    assert len(tree.findall(".//tbody/tr")) == num_rounds
    assert bool(tree.findall(".//svg")) == (num_rounds > 0)


def test_nothing_from_elsewhere_becomes_markup() -> None:
    page = page_of([scripted_round(1, ("a",))], error={"code": "U001", "message": "<b>bold</b>\x07"})
    tree = ElementTree.fromstring(page)
    assert not tree.findall(".//script")
    assert not tree.findall(".//img")
    assert not tree.findall(".//pre/b")
    assert "\x1b" not in page
    assert "<script" not in page


def test_the_report_needs_nothing_from_elsewhere() -> None:
    page = page_of([scripted_round(1, ("a",))])
    assert "http://" not in page
    assert "https://" not in page
    assert "src=" not in page.replace("&lt;img src=x", "")


def test_a_long_run_gives_a_page_that_still_opens() -> None:
    rounds = [scripted_round(n, ("a", "b")) for n in range(1, 5001)]
    page = page_of(rounds)
    assert len(page) < 1_000_000
    assert len(ElementTree.fromstring(page).findall(".//tbody/tr")) == MAX_ROWS


def test_a_curve_of_values_that_cannot_be_drawn_is_empty() -> None:
    nan = replace(scripted_round(1, ("a",)), metrics={"loss": float("nan")})
    assert curve_svg([nan]) == ""
    assert curve_svg([]) == ""


def test_files_that_no_run_has_written_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    with pytest.raises(LocalError) as caught:
        RunFolder(tmp_path)
    assert caught.value.code == "L005"
    assert (tmp_path / "config.yaml").read_text() == "mine: 1\n"
