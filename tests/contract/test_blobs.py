"""The contract of :class:`icrf.ports.BlobStore`, held by every adapter, and what the one on disk promises."""

from __future__ import annotations

import gc
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from icrf.errors import InternalError, LocalError, ProtocolError, RunError
from icrf.ports import BlobStore
from icrf_mediator.blobs import FolderBlobs, MemoryBlobs


@pytest.fixture(params=["memory", "folder"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    return MemoryBlobs() if request.param == "memory" else FolderBlobs(tmp_path / "blobs")


def put(blobs: BlobStore, run_id: str, artifact: str, *chunks: bytes) -> str:
    writer = blobs.writer(run_id, artifact)
    for chunk in chunks:
        writer.write(chunk)
    return writer.commit()


def unknown(blobs: BlobStore, run_id: str, artifact: str) -> bool:
    with pytest.raises(RunError) as caught:
        blobs.read(run_id, artifact)
    return caught.value.code == "F006"


# ---------------------------------------------------------------- every adapter


def test_bytes_come_back_in_chunks_with_their_hash(blobs: BlobStore) -> None:
    data = os.urandom(2_500)
    assert put(blobs, "r", "model.safetensors", data[:999], b"", data[999:]) == hashlib.sha256(data).hexdigest()
    chunks = list(blobs.read("r", "model.safetensors", chunk_bytes=1_000))
    assert [len(c) for c in chunks] == [1_000, 1_000, 500]
    assert b"".join(chunks) == data


def test_an_empty_artifact_exists(blobs: BlobStore) -> None:
    put(blobs, "r", "empty")
    assert list(blobs.read("r", "empty")) == []


def test_nothing_is_visible_before_commit(blobs: BlobStore) -> None:
    writer = blobs.writer("r", "model")
    writer.write(b"new")
    assert unknown(blobs, "r", "model")
    writer.commit()
    assert list(blobs.read("r", "model")) == [b"new"]


def test_committing_again_replaces_and_aborting_does_not(blobs: BlobStore) -> None:
    put(blobs, "r", "model", b"one")
    put(blobs, "r", "model", b"two")
    writer = blobs.writer("r", "model")
    writer.write(b"three")
    writer.abort()
    writer.abort()
    assert list(blobs.read("r", "model")) == [b"two"]


def test_a_reader_keeps_what_it_opened(blobs: BlobStore) -> None:
    put(blobs, "r", "model", b"abcdef")
    chunks = blobs.read("r", "model", chunk_bytes=3)
    put(blobs, "r", "model", b"xxxxxx")
    assert list(chunks) == [b"abc", b"def"]


def test_an_ended_writer_is_no_use(blobs: BlobStore) -> None:
    writer = blobs.writer("r", "model")
    writer.commit()
    writer.abort()
    for use in (lambda: writer.write(b"x"), writer.commit):
        with pytest.raises(InternalError):
            use()
    assert list(blobs.read("r", "model")) == []


def test_a_name_may_be_the_folder_of_another(blobs: BlobStore) -> None:
    put(blobs, "r", "call", b"1")
    put(blobs, "r", "call/abc", b"2")
    assert list(blobs.read("r", "call")) == [b"1"]
    assert list(blobs.read("r", "call/abc")) == [b"2"]


def test_delete_by_prefix_and_whole(blobs: BlobStore) -> None:
    for run_id, artifact in (("r", "call/a"), ("r", "call/b"), ("r", "model"), ("s", "call/a")):
        put(blobs, run_id, artifact, b"x")
    blobs.delete_run("r", "call/")
    assert unknown(blobs, "r", "call/a")
    assert list(blobs.read("r", "model")) == [b"x"]
    blobs.delete_run("r")
    blobs.delete_run("r")
    assert unknown(blobs, "r", "model")
    assert list(blobs.read("s", "call/a")) == [b"x"]
    put(blobs, "r", "model", b"again")
    assert list(blobs.read("r", "model")) == [b"again"]


BAD_NAMES = ["", ".", "..", "../x", "a/../b", "/etc/passwd", "a//b", "a/", ".tmp", "a b", "a\\b", "ä", "a\0", "x" * 201]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_could_leave_the_store_are_refused(blobs: BlobStore, name: str) -> None:
    for run_id, artifact in (("r", name), (name, "model")):
        with pytest.raises(ProtocolError) as caught:
            blobs.writer(run_id, artifact)
        assert caught.value.code == "P001"
        assert unknown(blobs, run_id, artifact)
        blobs.delete_run(name)


def test_a_run_id_is_one_part(blobs: BlobStore) -> None:
    with pytest.raises(ProtocolError):
        blobs.writer("a/b", "model")


def test_racing_writers_leave_one_whole_artifact(blobs: BlobStore) -> None:
    bodies = [bytes([n]) * 100_000 for n in range(8)]

    def work(body: bytes) -> None:
        put(blobs, "r", "model", body[:50_000], body[50_000:])
        blobs.delete_run("r", "none")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, bodies))
    assert b"".join(blobs.read("r", "model")) in bodies


# ---------------------------------------------------------------- on disk


def files(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def test_an_aborted_writer_leaves_nothing(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path)
    writer = blobs.writer("r", "model")
    writer.write(b"x" * 100_000)
    writer.abort()
    assert files(tmp_path) == []
    assert not (tmp_path / "r").exists()


def test_a_reopened_folder_has_what_was_committed_and_no_leftovers(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path)
    put(blobs, "r", "call/a", b"kept")
    crashed = blobs.writer("r", "lost")
    crashed.write(b"half")
    assert len(files(tmp_path)) == 2
    again = FolderBlobs(tmp_path)
    assert list(again.read("r", "call/a")) == [b"kept"]
    assert len(files(tmp_path)) == 1
    crashed.abort()


def open_below(folder: Path) -> int:
    """How many files of this process are open there; other threads open and close elsewhere as they like."""
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith(f"{folder}/") for link in links if os.path.lexists(link))


def test_an_unused_reader_closes_its_file(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path)
    put(blobs, "r", "model", b"x")
    assert open_below(tmp_path) == 0
    reader = blobs.read("r", "model")
    assert open_below(tmp_path) == 1
    del reader
    gc.collect()
    assert open_below(tmp_path) == 0


def test_a_disk_that_refuses_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LocalError) as caught:
        FolderBlobs(tmp_path / "file")
    assert caught.value.code == "L005"
    blobs = FolderBlobs(tmp_path / "blobs")
    writer = blobs.writer("r", "model")
    (tmp_path / "blobs" / "r").touch()
    with pytest.raises(LocalError) as caught:
        writer.commit()
    assert caught.value.code == "L005"
    assert files(tmp_path / "blobs") == ["r"]
