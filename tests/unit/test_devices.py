"""Where a host computes. Without a GPU the code for one runs on a CPU whose memory is taken to be somewhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from icrf.errors import ConfigErrors, ResourceError
from icrf.learning import devices
from icrf.learning.datasets import load_dataset
from icrf.learning.devices import Device, device_of, global_generators, prepare, put_back, require_same_bits
from icrf.learning.fingerprint import numeric_fingerprint
from icrf.learning.flat_module import FlatModule
from icrf.learning.layout import Layout
from icrf.learning.models import build_model
from icrf.learning.rng import global_randomness, torch_generator
from icrf.learning.training import LocalTerms, LocalTrainer, evaluate, mean_loss
from icrf.learning.vectorizable import require_equal_lanes
from icrf.learning.vectorized import Job, Recipe, VectorTrainer
from icrf.local import machine_gpus
from icrf.spec import FederationConfig
from icrf_agent import ray_substrate

DIGITS = load_dataset("digits", None)
APART = Device("cpu", apart=True)
STAR = {"federation_id": "f", "schema": "TraditionalFederatedLearning", "federated_learning_topology": "star"}

with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
# What runs everywhere, and what a GPU is asked beside it.
ELSEWHERE = [pytest.param(APART, id="apart"), pytest.param(Device("cuda", True), id="cuda", marks=with_gpu)]


class Normed(nn.Module):
    """Weights, statistics, a counter, a constant that is no state, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(64, 16), nn.BatchNorm1d(16)
        self.drop, self.last = nn.Dropout(0.3), nn.Linear(16, 10)
        self.register_buffer("shift", torch.full((16,), 0.5), persistent=False)

    def forward(self, x: Any) -> Any:
        return self.last(self.drop(torch.relu(self.norm(self.first(x.flatten(1))) + self.shift)))


def normed() -> nn.Module:
    with global_randomness(3):
        return Normed()


def mlp() -> nn.Module:
    module: nn.Module = build_model("mlp", DIGITS.input_shape, DIGITS.num_classes, 0)
    return module


def same(found: Any, expected: Any, device: Device) -> None:
    """Bit for bit on a CPU; a GPU adds in another order."""
    if device.name == "cpu":
        assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    """Every switch that :func:`prepare` sets is put back."""
    backends = torch.backends
    before = (
        torch.are_deterministic_algorithms_enabled(),
        backends.cudnn.benchmark,
        backends.cudnn.deterministic,
        backends.cudnn.allow_tf32,
        backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision(),
    )
    yield
    torch.use_deterministic_algorithms(before[0])
    backends.cudnn.benchmark, backends.cudnn.deterministic, backends.cudnn.allow_tf32 = before[1:4]
    backends.cuda.matmul.allow_tf32 = before[4]
    torch.set_float32_matmul_precision(before[5])


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("device", ELSEWHERE)
@pytest.mark.parametrize("private", [(), ("norm*",)])
def test_a_model_goes_there_and_comes_back_as_it_was(device: Device, private: tuple[str, ...]) -> None:
    layout = Layout.of_module(normed(), private)
    here, there = FlatModule(normed(), layout), FlatModule(normed(), layout, device)
    assert there.row.tobytes() == here.row.tobytes()
    assert {p.device.type for p in there.module.parameters()} == {torch.device(device.name).type}
    other = np.linspace(0.0, 1.0, layout.row_size).astype(np.float32)
    for module in (here, there):
        module.load(other)
        with torch.no_grad():
            module.module.last.bias.add_(1.0)
    assert there.row.tobytes() == here.row.tobytes()
    there.load(here.snapshot())
    assert there.flat.tobytes() == here.flat.tobytes()


def test_on_a_cpu_nothing_is_copied() -> None:
    module = FlatModule(mlp())
    (parameter, view), *_ = module.trainable
    before = module.flat.copy()
    with torch.no_grad():
        parameter.add_(1.0)
    assert (module.flat != before).sum() == parameter.numel()
    assert view.untyped_storage().data_ptr() == torch.from_numpy(module.row).untyped_storage().data_ptr()


# ---------------------------------------------------------------- training


def trained(factory: Callable[[], Any], device: Device, optimizer: str, terms: bool) -> tuple[Any, ...]:
    module = FlatModule(factory(), None, device)
    size = module.layout.num_parameters
    state = np.zeros({"SGD": size, "Adam": 2 * size + 1}[optimizer], np.float32) if terms else None
    anchor = np.full(size, 0.01, np.float32)
    found = []
    trainer = LocalTrainer()
    for number in (1, 2):
        given = LocalTerms(mu=0.1, anchor=anchor, correction=anchor * 0.1, optimizer_state=state)
        trainer.begin(given if terms else None)
        found += trainer.train(
            module,
            DIGITS.train_x[:101],
            DIGITS.train_y[:101],
            optimizer=optimizer,
            learning_rate=0.01,
            momentum=0.9 if optimizer == "SGD" else 0.0,
            epochs=2,
            batch_size=20,
            shuffle=True,
            generator=torch_generator(1, 2, number, "batches"),
        )
    return module, np.array(found), module.flat.copy(), np.zeros(1) if state is None else state


@pytest.mark.parametrize("device", ELSEWHERE)
@pytest.mark.parametrize("terms", [False, True])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_nodes_train_there_as_they_do_here(device: Device, optimizer: str, terms: bool) -> None:
    here, there = (trained(mlp, where, optimizer, terms) for where in (Device(), device))
    for expected, found in zip(here[1:], there[1:], strict=True):
        same(found, expected, device)
    x, y = DIGITS.test_x, DIGITS.test_y
    expected, found = (evaluate(m.module, x, y, metrics=["macro_f1"]) for m in (here[0], there[0]))
    assert found == pytest.approx(expected, rel=1e-12 if device.name == "cpu" else 1e-2)
    losses = [mean_loss(m.module, x, y, nn.functional.cross_entropy) for m in (here[0], there[0])]
    assert losses[1] == pytest.approx(losses[0], rel=1e-12 if device.name == "cpu" else 1e-2)


def test_models_with_statistics_and_dropout_train_elsewhere_too() -> None:
    here, there = (trained(normed, where, "SGD", False) for where in (Device(), APART))
    assert here[2].tobytes() == there[2].tobytes() and here[1].tobytes() == there[1].tobytes()


RECIPE = Recipe("SGD", 0.05, 0.9, 0.0, 2, None, 16, True)


def together(device: Device, optimizer: str = "SGD") -> tuple[VectorTrainer, list[Job]]:
    module = FlatModule(mlp(), None, device)
    jobs = [
        Job(
            module.row.copy(),
            device.put(torch.tensor(DIGITS.train_x[40 * k : 40 * k + 30 + k])),
            torch.tensor(DIGITS.train_y[40 * k : 40 * k + 30 + k]),
            partial(torch_generator, 0, k, 1, "batches"),
            LocalTerms(0.1, np.zeros(module.layout.num_parameters, np.float32)),
        )
        for k in range(3)
    ]
    recipe = Recipe(optimizer, 0.01, 0.9 if optimizer == "SGD" else 0.0, 0.0, 2, None, 16, True)
    return VectorTrainer(module, 4, recipe), jobs


@pytest.mark.parametrize("device", ELSEWHERE)
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_nodes_train_together_there_as_they_do_here(device: Device, optimizer: str) -> None:
    prepare(device)
    outcomes = []
    for where in (Device(), device):
        trainer, jobs = together(where, optimizer)
        outcomes.append([(found.row.copy(), found.loss, found.steps) for found in trainer.train(jobs)])
    for (row, loss, steps), (expected, expected_loss, expected_steps) in zip(outcomes[1], outcomes[0], strict=True):
        same(row, expected, device)
        assert loss == pytest.approx(expected_loss, rel=1e-3) and steps == expected_steps


def test_lanes_of_other_bits_are_refused() -> None:
    trainer, jobs = together(APART)
    require_equal_lanes(trainer, "mlp", jobs[0])

    class Skewed(VectorTrainer):
        def train(self, given: Any) -> Any:
            found = super().train(given)
            found[1].row[0] += 1e-7
            return found

    skewed = Skewed(FlatModule(mlp(), None, APART), 4, RECIPE)
    with pytest.raises(Exception, match="in one lane than in another on this device"):
        require_equal_lanes(skewed, "mlp", jobs[0])


@with_gpu
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("factory", [mlp, normed])
def test_a_gpu_repeats_its_bits(factory: Callable[[], Any], optimizer: str) -> None:
    device = Device.of("cuda")
    prepare(device)
    one, two = (trained(factory, device, optimizer, False) for _ in range(2))
    assert one[2].tobytes() == two[2].tobytes() and one[1].tobytes() == two[1].tobytes()


@with_gpu
def test_a_gpu_repeats_its_bits_where_nodes_train_together() -> None:
    device = Device.of("cuda")
    prepare(device)
    one, two = ([found.row.tobytes() for found in trainer.train(jobs)] for trainer, jobs in (together(device),) * 2)
    assert one == two
    trainer, jobs = together(device)
    require_equal_lanes(trainer, "mlp", jobs[0])


# ---------------------------------------------------------------- randomness


@pytest.fixture
def gpu_generators(monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Generator, ...]:
    """Two generators in the place of those of two GPUs in use."""
    found = torch.Generator(), torch.Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", found)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    return found


def test_generators_of_gpus_are_seeded_and_put_back_like_that_of_the_cpu(gpu_generators: Any) -> None:
    assert global_generators() == (torch.random.default_generator, *gpu_generators)
    before = [generator.get_state() for generator in gpu_generators]
    draws = []
    for _ in range(2):
        with global_randomness(11):
            draws.append([torch.rand(3, generator=generator).tolist() for generator in gpu_generators])
    assert draws[0] == draws[1]
    with put_back() as generators:
        generators[1].manual_seed(5)
    trained(normed, APART, "SGD", False)
    for generator, state in zip(gpu_generators, before, strict=True):
        assert torch.equal(generator.get_state(), state)


def test_gpus_that_are_not_in_use_are_left_alone() -> None:
    if not torch.cuda.is_initialized():
        assert global_generators() == (torch.random.default_generator,)


# ---------------------------------------------------------------- getting ready


def test_the_same_bits_every_time_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    torch.backends.cudnn.benchmark = True
    prepare(Device.of("cpu"))
    assert torch.backends.cudnn.benchmark and not torch.are_deterministic_algorithms_enabled()
    require_same_bits()
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_getting_ready_sets_the_workspace_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    prepare(Device.of("cuda"))
    assert devices.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("built", "allowed", "hint"),
    [(None, "a torch that is built for CUDA", "install torch with CUDA"), ("12.8", "a GPU", "--num-gpus")],
)
def test_a_host_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch, built: Any, allowed: str, hint: str) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    with pytest.raises(ResourceError, match="device cuda needs a GPU") as caught:
        prepare(Device.of("cuda"))
    assert (caught.value.code, caught.value.allowed) == ("R001", allowed) and hint in caught.value.hint


def test_modules_say_where_they_are() -> None:
    assert device_of(mlp()).type == "cpu" and device_of(nn.ReLU()).type == "cpu"


# ---------------------------------------------------------------- in a configuration


@pytest.mark.parametrize(
    ("keys", "code", "what"),
    [
        ({"device": "cuda", "resources": {"num_cpus": 1}}, "C008", "a slot would see no GPU"),
        ({"resources": {"num_gpus": 1.5}}, "C007", "neither a part of a GPU nor several whole ones"),
        ({"device": "mps"}, "C012", "not built yet"),
    ],
)
def test_shares_of_a_gpu_that_cannot_be_are_refused(keys: dict[str, Any], code: str, what: str) -> None:
    with pytest.raises(ConfigErrors, match=what) as caught:
        FederationConfig.from_mapping({**STAR, **keys})
    assert [error.code for error in caught.value.errors] == [code]


@pytest.mark.parametrize("resources", ["uniform", {"num_cpus": 0.5, "num_gpus": 0.25}, {"num_cpus": 1, "num_gpus": 2}])
def test_shares_of_a_gpu(resources: Any) -> None:
    assert FederationConfig.from_mapping({**STAR, "device": "cuda", "resources": resources}).device == "cuda"


# ---------------------------------------------------------------- what machines and clusters have


@pytest.mark.parametrize(
    ("resources", "device"),
    [
        ({"CPU": 8.0}, "cpu"),
        ({"CPU": 8.0, "GPU": 0.0, "accelerator_type:T4": 1.0}, "cpu"),
        ({"GPU": 2.0, "accelerator_type:H100": 1.0}, "cuda:H100"),
        ({"GPU": 2.0, "accelerator_type:T4": 1.0, "accelerator_type:A100": 1.0}, "cuda:A100+T4"),
        ({"GPU": 1.0}, "cuda:unnamed"),
    ],
)
def test_the_kind_of_gpu_is_what_ray_says(resources: dict[str, float], device: str) -> None:
    assert ray_substrate.device_of(resources) == device
    assert numeric_fingerprint(device, 1).device == device


@pytest.mark.parametrize(("visible", "number"), [("", 0), ("-1", 0), ("0", 1), ("GPU-1, GPU-2", 2)])
def test_gpus_that_processes_may_use_are_counted(monkeypatch: pytest.MonkeyPatch, visible: str, number: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine_gpus() == number
