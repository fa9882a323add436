"""``scripts/bench between-clusters``: its arithmetic, budgets and tables, and measurements of plain gRPC. No time is
judged."""

import argparse
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmarks import between_clusters, environments
from benchmarks import turns as turns_module
from benchmarks.__main__ import main
from benchmarks.between_clusters import DEFAULT_CASES, ROUND_SYSTEMS, Asked
from benchmarks.crossing_fabric import activation, header
from benchmarks.crossing_figures import budgets_of, crossing_table, round_rows, round_table, rows_of
from benchmarks.crossings import CARRIERS, CASES, Job, heard
from benchmarks.document import read_part
from benchmarks.sockets import free_ports, is_open, received_bytes
from benchmarks.turns import Growth, measure

TITLES = {name: system.title for name, system in ROUND_SYSTEMS.items()}


def turns(case, *seconds, **more):
    return [{"seconds": list(seconds), "delivered": CASES[case].delivered, "versions": {"python": "3"}, **more}]


def asked(*options):
    parser = argparse.ArgumentParser()
    between_clusters.add_arguments(parser)
    return Asked.read(parser.parse_args(options))


# ---------------------------------------------------------------- crossings


def test_a_row_has_what_was_delivered_per_second_and_the_ratios_to_the_anchors():
    runs = {
        "grpc-copy": turns("bulk100", 0.2, 0.1, 0.05),
        "icrf": turns("bulk100", 0.1, 0.1, socket_bytes=101e6),
        "rayfed": turns("bulk100", 0.5),
    }
    lines = [json.loads(row.line()) for row in rows_of(CASES["bulk100"], runs)]
    assert lines[0] == {
        **{"case": "bulk100", "system": "grpc-copy", "median": 1.0, "min": 0.5, "max": 2.0, "unit": "GB/s"},
        **{"tls": False, "megabytes": 100, "repeats": 3, "ratio_to_reference": 1.0, "budgets": {}},
        **{"against": {"grpc-copy": 1.0, "rayfed": 5.0}, "versions": {"python": "3"}},
    }
    assert (lines[1]["median"], lines[1]["ratio_to_reference"], lines[1]["wire_ratio"]) == (1.0, 1.0, 1.01)
    assert lines[1]["against"] == {"grpc-copy": 1.0, "rayfed": 5.0}
    assert lines[1]["budgets"] == {"grpc-copy": 0.8, "rayfed": 7.0}
    # Five times RayFed is too little.
    assert lines[1]["within_budget"] is False
    (row,) = rows_of(CASES["small"], {"grpc-copy": turns("small", 0.5)})
    assert (row.values["median"], row.values["unit"]) == (4000.0, "messages/s")


@pytest.mark.parametrize(
    ("system", "case", "seconds", "more", "within"),
    [
        ("icrf", "bulk100", 0.12, {}, True),
        ("icrf", "bulk100", 0.13, {}, False),
        ("icrf", "bulk100", 0.1, {"socket_bytes": 103e6}, False),
        ("icrf-relay", "bulk100", 0.19, {"relay_growth_bytes": 64 << 20}, True),
        ("icrf-relay", "bulk100", 0.19, {"relay_growth_bytes": 65 << 20}, False),
        ("icrf-relay", "bulk100", 0.21, {"relay_growth_bytes": 0}, False),
        ("icrf", "small", 0.19, {}, True),
        ("icrf", "small", 0.21, {}, False),
    ],
)
def test_budgets(system, case, seconds, more, within):
    runs = {"grpc-copy": turns(case, 0.1), system: turns(case, seconds, **more)}
    assert rows_of(CASES[case], runs)[1].values["within_budget"] is within


def test_what_has_no_budget_is_not_judged_and_what_is_no_anchor_has_none():
    assert "within_budget" not in rows_of(CASES["bulk100"], {"grpc-copy": turns("bulk100", 0.1)})[0].values


def test_a_budget_whose_peer_has_failed_is_not_kept():
    runs = {"grpc-copy": turns("bulk100", 0.1), "icrf": turns("bulk100", 0.11), "rayfed": [{"failed": "it crashed"}]}
    assert "within_budget" not in rows_of(CASES["bulk100"], runs)[1].values
    assert rows_of(CASES["bulk100"], {**runs, "icrf": turns("bulk100", 0.5)})[1].values["within_budget"] is False
    assert not budgets_of(CASES["bulk100"], "grpc")
    assert not budgets_of(CASES["fanout"], "icrf")


def test_a_fan_out_is_compared_with_one_payload_and_with_one_per_cluster_on_the_wire():
    runs = {"grpc-copy": turns("clusters3", 0.9), "icrf": turns("clusters3", 0.6, socket_bytes=303e6)}
    singles = {"grpc-copy": turns("bulk100", 0.3), "icrf": turns("bulk100", 0.3)}
    reference, mine = rows_of(CASES["clusters3"], runs, singles=singles)
    assert (reference.values["single_ratio"], mine.values["single_ratio"]) == (3.0, 2.0)
    assert mine.values["wire_ratio"] == 1.01 and mine.values["within_budget"]


def test_what_could_not_be_measured_says_why_and_without_the_reference_nothing_is_compared():
    why = "pip install rayfed-nightly: ERROR: none"
    runs = {"grpc-copy": turns("bulk100", 0.1), "rayfed": [{"unavailable": why}], "icrf": [{"failed": "exit 1"}]}
    rows = rows_of(CASES["bulk100"], runs)
    assert [row.refused for row in rows] == [False, False, True]
    assert json.loads(rows[1].line())["unavailable"] == why
    text = crossing_table(rows)
    assert f"| bulk100 | RayFed | off | not available: {why} |" in text and "refused: exit 1" in text
    assert all(row.refused for row in rows_of(CASES["bulk100"], {"grpc-copy": [{"failed": "x"}], "icrf": [{}]}))


def test_the_table_shows_ratios_with_their_budgets():
    runs = {
        "grpc-copy": turns("bulk100", 0.1),
        "icrf-relay": turns("bulk100", 0.16, socket_bytes=100.5e6, relay_growth_bytes=5 << 20),
    }
    text = crossing_table(rows_of(CASES["bulk100"], runs, tls=True))
    assert (
        "| bulk100 | **ICRF**, relayed | on | 0.625 (0.625, 0.625) GB | 0.625 (0.5) |  |  | 1.0050 | 5 | yes |" in text
    )
    assert len({line.count("|") for line in text.splitlines()}) == 1


# ---------------------------------------------------------------- what is sent


@pytest.mark.parametrize("name", CASES)
def test_what_crosses_goes_from_one_node_to_those_of_the_other_clusters(name):
    case = CASES[name]
    found = activation(case)
    assert found.assignment[0] == 0 and set(found.assignment[1:]) == set(range(1, 1 + case.clusters))
    assert len(found.nodes) == (case.receivers if case.megabytes else 1) + 1
    targets = [header("update", 0, k, "float32", 1).target for k in range(case.clusters)]
    assert ["source", *targets] == list(found.clusters)


def test_a_job_is_the_same_in_the_process_that_it_is_for():
    job = Job("sink", "icrf", CASES["clusters3"], 2, peers=("a:1", "b:2"), number=1)
    assert Job.from_json(job.to_json()) == job


@pytest.mark.parametrize(
    ("line", "found"), [('{"sent": 1}', {"sent": 1}), ("{not json", None), ("INFO {}", None), ("\n", None)]
)
def test_what_libraries_print_is_not_heard(line, found):
    assert heard(line) == found


def test_who_is_measured_with_what():
    def carried(case, tls=False, **changes):
        return {name for name, carrier in CARRIERS.items() if carrier.takes(replace(CASES[case], **changes), tls)}

    assert carried("bulk100") == {"grpc-copy", "grpc", "icrf", "icrf-relay", "rayfed"}
    assert carried("bulk2000") == {"grpc-copy", "grpc", "icrf", "icrf-relay"}
    assert carried("small") == set(CARRIERS)
    assert carried("small", tls=True) == {"grpc-copy", "grpc", "icrf", "icrf-relay"}
    assert carried("fanout") == carried("clusters3") == {"grpc-copy", "icrf"}
    assert not carried("fanout", tls=True)


# ---------------------------------------------------------------- rounds


def rounds(*round_s, **more):
    same = {"processor_s": 0.5, "first_round_s": 2.0, "private_mb": 100.0, "resident_mb": 150.0, "split": {}}
    return {"round_s": list(round_s), "accuracy": 0.75, "norm": 7.0, "versions": {"torch": "2"}, **same, **more}


@pytest.mark.parametrize(("mine", "flowers", "within"), [(0.11, 6.0, True), (0.13, 9.0, False), (0.11, 5.0, False)])
def test_a_round_is_compared_with_the_training_alone_and_with_the_peer(mine, flowers, within):
    runs = {"loop": [rounds(0.02)], "icrf": [rounds(mine)], "flower": [rounds(flowers)]}
    rows = {row.system: row.values for row in round_rows("digits2", runs, "loop")}
    assert rows["icrf"]["over_training_s"] == pytest.approx(mine - 0.02)
    assert rows["icrf"]["against"] == {"flower": pytest.approx(flowers / mine, rel=1e-3)}
    assert rows["icrf"]["within_budget"] is within
    assert "within_budget" not in rows["flower"] and rows["loop"]["over_training_s"] == 0.0


def test_rounds_of_other_work_are_refused_and_a_peer_that_is_not_there_is_said():
    runs = {"loop": [rounds(0.02)], "icrf": [rounds(0.1, accuracy=0.5)], "flower": [{"unavailable": "no wheel"}]}
    rows = round_rows("digits2", runs, "loop")
    assert [row.refused for row in rows] == [False, True, False]
    text = round_table(rows, TITLES)
    assert "other work was done" in text and "not available: no wheel" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1


# ---------------------------------------------------------------- the command


def test_what_is_measured_by_default():
    found = asked()
    assert [case.name for case in found.crossings] == ["bulk100", "bulk2000", "small", "bulk10", "fanout", "clusters3"]
    assert [case.name for case in found.rounds] == ["digits2"] and "digits2" in DEFAULT_CASES
    assert found.systems[0] == "grpc-copy"
    assert found.environments == {"flower", "rayfed"}
    assert all(ROUND_SYSTEMS[name].takes(case) for case in found.rounds for name in ROUND_SYSTEMS)


def test_one_payload_is_measured_where_a_fan_out_is_and_sizes_can_be_set():
    found = asked("--cases=clusters3,small", "--systems=icrf", "--megabytes=3")
    assert [(case.name, case.megabytes) for case in found.crossings] == [("bulk100", 3), ("small", 0), ("clusters3", 3)]
    assert found.systems == ["grpc-copy", "icrf"] and not found.rounds and not found.environments


@pytest.mark.parametrize(
    "wrong",
    [
        ["--cases", "bulk1"],
        ["--systems", "smoke"],
        ["--repeat", "0"],
        ["--megabytes", "0"],
        ["--write", "--repeat", "2"],
        ["--write", "--megabytes", "5"],
    ],
)
def test_a_command_that_makes_no_sense_measures_nothing(wrong, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", "between-clusters", *wrong])
    assert main() == 2
    assert capsys.readouterr().out == ""


def test_plain_grpc_is_measured_in_processes_of_its_own_and_written_down(monkeypatch, capsys, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"<!-- measured by {between_clusters.COMMAND} -->\n\nold\n\n<!-- end of what was measured -->\n")
    monkeypatch.setattr(between_clusters, "DOCUMENT", page)
    monkeypatch.setitem(CASES, "small", replace(CASES["small"], receivers=100))
    options = ["--cases=small", "--systems=grpc", "--repeat=3", "--tls=off", "--json", "--write"]
    monkeypatch.setattr("sys.argv", ["bench", "between-clusters", *options])
    assert main() == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["system"], line["tls"]) for line in lines] == [("grpc-copy", False), ("grpc", False)]
    written = read_part(page, between_clusters.COMMAND)
    assert "| small | gRPC stream, dropped | off |" in written and "old" not in written


def test_the_page_has_a_place_for_what_is_measured():
    assert read_part(between_clusters.DOCUMENT, between_clusters.COMMAND)


# ---------------------------------------------------------------- turns and what is seen from outside


def test_a_side_that_fails_says_its_last_words(monkeypatch):
    monkeypatch.setitem(CARRIERS, "grpc", replace(CARRIERS["grpc"], module="no_such_module"))
    assert "no_such_module" in measure(CASES["small"], "grpc", 1)["failed"]


def test_a_side_that_hangs_is_ended(monkeypatch, tmp_path):
    (tmp_path / "hangs.py").write_text("input()")
    monkeypatch.setitem(turns_module._ENVIRONMENT, "PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(turns_module, "LIMIT_S", 1.0)
    monkeypatch.setitem(CARRIERS, "grpc", replace(CARRIERS["grpc"], module="hangs"))
    assert measure(CASES["small"], "grpc", 1)["failed"].startswith("the sink ended with -9")


def test_a_peer_without_its_environment_is_not_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    assert "--setup" in measure(CASES["small"], "rayfed", 1)["unavailable"]
    (tmp_path / "rayfed").mkdir()
    (tmp_path / "rayfed" / "problem").write_text("no wheel")
    assert measure(CASES["small"], "rayfed", 1) == {"unavailable": "no wheel"}
    (tmp_path / "rayfed" / "ready").touch()
    assert not environments.why_not("rayfed") and not environments.why_not("")


def test_an_environment_that_cannot_be_installed_says_why(monkeypatch, tmp_path, capsys):
    (tmp_path / "rayfed").mkdir()
    said = "WARNING: slow\nERROR: No matching distribution found for ray==2.35.0\n"
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    monkeypatch.setattr(environments.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr=said))
    environments.set_up("rayfed")
    why = environments.why_not("rayfed")
    assert why.startswith("pip install ray==2.35.0 ") and why.endswith("found for ray==2.35.0")
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_kernel_counts_what_comes_in_at_a_port(host):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        port = server.getsockname()[1]
        assert received_bytes(port) == 0
        with socket.create_connection((host, port)) as near, server.accept()[0] as far:
            near.sendall(b"x" * 5000)
            far.sendall(b"y" * 70)
            assert len(far.recv(5000, socket.MSG_WAITALL)) == 5000
            assert received_bytes(port) == 5000


def test_free_ports_are_not_listened_on():
    first, second = free_ports(2)
    assert first != second and not is_open(first)
    with socket.create_server(("127.0.0.1", first)):
        assert is_open(first)


def test_growth_is_what_a_process_takes_more_than_at_its_beginning():
    takes = "input(); x = bytearray(b'1') * (40 << 20); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", takes], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ}, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        with Growth(process.pid) as growth:
            process.stdin.write("\n")
            process.stdin.flush()
            process.stdout.readline()
        process.stdin.write("\n")
        process.stdin.flush()
        process.communicate()
    assert 39 << 20 <= growth.num_bytes < 60 << 20
