"""McMahan et al. 2017 (arXiv 1602.05629), table 2: rounds of FedAvg that the 2NN needs to a test accuracy.

MNIST is read from the IDX files in the folder ICRF_MNIST_DIR. Fashion-MNIST has its shape; the 2NN comes to about 90 %
there, so the paper's target of 97 % is replaced by one of 82 %, and only the order of the cells is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from .bench import MNIST_DIR, Row, needs_fashion_mnist, run, show_rounds

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
needs_mnist = pytest.mark.skipif(not MNIST_DIR, reason="ICRF_MNIST_DIR names no folder with the files of MNIST")

PAPER = "FedAvg, arXiv 1602.05629"
WHOLE = 600  # samples of a client: B = inf
TARGET, FASHION_TARGET = 0.97, 0.82
LEAST, MOST = 0.6, 1.5


@dataclass(frozen=True)
class Cell:
    """A cell of the paper's table: how samples are dealt, clients per round, batch size, rounds to 97 % on MNIST."""

    split: str
    clients: int
    batch_size: int
    published: int

    @property
    def name(self) -> str:
        batch = "inf" if self.batch_size == WHOLE else self.batch_size
        share = "0 (one client)" if self.clients == 1 else f"{self.clients / 100:g}"
        return f"{self.split}, C={share}, B={batch}"

    def rounds_to(self, target: float, limit: int, **keys: Any) -> int | None:
        return run(
            data_distribution_kind=self.split,
            sampled_clients=self.clients,
            batch_size=self.batch_size,
            number_of_clients=100,
            model_type="2nn",
            learning_rate=0.1,
            federated_learning_rounds=limit,
            target_accuracy=target,
            **keys,
        ).rounds_to(target)


IID = Cell("iid", 10, 10, 87)
ONE_CLIENT = Cell("iid", 1, 10, 316)
WHOLE_BATCH = Cell("iid", 10, WHOLE, 1474)
SHARDS = Cell("shards", 10, 10, 664)


@needs_fashion_mnist
def test_cells_are_ordered_as_in_the_paper_on_fashion_mnist(row: Row) -> None:
    limits = {IID: 60, ONE_CLIENT: 150, SHARDS: 300, WHOLE_BATCH: 150}
    found = {cell: cell.rounds_to(FASHION_TARGET, limit, dataset_type="fmnist") for cell, limit in limits.items()}
    row(
        PAPER,
        f"Fashion-MNIST to {FASHION_TARGET:.0%}, 2NN, 100 clients, E=1: " + "; ".join(cell.name for cell in limits),
        f"on MNIST to {TARGET:.0%}: " + ", ".join(str(cell.published) for cell in limits),
        ", ".join(show_rounds(found[cell], limit) for cell, limit in limits.items()),
    )
    fast, one, skewed = (found[cell] for cell in (IID, ONE_CLIENT, SHARDS))
    assert fast is not None and one is not None and skewed is not None
    assert fast < one and fast < skewed
    assert (found[WHOLE_BATCH] or limits[WHOLE_BATCH] + 1) > 5 * fast


@needs_mnist
@pytest.mark.parametrize(("cell", "seeds"), [(IID, (0, 1, 2)), (SHARDS, (0,))], ids=["iid", "shards"])
def test_rounds_to_97_per_cent_on_mnist(row: Row, cell: Cell, seeds: Sequence[int]) -> None:
    limit = int(MOST * cell.published) + 1
    keys = {"dataset_type": "mnist", "data_dir": MNIST_DIR}
    found = [cell.rounds_to(TARGET, limit, seed=seed, **keys) for seed in seeds]
    row(
        PAPER,
        f"MNIST to {TARGET:.0%}, 2NN, 100 clients, E=1, {cell.name}; seeds {', '.join(map(str, seeds))}",
        str(cell.published),
        ", ".join(show_rounds(n, limit) for n in found),
    )
    for rounds in found:
        assert rounds is not None and LEAST * cell.published <= rounds <= MOST * cell.published
