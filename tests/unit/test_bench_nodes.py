"""``scripts/bench nodes``: its arithmetic, table and plot, and that what it runs is valid. No time is judged."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import nodes
from benchmarks.cases import MOST_TINY_MANY, Case
from benchmarks.document import read_part
from benchmarks.figures import Row
from benchmarks.icrf_parts import tiny, tiny_many
from benchmarks.machine import circumstances
from benchmarks.node_figures import by_graph, node_plot, node_row, node_table
from benchmarks.plot import log_log
from benchmarks.systems.fabric import configuration
from benchmarks.systems.nodes import keys_of
from icrf.spec import FederationConfig

SVG = "{http://www.w3.org/2000/svg}"


def found(*round_s: float, mediator_s: float = 0.01, **more: Any) -> dict[str, Any]:
    """What a run of one process brings back."""
    same = {"processor_s": 0.5, "first_round_s": 2.0, "private_mb": 100.0, "resident_mb": 150.0}
    split = {"train_s": 0.1, "mediator_s": mediator_s}
    return {"round_s": list(round_s), "split": split, "versions": {"torch": "2"}, **same, **more}


def rows() -> list[Row]:
    small, large = [found(1.0, 1.0, 9.0), found(2.0)], [found(11.0), found(20.0)]
    return [node_row("ring", 100, small, small), node_row("ring", 1000, large, small)]


def test_cost_per_node_is_compared_in_pairs_and_the_share_is_of_all_rounds() -> None:
    # The machine is half as fast in the second pair.
    small, large = (json.loads(row.line()) for row in rows())
    assert (large["case"], large["nodes"], large["unit"]) == ("ring1000", 1000, "s/round")
    assert (large["median"], large["min"], large["max"]) == (15.5, 11.0, 20.0)
    assert large["node_round_us"] == 15500.0
    assert large["ratio_spread"] == [1.0, 1.1]
    assert large["ratio_to_reference"] == 1.05
    assert large["processor_us"] == 500.0
    # 0.01 of 11 / 3 s, and of 2 s.
    assert small["mediator_spread"] == [0.002727, 0.005]
    assert small["ratio_to_reference"] == 1.0
    assert small["within_budget"] and large["within_budget"]


@pytest.mark.parametrize(
    ("nodes_there", "run", "within"),
    [
        (1000, found(11.6), False),
        (1000, found(11.4), True),
        (1000, found(11.0, mediator_s=0.6), False),
        # What a round costs besides its nodes weighs more where there are few.
        (10, found(0.5), True),
        (10, found(0.5, mediator_s=0.03), False),
    ],
)
def test_budgets(nodes_there: int, run: dict[str, Any], within: bool) -> None:
    assert node_row("star", nodes_there, [run], [found(1.0)]).values["within_budget"] == within


def test_a_failed_run_and_one_without_its_reference_are_refused() -> None:
    for row in (
        node_row("ring", 1000, [{"failed": "exit 1"}], [found(1.0)]),
        node_row("ring", 1000, [found(1.0)], [{"failed": "exit 1"}]),
    ):
        assert row.refused
        assert "median" not in json.loads(row.line())
        assert "refused: exit 1" in node_table([row])


def test_the_table_has_a_row_per_size() -> None:
    text = node_table(rows())
    assert "| ring | 1,000 | 15.5 (11, 20) | 15500 | 1.05 | 500 |" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_the_plot_shows_every_size_and_the_line_to_compare_with() -> None:
    tree = ElementTree.fromstring(node_plot(rows()))
    dots = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in tree.iter(f"{SVG}circle")]
    assert len(dots) == 2
    # More nodes lie to the right, more seconds higher up.
    assert dots[0][0] < dots[1][0] and dots[0][1] > dots[1][1]
    texts = [text.text for text in tree.iter(f"{SVG}text")]
    assert {"nodes", "seconds per round", "ICRF, ring", "ring, linear", "100", "1,000", "10"} <= set(texts)


def test_a_plot_of_one_point_has_axes() -> None:
    tree = ElementTree.fromstring(log_log({"a": [(10.0, 0.1)]}, {}, "x", "y"))
    assert len(list(tree.iter(f"{SVG}circle"))) == 1


def test_the_size_to_compare_with_is_always_measured() -> None:
    assert by_graph({"ring": (1000, 10), "star": ()}) == [("ring", 10), ("ring", 100), ("ring", 1000)]


@pytest.mark.parametrize("sizes", ["2", "100,10001"])
def test_there_are_no_such_sizes(sizes: str) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    nodes.add_arguments(parser)
    with pytest.raises(argparse.ArgumentError, match="from 3 to 10000"):
        parser.parse_args(["--nodes", sizes])


def test_the_defaults_are_sizes_and_short_rounds_are_measured_more_often() -> None:
    parser = argparse.ArgumentParser()
    nodes.add_arguments(parser)
    arguments = parser.parse_args([])
    assert arguments.nodes == (100, 1000, 10_000)
    assert arguments.star == (10, 100, 1000, 10_000)
    assert [nodes.rounds_of(size) for size in arguments.star] == [40, 40, 5, 5]


@pytest.mark.parametrize("graph", nodes.SYSTEMS)
@pytest.mark.parametrize("size", [10, MOST_TINY_MANY])
def test_a_size_is_a_valid_configuration(graph: str, size: int) -> None:
    system, case = nodes.SYSTEMS[graph], Case("tiny", size, 2)
    assert system.takes(case) and not system.takes(Case("tiny", MOST_TINY_MANY + 1, 2))
    keys = keys_of(case, system.options)
    config = FederationConfig.from_mapping(configuration(case, keys))
    assert config.number_of_clients == size
    assert config.federated_learning_topology == graph
    assert config.dataset_type.endswith(":tiny_many") == (size > 1000)


def test_many_clients_have_the_data_of_few_and_then_some() -> None:
    few, many = tiny(), tiny_many()
    assert len(many.train_y) == 16 * MOST_TINY_MANY
    assert (many.train_x[: len(few.train_x)] == few.train_x).all()


def test_too_few_runs_are_not_written_down() -> None:
    parser = argparse.ArgumentParser()
    nodes.add_arguments(parser)
    assert nodes.main(parser.parse_args(["--write", "--repeat", "2"])) == 2


def test_what_was_measured_is_written_and_a_refused_row_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, plot = tmp_path / "page.md", tmp_path / "nodes.svg"
    page.write_text(f"<!-- measured by {nodes.COMMAND} -->\n\nold\n\n<!-- end of what was measured -->\n")
    monkeypatch.setattr(nodes, "DOCUMENT", page)
    monkeypatch.setattr(nodes, "PLOT", plot)
    runs = [found(1.0), {"failed": "exit 1"}]
    monkeypatch.setattr(nodes, "measure", lambda system, case: runs[0])
    parser = argparse.ArgumentParser()
    nodes.add_arguments(parser)
    arguments = parser.parse_args(["--nodes", "100,1000", "--star", "", "--write"])
    assert nodes.main(arguments) == 0
    assert [json.loads(line)["nodes"] for line in capsys.readouterr().out.splitlines()[:2]] == [100, 1000]
    written = read_part(page, nodes.COMMAND)
    assert "| ring | 1,000 | 1 (1, 1) |" in written and "](nodes.svg)" in written and "old" not in written
    assert plot.read_text().startswith("<svg")
    runs.pop(0)
    assert nodes.main(arguments) == 1
    assert read_part(page, nodes.COMMAND) == written


def test_circumstances_name_each_version_once() -> None:
    text = circumstances("scripts/bench x", [{"ray": "2"}, {"ray": "1", "torch": "3"}, {"ray": "2"}], 0.25)
    assert "ray 1 and 2, torch 3." in text
    assert "load 0.2 before" in text


def test_the_page_has_a_place_for_what_is_measured() -> None:
    assert read_part(nodes.DOCUMENT, nodes.COMMAND)
