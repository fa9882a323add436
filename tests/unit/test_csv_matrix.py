"""Adjacency matrices in CSV files: what is accepted and the error that everything else gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from icrf.errors import ConfigErrors, IcrfError, TopologyError
from icrf.topology import HybridAdjacencyMatrix, build_topology, read_adjacency_csv, read_weights_csv

IDS = ["a", "b", "c"]
RING = "0,1,1\n1,0,1\n1,1,0\n"


def read(tmp_path: Path, content: str | bytes, ids: list[str] = IDS, **options: bool) -> HybridAdjacencyMatrix:
    path = tmp_path / "adj.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_adjacency_csv(path, ids, **options)


def errors_of(tmp_path: Path, content: str | bytes, ids: list[str] = IDS) -> list[IcrfError]:
    with pytest.raises(IcrfError) as caught:
        read(tmp_path, content, ids)
    return list(caught.value.errors) if isinstance(caught.value, ConfigErrors) else [caught.value]


@pytest.mark.parametrize(
    "content",
    [
        RING,
        RING.rstrip(),
        "\ufeff" + RING,
        RING.replace("\n", "\r\n"),
        RING + "\n \n\r\n",
        "0, 1 ,1\n1.0,0.0,1\n1,+1,0e0\n",
        '"0","1","1"\n1,0,1\n1,1,0\n',
        "a,b,c\n" + RING,
        ",a,b,c\na,0,1,1\nb,1,0,1\nc,1,1,0\n",
        "node,a,b,c\na,0,1,1\nb,1,0,1\nc,1,1,0\n",
        "a,0,1,1\nb,1,0,1\nc,1,1,0\n",
    ],
)
def test_accepted_spellings_of_the_same_matrix(tmp_path: Path, content: str) -> None:
    assert read(tmp_path, content) == build_topology("ring", 3, {})


def test_one_node(tmp_path: Path) -> None:
    assert read(tmp_path, "0\n", ["a"]).num_edges == 0


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("0,1,1\n1,0,1\n1,1\n", ("T001", "adj.csv", "3 rows, row 3 has 2 columns")),
        ("0,1,1\n1,0,1\n", ("T001", "adj.csv", "2 rows of 3 columns")),
        ("0,1\n\n1,0\n", ("T001", "adj.csv:2", "blank line inside the matrix")),
        ("0,1,1\n1,0,x\n1,1,0\n", ("T002", "adj.csv:2:3", "'x' is not a finite number ≥0")),
        ("0,1,1\n1,0,\n1,1,0\n", ("T002", "adj.csv:2:3", "'' is not")),
        ('0,1,"1,5"\n1,0,1\n1,1,0\n', ("T002", "adj.csv:1:3", "'1,5' is not")),
        ("0,1,0x1\n1,0,1\n0,1,0\n", ("T002", "adj.csv:1:3", "'0x1' is not")),
        ("0,1,nan\n1,0,1\n0,1,0\n", ("T002", "adj.csv:1:3", "'nan' is not")),
        ("0,1,inf\n1,0,1\n0,1,0\n", ("T002", "adj.csv:1:3", "'inf' is not")),
        ("0,1,1e999\n1,0,1\n0,1,0\n", ("T002", "adj.csv:1:3", "'1e999' is not")),
        ("0,1,-1\n1,0,1\n0,1,0\n", ("T002", "adj.csv:1:3", "'-1' is not")),
        ("0,1,1_0\n1,0,1\n0,1,0\n", ("T002", "adj.csv:1:3", "'1_0' is not")),
        ("0,1,=cmd\n1,0,1\n0,1,0\n", ("T002", "adj.csv:1:3", "'=cmd' is not")),
        ("0,1,0.5\n1,0,1\n0,1,0\n", ("T002", "adj.csv:1:3", "'0.5' is a weight")),
        ("a,c,b\n" + RING, ("T002", "adj.csv:1:1", "the first row holds no numbers")),
        ("a,0,1,1\nx,1,0,1\nc,1,1,0\n", ("T002", "adj.csv:2:1", "header column differs")),
        ("0;1\n1;0\n", ("T003", "adj.csv:1", "separated by semicolons")),
        ("0\t1\n1\t0\n", ("T003", "adj.csv:1", "separated by tabs")),
        (RING.encode("utf-16"), ("T003", "adj.csv", "UTF-16")),
        (b"0,1\xff\n1,0\n", ("T003", "adj.csv:1", "not UTF-8")),
        (b"0,1\r1,0\r", ("T003", "adj.csv:1", "not a CSV line")),
        ("0,1,1\n1,0,1\n0,1,0\n", ("T004", "adj.csv", "A[0,2]=1 but A[2,0]=0")),
        ("1,1,1\n1,0,1\n1,1,0\n", ("T005", "adj.csv", "1 self loops: A[0,0]=1")),
        ("", ("T008", "adj.csv", "no matrix")),
        ("\n\n", ("T008", "adj.csv", "no matrix")),
        (b"0,1\n1,\x00\n", ("T009", "adj.csv:2", "NUL byte at byte 3")),
        ("0,1\n1,0\n", ("T010", "adj.csv", "matrix 2×2, configuration has 3 nodes")),
    ],
)
def test_what_is_refused_names_the_place(tmp_path: Path, content: str | bytes, expected: tuple[str, str, str]) -> None:
    (error,) = errors_of(tmp_path, content)
    code, place, text = expected
    assert (error.code, error.place) == (code, place)
    assert text in error.message


def test_all_bad_cells_are_reported_at_once_up_to_a_limit(tmp_path: Path) -> None:
    found = errors_of(tmp_path, "0,x,1\n1,0,y\n1,1,z\n")
    assert [error.place for error in found] == ["adj.csv:1:2", "adj.csv:2:3", "adj.csv:3:3"]
    wide = "0" + ",x" * 99
    assert len(errors_of(tmp_path, "\n".join([wide] * 100), [str(i) for i in range(100)])) == 20


def test_cells_shape_loops_and_symmetry_come_together(tmp_path: Path) -> None:
    assert [e.code for e in errors_of(tmp_path, "1,1,0\n0,0,1\n0,1,0\n")] == ["T005", "T004"]
    assert [e.code for e in errors_of(tmp_path, "0,1,x\n1,0\n")] == ["T002", "T001"]


def test_only_the_first_asymmetries_are_shown(tmp_path: Path) -> None:
    upper = "\n".join(",".join(map(str, row)) for row in np.triu(np.ones((9, 9), dtype=int), 1))
    (error,) = errors_of(tmp_path, upper, [str(i) for i in range(9)])
    assert error.code == "T004" and error.message.count("but") == 5
    assert read(tmp_path, upper, [str(i) for i in range(9)], symmetric=False).num_edges == 36


def test_too_many_columns_and_endless_lines(tmp_path: Path) -> None:
    assert errors_of(tmp_path, ",".join(["0"] * 20_002))[0].code == "T008"
    assert errors_of(tmp_path, b"0" * 6_000_000)[0].code == "T008"


def test_a_missing_file_or_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(IcrfError) as caught:
            read_adjacency_csv(path, IDS)
        assert caught.value.code == "C015" and str(path) in caught.value.place


@given(st.integers(1, 9), st.integers(0, 2**32))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_printed_is_read_back(tmp_path: Path, num_nodes: int, seed: int) -> None:
    upper = np.triu(np.random.default_rng(seed).integers(0, 2, (num_nodes, num_nodes)), 1)
    dense = upper + upper.T
    printed = "\n".join(",".join(map(str, row)) for row in dense)
    assert (read(tmp_path, printed, [f"n{i}" for i in range(num_nodes)]).to_dense() == dense).all()


@given(st.one_of(st.binary(max_size=60), st.text('01,;"\r\n\t x.e-ab', max_size=60).map(str.encode)))
@example(b'"\n')
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_input_gets_anything_but_a_matrix_or_an_error_with_a_code(tmp_path: Path, content: bytes) -> None:
    try:
        assert read(tmp_path, content).num_nodes == 3
    except IcrfError as error:
        assert error.code[0] in "TC"


# ---------------------------------------------------------------- weights


def read_weights(folder: Path, content: str, ids: list[str] | None = None) -> Any:
    (folder / "weights.csv").write_text(content)
    return read_weights_csv(folder / "weights.csv", ids or ["a", "b"])


@pytest.mark.parametrize("content", ["0.25,0.75\n1e0,0\n", ",a,b\na,0.25,.75\nb,1,0\n", "a,b\n0.25,0.75\n1,0.0\n"])
def test_weights_are_read(tmp_path: Path, content: str) -> None:
    assert read_weights(tmp_path, content).toarray().tolist() == [[0.25, 0.75], [1.0, 0.0]]


@pytest.mark.parametrize(
    ("content", "code"),
    [("0.5,-0.5\n0,1\n", "T002"), ("nan,1\n0,1\n", "T002"), ("1,0\n0\n", "T001"), ("1\n", "T010"), ("", "T008")],
)
def test_weights_that_are_none_are_refused(tmp_path: Path, content: str, code: str) -> None:
    with pytest.raises(IcrfError) as caught:
        read_weights(tmp_path, content)
    assert caught.value.code == code


def test_edges_in_one_direction_need_to_be_asked_for(tmp_path: Path) -> None:
    (tmp_path / "adj.csv").write_text("0,1,0\n0,0,1\n1,0,0\n")
    with pytest.raises(TopologyError) as caught:
        read_adjacency_csv(tmp_path / "adj.csv", ["a", "b", "c"])
    assert caught.value.code == "T004" and "directed: true" in caught.value.hint
    ring = build_topology("ring", 3, {"directed": True})
    assert read_adjacency_csv(tmp_path / "adj.csv", ["a", "b", "c"], symmetric=False) == ring
