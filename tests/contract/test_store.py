"""The contract of :class:`icrf.ports.FederationStore`, held by every journal, and what the one on disk adds."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icrf.errors import IcrfError, InternalError, LocalError, RunError
from icrf.ports import FederationStore, Write
from icrf_mediator.store import SCHEMA_VERSION, MemoryStore, encode_key
from icrf_mediator.store_sqlite import SqliteStore


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FederationStore]:
    made: FederationStore = MemoryStore() if request.param == "memory" else SqliteStore(tmp_path / "journal.db")
    yield made
    made.close()


def commit(number: int, sha: str = "a") -> Write:
    return Write("commits", ("run", number), {"round": number, "sha256": sha})


# ---------------------------------------------------------------- every adapter


def test_rows_come_back_as_they_were_written(store: FederationStore) -> None:
    row = {
        "text": "ü\udc80 \x1b[0m",
        "number": 2**70,
        "real": 0.1,
        "none": None,
        "list": [1, [2]],
        "bytes": b"\x00\xff",
    }
    store.apply([Write("runs", ("r1",), row)])
    assert store.rows("runs") == [Write("runs", ("r1",), row)]


def test_an_equal_key_replaces_the_row(store: FederationStore) -> None:
    store.apply([Write("runs", ("r1",), {"status": "QUEUED"}), Write("runs", ("r1",), {"status": "RUNNING"})])
    store.apply([Write("runs", ("r2",), {"status": "QUEUED"})])
    store.apply([Write("runs", ("r2",), {"status": "FAILED"})])
    assert [w.row["status"] for w in store.rows("runs")] == ["RUNNING", "FAILED"]


def test_rows_are_ordered_by_key_part_by_part(store: FederationStore) -> None:
    keys: list[tuple[str | int, ...]] = [("b", 2), ("a", 10), ("a", 9), ("a", -1), ("ab", 0), ("a", 256), ("a\0", 0)]
    store.apply([Write("events", key, {}) for key in keys])
    assert [w.key for w in store.rows("events")] == sorted(keys)


def test_a_prefix_selects_whole_parts(store: FederationStore) -> None:
    keys: list[tuple[str | int, ...]] = [("r", 1, 0, "eu"), ("r", 1, 1, "eu"), ("r", 10, 0, "eu"), ("r1", 1, 0, "eu")]
    store.apply([Write("attempts", key, {}) for key in keys])
    assert [w.key for w in store.rows("attempts", ("r", 1))] == keys[:2]
    assert [w.key for w in store.rows("attempts", ("r",))] == keys[:3]
    assert [w.key for w in store.rows("attempts", keys[3])] == [keys[3]]
    assert store.rows("attempts", ("x",)) == []


def test_a_returned_row_is_the_callers_own(store: FederationStore) -> None:
    row: dict[str, Any] = {"list": [1]}
    store.apply([Write("runs", ("r",), row)])
    row["list"].append(2)
    store.rows("runs")[0].row["list"].append(3)
    assert store.rows("runs")[0].row == {"list": [1]}


def test_a_commit_may_be_repeated_but_never_changed(store: FederationStore) -> None:
    store.apply([commit(1)])
    store.apply([Write("commits", ("run", 1), {"sha256": "a", "round": 1})])
    with pytest.raises(RunError) as caught:
        store.apply([commit(1, "b")])
    assert caught.value.code == "F005"
    assert store.rows("commits") == [commit(1)]


def test_all_writes_or_none(store: FederationStore) -> None:
    store.apply([commit(1)])
    with pytest.raises(RunError):
        store.apply([commit(2), Write("runs", ("run",), {"status": "IDLE"}), commit(1, "b")])
    with pytest.raises(RunError):
        store.apply([commit(3, "a"), commit(3, "b")])
    with pytest.raises(InternalError):
        store.apply([commit(4), Write("runs", ("run",), {"not plain": object()})])
    assert store.rows("commits") == [commit(1)]
    assert store.rows("runs") == []


def test_nothing_to_write_is_fine(store: FederationStore) -> None:
    store.apply([])
    assert store.rows("runs") == []


def test_the_schema_version_is_in_meta(store: FederationStore) -> None:
    assert store.rows("meta", ("schema",))[0].row == {"version": SCHEMA_VERSION}


def test_an_unknown_table_is_refused(store: FederationStore) -> None:
    with pytest.raises(InternalError, match="no table 'rounds'"):
        store.rows("rounds")
    with pytest.raises(InternalError):
        store.apply([Write("runs;--", ("r",), {})])


def test_many_threads_write_and_read(store: FederationStore) -> None:
    def work(thread: int) -> None:
        for seq in range(20):
            store.apply(
                [Write("events", (f"run{thread}", seq), {"seq": seq}), Write("runs", ("shared",), {"by": thread})]
            )
            assert len(store.rows("events", (f"run{thread}",))) == seq + 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(store.rows("events")) == 160


def test_racing_commits_have_one_winner(store: FederationStore) -> None:
    def work(thread: int) -> bool:
        try:
            store.apply([commit(1, str(thread))])
        except RunError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == 1


PARTS = st.one_of(st.text(max_size=4), st.integers(-(2**63), 2**63 - 1))


@given(st.tuples(st.text(max_size=3), PARTS), st.tuples(st.text(max_size=3), PARTS))
def test_encoded_keys_order_like_keys(left: tuple[str, str | int], right: tuple[str, str | int]) -> None:
    def rank(key: tuple[str, str | int]) -> tuple[str, bool, str | int]:
        return key[0], isinstance(key[1], str), key[1]

    assert (encode_key(left) < encode_key(right)) == (rank(left) < rank(right))
    assert encode_key(left).startswith(encode_key(right[:1])) == (left[0] == right[0])


# ---------------------------------------------------------------- on disk


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


def refused(path: Path, code: str) -> IcrfError:
    with pytest.raises(LocalError) as caught:
        SqliteStore(path)
    assert caught.value.code == code
    return caught.value


def test_a_reopened_journal_has_everything(path: Path) -> None:
    store = SqliteStore(path)
    store.apply([commit(1), Write("runs", ("r",), {"status": "IDLE"})])
    store.close()
    store.close()
    again = SqliteStore(path)
    assert again.rows("commits") == [commit(1)]
    with pytest.raises(RunError):
        again.apply([commit(1, "b")])
    again.close()


def test_use_after_close_is_an_error(path: Path) -> None:
    store = SqliteStore(path)
    store.close()
    with pytest.raises(InternalError, match="closed"):
        store.rows("runs")


def test_a_newer_schema_is_refused(path: Path) -> None:
    store = SqliteStore(path)
    store.apply([Write("meta", ("schema",), {"version": 9})])
    store.close()
    assert "schema 9 > supported 1, upgrade ICRF" in str(refused(path, "L007"))


def test_another_programs_database_is_refused(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE cats (name TEXT)")
    db.commit()
    db.close()
    assert "another program" in str(refused(path, "L007"))
    assert path.stat().st_size > 0


def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path) -> None:
    path.write_bytes(b"not a database at all " * 100)
    assert "no journal" in str(refused(path, "L007"))
    assert path.read_bytes().startswith(b"not a database")


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere" / "journal.db", "L005")


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_a_cut_journal_is_refused(path: Path, keep: float) -> None:
    store = SqliteStore(path)
    store.apply([Write("events", ("r", n), {"text": "x" * 200}) for n in range(300)])
    store.close()
    os.truncate(path, int(path.stat().st_size * keep))
    refused(path, "L007")


WRITER = """
import sys
from pathlib import Path
from icrf.ports import Write
from icrf_mediator.store_sqlite import SqliteStore

store = SqliteStore(Path(sys.argv[1]))
for number in range(1_000_000):
    commit = Write("commits", ("run", number), {"round": number})
    store.apply([commit, Write("runs", ("run",), {"rounds_done": number})])
    print(number, flush=True)
"""


def test_whatever_was_acknowledged_survives_kill_9(path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as writer:
        assert writer.stdout is not None
        acknowledged = -1
        while acknowledged < 50:
            acknowledged = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read().split("\n")
    # The last line may be cut; whole ones were acknowledged before the process died.
    acknowledged = max([acknowledged, *(int(line) for line in rest[:-1])])
    store = SqliteStore(path)
    rounds = [w.row["round"] for w in store.rows("commits")]
    assert rounds == list(range(len(rounds)))
    assert len(rounds) > acknowledged
    assert store.rows("runs")[0].row["rounds_done"] == rounds[-1]
    store.close()
