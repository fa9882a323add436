"""Data sets by name, loaded once per process and never written to.

Pixels stay bytes in memory and are scaled when samples are taken out, so that a process holds in floats only what its
nodes train on. Nothing is downloaded: a data set comes with a package or lies in ``data_dir``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from icrf.errors import ConfigError
from icrf.learning.files.cifar import FOLDER, read_cifar_folder
from icrf.learning.files.idx import read_idx_folder
from icrf.learning.files.problems import not_set, require_folder, unreadable
from icrf.learning.files.tables import Rows, TableColumns, make_table, read_csv, read_parquet
from icrf.learning.injection import accepted_arguments
from icrf.learning.rng import global_randomness, stable_random_state
from icrf.registry import Registry

Array = np.ndarray[Any, np.dtype[Any]]

DATASETS: Registry[Callable[..., Any]] = Registry("dataset")

# Where Debian's package dataset-fashion-mnist puts its files.
FASHION_MNIST_DIR = "/usr/share/datasets/fashion-mnist"
_HELD_OUT = 5
# The largest class number that is taken from labels.
_MAX_CLASS = (1 << 20) - 1


@dataclass(frozen=True)
class Dataset:
    """Training and test data of a classification task, shared by all nodes of a process and never written to.

    Attributes:
        train_x: features, shape (num_train, ...): float32, or uint8 pixels, which :meth:`train_part` divides by 255.
        train_y: int64 class numbers, shape (num_train,).
        test_x: features of the same type, shape (num_test, ...).
        test_y: int64 class numbers, shape (num_test,).
        num_classes: classes are 0 to num_classes - 1.
        name: for messages.
        groups: int64 natural id (writer, patient, site) per training sample, shape (num_train,), for the partitioner
            ``natural``; None where the data has none.

    Raises:
        ConfigError: C018 for shapes, types or values that do not make a classification task.
    """

    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array
    num_classes: int
    name: str
    groups: Array | None = None

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            features = self._features(f"{part}_x")
            labels = self._integers(f"{part}_y", self.num_classes - 1)
            if len(features) != len(labels) or not len(labels):
                raise self._error(f"{part}_x has {len(features)} samples and {part}_y {len(labels)}", "equal, not 0")
        if self.train_x.shape[1:] != self.test_x.shape[1:] or self.train_x.dtype != self.test_x.dtype:
            found = [f"{x.dtype} {x.shape[1:]}" for x in (self.train_x, self.test_x)]
            raise self._error(f"samples differ: {found[0]} and {found[1]}", "equal")
        if self.groups is not None and len(self._integers("groups", None)) != len(self.train_y):
            raise self._error(f"groups has {len(self.groups)} ids for {len(self.train_y)} samples", "one per sample")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.train_x.shape[1:])

    def train_part(self, rows: Array | slice) -> tuple[Array, Array]:
        """Features (float32) and classes (int64) of some training samples, as arrays of their own."""
        return _scaled(self.train_x[rows]), np.array(self.train_y[rows])

    def test_part(self) -> tuple[Array, Array]:
        """Features (float32) and classes (int64) of all test samples."""
        return _scaled(self.test_x), self.test_y

    def _features(self, field: str) -> Array:
        values = np.asarray(getattr(self, field))
        if values.dtype == np.uint8:
            return values
        if values.dtype.kind != "f":
            raise self._error(f"{field} is {values.dtype}", "floating point, or uint8 for pixels of 0 to 255")
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
            values = np.ascontiguousarray(values, np.float32)
        if not np.isfinite(values).all():
            raise self._error(f"{field} has values that are not finite", "finite values")
        object.__setattr__(self, field, values)
        return values

    def _integers(self, field: str, largest: int | None) -> Array:
        numbers = np.asarray(getattr(self, field))
        if numbers.dtype.kind not in "iu" or numbers.ndim != 1:
            raise self._error(f"{field} is {numbers.dtype} of shape {numbers.shape}", "one integer per sample")
        if largest is not None and numbers.size and not 0 <= numbers.min() <= numbers.max() <= largest:
            found = f"{numbers.min()} to {numbers.max()}"
            raise self._error(f"{field} has classes {found}", f"0 to {largest}")
        numbers = np.ascontiguousarray(numbers, np.int64)
        object.__setattr__(self, field, numbers)
        return numbers

    def _error(self, problem: str, allowed: str) -> ConfigError:
        return ConfigError("C018", problem, place=f"dataset_type {self.name}", allowed=allowed)


def _scaled(values: Array) -> Array:
    """Pixels of 0 to 255 as float32 of 0 to 1; floats as they are."""
    if values.dtype != np.uint8:
        return values
    scaled = values.astype(np.float32)
    scaled /= 255.0
    return scaled


@DATASETS.register("digits")
def digits(data_dir: str = "") -> Dataset:
    """The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn; 1,437 to train on, 360 to test.

    The split is fixed and does not depend on the federation's seed, so that accuracies compare between runs.
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415 - half a second that other data sets need not pay

    loaded = load_digits()
    order = stable_random_state(0, "digits").permutation(len(loaded.target))
    features = (loaded.data[order] / 16.0).astype(np.float32)
    labels = loaded.target[order].astype(np.int64)
    cut = len(labels) - 360
    return Dataset(features[:cut], labels[:cut], features[cut:], labels[cut:], 10, "digits")


@DATASETS.register("breast_cancer")
def breast_cancer(data_dir: str = "") -> Dataset:
    """The 569 breast tumours with 30 measurements that come with scikit-learn; 456 to train on, 113 to test.

    Class 0 is malignant. Features are standardised by mean and deviation of the training part; the split is fixed.
    """
    from sklearn.datasets import load_breast_cancer  # noqa: PLC0415 - see digits

    loaded = load_breast_cancer()
    order = stable_random_state(0, "breast_cancer").permutation(len(loaded.target))
    features, labels = loaded.data[order], loaded.target[order].astype(np.int64)
    cut = len(labels) - 113
    mean, deviation = features[:cut].mean(axis=0), features[:cut].std(axis=0)
    features = ((features - mean) / deviation).astype(np.float32)
    return Dataset(features[:cut], labels[:cut], features[cut:], labels[cut:], 2, "breast_cancer")


@DATASETS.register("mnist")
def mnist(data_dir: str = "") -> Dataset:
    """MNIST from the four IDX files in `data_dir`: 60,000 and 10,000 images of (1, 28, 28) pixels scaled to 0..1."""
    hint = "Set data_dir to a folder with the four files of MNIST, gzipped or not; nothing is downloaded"
    return _idx("mnist", data_dir, hint)


@DATASETS.register("fmnist")
def fmnist(data_dir: str = "") -> Dataset:
    """Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, arXiv 1708.07747), in files like those of MNIST.

    Without `data_dir` the folder of Debian's package ``dataset-fashion-mnist`` is read, where it is installed.
    """
    hint = "Install Debian's package dataset-fashion-mnist, or set data_dir to a folder with the four files"
    return _idx("fmnist", data_dir or (FASHION_MNIST_DIR if Path(FASHION_MNIST_DIR).is_dir() else ""), hint)


def _idx(name: str, data_dir: str, hint: str) -> Dataset:
    folder = require_folder(data_dir, expected="a folder with train-images-idx3-ubyte and so on", hint=hint)
    return Dataset(*read_idx_folder(folder, hint=hint), num_classes=10, name=name)


@DATASETS.register("cifar10")
def cifar10(data_dir: str = "") -> Dataset:
    """CIFAR-10 from the "python version": 50,000 and 10,000 images of (3, 32, 32) pixels scaled to 0..1."""
    hint = f"Unpack the python version of CIFAR-10 and set data_dir to its folder {FOLDER}; nothing is downloaded"
    folder = require_folder(data_dir, expected="a folder with data_batch_1 to data_batch_5 and test_batch", hint=hint)
    return Dataset(*read_cifar_folder(folder, hint=hint), num_classes=10, name="cifar10")


@DATASETS.register("csv")
def csv_table(
    data_dir: str = "",
    target_column: str = "",
    categorical_columns: tuple[str, ...] = (),
    ignored_columns: tuple[str, ...] = (),
    group_column: str = "",
) -> Dataset:
    """A table of CSV files: ``train.csv`` and ``test.csv`` in `data_dir`, or one file that `data_dir` names.

    Without a test file a fifth of the rows is held out; which ones is fixed and does not depend on the seed. For what
    the columns become see :mod:`icrf.learning.files.tables`.
    """
    columns = TableColumns(target_column, categorical_columns, ignored_columns, group_column)
    return _table("csv", read_csv, data_dir, columns)


@DATASETS.register("parquet")
def parquet_table(
    data_dir: str = "",
    target_column: str = "",
    categorical_columns: tuple[str, ...] = (),
    ignored_columns: tuple[str, ...] = (),
    group_column: str = "",
) -> Dataset:
    """The same as :func:`csv_table` for Parquet files; needs ``pyarrow`` (``pip install 'icrf[parquet]'``)."""
    columns = TableColumns(target_column, categorical_columns, ignored_columns, group_column)
    return _table("parquet", read_parquet, data_dir, columns)


def _table(kind: str, read: Callable[[Path], Rows], data_dir: str, columns: TableColumns) -> Dataset:
    path = Path(data_dir)
    if not columns.target:
        raise ConfigError(
            "C016", "target_column is missing", place="target_column", hint="Name the column that holds the class"
        )
    expected = f"a folder with train.{kind}, or one {kind} file"
    if not data_dir:
        raise not_set(expected=expected)
    if not path.exists():
        raise unreadable(path, "no such file or folder", expected=expected)
    folder = path if path.is_dir() else None
    train = read(folder / f"train.{kind}" if folder else path)
    if folder and (folder / f"test.{kind}").exists():
        test = read(folder / f"test.{kind}")
    else:
        num_rows = len(train.numbers)
        order = stable_random_state(0, "table").permutation(num_rows)
        cut = num_rows - max(1, num_rows // _HELD_OUT)
        train, test = train.take(sorted(order[:cut])), train.take(sorted(order[cut:]))
    table = make_table(train, test, columns)
    return Dataset(
        table.train_x, table.train_y, table.test_x, table.test_y, table.num_classes, str(path), groups=table.groups
    )


# The keys of a configuration that a data set may take, and what each is where it is not set.
_OPTIONS: dict[str, Any] = {
    "data_dir": "",
    "target_column": "",
    "categorical_columns": (),
    "ignored_columns": (),
    "group_column": "",
}


def configured_dataset(config: Any) -> Dataset:
    """The data set of a configuration (:class:`icrf.spec.FederationConfig`); see :func:`load_dataset`."""
    found = {name: getattr(config, name) or absent for name, absent in _OPTIONS.items()}
    options: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}
    return load_dataset(config.dataset_type, **options)


def load_dataset(dataset_type: str, data_dir: str = "", **options: Any) -> Dataset:
    """Load a data set; the same arguments give the same object within a process.

    Args:
        dataset_type: a registered name or ``module:attr`` of a function. It is called with those of ``data_dir`` and
            `options` that it has parameters for, and returns a :class:`Dataset` or ``(train_x, train_y, test_x,
            test_y)``.
        data_dir: folder with the files, for data sets that are read from disk.
        options: the keys of a configuration that describe a table, hashable.

    Raises:
        ConfigError: C010 unknown name, C015 files that are missing or broken, C017 code that cannot be loaded or
            raises, C018 unusable data.
    """
    return _load(dataset_type, tuple(sorted({**_OPTIONS, "data_dir": data_dir, **options}.items())))


@functools.lru_cache(maxsize=4)
def _load(dataset_type: str, options: tuple[tuple[str, Any], ...]) -> Dataset:
    load = DATASETS.get(dataset_type)
    offered: Mapping[str, Any] = dict(options)
    # Clusters that load by themselves get the same data, whatever the seed.
    with DATASETS.calling(dataset_type), global_randomness(0):
        loaded = load(**accepted_arguments(load, offered))
    if isinstance(loaded, Dataset):
        return loaded
    if not isinstance(loaded, tuple) or len(loaded) != 4:
        raise ConfigError(
            "C018",
            f"data set '{dataset_type}' returned {type(loaded).__name__}",
            place="dataset_type",
            allowed="a Dataset or (train_x, train_y, test_x, test_y)",
        )
    train_x, train_y, test_x, test_y = (np.asarray(part) for part in loaded)
    # A model has a score per class: labels that count something else than classes would take all memory for it.
    largest = max((int(y.max()) for y in (train_y, test_y) if y.size and y.dtype.kind in "iu"), default=0)
    num_classes = 1 + min(max(largest, 0), _MAX_CLASS)
    return Dataset(train_x, train_y, test_x, test_y, num_classes, dataset_type)
