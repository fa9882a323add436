"""CSV and Parquet tables as numbers: one row per sample, one column with its class.

A column is categorical if the configuration lists it or if none of its cells reads as a number; it becomes one column
of 0 and 1 per value, all 0 for a value that only the test part has. Any other column is numeric: every cell has to be a
finite number (``nan`` and ``inf`` read as numbers and are none), and they are standardised to mean 0 and standard
deviation 1. So a bad cell never turns a numeric column into categories. The target column follows the same rule, and
each of its texts is a class. Mean, deviation, values and classes are those of the training part only, so that nothing
about the test part reaches a model.
"""

from __future__ import annotations

import csv
import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from icrf.errors import ConfigError
from icrf.learning.files.problems import unreadable
from icrf.registry import did_you_mean

Array = np.ndarray[Any, np.dtype[Any]]

_MAX_VALUES = 1000
# Far from where a square, or the sum of very many, is too large for a float64.
_MAX_NUMBER = 1e100


@dataclass(frozen=True)
class TableColumns:
    """What the columns of a table are.

    Attributes:
        target: the column with the class; every distinct text is a class, numbered in sorted order.
        categorical: columns that are categorical even where they look like numbers.
        ignored: columns that are left out.
        group: the column with a sample's natural id, for the partitioner ``natural``; no feature. Empty: none.
    """

    target: str
    categorical: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    group: str = ""


@dataclass(frozen=True)
class Rows:
    """Rows of a file.

    Attributes:
        path: the file.
        columns: column name -> its cells as text, one per row.
        numbers: where each row stands in the file, counted from 1.
        unit: what is counted.
    """

    path: Path
    columns: Mapping[str, Sequence[str]]
    numbers: Sequence[int]
    unit: str = "line"

    def take(self, chosen: Sequence[int]) -> Rows:
        """Some of the rows, by their positions here, in this order."""
        columns = {name: [cells[row] for row in chosen] for name, cells in self.columns.items()}
        return Rows(self.path, columns, [self.numbers[row] for row in chosen], self.unit)

    def place(self, row: int) -> str:
        """Where a row stands within the file."""
        return f"{self.unit} {self.numbers[row]}"


@dataclass(frozen=True)
class Table:
    """A table as arrays: float32 features (n, num_features), int64 classes (n,), and group numbers (n,) or None."""

    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array
    num_classes: int
    groups: Array | None


def read_csv(path: Path) -> Rows:
    """The rows of a CSV file (UTF-8, comma, names in the first line).

    Raises:
        ConfigError: C015 for a file that is missing or broken, with the line.
    """
    expected = "a CSV file in UTF-8: names of columns in the first line, as many cells in every other"
    if not path.is_file():
        raise unreadable(path, "no such file", expected=expected)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            names = [name.strip() for name in next(reader, [])]
            if problem := _problem_of_header(names):
                raise unreadable(path, f"line 1 {problem}", expected=expected)
            rows, lines = [], []
            for row in reader:
                if row and len(row) != len(names):
                    problem = f"line {reader.line_num} has {len(row)} cells for {len(names)} columns"
                    raise unreadable(path, problem, expected=expected)
                if row:
                    rows.append(row)
                    lines.append(reader.line_num)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise unreadable(path, f"cannot be read: {error}", expected=expected) from error
    if not rows:
        raise unreadable(path, "it has no rows", expected=expected)
    columns = {
        name: [cell.strip() for cell in column] for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }
    return Rows(path, columns, lines)


def _problem_of_header(names: Sequence[str]) -> str:
    """Why these cannot be the names of columns; empty if they can."""
    if not any(names):
        return "does not name columns"
    if "" in names:
        return f"has no name for column {1 + names.index('')}"
    twice = next((name for name in names if names.count(name) > 1), None)
    return "" if twice is None else f"names {twice!r} twice"


def read_parquet(path: Path) -> Rows:
    """The rows of a Parquet file, every value as text; needs ``pyarrow``.

    Raises:
        ConfigError: C015 for a file that is missing or broken, C017 where pyarrow is not installed.
    """
    expected = "a Parquet file with one row per sample"
    if not path.is_file():
        raise unreadable(path, "no such file", expected=expected)
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError(
            "C017",
            "Parquet files need pyarrow, which is not installed",
            place="dataset_type",
            value="parquet",
            hint="Install it with pip install 'icrf[parquet]', or write the table as CSV",
        ) from error
    try:
        columns: dict[str, list[Any]] = parquet.read_table(path).to_pydict()
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise unreadable(path, f"cannot be read: {error}", expected=expected) from error
    if not columns or not all(columns.values()):
        raise unreadable(path, "it has no rows", expected=expected)
    texts = {name: ["" if cell is None else str(cell) for cell in cells] for name, cells in columns.items()}
    return Rows(path, texts, range(1, 1 + len(next(iter(texts.values())))), "row")


def make_table(train: Rows, test: Rows, columns: TableColumns) -> Table:
    """Numbers for texts, by what the training part says.

    Raises:
        ConfigError: C010 for a column that the table does not have; C015 with file and line for an empty cell, or one
            that is no finite number in a numeric column; C018 for fewer than two classes, a class that the training
            part does not have, or a column with too many categories.
    """
    _require_columns(train, test, columns)
    if _is_numeric(columns.target, train, test, columns):
        for part in (train, test):
            _numbers(columns.target, part)
    labels = train.columns[columns.target]
    classes = sorted(set(labels), key=_natural_order)
    if len(classes) < 2:
        raise _misfit(columns.target, f"holds {len(classes)} class in the training part", "two or more classes")
    left_out = {columns.target, columns.group, *columns.ignored}
    names = [name for name in train.columns if name not in left_out]
    if not names:
        raise ConfigError(
            "C018",
            "no column is left for features",
            place="ignored_columns" if columns.ignored else "target_column",
            allowed="one or more columns besides the class and the group",
        )
    numeric = [_is_numeric(name, train, test, columns) for name in names]
    kinds = zip(names, numeric, strict=True)
    parts = [(_standardised if is_number else _one_hot)(name, train, test) for name, is_number in kinds]
    groups = None
    if columns.group:
        ids = train.columns[columns.group]
        known = {name: k for k, name in enumerate(sorted(set(ids), key=_natural_order))}
        groups = np.array([known[name] for name in ids], np.int64)
    return Table(
        train_x=np.concatenate([a for a, _ in parts], axis=1),
        train_y=_numbered(columns.target, train, classes),
        test_x=np.concatenate([b for _, b in parts], axis=1),
        test_y=_numbered(columns.target, test, classes),
        num_classes=len(classes),
        groups=groups,
    )


def _require_columns(train: Rows, test: Rows, columns: TableColumns) -> None:
    keys = {"target_column": (columns.target,), "categorical_columns": columns.categorical}
    keys |= {"ignored_columns": columns.ignored, "group_column": (columns.group,) if columns.group else ()}
    for key, names in keys.items():
        for name in names:
            if name not in train.columns:
                shown = ", ".join(list(train.columns)[:12])
                raise ConfigError(
                    "C010",
                    f"the table has no column '{name}'",
                    place=key,
                    allowed=shown,
                    hint=did_you_mean(name, train.columns),
                )
    used = [name for name in train.columns if name not in {*columns.ignored, columns.group}]
    for name in used:
        if name not in test.columns:
            raise _misfit(name, f"is missing in {test.path.name}", "the columns of the training part")
        for part in (train, test):
            if "" in part.columns[name]:
                row = part.columns[name].index("")
                hint = f"Fill it, or drop the {part.unit} before; the fabric invents no values"
                raise unreadable(
                    part.path,
                    f"{part.place(row)}, column '{name}' is empty",
                    expected="a value in every cell",
                    hint=hint,
                )


def _is_numeric(name: str, train: Rows, test: Rows, columns: TableColumns) -> bool:
    """Whether a column is one of numbers: not listed as categorical, and any cell of either part reads as a number."""
    if name in columns.categorical:
        return False
    return any(_number(cell) is not None for part in (train, test) for cell in set(part.columns[name]))


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _numbers(name: str, part: Rows) -> Array:
    """The cells of a numeric column as float64, shape (n,).

    Raises:
        ConfigError: C015 with the line of the first cell that is no finite number, or one too large to compute with.
    """
    numbers = [_number(cell) for cell in part.columns[name]]
    for row, number in enumerate(numbers):
        # The comparison is false for NaN too.
        if number is None or not abs(number) <= _MAX_NUMBER:
            raise _bad_number(name, part, row)
    return np.array(numbers, np.float64)


def _bad_number(name: str, part: Rows, row: int) -> ConfigError:
    cell = part.columns[name][row]
    number = _number(cell)
    size = "a finite number" if number is None or not math.isfinite(number) else "in the range of numbers to learn from"
    shown = repr(cell) if len(cell) <= 40 else f"{cell[:20]!r}... of {len(cell)} characters"
    return unreadable(
        part.path,
        f"{part.place(row)}, column '{name}': {shown} is not {size}",
        expected=f"finite numbers up to {_MAX_NUMBER:g} in size in a column that has any number",
        hint=f"Fill in a number, or list '{name}' under categorical_columns if its texts are categories",
    )


def _standardised(name: str, train: Rows, test: Rows) -> tuple[Array, Array]:
    """A numeric column of the training and of the test part, float32 of shape (n, 1) each."""
    numbers, others = _numbers(name, train), _numbers(name, test)
    mean, deviation = float(numbers.mean()), float(numbers.std())
    scale = deviation if deviation > 0 else 1.0
    with np.errstate(over="ignore"):  # looked at below
        first, second = (((part - mean) / scale).astype(np.float32) for part in (numbers, others))
    for part, values in ((train, first), (test, second)):
        if not np.isfinite(values).all():
            raise _bad_number(name, part, int(np.argmin(np.isfinite(values))))
    return first[:, np.newaxis], second[:, np.newaxis]


def _one_hot(name: str, train: Rows, test: Rows) -> tuple[Array, Array]:
    """A categorical column of the training and of the test part, float32 of shape (n, number of values) each."""
    values = sorted(set(train.columns[name]), key=_natural_order)
    if len(values) > _MAX_VALUES:
        raise _misfit(name, f"has {len(values)} categories", f"up to {_MAX_VALUES}", "Put it under ignored_columns")
    # The last row is for values that the training part does not have: none of its columns is theirs.
    rows = np.eye(len(values) + 1, len(values), dtype=np.float32)
    known = {value: k for k, value in enumerate(values)}
    first, second = (rows[[known.get(cell, len(values)) for cell in part.columns[name]]] for part in (train, test))
    return first, second


def _numbered(name: str, part: Rows, values: Sequence[str]) -> Array:
    known, cells = {value: k for k, value in enumerate(values)}, part.columns[name]
    new = next((row for row, cell in enumerate(cells) if cell not in known), None)
    if new is not None:
        where = f"{part.place(new)} of {part.path}"
        raise _misfit(name, f"has {cells[new]!r} in {where}, which is test data", "classes of the training part")
    return np.array([known[cell] for cell in cells], np.int64)


def _natural_order(text: str) -> tuple[bool, float, str]:
    """Numbers by value and before words, so that class 10 comes after class 9."""
    number = _number(text)
    return (True, 0.0, text) if number is None or not math.isfinite(number) else (False, number, text)


def _misfit(column: str, problem: str, allowed: str, hint: str = "") -> ConfigError:
    return ConfigError("C018", f"column '{column}' {problem}", place="dataset_type", allowed=allowed, hint=hint)
