"""The benchmarks' own arithmetic, what they refuse, and that what they compare is the same work. No time is judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import assignment
from benchmarks.cases import Case, judge, parse_case
from benchmarks.catalogue import DEFAULT_CASES, DEFAULT_SYSTEMS, SYSTEMS, System
from benchmarks.document import read_part, table, write_part
from benchmarks.figures import make_row, markdown
from benchmarks.measure import measure
from benchmarks.memory import Family
from benchmarks.one_cluster import COMMAND, DOCUMENT, compare
from benchmarks.systems.fabric import configuration
from benchmarks.systems.loop import Share
from icrf.client import Fabric
from icrf.spec import FederationConfig
from icrf.testing.inline import InlineFabric

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TITLES = {name: system.title for name, system in SYSTEMS.items()}


def found(*round_s: float, accuracy: float | None = 0.75, norm: float = 7.0, **more: Any) -> dict[str, Any]:
    """What a run of one process brings back."""
    same: dict[str, Any] = {"processor_s": 0.5, "first_round_s": 2.0, "private_mb": 100.0, "resident_mb": 150.0}
    same |= {"split": {}, "versions": {"torch": "2"}}
    return {"round_s": list(round_s), "accuracy": accuracy, "norm": norm, **same, **more}


def plain_rounds(case: Case) -> dict[str, Any]:
    """The last model of the plain loop, run here."""
    share = Share(case, range(case.clients))
    weights = [tensor.clone() for tensor in share.model.state_dict().values()]
    for _ in range(case.rounds + 1):
        sums, total = share.round(weights)
        weights = [part.div_(total) for part in sums]
    return dict(zip(share.model.state_dict(), weights, strict=True))


# ---------------------------------------------------------------- arithmetic


def test_figures_are_medians_of_runs_and_the_ratio_is_that_of_pairs() -> None:
    # The machine is half as fast in the second pair: its ratio is that of the first.
    references = [found(1.0, 1.0, 9.0), found(2.0, 2.0, 2.0), found(1.0, 1.0, 1.0)]
    runs = [found(0.5, 0.5, 0.5), found(1.0, 1.0, 8.0), found(0.6, 0.4, 0.5)]
    row = make_row("digits10", "icrf", runs, references)
    line = json.loads(row.line())
    assert (line["case"], line["system"], line["unit"]) == ("digits10", "icrf", "s/round")
    assert (line["median"], line["min"], line["max"]) == (0.5, 0.5, 1.0)
    assert line["ratio_to_reference"] == 0.5
    assert line["best_ratio"] == 0.4
    assert line["versions"] == {"torch": "2"}


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (found(1.0, accuracy=0.74), "accuracy"),
        (found(1.0, accuracy=None), "accuracy"),
        (found(1.0, accuracy=float("nan")), "accuracy"),
        (found(1.0, norm=7.01), "norm"),
        (found(1.0, norm=float("nan")), "norm"),
    ],
)
def test_a_row_of_other_work_is_refused(run: Mapping[str, Any], says: str) -> None:
    row = make_row("digits10", "pfl", [found(1.0), run], [found(1.0), found(1.0)])
    assert row.refused
    assert says in row.problem
    assert "median" not in json.loads(row.line())
    assert f"refused: {row.problem}" in markdown([row], TITLES)


def test_last_bits_of_the_weights_may_differ() -> None:
    run = found(1.0, accuracy=0.7505, norm=7.0001)
    assert not make_row("digits10", "icrf-vmap", [run], [found(1.0)]).problem


def test_what_a_system_does_not_have_is_no_failure_and_not_in_the_table() -> None:
    row = make_row("digits10", "icrf-vmap", [{"unavailable": "no key vectorize"}], [found(1.0)])
    assert not row.refused
    assert json.loads(row.line())["unavailable"] == "no key vectorize"
    assert "vectorised" not in markdown([row], TITLES)


def test_a_failed_run_is_refused_and_without_the_reference_everything_is() -> None:
    assert make_row("digits10", "pool", [{"failed": "exit 1"}], [found(1.0)]).refused
    assert make_row("digits10", "pool", [found(1.0)], [{"failed": "exit 1"}]).refused


def test_the_tables_show_rows_and_parts_of_rounds() -> None:
    run = found(0.25, split={"train_s": 0.125, "commit_s": 0.001})
    text = markdown([make_row("digits10", "icrf", [run], [found(0.5)])], TITLES)
    assert "| digits10 | **ICRF** | 0.25 (0.25, 0.25) | 0.50 | 0.5 | 2.0 | 100 | 0.7500 |" in text
    assert "| digits10 | **ICRF** | 0.125 | 0.001 |" in text
    for part in text.split("\n\nOf a round, seconds:\n\n"):
        assert len({line.count("|") for line in part.splitlines()}) == 1


def test_a_part_of_a_document_is_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- measured by x -->\nold\n<!-- end of what was measured -->\nafter\n", encoding="utf-8")
    write_part(page, "x", table(("a", "b"), [("1", "2")]))
    assert read_part(page, "x") == "| a | b |\n|---|---|\n| 1 | 2 |"
    assert page.read_text(encoding="utf-8").startswith("before\n")
    assert page.read_text(encoding="utf-8").endswith("\nafter\n")
    with pytest.raises(ValueError, match="measured by y"):
        write_part(page, "y", "")


def test_the_page_has_a_place_for_what_is_measured() -> None:
    assert read_part(DOCUMENT, COMMAND)


# ---------------------------------------------------------------- cases and systems


@pytest.mark.parametrize("name", ["digits", "digits0", "digits10x", "huge10", "tiny10000", ""])
def test_there_is_no_such_case(name: str) -> None:
    with pytest.raises(ValueError, match="no case"):
        parse_case(name)


def test_what_is_measured_by_default_exists() -> None:
    assert [parse_case(name).name for name in DEFAULT_CASES] == list(DEFAULT_CASES)
    modules = SCRIPTS / "benchmarks" / "systems"
    assert set(DEFAULT_SYSTEMS) <= SYSTEMS.keys()
    assert all((modules / f"{system.module}.py").exists() for system in SYSTEMS.values())


def test_more_actors_than_fit_are_not_tried() -> None:
    assert SYSTEMS["actors"].takes(parse_case("digits10"))
    assert not SYSTEMS["actors"].takes(parse_case("digits100"))
    assert "unavailable" in measure(SYSTEMS["actors"], parse_case("digits100"))


@pytest.mark.parametrize("name", ["digits3", "tiny5", "heavy10"])
def test_a_case_is_a_valid_configuration(name: str) -> None:
    config = FederationConfig.from_mapping(configuration(parse_case(name), {}))
    assert config.number_of_clients == parse_case(name).clients


@pytest.mark.parametrize("name", ["digits3", "tiny5"])
def test_the_fabric_does_the_work_of_the_loop(name: str) -> None:
    case = parse_case(name, rounds=1)
    with InlineFabric(1) as inline:
        run = Fabric(inline.port).submit(FederationConfig.from_mapping(configuration(case, {})))
        mine = run.result().state_dict()
    theirs = plain_rounds(case)
    assert mine.keys() == theirs.keys()
    for weights, expected in zip(mine.values(), (theirs[key] for key in mine), strict=True):
        assert weights.sub(expected).abs().max() < 1e-6
    assert judge(case, mine).accuracy == judge(case, theirs).accuracy


# ---------------------------------------------------------------- runs


def test_a_run_of_the_loop_from_end_to_end() -> None:
    case = parse_case("tiny3", rounds=2)
    (row,) = compare(case, ["loop"], repeats=1)
    assert not row.problem
    assert row.values["ratio_to_reference"] == 1.0
    assert row.values["rounds"] == 2
    assert row.values["accuracy"] == judge(case, plain_rounds(case)).accuracy
    assert row.values["private_mb"] > 0
    assert row.values["processor_s"] >= 0


def test_a_run_that_fails_says_why() -> None:
    problem = measure(System("nothing", "no_such_module"), parse_case("tiny3"))["failed"]
    assert "no_such_module" in problem


def test_a_family_is_all_that_a_process_has_started_and_ends_with_it() -> None:
    family = Family()
    # A child that no longer carries the mark, and outlives its parent.
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE, env={})"
    parent = subprocess.Popen(
        [sys.executable, "-c", f"{child}; print(flush=True); input()"],
        env={**os.environ, **family.environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    parent.stdout.readline()
    members = family.members()
    assert parent.pid in members
    assert len(members) == 2
    assert os.getpid() not in members
    family.end(grace_s=0.0)
    parent.communicate()
    assert parent.returncode
    assert not family.members()


# ---------------------------------------------------------------- assignment


def test_assignments_are_compared_on_the_same_graph() -> None:
    make, num_nodes = assignment.parse_case("blocks1k")
    rows = assignment.compare("blocks1k", make(num_nodes), ["icrf", "pymetis", "louvain"], 2)
    lines = {row.system: json.loads(row.line()) for row in rows}
    for line in lines.values():
        assert line.keys() >= {"case", "system", "median", "min", "max", "unit", "ratio_to_reference", "versions"}
        assert line["unit"] == "s" and line["repeats"] == 2 and line["nodes"] == 1000
    assert lines["pymetis"]["ratio_to_reference"] == lines["pymetis"]["cut_ratio_to_reference"] == 1
    assert lines["icrf"]["imbalance"] == 1 and lines["icrf"]["cut_ratio_to_reference"] <= 1.05


@pytest.mark.parametrize("name", ["kreg", "kreg10", "blocks1m", "star1k"])
def test_cases_of_assignment_that_are_none(name: str) -> None:
    with pytest.raises(ValueError, match="no case"):
        assignment.parse_case(name)
