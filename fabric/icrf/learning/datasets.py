"""Data sets by name, loaded once per process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from icrf.errors import ConfigError
from icrf.learning.injection import accepted_arguments
from icrf.learning.rng import global_randomness, stable_random_state
from icrf.registry import Registry

Array = np.ndarray[Any, np.dtype[Any]]

DATASETS: Registry[Callable[..., Any]] = Registry("dataset")


@dataclass(frozen=True)
class Dataset:
    """Training and test data of a classification task, shared by all nodes of a process and never written to.

    Attributes:
        train_x: float32 features, shape (num_train, ...).
        train_y: int64 class numbers, shape (num_train,).
        test_x: float32 features, shape (num_test, ...).
        test_y: int64 class numbers, shape (num_test,).
        num_classes: classes are 0 to num_classes - 1.
        name: for messages.

    Raises:
        ConfigError: C018 for shapes, types or values that do not make a classification task.
    """

    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array
    num_classes: int
    name: str

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            features = self._features(f"{part}_x")
            labels = self._labels(f"{part}_y")
            if len(features) != len(labels) or not len(labels):
                raise self._error(f"{part}_x has {len(features)} samples and {part}_y {len(labels)}", "equal, not 0")
        if self.train_x.shape[1:] != self.test_x.shape[1:]:
            raise self._error(f"sample shapes differ: {self.train_x.shape[1:]} and {self.test_x.shape[1:]}", "equal")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.train_x.shape[1:])

    def _features(self, field: str) -> Array:
        values = np.asarray(getattr(self, field))
        if values.dtype.kind != "f":
            raise self._error(f"{field} is {values.dtype}", "floating point; scale images to 0..1")
        values = np.ascontiguousarray(values, np.float32)
        if not np.isfinite(values).all():
            raise self._error(f"{field} has values that are not finite", "finite values")
        object.__setattr__(self, field, values)
        return values

    def _labels(self, field: str) -> Array:
        labels = np.asarray(getattr(self, field))
        if labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise self._error(f"{field} is {labels.dtype} of shape {labels.shape}", "one integer class per sample")
        labels = np.ascontiguousarray(labels, np.int64)
        if labels.size and not 0 <= labels.min() <= labels.max() < self.num_classes:
            found = f"{labels.min()} to {labels.max()}"
            raise self._error(f"{field} has classes {found}", f"0 to {self.num_classes - 1}")
        object.__setattr__(self, field, labels)
        return labels

    def _error(self, problem: str, allowed: str) -> ConfigError:
        return ConfigError("C018", problem, place=f"dataset_type {self.name}", allowed=allowed)


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


@functools.lru_cache(maxsize=4)
def load_dataset(dataset_type: str, data_dir: str = "") -> Dataset:
    """Load a data set; the same arguments give the same object within a process.

    Args:
        dataset_type: a registered name or ``module:attr`` of a function. It is called with ``data_dir`` if it has such
            a parameter and returns a :class:`Dataset` or ``(train_x, train_y, test_x, test_y)``.
        data_dir: folder with the files, for data sets that are read from disk.

    Raises:
        ConfigError: C010 unknown name, C017 code that cannot be loaded or raises, C018 unusable data.
    """
    load = DATASETS.get(dataset_type)
    try:
        with global_randomness(0):  # clusters that load by themselves get the same data, whatever the seed
            loaded = load(**accepted_arguments(load, {"data_dir": data_dir}))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            "C017", f"data set raised {type(error).__name__}: {error}", place="dataset_type", value=dataset_type
        ) from error
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
    num_classes = 1 + max((int(y.max()) for y in (train_y, test_y) if y.size and y.dtype.kind in "iu"), default=0)
    return Dataset(train_x, train_y, test_x, test_y, num_classes, dataset_type)
