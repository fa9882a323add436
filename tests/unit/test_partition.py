"""Splits: every sample at most once, nobody empty, and what each kind promises about labels and sizes."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icrf.errors import ConfigError
from icrf.learning.partition import Partition, partition
from icrf.learning.partitioners import BUILT_IN

COVERING = ("iid", "dir", "shards", "quantity", "natural")
FMNIST_LIKE = np.repeat(np.arange(10), 6000)


def labels_of(num_classes: int, sizes: list[int], seed: int) -> Any:
    labels = np.repeat(np.arange(num_classes), sizes[:num_classes])
    return np.random.RandomState(seed).permutation(labels)


@settings(max_examples=150, derandomize=True, database=None)
@given(
    kind=st.sampled_from(sorted(BUILT_IN)),
    num_classes=st.integers(2, 8),
    sizes=st.lists(st.integers(1, 60), min_size=8, max_size=8),
    num_parts=st.integers(1, 40),
    seed=st.integers(0, 2**62),
    beta=st.sampled_from([1e-3, 0.1, 0.5, 100.0]),
)
def test_every_split_deals_each_sample_at_most_once_and_something_to_everybody(
    kind: str, num_classes: int, sizes: list[int], num_parts: int, seed: int, beta: float
) -> None:
    labels = labels_of(num_classes, sizes, seed % 1000)
    groups = np.arange(len(labels)) // 2
    try:
        parts = partition(kind, labels, num_parts, seed, beta, groups=groups)
    except ConfigError as refused:
        assert refused.code == "C008", refused
        return
    dealt = np.concatenate(list(parts))
    assert len(parts) == num_parts and min(map(len, parts)) >= 1
    assert len(np.unique(dealt)) == len(dealt) == parts.sizes.sum()
    assert all((np.diff(part) > 0).all() for part in parts)
    if kind in COVERING:
        assert len(dealt) == len(labels)
    again = partition(kind, labels, num_parts, seed, beta, groups=groups)
    assert [p.tolist() for p in again] == [p.tolist() for p in parts]


@pytest.mark.parametrize("percentage", [20, 50, 90])
@pytest.mark.parametrize("num_parts", [1, 3, 10, 100])
def test_so_many_per_cent_of_a_node_carry_its_dominant_label(percentage: int, num_parts: int) -> None:
    parts = partition(str(percentage), FMNIST_LIKE, num_parts, seed=1)
    assert len(set(parts.sizes)) == 1
    size = int(parts.sizes[0])
    counts = np.array([np.bincount(FMNIST_LIKE[part], minlength=10) for part in parts])
    wanted = (percentage * size + 50) // 100
    assert (counts.max(axis=1) >= wanted).all() and ((counts == wanted).any(axis=1)).all()
    if percentage > 20:
        assert (counts.max(axis=1) == wanted).all()
    if num_parts >= 10:
        assert parts.sizes.sum() == len(FMNIST_LIKE)
        assert len(set(counts.argmax(axis=1))) == 10 or percentage == 20


def test_shards_are_those_of_mcmahan() -> None:
    parts = partition("shards", FMNIST_LIKE, 100, seed=3)
    assert set(parts.sizes) == {600}
    assert max(len(np.unique(FMNIST_LIKE[part])) for part in parts) <= 2
    counts = np.array([np.bincount(FMNIST_LIKE[part], minlength=10) for part in parts])
    assert set(counts.ravel()) <= {0, 300, 600}
    four = partition("shards", FMNIST_LIKE, 100, seed=3, shards_per_node=4)
    assert max(len(np.unique(FMNIST_LIKE[part])) for part in four) > 2
    with pytest.raises(ConfigError, match="C008 shards_per_node"):
        partition("shards", np.zeros(30, np.int64), 20, seed=0)


@pytest.mark.parametrize("classes", [1, 2, 5, 10])
def test_pathological_nodes_hold_exactly_so_many_classes(classes: int) -> None:
    parts = partition("pathological", FMNIST_LIKE, 50, seed=3, classes_per_node=classes)
    assert {len(np.unique(FMNIST_LIKE[part])) for part in parts} == {classes}
    assert parts.sizes.sum() == len(FMNIST_LIKE)
    with pytest.raises(ConfigError, match="C008 classes_per_node"):
        partition("pathological", FMNIST_LIKE, 50, seed=3, classes_per_node=11)
    with pytest.raises(ConfigError, match=r"C008 classes_per_node: .*hold class"):
        partition("pathological", np.array([0, 1] * 20), 30, seed=3)


def test_quantity_skews_sizes_and_not_labels() -> None:
    few, even = (partition("quantity", FMNIST_LIKE, 20, seed=2, beta=beta).sizes for beta in (0.2, 1e4))
    assert few.max() > 4 * few.mean() and even.max() < 1.1 * even.mean()
    largest = partition("quantity", FMNIST_LIKE, 20, seed=2, beta=0.2)[int(few.argmax())]
    shares = np.bincount(FMNIST_LIKE[largest], minlength=10) / len(largest)
    assert np.abs(shares - 0.1).max() < 0.02


def test_natural_ids_stay_together() -> None:
    groups = np.random.RandomState(1).randint(100, 130, 3000)
    labels = np.zeros(3000, np.int64)
    exact = partition("natural", labels, 30, seed=1, groups=groups)
    assert [set(groups[part]) for part in exact] == [{100 + k} for k in range(30)]
    fewer = partition("natural", labels, 7, seed=1, groups=groups)
    owned = [set(groups[part]) for part in fewer]
    assert sum(map(len, owned)) == 30 and {len(ids) for ids in owned} == {4, 5}
    with pytest.raises(ConfigError, match="C008 number_of_clients: 31 nodes share 30 natural ids"):
        partition("natural", labels, 31, seed=1, groups=groups)
    with pytest.raises(ConfigError, match=r"C008 data_distribution_kind: the data has no natural ids.*group_column"):
        partition("natural", labels, 3, seed=1)


def test_dirichlet_serves_many_nodes_and_tiny_betas() -> None:
    for num_parts, beta in ((1000, 0.5), (1000, 0.01), (20, 1e-4)):
        parts = partition("dir", FMNIST_LIKE, num_parts, seed=4, beta=beta)
        assert parts.sizes.min() >= 10 and parts.sizes.sum() == len(FMNIST_LIKE)
    with pytest.raises(ConfigError, match="C007 dirichlet_beta"):
        partition("dir", FMNIST_LIKE, 10, seed=4, beta=0.0)


@pytest.mark.parametrize("kind", sorted(BUILT_IN))
def test_ten_thousand_nodes_are_no_matter(kind: str) -> None:
    labels = np.random.RandomState(0).randint(0, 62, 160_000)
    parts = partition(kind, labels, 10_000, seed=5, groups=np.arange(160_000) // 8)
    assert parts.sizes.min() >= 1
    assert parts[9_999].size == parts.sizes[9_999]


# Splits are part of what clusters agree on: they must never change, with another NumPy neither.
FROZEN = {
    "20": "38c768ed0798",
    "50": "e9c6317289c3",
    "90": "fcbef575909c",
    "dir": "a74738e5a9b8",
    "iid": "d1e5425fdfd2",
    "natural": "9f61c6fcc6fa",
    "pathological": "503f1b4c20d6",
    "quantity": "6505baaca6c2",
    "shards": "1325260fecd0",
}


@pytest.mark.parametrize("kind", sorted(BUILT_IN))
def test_splits_are_frozen(kind: str) -> None:
    parts = partition(kind, FMNIST_LIKE[::20], 12, seed=11, groups=np.arange(3000) % 50)
    digest = hashlib.sha256(b"|".join(part.astype("<i8").tobytes() for part in parts)).hexdigest()[:12]
    assert digest == FROZEN[kind]


# ---------------------------------------------------------------- partitioners of users


def by_halves(labels: Any, num_parts: int) -> Any:
    return np.array_split(np.arange(len(labels)), num_parts)


def owners(labels: Any, num_parts: int, seed: int) -> Any:
    return np.arange(len(labels)) % num_parts - (np.arange(len(labels)) == 0)


class Broken:
    overlap = staticmethod(lambda labels, num_parts: [np.arange(3)] * num_parts)
    empty = staticmethod(lambda num_parts: [np.arange(3)] + [[]] * (num_parts - 1))
    outside = staticmethod(lambda labels, num_parts: [[len(labels) + k] for k in range(num_parts)])
    too_few = staticmethod(lambda labels: [np.arange(len(labels))])
    nothing = staticmethod(lambda: None)
    short = staticmethod(lambda num_parts: np.arange(num_parts))
    owner_outside = staticmethod(lambda labels: np.arange(len(labels)))


def test_partitioners_of_users_are_called_by_name() -> None:
    labels = np.zeros(10, np.int64)
    assert [p.tolist() for p in partition(f"{__name__}:by_halves", labels, 2, 0)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert partition(f"{__name__}:owners", labels, 2, 0)[0].tolist() == [2, 4, 6, 8]
    for name in vars(Broken):
        if not name.startswith("_"):
            with pytest.raises(ConfigError, match=f"C018 data_distribution_kind: .*{name}' made no split"):
                partition(f"{__name__}:Broken.{name}", labels, 4, 0)
    with pytest.raises(ConfigError, match="C017 data_distribution_kind: partitioner 'builtins:len' raised TypeError"):
        partition("builtins:len", labels, 4, 0)


def test_a_part_is_a_sequence() -> None:
    parts = Partition(np.array([1, -1, 0, 1]), 2)
    assert (len(parts), parts[1].tolist(), [p.tolist() for p in parts[0:2]]) == (2, [0, 3], [[2], [0, 3]])
    with pytest.raises(IndexError):
        parts[2]
