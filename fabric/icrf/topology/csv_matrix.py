"""Adjacency and mixing matrices in CSV files, read strictly: every complaint names file, row and column.

The format: one row per node, cells ``0`` or ``1`` (weights: numbers from 0) separated by commas, UTF-8. A byte order
mark, CRLF line ends and blank lines at the end are fine. A header row or a header column is accepted if it equals the
node ids.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from icrf.errors import ConfigError, ConfigErrors, IcrfError, TopologyError
from icrf.topology.hybrid import MAX_DENSE_NODES, SHOWN, HybridAdjacencyMatrix

# Errors reported at once; a wholly wrong file would give millions.
MAX_ERRORS = 20
# A cell longer than this is no number; it bounds the memory that a file without line ends can take.
MAX_CELL_BYTES = 256
MAX_CELLS = MAX_DENSE_NODES + 1

# float() also takes "1_0", "nan" and "infinity".
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_ZERO, _ONE, _COMMA = b"0,1"[0], b"0,1"[2], b"0,1"[1]


def read_adjacency_csv(path: str | Path, node_ids: Sequence[str], *, symmetric: bool = True) -> HybridAdjacencyMatrix:
    """Read a 0/1 matrix; row i, column j is 1 where node i may send to node j.

    Args:
        node_ids: ids in index order; they decide the size and what a header may say.
        symmetric: require an undirected graph.

    Raises:
        ConfigError: C015 if the file cannot be read.
        TopologyError: T001 ragged or not square, T002 a bad cell, T003 encoding or separator, T004 not symmetric,
            T005 a self loop, T008 empty or too large, T009 a NUL byte, T010 not one row per node.
        ConfigErrors: several of these at once.
    """
    reader = _Reader(Path(path).name, node_ids)
    _read(Path(path), reader)
    return reader.finish(symmetric)


def read_weights_csv(path: str | Path, node_ids: Sequence[str]) -> csr_matrix:
    """Read a mixing matrix; row i, column j is what node i multiplies the state of node j with.

    Returns:
        float64 CSR matrix of shape (number of nodes, number of nodes).

    Raises:
        ConfigError, TopologyError, ConfigErrors: see :func:`read_adjacency_csv`; T002 for a cell that is no finite
            number from 0.
    """
    reader = _Reader(Path(path).name, node_ids, weighted=True)
    _read(Path(path), reader)
    return reader.weights()


def _read(path: Path, reader: _Reader) -> None:
    try:
        with path.open("rb") as file:
            for number, row in _lines(file, path.name):
                reader.read_line(number, row)
                if len(reader.errors) >= MAX_ERRORS:
                    break
    except OSError as error:
        raise ConfigError("C015", f"cannot read the matrix: {error.strerror or error}", place=str(path)) from error


def _lines(file: Any, name: str) -> Iterator[tuple[int, bytes]]:
    """(line number, line without its end); refuses what no CSV line can be before it fills the memory."""
    limit = MAX_CELLS * MAX_CELL_BYTES
    number, blank_since = 0, 0
    while line := file.readline(limit + 1):
        number += 1
        if number == 1:
            if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise TopologyError("T003", "the file is UTF-16", place=name, hint="save it as UTF-8, comma separated")
            line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) > limit:
            raise TopologyError("T008", f"line longer than {limit} bytes", place=f"{name}:{number}")
        if b"\0" in line:
            column = line.index(b"\0") + 1
            raise TopologyError(
                "T009",
                f"NUL byte at byte {column} of the line",
                place=f"{name}:{number}",
                hint="the file may be UTF-16 or binary: save it as UTF-8, comma separated",
            )
        line = line.rstrip(b"\r\n")
        if not line.strip():
            blank_since = blank_since or number
            continue
        if blank_since:
            raise TopologyError(
                "T001", "blank line inside the matrix", place=f"{name}:{blank_since}", hint="remove the line"
            )
        yield number, line


class _Reader:
    """Collects rows and errors of one file."""

    def __init__(self, name: str, node_ids: Sequence[str], weighted: bool = False) -> None:
        self._name = name
        self._weighted = weighted
        self._values: list[np.ndarray[Any, Any]] = []
        self._ids = list(node_ids)
        self._has_header_column = False
        self._columns: list[np.ndarray[Any, Any]] = []
        self._width = 0
        self._ragged: list[tuple[int, int]] = []
        self._too_many = False
        self.errors: list[IcrfError] = []

    def read_line(self, number: int, line: bytes) -> None:
        if number == 1 and self._read_first(line):
            return
        row = len(self._columns)
        if row >= MAX_CELLS:
            raise TopologyError(
                "T008", "too many rows", place=f"{self._name}:{number}", allowed=f"at most {MAX_DENSE_NODES}"
            )
        ones = None if self._has_header_column or self._weighted else self._fast(line)
        self._columns.append(self._slow(number, row, line) if ones is None else ones)

    def finish(self, symmetric: bool) -> HybridAdjacencyMatrix:
        self._require_shape()
        rows = len(self._columns)
        matrix = HybridAdjacencyMatrix.from_edges(rows, self._pairs(), symmetric=False)
        if symmetric and not matrix.is_symmetric():
            shown = "; ".join(f"A[{i},{j}]=1 but A[{j},{i}]=0" for i, j in matrix.one_way_edges(SHOWN))
            hint = "indices count from 0; edges in one direction need directed: true and mixing: push_sum"
            self._complain("T004", shown, allowed="a symmetric matrix", hint=hint)
        self._raise_errors()
        return matrix

    def weights(self) -> csr_matrix:
        """The numbers read as a matrix."""
        self._require_shape()
        num_nodes = len(self._columns)
        indptr = np.concatenate([[0], np.cumsum([len(columns) for columns in self._columns])])
        return csr_matrix(
            (np.concatenate(self._values), np.concatenate(self._columns), indptr), shape=(num_nodes, num_nodes)
        )

    def _require_shape(self) -> None:
        rows = len(self._columns)
        if rows == 0 and not self.errors:
            raise TopologyError("T008", "the file holds no matrix", place=self._name, allowed="at least one row")
        if self._ragged:
            first = ", ".join(f"row {row} has {count} columns" for row, count in self._ragged[:SHOWN])
            self._complain("T001", f"{rows} rows, {first}", allowed="as many columns as rows in every row")
        elif self._width != rows and len(self.errors) < MAX_ERRORS:
            self._complain("T001", f"{rows} rows of {self._width} columns", allowed="a square matrix")
        elif rows != len(self._ids) and len(self.errors) < MAX_ERRORS:
            self._complain("T010", f"matrix {rows}×{rows}, configuration has {len(self._ids)} nodes")
        self._raise_errors()

    # ------------------------------------------------------------ rows

    def _read_first(self, line: bytes) -> bool:
        """Look at separator, width and header; true if the line was a header row."""
        text = self._decode(1, line)
        for separator, called in ((";", "semicolons"), ("\t", "tabs")):
            if separator in text:
                raise TopologyError(
                    "T003", f"cells are separated by {called}", place=f"{self._name}:1", hint="export it with commas"
                )
        cells = self._split(1, text)
        if len(cells) > MAX_CELLS:
            raise TopologyError(
                "T008", f"{len(cells)} columns", place=self._name, allowed=f"at most {MAX_DENSE_NODES} nodes"
            )
        # Ids such as "0" and "1" could be cells: a row of valid cells is always data.
        if all(self._is_valid(_cell(cell)) for cell in cells):
            self._width = len(cells)
            return False
        if cells in (self._ids, ["", *self._ids]) or cells[1:] == self._ids:
            self._has_header_column = cells != self._ids
            self._width = len(self._ids)
            return True
        if len(cells) == len(self._ids) + 1 and cells[0] == self._ids[0] and _cell(cells[0]) is None:
            self._has_header_column = True
            self._width = len(self._ids)
            return False
        if all(_cell(cell) is None for cell in cells):
            self._complain(
                "T002",
                "the first row holds no numbers",
                place=f"{self._name}:1:1",
                value=repr(cells[0][:40]),
                allowed=self._allowed,
                hint="a header is accepted only if it equals the node ids: " + ", ".join(self._ids[:SHOWN]),
            )
            self._width = len(cells)
            return True
        self._width = len(cells)
        return False

    def _fast(self, line: bytes) -> np.ndarray[Any, Any] | None:
        """Columns of the ones if the line is exactly ``d,d,...,d`` with digits 0 and 1 and the right width."""
        if len(line) != 2 * self._width - 1:
            return None
        bytes_ = np.frombuffer(line, dtype=np.uint8)
        digits = bytes_[::2]
        if (bytes_[1::2] != _COMMA).any() or ((digits != _ZERO) & (digits != _ONE)).any():
            return None
        return np.flatnonzero(digits == _ONE)

    def _slow(self, number: int, row: int, line: bytes) -> np.ndarray[Any, Any]:
        cells = self._split(number, self._decode(number, line))
        shift = int(self._has_header_column)
        if shift:
            self._check_row_header(number, row, cells.pop(0))
        if len(cells) != self._width:
            self._ragged.append((row + 1, len(cells)))
        found = [_cell(cell) for cell in cells]
        for column, value in enumerate(found):
            if not self._is_valid(value) and len(self.errors) < MAX_ERRORS:
                self._complain_cell(f"{self._name}:{number}:{column + 1 + shift}", cells[column], value)
        used = [column for column, value in enumerate(found) if value and self._is_valid(value)]
        if self._weighted:
            self._values.append(np.array([found[column] for column in used], dtype=np.float64))
        return np.array(used, dtype=np.int64)

    def _is_valid(self, value: float | None) -> bool:
        if self._weighted:
            return value is not None and 0.0 <= value < math.inf
        return value in (0.0, 1.0)

    @property
    def _allowed(self) -> str:
        return "finite numbers from 0" if self._weighted else "0 or 1"

    def _check_row_header(self, number: int, row: int, found: str) -> None:
        expected = self._ids[row] if row < len(self._ids) else None
        if expected is not None and found != expected:
            self._complain(
                "T002",
                "header column differs from the node ids",
                place=f"{self._name}:{number}:1",
                value=repr(found[:40]),
                allowed=repr(expected),
            )

    def _decode(self, number: int, line: bytes) -> str:
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise TopologyError(
                "T003", f"not UTF-8 at byte {error.start + 1}", place=f"{self._name}:{number}", hint="save it as UTF-8"
            ) from error

    def _split(self, number: int, text: str) -> list[str]:
        try:
            return [cell.strip() for cell in next(csv.reader([text]), [])]
        except csv.Error as error:
            raise TopologyError(
                "T003", f"not a CSV line: {error}", place=f"{self._name}:{number}", hint="end lines with LF or CRLF"
            ) from error

    # ------------------------------------------------------------ results

    def _pairs(self) -> np.ndarray[Any, Any]:
        rows = np.repeat(np.arange(len(self._columns)), [len(columns) for columns in self._columns])
        columns = np.concatenate(self._columns)
        loops = rows[rows == columns]
        if len(loops):
            shown = ", ".join(f"A[{i},{i}]=1" for i in loops[:SHOWN])
            self._complain(
                "T005", f"{len(loops)} self loops: {shown}", allowed="0 on the diagonal", hint="indices count from 0"
            )
            # Symmetry is worth reporting in the same go.
            rows, columns = rows[rows != columns], columns[rows != columns]
        return np.stack([rows, columns], axis=1)

    def _complain_cell(self, place: str, cell: str, value: float | None) -> None:
        shown = repr(cell[:40])
        if value is not None and math.isfinite(value) and value >= 0:
            hint = "weights go into mixing_matrix_file_name, with mixing: custom"
            self._complain("T002", f"{shown} is a weight; edges have none", place=place, allowed="0 or 1", hint=hint)
        else:
            self._complain("T002", f"{shown} is not a finite number ≥0", place=place, allowed=self._allowed)

    def _complain(self, code: str, message: str, **parts: Any) -> None:
        self.errors.append(TopologyError(code, message, **{"place": self._name, **parts}))

    def _raise_errors(self) -> None:
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise ConfigErrors(self.errors)


def _cell(text: str) -> float | None:
    """The number in a cell; None if there is none."""
    return float(text) if _NUMBER.fullmatch(text) else None
