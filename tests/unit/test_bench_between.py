"""The arithmetic of ``scripts/bench between-clusters``, and one measurement of plain gRPC. No time is judged."""

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.between_clusters import rows_of
from benchmarks.crossing import CASES, activation


def turns(*seconds):
    return [{"seconds": list(seconds), "versions": {"python": "3"}}]


def test_a_row_has_what_was_delivered_per_second_and_the_ratio_to_the_copying_stream():
    rows = rows_of(CASES["fanout"], {"grpc-copy": turns(0.8, 0.4, 0.2), "icrf": turns(0.1, 0.1)})
    lines = [json.loads(row.line()) for row in rows]
    assert lines[0] == {
        **{"case": "fanout", "system": "grpc-copy", "median": 1.0, "min": 0.5, "max": 2.0, "unit": "GB/s"},
        **{"tls": False, "ratio_to_reference": 1.0, "versions": {"python": "3"}},
    }
    assert (lines[1]["median"], lines[1]["ratio_to_reference"]) == (4.0, 4.0)
    (row,) = rows_of(CASES["small"], {"grpc-copy": turns(0.5)})
    assert (row.values["median"], row.values["unit"]) == (4000.0, "messages/s")


@pytest.mark.parametrize("name", CASES)
def test_what_crosses_goes_from_one_node_to_all_those_of_the_other_cluster(name):
    found = activation(CASES[name])
    assert found.assignment[0] == 0 and set(found.assignment[1:]) == {1}
    assert len(found.nodes) == (CASES[name].receivers if CASES[name].megabytes else 1) + 1


@pytest.mark.parametrize("wrong", [["--cases", "bulk1"], ["--systems", "smoke"], ["--repeat", "0"]])
def test_a_command_that_makes_no_sense_measures_nothing(wrong, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", "between-clusters", *wrong])
    assert main() == 2
    assert capsys.readouterr().out == ""


def test_plain_grpc_is_measured_in_processes_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", "between-clusters", "--cases=small", "--systems=grpc", "--repeat=1"])
    assert main() == 0
    assert [json.loads(line)["system"] for line in capsys.readouterr().out.splitlines()] == ["grpc-copy", "grpc"]
