"""CSV and Parquet tables as numbers: one row per sample, one column with its class.

A column is numeric when every value of the training part is a finite number and the configuration does not call it
categorical; it is standardised to mean 0 and standard deviation 1. Any other column is categorical and becomes one
column of 0 and 1 per value, all 0 for a value that only the test part has. Mean, deviation, values and classes are
those of the training part only, so that nothing about the test part reaches a model.
"""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from icrf.errors import ConfigError
from icrf.learning.files.problems import unreadable
from icrf.registry import did_you_mean

Array = np.ndarray[Any, np.dtype[Any]]
# Column name -> its cells as text.
Columns = Mapping[str, Sequence[str]]

_MAX_VALUES = 1000


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
class Table:
    """A table as arrays: float32 features (n, num_features), int64 classes (n,), and group numbers (n,) or None."""

    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array
    num_classes: int
    groups: Array | None


def read_csv(path: Path) -> dict[str, list[str]]:
    """The columns of a CSV file (UTF-8, comma, names in the first line).

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
            if not names or len(set(names)) != len(names) or "" in names:
                raise unreadable(path, f"line 1 does not name columns: {names[:8]}", expected=expected)
            rows = []
            for row in reader:
                if row and len(row) != len(names):
                    problem = f"line {reader.line_num} has {len(row)} cells for {len(names)} columns"
                    raise unreadable(path, problem, expected=expected)
                if row:
                    rows.append(row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise unreadable(path, f"cannot be read: {error}", expected=expected) from error
    if not rows:
        raise unreadable(path, "it has no rows", expected=expected)
    return {
        name: [cell.strip() for cell in column] for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }


def read_parquet(path: Path) -> dict[str, list[str]]:
    """The columns of a Parquet file, every value as text; needs ``pyarrow``.

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
    return {name: ["" if cell is None else str(cell) for cell in cells] for name, cells in columns.items()}


def make_table(train: Columns, test: Columns, columns: TableColumns) -> Table:
    """Numbers for texts, by what the training part says.

    Raises:
        ConfigError: C010 for a column that the table does not have; C018 for an empty cell, fewer than two classes, a
            class that the training part does not have, or a column with too many categories.
    """
    _require_columns(train, test, columns)
    classes = sorted(set(train[columns.target]), key=_natural_order)
    if len(classes) < 2:
        raise _misfit(columns.target, f"holds {len(classes)} class in the training part", "two or more classes")
    left_out = {columns.target, columns.group, *columns.ignored}
    names = [name for name in train if name not in left_out]
    if not names:
        raise _misfit("target_column", "leaves no column for features", "one or more")
    parts = [_features(name, train[name], test[name], name in columns.categorical) for name in names]
    groups = None
    if columns.group:
        known = {name: k for k, name in enumerate(sorted(set(train[columns.group]), key=_natural_order))}
        groups = np.array([known[name] for name in train[columns.group]], np.int64)
    return Table(
        train_x=np.concatenate([a for a, _ in parts], axis=1),
        train_y=_numbered(columns.target, train[columns.target], classes),
        test_x=np.concatenate([b for _, b in parts], axis=1),
        test_y=_numbered(columns.target, test[columns.target], classes),
        num_classes=len(classes),
        groups=groups,
    )


def take_rows(columns: Columns, rows: Iterable[int]) -> dict[str, list[str]]:
    """Some rows of a table, in this order."""
    chosen = list(rows)
    return {name: [cells[row] for row in chosen] for name, cells in columns.items()}


def _require_columns(train: Columns, test: Columns, columns: TableColumns) -> None:
    keys = {"target_column": (columns.target,), "categorical_columns": columns.categorical}
    keys |= {"ignored_columns": columns.ignored, "group_column": (columns.group,) if columns.group else ()}
    for key, names in keys.items():
        for name in names:
            if name not in train:
                shown = ", ".join(list(train)[:12])
                raise ConfigError(
                    "C010",
                    f"the table has no column '{name}'",
                    place=key,
                    allowed=shown,
                    hint=did_you_mean(name, train),
                )
    used = [name for name in train if name not in {*columns.ignored, columns.group}]
    for name in used:
        if name not in test:
            raise _misfit(name, "is missing in the test part", "the columns of the training part")
        for part, cells in (("training", train[name]), ("test", test[name])):
            if "" in cells:
                raise _misfit(
                    name,
                    f"is empty in row {1 + list(cells).index('')} of the {part} part",
                    "a value in every cell",
                    "Fill it or drop the row before; the fabric invents no values",
                )


def _features(name: str, train: Sequence[str], test: Sequence[str], categorical: bool) -> tuple[Array, Array]:
    """float32 columns of the training and of the test part, shapes (n, 1) or (n, number of categories)."""
    numbers = None if categorical else _numbers(train)
    if numbers is None:
        values = sorted(set(train), key=_natural_order)
        if len(values) > _MAX_VALUES:
            raise _misfit(name, f"has {len(values)} categories", f"up to {_MAX_VALUES}", "Put it under ignored_columns")
        # The last row is for values that the training part does not have: none of its columns is theirs.
        rows = np.eye(len(values) + 1, len(values), dtype=np.float32)
        known = {value: k for k, value in enumerate(values)}
        first, second = (rows[[known.get(cell, len(values)) for cell in part]] for part in (train, test))
        return first, second
    others = _numbers(test)
    if others is None:
        raise _misfit(name, "is numeric in the training part and not in the test part", "numbers in both")
    mean, deviation = float(numbers.mean()), float(numbers.std())
    scale = deviation if deviation > 0 else 1.0
    first, second = (((part - mean) / scale).astype(np.float32)[:, np.newaxis] for part in (numbers, others))
    return first, second


def _numbers(cells: Sequence[str]) -> Array | None:
    """The cells as float64, or None unless all of them are finite numbers."""
    try:
        numbers = np.array([float(cell) for cell in cells])
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() else None


def _numbered(name: str, cells: Sequence[str], values: Sequence[str]) -> Array:
    known = {value: k for k, value in enumerate(values)}
    new = next((cell for cell in cells if cell not in known), None)
    if new is not None:
        raise _misfit(name, f"has {new!r} in the test part only", "values of the training part")
    return np.array([known[cell] for cell in cells], np.int64)


def _natural_order(text: str) -> tuple[bool, float, str]:
    """Numbers by value and before words, so that class 10 comes after class 9."""
    try:
        number = float(text)
    except ValueError:
        return True, 0.0, text
    return (False, number, text) if np.isfinite(number) else (True, 0.0, text)


def _misfit(column: str, problem: str, allowed: str, hint: str = "") -> ConfigError:
    return ConfigError("C018", f"column '{column}' {problem}", place="dataset_type", allowed=allowed, hint=hint)
