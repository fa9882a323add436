"""Training in lanes: within rounding of the plain loop, and the same bits in any company; what cannot is refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from icrf.errors import ConfigError, ConfigErrors
from icrf.learning.datasets import DATASETS
from icrf.learning.flat_module import FlatModule
from icrf.learning.models import build_model, register_model
from icrf.learning.rng import torch_generator
from icrf.learning.training import LocalTerms, LocalTrainer
from icrf.learning.vectorizable import suitable_width
from icrf.learning.vectorized import Job, Outcome, Recipe, VectorTrainer
from icrf.spec import FederationConfig
from icrf.submission import build_submission, check_configuration

# What docs/models.md promises: of the largest weight, after one call.
TOLERANCE = 1e-6
# A node without samples, short batches, one sample too few and one too many for a batch.
RAGGED = (16, 5, 33, 1, 0, 40, 15, 17)
STAR = {
    "federation_id": "lanes",
    "federated_learning_schema": "TraditionalFederatedLearning",
    "federated_learning_topology": "star",
}
Terms = Callable[[int, np.ndarray], LocalTerms | None]


class Case:
    """Nodes of differing sample counts, each with two passes over its data."""

    def __init__(
        self, model: str, shape: tuple[int, ...], terms: Terms = lambda index, model: None, **more: Any
    ) -> None:
        self.module = FlatModule(build_model(model, shape, 10, seed=3))
        self.start = self.module.row.copy()
        draw = np.random.default_rng(0)
        self.data = [
            (torch.from_numpy(draw.random((n, *shape), dtype=np.float32)), torch.from_numpy(draw.integers(0, 10, n)))
            for n in RAGGED
        ]
        options = {"optimizer": "SGD", "learning_rate": 0.05, "momentum": 0.0, "weight_decay": 0.0, "epochs": 2}
        self.recipe = Recipe(**{**options, "steps": None, "batch_size": 16, "shuffle": True, **more})
        self.terms = terms

    def generator(self, index: int) -> torch.Generator:
        return torch_generator(7, index, 1, "batches")

    def one_by_one(self) -> tuple[list[Outcome], list[LocalTerms | None]]:
        trainer, found, all_terms = LocalTrainer(), [], []
        r = self.recipe
        for index, (x, y) in enumerate(self.data):
            self.module.load(self.start)
            all_terms.append(self.terms(index, self.start))
            trainer.begin(all_terms[-1])
            loss, _ = trainer.train(
                self.module,
                x,
                y,
                optimizer=r.optimizer,
                learning_rate=r.learning_rate,
                momentum=r.momentum,
                weight_decay=r.weight_decay,
                epochs=r.epochs,
                batch_size=r.batch_size,
                shuffle=r.shuffle,
                generator=self.generator(index),
                steps=r.steps,
            )
            found.append(Outcome(self.module.row.copy(), loss, trainer.steps))
        return found, all_terms

    def together(
        self, width: int, groups: Sequence[Sequence[int]] = ()
    ) -> tuple[list[Outcome], list[LocalTerms | None]]:
        trainer = VectorTrainer(self.module, width, self.recipe)
        all_terms = [self.terms(index, self.start) for index in range(len(self.data))]
        found: dict[int, Outcome] = {}
        for group in groups or [range(k, min(k + width, len(RAGGED))) for k in range(0, len(RAGGED), width)]:
            jobs = [Job(self.start, *self.data[i], partial(self.generator, i), all_terms[i]) for i in group]
            for index, outcome in zip(group, trainer.train(jobs), strict=True):
                found[index] = Outcome(outcome.row.copy(), outcome.loss, outcome.steps)
        return [found[index] for index in range(len(self.data))], all_terms


def kept_state(rows: int, numbers: int) -> Terms:
    """An optimizer's state from earlier rounds, another one for each node."""

    def terms(index: int, model: np.ndarray) -> LocalTerms:
        state = np.full(rows * len(model) + numbers, 1e-3 * index, np.float32)
        state[rows * len(model) :] = index
        return LocalTerms(optimizer_state=state)

    return terms


CASES: dict[str, Callable[[], Case]] = {
    **{name: partial(Case, name, (20,)) for name in ("logistic", "mlp", "2nn")},
    "lenet": partial(Case, "lenet", (1, 12, 12)),
    "cnn": partial(Case, "cnn", (1, 4, 4)),
    "resnet8": partial(Case, "resnet8", (3, 4, 4)),
    "momentum": partial(Case, "mlp", (20,), momentum=0.9, weight_decay=0.01),
    "adam": partial(Case, "mlp", (20,), optimizer="Adam", learning_rate=2e-3, weight_decay=0.01),
    "adamw": partial(Case, "mlp", (20,), optimizer="AdamW", learning_rate=2e-3, weight_decay=0.01),
    "in order": partial(Case, "mlp", (20,), shuffle=False),
    "steps": partial(Case, "mlp", (20,), steps=5, momentum=0.5),
    "proximal": partial(Case, "mlp", (20,), lambda i, model: LocalTerms(mu=0.1, anchor=0.9 * model)),
    "corrected": partial(Case, "mlp", (20,), lambda i, model: LocalTerms(correction=np.full_like(model, 0.01 * i))),
    "kept velocity": partial(Case, "mlp", (20,), kept_state(1, 0), momentum=0.9),
    "kept moments": partial(Case, "mlp", (20,), kept_state(2, 1), optimizer="AdamW", learning_rate=2e-3),
}


def differs(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference, as a part of the largest value."""
    return float(np.abs(found - wanted).max() / max(float(np.abs(wanted).max()), 1e-12))


@pytest.mark.parametrize("name", CASES)
def test_lanes_train_what_the_plain_loop_trains(name: str) -> None:
    case = CASES[name]()
    (wanted, wanted_terms), (found, found_terms) = case.one_by_one(), case.together(3)
    for one, other in zip(found, wanted, strict=True):
        assert differs(one.row, other.row) <= TOLERANCE
        assert one.loss == pytest.approx(other.loss, rel=1e-6)
        assert one.steps == other.steps
    assert differs(found[0].row, case.start) > 1e-3
    assert np.array_equal(found[RAGGED.index(0)].row, case.start)
    for a, b in zip(found_terms, wanted_terms, strict=True):
        if a is not None and a.optimizer_state is not None:
            assert b is not None and b.optimizer_state is not None
            assert differs(a.optimizer_state, b.optimizer_state) <= 2 * TOLERANCE


@pytest.mark.parametrize("width", [2, 3, 8, 32])
@pytest.mark.parametrize("name", ["mlp", "lenet", "adamw", "kept moments", "smooth"])
def test_no_bit_depends_on_the_company_or_on_the_lane(name: str, width: int) -> None:
    case = Case("smooth", (7,), batch_size=5) if name == "smooth" else CASES[name]()
    wanted, wanted_terms = case.together(width, [[index] for index in range(len(RAGGED))])
    shuffle = random.Random(width)
    order = shuffle.sample(range(len(RAGGED)), len(RAGGED))
    groups = []
    while order:
        size = shuffle.randint(1, min(width, len(order)))
        groups, order = [*groups, order[:size]], order[size:]
    found, found_terms = case.together(width, groups)
    for one, other in zip(found, wanted, strict=True):
        assert one.row.tobytes() == other.row.tobytes()
        assert one.loss == other.loss
    for a, b in zip(found_terms, wanted_terms, strict=True):
        assert a is None or a.optimizer_state is None or a.optimizer_state.tobytes() == b.optimizer_state.tobytes()  # type: ignore[union-attr]


@register_model("smooth")
def smooth() -> nn.Module:
    """Sizes that fit no vector, and functions whose vector code has other last bits than the rest's."""
    return nn.Sequential(
        nn.Linear(7, 13), nn.SiLU(), nn.LayerNorm(13), nn.Linear(13, 11), nn.Sigmoid(), nn.Linear(11, 10)
    )


def test_what_diverges_in_one_lane_stays_there() -> None:
    case = Case("mlp", (20,))
    x, y = case.data[0]
    alone, _ = case.together(4, [[k] for k in range(len(RAGGED))])
    case.data[0] = x * 1e38, y
    found, _ = case.together(4)
    assert not np.isfinite(found[0].row).all()
    assert [o.row.tobytes() for o in found[1:]] == [o.row.tobytes() for o in alone[1:]]


def test_what_has_no_part_in_training_keeps_its_bits() -> None:
    """A parameter that is frozen, one that nothing uses, and constants, of which the model makes use."""

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Parameter(torch.full((20,), 0.5), requires_grad=False)
            self.idle = nn.Parameter(torch.ones(3))
            self.learned = nn.Linear(20, 10)
            self.register_buffer("scale", torch.full((20,), 2.0))
            self.register_buffer("picked", torch.arange(19, -1, -1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.learned((x * self.scale + self.frozen)[:, self.picked])

    register_model("partly")(Partly)
    case = Case("partly", (20,), weight_decay=0.1)
    (wanted, _), (found, _) = case.one_by_one(), case.together(4)
    for one, other in zip(found, wanted, strict=True):
        assert differs(one.row, other.row) <= TOLERANCE
        for tensor, part in case.module.layout.places:
            if not tensor.name.startswith("learned"):
                assert np.array_equal(one.row[part], case.start[part])


# ---------------------------------------------------------------- what is decided before a run


def config_of(**keys: Any) -> FederationConfig:
    return FederationConfig.from_mapping({**STAR, "number_of_clients": 100, **keys})


def resolved(**keys: Any) -> int | str:
    submitted = build_submission(config_of(**keys))
    return FederationConfig.from_json(submitted.config_json).vectorize


def test_auto_becomes_a_number_or_off_in_the_submitted_configuration() -> None:
    assert resolved() == "off"
    assert resolved(vectorize=7) == 7
    assert resolved(vectorize="auto") == 16
    assert resolved(vectorize="auto", number_of_clients=10) == "off"
    assert resolved(vectorize="auto", client_fraction=0.1) == "off"
    assert resolved(vectorize="auto", optimizer="RMSprop") == "off"
    assert resolved(vectorize="auto", model_type="tests-with-dropout") == "off"
    assert resolved(vectorize="auto", client_template="icrf:FederatedNode") == "off"


@pytest.mark.parametrize(
    ("elements", "participants", "width"),
    [
        (9_610, 1000, 64),
        (9_610, 100, 16),
        (9_610, 63, 0),
        (60_000, 1000, 16),
        (101_770, 1000, 0),
        (25_000_000, 1000, 0),
    ],
)
def test_auto_looks_at_the_size_of_the_model_and_the_number_of_nodes(
    elements: int, participants: int, width: int
) -> None:
    assert suitable_width(elements, participants) == width


class _With(nn.Module):
    """Digits through a layer of the test's choice."""

    def __init__(self, middle: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(64, 8), middle, nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(x.flatten(1))))


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        return x


UNFIT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tests-with-dropout": (lambda: _With(nn.Dropout(0.1)), "draws random numbers (aten.bernoulli_"),
    "tests-with-noise": (lambda: _With(lambda x: x + torch.randn(8)), "draws random numbers (aten.randn"),
    "tests-with-numpy": (lambda: _With(lambda x: x * float(np.random.rand())), "draws random numbers (numpy.random)"),
    "tests-with-random": (lambda: _With(lambda x: x * random.random()), "draws random numbers (random)"),
    "tests-with-batch-norm": (lambda: _With(nn.BatchNorm1d(8)), "changes buffer middle.running_mean"),
    "tests-with-a-count": (lambda: _With(_Counting()), "changes buffer middle.calls in training"),
    "tests-with-batch-statistics": (
        lambda: _With(nn.BatchNorm1d(8, track_running_stats=False)),
        "looks at other samples of the batch",
    ),
    "tests-with-a-branch": (lambda: _With(lambda x: x if x.sum() > 0 else -x), "cannot do so: "),
}
for _name, (_factory, _) in UNFIT.items():
    register_model(_name)(_factory)


@pytest.mark.parametrize("name", UNFIT)
def test_a_model_that_cannot_train_in_lanes_is_refused_by_name(name: str) -> None:
    state = torch.get_rng_state()
    with pytest.raises(ConfigError) as refused:
        check_configuration(config_of(model_type=name, vectorize=4))
    error = refused.value
    assert (error.code, error.place, error.value, error.allowed) == ("C008", "vectorize", "4", "off")
    assert f"model_type '{name}' contradicts vectorize 4: the model {UNFIT[name][1]}" in error.message
    check_configuration(config_of(model_type=name))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_draws_in_evaluation_alone_is_not_refused() -> None:
    register_model("tests-sure-dropout")(lambda: _With(nn.Dropout(0.0)))
    assert resolved(model_type="tests-sure-dropout", vectorize=4) == 4


@pytest.mark.parametrize("optimizer", ["RMSprop", "Adagrad", "NAdam"])
def test_an_optimizer_without_lanes_is_refused_by_name(optimizer: str) -> None:
    with pytest.raises(ConfigErrors) as refused:
        config_of(optimizer=optimizer, vectorize=8)
    (error,) = refused.value.errors
    assert error.code == "C008" and error.place.startswith("configuration")
    assert error.message == f"vectorize 8 contradicts optimizer {optimizer}, which trains one node after the other"
    assert config_of(optimizer=optimizer).vectorize == "off"


@pytest.mark.parametrize(
    ("value", "code"), [(1, "C007"), (0, "C007"), (5000, "C007"), (True, "C006"), ("on", "C006"), (2.0, "C006")]
)
def test_only_off_auto_and_widths_from_two_are_values(value: Any, code: str) -> None:
    with pytest.raises(ConfigErrors) as refused:
        config_of(vectorize=value)
    assert [error.code for error in refused.value.errors] == [code]


def test_batches_are_no_larger_than_the_largest_node_needs() -> None:
    config = config_of(batch_size=10_000)
    assert Recipe.of(config, most_samples=15).batch_size == 15
    assert Recipe.of(config).batch_size == 10_000
    assert "digits" in DATASETS.names()
