"""Data sets from files: what is read, what becomes of it, and what a broken file is told."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icrf.errors import ConfigError
from icrf.learning.architectures import BUILT_IN
from icrf.learning.datasets import FASHION_MNIST_DIR, Dataset, load_dataset
from icrf.learning.files.cifar import read_batch, read_plain_pickle
from icrf.learning.models import build_model, check_fit

IDX = {"train-images": 3, "train-labels": 1, "t10k-images": 3, "t10k-labels": 1}


def write_idx(folder: Path, *, zipped: bool, dot: str = "-", num_train: int = 20, num_test: int = 10) -> None:
    """Four files; pixel (i, j, k) of every image is (28 j + k) mod 256, sample i has class i mod 10."""
    folder.mkdir(exist_ok=True)
    for stem, dimensions in IDX.items():
        count = num_train if stem.startswith("train") else num_test
        shape = (count, 28, 28) if dimensions == 3 else (count,)
        body = np.arange(28 * 28, dtype=np.int64) % 256
        values = np.tile(body.astype(np.uint8), count) if dimensions == 3 else np.arange(count, dtype=np.uint8) % 10
        data = struct.pack(f">4B{dimensions}I", 0, 0, 8, dimensions, *shape) + values.tobytes()
        name = f"{stem}{dot}idx{dimensions}-ubyte"
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / name).write_bytes(data)


@pytest.mark.parametrize(("zipped", "dot"), [(True, "-"), (False, "-"), (False, ".")])
def test_idx_folders_are_read_in_every_spelling(tmp_path: Path, zipped: bool, dot: str) -> None:
    write_idx(tmp_path / "d", zipped=zipped, dot=dot)
    data = load_dataset("mnist", str(tmp_path / "d"))
    assert data.input_shape == (1, 28, 28) and data.train_x.dtype == np.uint8
    assert (len(data.train_y), len(data.test_y), data.num_classes) == (20, 10, 10)
    x, y = data.train_part(np.array([3, 12]))
    assert x.dtype == np.float32 and x.shape == (2, 1, 28, 28) and y.tolist() == [3, 2]
    assert x[0].reshape(-1)[255] == 1.0 and x[0].reshape(-1)[51] == np.float32(0.2)
    assert data.test_part()[0].max() == 1.0
    check_fit(build_model("cnn", data.input_shape, data.num_classes, 0), data)


def test_a_missing_file_is_named_with_what_is_expected(tmp_path: Path) -> None:
    write_idx(tmp_path, zipped=True)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ConfigError, match=r"C015 data_dir: no such file .*t10k-labels-idx1-ubyte.*nothing is down"):
        load_dataset("mnist", str(tmp_path))
    with pytest.raises(ConfigError, match=r"C015 data_dir: no such folder .*nowhere"):
        load_dataset("fmnist", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="C016 data_dir: data_dir is missing"):
        load_dataset("mnist")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda data: data[:-1], "shape 20 needs 20 bytes, 19 follow"),
        (lambda data: data + b"x", "shape 20 needs 20 bytes, 21 (or more )?follow"),
        (lambda data: b"\x00\x00\x0d\x01" + data[4:], "begins with 00 00 0d 01"),
        (lambda data: b"", "begins with nothing"),
        (lambda data: struct.pack(">4BI", 0, 0, 8, 1, 2**32 - 1) + data[8:], "needs 4294967295 bytes, 20 follow"),
    ],
)
def test_broken_idx_files_say_what_is_wrong(tmp_path: Path, damage: Any, problem: str, zipped: bool) -> None:
    write_idx(tmp_path, zipped=zipped)
    path = tmp_path / f"train-labels-idx1-ubyte{'.gz' if zipped else ''}"
    data = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
    path.write_bytes(gzip.compress(damage(data)) if zipped else damage(data))
    with pytest.raises(ConfigError, match=f"C015 data_dir: .*{problem}.*train-labels.*IDX file"):
        load_dataset("mnist", str(tmp_path))


def test_a_truncated_gzip_is_refused(tmp_path: Path) -> None:
    write_idx(tmp_path, zipped=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match="C015 data_dir: cannot be read"):
        load_dataset("mnist", str(tmp_path))


def test_bytes_are_pixels_and_floats_stay(tmp_path: Path) -> None:
    x, y = np.full((4, 2), 255, np.uint8), np.array([0, 1, 0, 1])
    data = Dataset(x, y, x, y, 2, "mine")
    assert data.train_part(slice(2))[0].tolist() == [[1.0, 1.0]] * 2
    with pytest.raises(ConfigError, match="C018 dataset_type mine: samples differ"):
        Dataset(x, y, x.astype(np.float32), y, 2, "mine")
    with pytest.raises(ConfigError, match="C018 dataset_type mine: groups has 3 ids for 4 samples"):
        Dataset(x, y, x, y, 2, "mine", groups=np.arange(3))


# ---------------------------------------------------------------- CIFAR-10


def batch_of(count: int, start: int = 0) -> dict[Any, Any]:
    data = (np.arange(count * 3072) % 251).astype(np.uint8).reshape(count, 3072)
    return {b"data": data, b"labels": [(start + i) % 10 for i in range(count)], b"batch_label": b"x", b"filenames": []}


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_cifar_batches_are_read_without_unpickling(tmp_path: Path, protocol: int) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i in range(1, 6):
        (folder / f"data_batch_{i}").write_bytes(pickle.dumps(batch_of(4, i), protocol=protocol))
    (folder / "test_batch").write_bytes(pickle.dumps(batch_of(3), protocol=protocol))
    data = load_dataset("cifar10", str(tmp_path))
    assert data.train_x.shape == (20, 3, 32, 32) and data.test_x.shape == (3, 3, 32, 32)
    assert data.train_y[:6].tolist() == [1, 2, 3, 4, 2, 3]
    assert data.train_x[1].reshape(-1)[:3].tolist() == [3072 % 251, 3073 % 251, 3074 % 251]
    (folder / "data_batch_3").unlink()
    with pytest.raises(ConfigError, match=r"C015 data_dir: no such file .*data_batch_3"):
        load_dataset("cifar10", str(folder))


@pytest.mark.parametrize("fortran", [False, True])
def test_a_batch_written_by_python_2_is_read(tmp_path: Path, fortran: bool) -> None:
    """As the published files are: protocol 2 with strings of bytes, which no writer of today makes."""
    images = np.arange(2 * 3072, dtype=np.int64).astype(np.uint8).reshape(2, 3072)
    body = images.tobytes(order="F" if fortran else "C")
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x05cnumpy\nndarray\nq\x06K\x00\x85U\x01b\x87Rq\x07"
        b"(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\nq\x08U\x02u1K\x00K\x01\x87Rq\t"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb" + (b"\x88" if fortran else b"\x89")
    )
    labels = b"U\x06labelsq\x03]q\x04(K\x06K\x09e"
    data = b"U\x04dataq\n" + array + b"T" + struct.pack("<I", len(body)) + body + b"tb"
    path = tmp_path / "data_batch_1"
    path.write_bytes(b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5" + labels + data + b"u.")
    x, y = read_batch(path)
    assert y.tolist() == [6, 9] and np.array_equal(x.reshape(2, 3072), images)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({b"data": Evil(), b"labels": [1]}, "posix.mkdir"),
        ({b"data": np.zeros((2, 3072)), b"labels": [1, 2]}, "array of float64"),
        ({b"data": np.zeros((2, 3071), np.uint8), b"labels": [1, 2]}, r"shape \(2, 3071\)"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}, r"labels is int64 of shape \(1,\)"),
        ({b"labels": [1]}, "it has no 'data'"),
        ([1, 2], "it holds a value of type list"),
        (Path("x"), "asks for pathlib"),
    ],
)
def test_files_that_are_no_batch_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "batch").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ConfigError, match=f"C015 data_dir: not readable: .*{problem}.*a python batch of CIFAR-10"):
        read_batch(tmp_path / "batch")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("data", [b"", b"\x80\x02", b"}.", b"garbage", b"\x80\x02]q\x00(h\x07e.", b"(t(t(t."])
def test_malformed_pickles_raise_one_kind_of_error(data: bytes) -> None:
    try:
        read_plain_pickle(data)
    except ValueError:
        pass


# ---------------------------------------------------------------- tables

TRAIN = "age,sex,code,site,kind\n" + "".join(
    f"{20 + i},{'mf'[i % 2]},{i % 3},s{i % 4},{9 + i % 2}\n" for i in range(12)
)
TEST = "age,sex,code,site,kind\n20,m,0,s9,10\n"


def table(folder: Path, train: str = TRAIN, test: str | None = TEST, **options: Any) -> Dataset:
    folder.mkdir(exist_ok=True)
    (folder / "train.csv").write_text(train)
    if test is not None:
        (folder / "test.csv").write_text(test)
    return load_dataset("csv", str(folder), **{"target_column": "kind", "group_column": "site", **options})


def test_tables_become_numbers_by_what_the_training_part_says(tmp_path: Path) -> None:
    data = table(tmp_path, categorical_columns=("code",))
    assert data.train_x.shape == (12, 1 + 2 + 3) and data.num_classes == 2
    assert data.train_y.tolist() == [0, 1] * 6, "9 comes before 10"
    age = np.arange(20, 32)
    assert data.train_x[:, 0] == pytest.approx((age - age.mean()) / age.std(), rel=1e-6)
    assert data.test_x[0, 0] == data.train_x[0, 0] and data.test_x[0, 1:].tolist() == [0, 1, 1, 0, 0]
    assert data.groups is not None and data.groups.tolist() == [0, 1, 2, 3] * 3
    other = table(tmp_path / "b", ignored_columns=("age", "sex"), group_column="")
    assert other.train_x.shape == (12, 1 + 4) and other.groups is None
    assert other.test_x[0, 1:].tolist() == [0, 0, 0, 0], "no training sample is from s9"


def test_without_a_test_file_a_fifth_is_held_out_for_good(tmp_path: Path) -> None:
    data = table(tmp_path, test=None)
    assert (len(data.train_y), len(data.test_y)) == (10, 2)
    alone = load_dataset("csv", str(tmp_path / "train.csv"), target_column="kind", group_column="site")
    assert np.array_equal(alone.train_x, data.train_x) and np.array_equal(alone.test_y, data.test_y)


@pytest.mark.parametrize(
    ("change", "options", "error"),
    [
        ({}, {"target_column": "kindd"}, "C010 target_column: the table has no column 'kindd'.*Did you mean 'kind'"),
        ({}, {"target_column": ""}, "C016 target_column"),
        ({}, {"ignored_columns": ("nope",)}, "C010 ignored_columns"),
        ({}, {"ignored_columns": ("age", "sex", "code")}, "C018 ignored_columns: no column is left for features"),
        ({"train": TRAIN + "1,2\n"}, {}, "C015 data_dir: line 14 has 2 cells for 5 columns"),
        ({"train": "a,a\n1,2\n"}, {}, "C015 data_dir: line 1 names 'a' twice"),
        ({"train": "a,,kind\n1,2,3\n"}, {}, "C015 data_dir: line 1 has no name for column 2"),
        ({"train": "\n"}, {}, "C015 data_dir: line 1 does not name columns"),
        ({"train": "a,kind\n"}, {}, "C015 data_dir: it has no rows"),
        ({"train": TRAIN + ",m,0,s1,9\n"}, {}, "C015 data_dir: line 14, column 'age' is empty .*train.csv"),
        ({"test": TEST + "30,m,0,s1,\n"}, {}, "C015 data_dir: line 3, column 'kind' is empty .*test.csv"),
        (
            {"test": "age,sex,code,site,kind\nx,m,0,s,9\n"},
            {},
            "C015 .*line 2, column 'age': 'x' is not a finite number",
        ),
        ({"test": "age,sex,code,site,kind\n1,m,0,s,11\n"}, {}, "C018 .*'kind' has '11' in line 2 of .*test.csv"),
        ({"test": "age,site,kind\n1,s,9\n"}, {}, "C018 .*'sex' is missing in test.csv"),
        ({"train": "age,site,kind\n1,s,9\n2,s,9\n"}, {}, "C018 .*'kind' holds 1 class"),
    ],
)
def test_tables_that_cannot_be_used_name_column_and_row(
    tmp_path: Path, change: dict[str, str], options: dict[str, Any], error: str
) -> None:
    with pytest.raises(ConfigError, match=error):
        table(tmp_path, **change, **options)


@pytest.mark.parametrize("cell", ["NA", "nan", "inf", "9" * 400, "1e308", "-1e101", "12 years"])
def test_a_bad_cell_never_turns_numbers_into_categories(tmp_path: Path, cell: str) -> None:
    hint = ".*list 'age' under categorical_columns"
    with pytest.raises(ConfigError, match=rf"C015 data_dir: line 14, column 'age': '.* is not .*/train\.csv.*{hint}"):
        table(tmp_path / "train", TRAIN + f"{cell},m,0,s1,9\n")
    with pytest.raises(ConfigError, match=rf"C015 data_dir: line 3, column 'age': '.* is not .*/test\.csv{hint}"):
        table(tmp_path / "test", test=TEST + f"{cell},m,0,s1,9\n")
    meant = table(tmp_path / "meant", TRAIN + f"{cell},m,0,s1,9\n", categorical_columns=("age",))
    assert meant.train_x.shape == (13, 13 + 2 + 1)


@pytest.mark.parametrize("bad", range(12))
def test_a_bad_cell_of_a_file_without_a_test_part_is_named_wherever_it_falls(tmp_path: Path, bad: int) -> None:
    lines = TRAIN.splitlines()
    lines[1 + bad] = "nan" + lines[1 + bad][2:]
    with pytest.raises(ConfigError, match=rf"C015 data_dir: line {2 + bad}, column 'age': 'nan' .*/train\.csv"):
        table(tmp_path, "\n".join(lines), None)
    new = TRAIN.splitlines()
    new[1 + bad] = new[1 + bad].rpartition(",")[0] + ",nan"
    with pytest.raises(ConfigError, match=rf"C015 data_dir: line {2 + bad}, column 'kind': 'nan' .*/train\.csv"):
        table(tmp_path, "\n".join(new), None)


def test_words_among_the_classes_are_classes_where_the_configuration_says_so(tmp_path: Path) -> None:
    mixed = TRAIN + "30,m,0,s1,other\n"
    with pytest.raises(ConfigError, match=r"C015 data_dir: line 14, column 'kind': 'other' is not a finite number"):
        table(tmp_path, mixed)
    assert table(tmp_path / "b", mixed, categorical_columns=("kind",)).num_classes == 3
    words = table(tmp_path / "c", TRAIN.replace(",9\n", ",NA\n").replace(",10\n", ",b\n"), None)
    assert words.num_classes == 2, "nothing in the column is a number"


def test_a_test_value_far_from_all_training_values_is_refused(tmp_path: Path) -> None:
    train = "a,kind\n" + "".join(f"{i}e-20,{i % 2}\n" for i in range(12))
    with pytest.raises(ConfigError, match=r"C015 data_dir: line 2, column 'a': '1e30' is not in the range"):
        table(tmp_path, train, "a,kind\n1e30,0\n", group_column="")


def test_parquet_is_read_or_says_what_to_install(tmp_path: Path) -> None:
    columns = {"a": [1.0, 2.0, 3.0, 4.0, 5.0], "kind": ["x", "y", "x", "y", "x"]}
    path = tmp_path / "train.parquet"
    try:
        import pyarrow  # noqa: PLC0415
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError:
        path.write_bytes(b"PAR1")
        with pytest.raises(ConfigError, match=r"C017 dataset_type: .*pip install 'icrf\[parquet\]'"):
            load_dataset("parquet", str(tmp_path), target_column="kind")
        return
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    data = load_dataset("parquet", str(tmp_path), target_column="kind")
    assert data.train_x.shape == (4, 1) and data.num_classes == 2


# ---------------------------------------------------------------- what comes with packages


def test_breast_cancer_is_standardised_by_its_training_part() -> None:
    data = load_dataset("breast_cancer")
    assert data.train_x.shape == (456, 30) and data.test_x.shape == (113, 30)
    assert np.abs(data.train_x.mean(axis=0)).max() < 1e-5 and np.abs(data.train_x.std(axis=0) - 1).max() < 1e-4
    assert np.abs(data.test_x.mean(axis=0)).max() > 1e-3


@pytest.mark.parametrize(("model", "count"), [("2nn", 199_210), ("cnn", 1_663_370), ("logistic", 7_850)])
def test_models_of_mcmahan_have_their_number_of_parameters(model: str, count: int) -> None:
    module = build_model(model, (1, 28, 28), 10, 0)
    assert sum(parameter.numel() for parameter in module.parameters()) == count


@pytest.mark.parametrize("model", sorted(BUILT_IN))
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_every_model_takes_images(model: str, shape: tuple[int, ...]) -> None:
    x, y = np.zeros((3, *shape), np.uint8), np.array([0, 6, 3])
    check_fit(build_model(model, shape, 7, 0), Dataset(x, y, x, y, 7, "images"))


def test_models_of_images_refuse_plain_features_by_name() -> None:
    for model in ("cnn", "lenet", "resnet8", "resnet8_bn"):
        with pytest.raises(ConfigError, match=rf"C018 model_type: model '{model}' takes images.*\(64,\).*Use mlp"):
            build_model(model, (64,), 10, 0)


@pytest.mark.slow
@pytest.mark.skipif(not Path(FASHION_MNIST_DIR).is_dir(), reason="the package dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_the_package() -> None:
    data = load_dataset("fmnist")
    assert data.train_x.shape == (60_000, 1, 28, 28) and data.test_x.shape == (10_000, 1, 28, 28)
    assert np.bincount(data.train_y).tolist() == [6000] * 10 and np.bincount(data.test_y).tolist() == [1000] * 10
