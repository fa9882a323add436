"""Thin but true learning: identities, splits, determinism, and what does not fit is refused."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from icrf.errors import ConfigError
from icrf.learning.architectures import mlp
from icrf.learning.datasets import Dataset, load_dataset
from icrf.learning.fingerprint import numeric_fingerprint
from icrf.learning.flat_module import FlatModule
from icrf.learning.metrics import measure, require_metrics
from icrf.learning.models import build_model, check_fit
from icrf.learning.partition import partition
from icrf.learning.rng import derive_seed, numpy_generator, torch_generator
from icrf.learning.training import LocalTrainer, evaluate
from icrf.update import ExactSum, choose_grid

DIGITS = load_dataset("digits", "")
SGD = {"optimizer": "SGD", "learning_rate": 0.1, "epochs": 1, "batch_size": 16, "shuffle": True}


def digits_module(seed: int = 1) -> FlatModule:
    return FlatModule(build_model("mlp", DIGITS.input_shape, DIGITS.num_classes, seed))


def fedavg_round(
    module: FlatModule, model: np.ndarray, parts: list[np.ndarray], round_number: int, **options: object
) -> np.ndarray:
    """One round of federated averaging, as a host does it."""
    total = sum(map(len, parts))
    layout = module.layout
    exact = ExactSum(layout.sizes, choose_grid(layout.absmax(model), total), total, layout.names)
    for index, part in enumerate(parts):
        module.load(model)
        generator = torch_generator(1, index, round_number, "train")
        LocalTrainer().train(module, DIGITS.train_x[part], DIGITS.train_y[part], generator=generator, **options)
        assert exact.add(module.flat, len(part)) == ()
    return exact.mean(layout.dtype)


# ---------------------------------------------------------------- identities


def test_fedavg_of_full_batches_is_gradient_descent() -> None:
    """McMahan et al. 2017, section 2: E=1, B=inf, C=1 is FedSGD, whatever the split."""
    module = digits_module()
    reference = copy.deepcopy(module.module)
    model = module.snapshot()
    parts = partition("dir", DIGITS.train_y, 7, seed=3, beta=0.5)
    x, y = torch.from_numpy(DIGITS.train_x), torch.from_numpy(DIGITS.train_y)
    for round_number in range(1, 4):
        model = fedavg_round(module, model, parts, round_number, **{**SGD, "batch_size": 0})
        reference.zero_grad()
        functional.cross_entropy(reference(x), y).backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= 0.1 * parameter.grad
    np.testing.assert_allclose(model, FlatModule(reference).flat, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 1e-3), (0.9, 1e-3)])
def test_plain_sgd_equals_torch_bit_for_bit(momentum: float, weight_decay: float) -> None:
    module = digits_module()
    reference = copy.deepcopy(module.module)
    x, y = DIGITS.train_x[:100], DIGITS.train_y[:100]
    options = {**SGD, "shuffle": False, "epochs": 2, "momentum": momentum, "weight_decay": weight_decay}
    loss, seen = LocalTrainer().train(module, x, y, generator=torch_generator(1, 0, 1, "train"), **options)
    assert seen == 200

    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=momentum, weight_decay=weight_decay)
    losses = []
    for start in [*range(0, 100, 16)] * 2:
        batch = slice(start, start + 16)
        optimizer.zero_grad()
        batch_loss = functional.cross_entropy(reference(torch.tensor(x[batch])), torch.tensor(y[batch]))
        batch_loss.backward()
        optimizer.step()
        losses.append(batch_loss.item() * len(y[batch]))
    assert module.flat.tobytes() == FlatModule(reference).flat.tobytes()
    assert loss == pytest.approx(sum(losses) / 200, rel=1e-9)


def test_digits_are_learnt_in_a_few_rounds() -> None:
    module = digits_module()
    model = module.snapshot()
    parts = partition("iid", DIGITS.train_y, 10, seed=1)
    for round_number in range(1, 6):
        model = fedavg_round(module, model, parts, round_number, **{**SGD, "momentum": 0.9, "epochs": 5})
    module.load(model)
    assert evaluate(module.module, DIGITS.test_x, DIGITS.test_y)["accuracy"] > 0.9


# ---------------------------------------------------------------- determinism


def trained_bits(options: dict[str, object], node: int = 0, factory: object = None) -> bytes:
    module = digits_module() if factory is None else FlatModule(build_with_dropout())
    generator = torch_generator(7, node, 1, "train")
    LocalTrainer().train(module, DIGITS.train_x[:200], DIGITS.train_y[:200], generator=generator, **options)
    return module.flat.tobytes()


def build_with_dropout() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_training_is_a_function_of_its_seed(optimizer: str) -> None:
    options = {**SGD, "optimizer": optimizer, "learning_rate": 0.01}
    assert trained_bits(options) == trained_bits(options)
    assert trained_bits(options) != trained_bits(options, node=1)


def test_dropout_follows_the_seed_too_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = trained_bits(SGD, factory=build_with_dropout)
    torch.manual_seed(2)
    assert trained_bits(SGD, factory=build_with_dropout) == first
    torch.manual_seed(1)
    digits_module()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_blocks_of_the_permuted_copy_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained_bits(SGD)
    monkeypatch.setattr("icrf.learning.training._BLOCK_BYTES", 10_000)
    assert trained_bits(SGD) == whole


def test_no_epochs_train_nothing() -> None:
    module = digits_module()
    before = module.snapshot()
    result = LocalTrainer().train(
        module, DIGITS.train_x, DIGITS.train_y, generator=torch_generator(1, 0, 1, "train"), **{**SGD, "epochs": 0}
    )
    assert result == (0.0, 0)
    assert module.flat.tobytes() == before.tobytes()


def test_seeds_are_independent() -> None:
    values = list(itertools.product((0, 1), (0, 1, 2), (0, 1, 2), ("train", "init")))
    seeds = {derive_seed(*value) for value in values}
    assert len(seeds) == len(values)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 2, 3, "train") == 3962110769039873701
    assert numpy_generator(1, 0, 1, "a").random() != numpy_generator(1, 0, 1, "b").random()


def test_evaluate_does_not_depend_on_torch_state_and_keeps_the_mode() -> None:
    module = build_with_dropout()
    first = evaluate(module, DIGITS.test_x, DIGITS.test_y)
    assert first == evaluate(module, DIGITS.test_x, DIGITS.test_y)
    assert set(first) == {"accuracy", "loss"} and module.training


@pytest.mark.parametrize(
    ("name", "momentum", "code"), [("SGDD", 0.0, "C010"), ("Adam", 0.9, "C008"), ("LBFGS", 0.0, "C010")]
)
def test_unusable_optimizers_are_refused(name: str, momentum: float, code: str) -> None:
    with pytest.raises(ConfigError, match=code):
        trained_bits({**SGD, "optimizer": name, "momentum": momentum})


def test_fingerprint_names_what_decides_bits() -> None:
    found = numeric_fingerprint("cpu", 1)
    assert found == numeric_fingerprint("cpu", 1)
    assert found != numeric_fingerprint("cpu", 2)
    assert found.torch_version == torch.__version__


@pytest.mark.parametrize("num_samples", [33, 32, 17, 16, 2])
def test_batch_norm_gets_no_single_sample_and_every_sample_once(num_samples: int) -> None:
    seen: list[int] = []

    class Watched(nn.BatchNorm1d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return super().forward(x)

    module = FlatModule(nn.Sequential(nn.Linear(64, 8), Watched(8), nn.Linear(8, 10)))
    x, y = DIGITS.train_x[:num_samples], DIGITS.train_y[:num_samples]
    generator = torch_generator(7, 0, 1, "train")
    _, count = LocalTrainer().train(module, x, y, generator=generator, **SGD)
    assert sum(seen) == num_samples == count and min(seen) >= 2
    assert module.layout.to_state_dict(module.flat)["1.num_batches_tracked"] == len(seen)


# ---------------------------------------------------------------- data


def test_digits_split_is_fixed() -> None:
    assert DIGITS.train_x.shape == (1437, 64) and DIGITS.test_x.shape == (360, 64)
    assert DIGITS.train_x.dtype == np.float32 and DIGITS.train_x.min() >= 0 and DIGITS.train_x.max() <= 1
    assert load_dataset("digits", "") is load_dataset("digits")


@pytest.mark.parametrize("kind", ["iid", "dir"])
@pytest.mark.parametrize("num_parts", [1, 2, 10, 50])
def test_partitions_are_disjoint_covering_and_reproducible(kind: str, num_parts: int) -> None:
    labels = DIGITS.train_y
    parts = partition(kind, labels, num_parts, seed=5, beta=0.5)
    assert len(parts) == num_parts
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    assert min(map(len, parts)) >= min(10, len(labels) / num_parts / 2)
    again = partition(kind, labels, num_parts, seed=5, beta=0.5)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    if num_parts > 1:
        other = partition(kind, labels, num_parts, seed=6, beta=0.5)
        assert any(not np.array_equal(a, b) for a, b in zip(parts, other, strict=True))


def test_smaller_beta_means_more_skew() -> None:
    def classes_per_node(beta: float) -> float:
        parts = partition("dir", DIGITS.train_y, 10, seed=1, beta=beta)
        return float(np.mean([len(np.unique(DIGITS.train_y[p])) for p in parts]))

    assert classes_per_node(0.1) < classes_per_node(0.5) < classes_per_node(100.0) == 10


def test_impossible_splits_are_refused() -> None:
    with pytest.raises(ConfigError, match="C008 number_of_clients"):
        partition("iid", np.zeros(3, np.int64), 4, seed=0)
    with pytest.raises(ConfigError, match="C010"):
        partition("iidd", np.zeros(3, np.int64), 2, seed=0)


def test_data_that_is_no_classification_task_is_refused() -> None:
    x, y = np.zeros((4, 2), np.float32), np.array([0, 1, 0, 1])
    for broken in (
        (x, y[:3], x, y),
        (x, y + 1, x, y),
        (x.astype(int), y, x, y),
        (x + np.nan, y, x, y),
        (x, y * 0.5, x, y),
    ):
        with pytest.raises(ConfigError, match="C018 dataset_type mine"):
            Dataset(*broken, num_classes=2, name="mine")
    assert Dataset(x.astype(np.float64), y, x, y, 2, "mine").train_x.dtype == np.float32


OWN_LABELS = {"huge": 10**15, "beyond int64": 2**64 - 41, "negative": -1}


def own_labels(target_column: str) -> tuple[np.ndarray, ...]:
    labels = np.arange(40) if OWN_LABELS[target_column] < 2**63 else np.arange(40, dtype=np.uint64)
    labels = (
        labels * OWN_LABELS[target_column] if target_column != "beyond int64" else labels + OWN_LABELS[target_column]
    )
    return np.zeros((40, 4)), labels, np.zeros((10, 4)), np.arange(10)


def too_large_for_float32() -> tuple[np.ndarray, ...]:
    return np.full((40, 4), 1e200), np.arange(40) % 2, np.zeros((10, 4)), np.arange(10) % 2


@pytest.mark.parametrize("kind", OWN_LABELS)
def test_labels_that_are_no_class_numbers_are_refused_as_such(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"C018 dataset_type .*own_labels: train_y has classes .* allowed: 0 to "):
        load_dataset(f"{__name__}:own_labels", target_column=kind)


def test_features_that_float32_cannot_hold_are_refused_without_a_warning() -> None:
    with pytest.raises(ConfigError, match=r"C018 .*train_x has values that are not finite"):
        load_dataset(f"{__name__}:too_large_for_float32")


# ---------------------------------------------------------------- models


def test_models_depend_on_their_seed_alone() -> None:
    torch.manual_seed(1)
    first = digits_module(3).flat.tobytes()
    torch.manual_seed(2)
    assert digits_module(3).flat.tobytes() == first
    assert digits_module(4).flat.tobytes() != first


def test_a_model_that_does_not_fit_the_data_names_the_shapes() -> None:
    check_fit(build_model("mlp", DIGITS.input_shape, 10, 0), DIGITS)
    with pytest.raises(ConfigError, match=r"C018.*\(2, 64\).*\(2, 4\).*\(2, 10\)"):
        check_fit(mlp((64,), 4), DIGITS)
    with pytest.raises(ConfigError, match=r"C018.*cannot take input of shape \(2, 64\)"):
        check_fit(mlp((32,), 10), DIGITS)


def test_user_factories_are_called_with_what_they_accept() -> None:
    module = build_model("torch.nn:Identity", (64,), 10, 0)
    with pytest.raises(ConfigError, match=r"C018.*\(2, 64\)"):
        check_fit(module, DIGITS)
    with pytest.raises(ConfigError, match=r"C017 model_type: model 'torch\.nn:Linear' raised TypeError"):
        build_model("torch.nn:Linear", (64,), 10, 0)
    with pytest.raises(ConfigError, match="C018 model_type"):
        build_model("builtins:dict", (64,), 10, 0)


# ---------------------------------------------------------------- metrics


def answered(scores: np.ndarray, labels: np.ndarray) -> float:
    return float(len(labels) * scores.shape[1])


def test_metrics_are_those_of_scikit_learn() -> None:
    from sklearn import metrics as reference  # noqa: PLC0415 - half a second

    random = np.random.RandomState(1)
    scores, labels = random.random_sample((200, 8)).astype(np.float32), random.randint(0, 7, 200)
    found = measure(["balanced_accuracy", "macro_f1", "top_5_accuracy", f"{__name__}:answered"], scores, labels)
    told = scores.argmax(axis=1)
    in_order = reference.recall_score(labels, told, average="macro", labels=np.unique(labels))
    assert found["balanced_accuracy"] == pytest.approx(in_order)
    assert found["macro_f1"] == pytest.approx(reference.f1_score(labels, told, average="macro"))
    assert found["top_5_accuracy"] == pytest.approx(
        reference.top_k_accuracy_score(labels, scores, k=5, labels=range(8))
    )
    assert found["answered"] == 1600.0


def test_metrics_against_values_worked_out_by_hand() -> None:
    # Answers 0 0 1 2 for classes 0 1 1 2; class 3 does not occur.
    scores, labels = np.eye(4)[[0, 0, 1, 2]], np.array([0, 1, 1, 2])
    found = measure(["macro_f1", "balanced_accuracy", "top_5_accuracy"], scores, labels)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert found["balanced_accuracy"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert found["top_5_accuracy"] == 1.0
    wide = np.tile(np.arange(20.0), (2, 1))
    assert measure(["top_5_accuracy"], wide, np.array([15, 14])) == {"top_5_accuracy": 0.5}


def test_metrics_see_all_samples_whatever_the_batch() -> None:
    module = torch.nn.Linear(3, 4)
    x, y = torch.randn(50, 3, generator=torch.Generator().manual_seed(1)), torch.arange(50) % 4
    whole = evaluate(module, x, y, metrics=["macro_f1"])
    assert evaluate(module, x, y, batch=7, metrics=["macro_f1"])["macro_f1"] == whole["macro_f1"]


def nothing(scores: np.ndarray, labels: np.ndarray) -> None:
    pass


def test_metrics_are_evaluated_by_name_and_refused_by_name() -> None:
    module = digits_module().module
    found = evaluate(module, DIGITS.test_x, DIGITS.test_y, batch=100, metrics=["macro_f1"])
    assert set(found) == {"accuracy", "loss", "macro_f1"} and 0 <= found["macro_f1"] <= 1
    assert evaluate(module, DIGITS.test_x[:0], DIGITS.test_y[:0], metrics=["macro_f1"])["macro_f1"] == 0.0
    with pytest.raises(ConfigError, match=r"C010 metrics: metric 'macro_f2' unknown.*Did you mean 'macro_f1'"):
        require_metrics(["macro_f2"])
    with pytest.raises(ConfigError, match=r"C008 metrics: two metrics are called 'macro_f1'"):
        require_metrics(["macro_f1", "icrf.learning.metrics:macro_f1"])
    with pytest.raises(ConfigError, match=r"C018 metrics: metric '.*:nothing' returned NoneType"):
        measure([f"{__name__}:nothing"], np.eye(2), np.arange(2))
