"""The table of docs/results.md: the tests fill it; with ``ICRF_RESULTS_TABLE=FILE``, see ``scripts/results``, it is
written into FILE."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from .bench import Row

HEADER = ("paper", "setting", "the paper's figure", "ours", "command")


@pytest.fixture(scope="package")
def rows(write_table: Callable[..., None]) -> Iterator[list[tuple[str, ...]]]:
    found: list[tuple[str, ...]] = []
    yield found
    write_table("ICRF_RESULTS_TABLE", "scripts/results", HEADER, found, keep_others=True)


@pytest.fixture
def row(rows: list[tuple[str, ...]], request: pytest.FixtureRequest) -> Row:
    """Keeps a row of the table and prints it; the command is the one that runs the test's module."""
    name = request.module.__name__.rpartition(".")[2]

    def keep(paper: str, setting: str, published: str, ours: str) -> None:
        rows.append((paper, setting, published, ours, f"`scripts/results -k {name}`"))
        print("\n" + " | ".join(rows[-1][:4]))  # noqa: T201 - what was measured, for those who run with -s

    return keep
