"""The flat form of a model: order, identity, files, and what it refuses by name."""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn

from icrf.errors import IcrfError
from icrf.learning.architectures import mlp
from icrf.learning.flat_module import FlatModule
from icrf.learning.layout import Layout
from icrf.learning.models import build_model
from icrf.protocol import TensorSpec
from icrf.update import ExactSum, choose_grid


def small() -> nn.Module:
    torch.manual_seed(0)
    return mlp((2, 2), 3)


def test_layout_is_in_name_order_and_covers_the_module() -> None:
    layout = Layout.of_module(small())
    assert layout.names == ("hidden.bias", "hidden.weight", "output.bias", "output.weight")
    assert layout.sizes == (128, 512, 3, 384)
    assert layout.offsets == (0, 128, 640, 643)
    assert layout.num_parameters == 1027
    assert layout.dtype == np.float32
    assert Layout(layout.tensors) == layout


def test_layout_refuses_names_out_of_order() -> None:
    with pytest.raises(IcrfError, match=r"W010.*'b' before 'a'"):
        Layout((TensorSpec("b", (1,), "float32"), TensorSpec("a", (1,), "float32")))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).double()), "1.bias"),
        (nn.Linear(2, 2).to(torch.float16), "bias"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()), "1.bias"),
    ],
)
def test_tensors_without_an_aggregation_rule_are_refused_by_name(module: nn.Module, name: str) -> None:
    with pytest.raises(IcrfError, match=f"W011 {name}:"):
        Layout.of_module(module)


def test_tied_parameters_are_refused_by_name() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    with pytest.raises(IcrfError, match=r"W011 1\.weight: .*'0\.weight' and '1\.weight' are tied"):
        Layout.of_module(module)


def test_safetensors_round_trip_and_hash() -> None:
    flat_module = FlatModule(small())
    layout, flat = flat_module.layout, flat_module.flat
    data = layout.to_safetensors(flat, {"round": "3"})
    assert layout.from_safetensors(data).tobytes() == flat.tobytes()
    tensors = safetensors.numpy.load(data)
    by_hand = hashlib.sha256(b"".join(tensors[name].tobytes() for name in sorted(tensors))).hexdigest()
    assert layout.model_sha256(flat) == by_hand


def test_foreign_files_are_refused_by_tensor() -> None:
    layout = Layout.of_module(small())
    state = layout.to_state_dict(np.zeros(layout.num_parameters, np.float32))
    with pytest.raises(IcrfError, match=r"W010.*not a readable safetensors file"):
        layout.from_safetensors(b"\x80\x04pickle")
    with pytest.raises(IcrfError, match=r"W010.*'output\.bias' is missing"):
        layout.from_safetensors(safetensors.numpy.save({k: v for k, v in state.items() if k != "output.bias"}))
    with pytest.raises(IcrfError, match=r"W010.*'extra' is not part of the model"):
        layout.from_safetensors(safetensors.numpy.save({**state, "extra": np.zeros(1, np.float32)}))
    with pytest.raises(IcrfError, match=r"W010.*'output\.bias'.*float32 \(1,\).*\(3,\)"):
        layout.from_safetensors(safetensors.numpy.save({**state, "output.bias": np.zeros(1, np.float32)}))


def test_check_names_what_was_found() -> None:
    layout = Layout.of_module(small())
    with pytest.raises(IcrfError, match=r"W010.*float64 \(1027,\).*float32 \(1027,\)"):
        layout.check(np.zeros(1027))


def test_absmax_and_first_nonfinite() -> None:
    layout = Layout(tuple(TensorSpec(n, s, "float32") for n, s in (("a", (2,)), ("b", (0, 3)), ("c", ()))))
    flat = np.array([1.5, -4.0, 0.25], np.float32)
    assert layout.absmax(flat) == (4.0, 0.0, 0.25)
    assert layout.first_nonfinite(flat) is None
    for bad in (np.nan, np.inf, -np.inf):
        flat[2] = bad
        assert layout.first_nonfinite(flat) == "c"


def test_flat_module_shares_memory_with_the_parameters() -> None:
    module = small()
    flat_module = FlatModule(module)
    before = flat_module.snapshot()
    features = torch.ones(1, 4)
    module(features).sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert flat_module.flat.tobytes() != before.tobytes()
    assert module.hidden.weight.data_ptr() == flat_module.flat[128:].ctypes.data
    trained = module(features)

    flat_module.load(before)
    assert not torch.equal(module(features), trained)
    flat_module.zero_grad()
    assert all(p.grad is None for p in module.parameters())
    with pytest.raises(IcrfError, match="W010"):
        flat_module.load(before[:-1])


# ---------------------------------------------------------------- buffers, integers, what is private


class Counting(nn.Module):
    """Counts its forward passes in every way a module may."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("average", torch.tensor([0.5, -1.0]))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.average = self.average * 0.5
        self.count = self.count + len(x)
        self.scratch += 1
        return self.linear(x)


def test_buffers_have_a_rule_by_their_type() -> None:
    layout = Layout.of_module(Counting())
    assert {t.name: (t.dtype, t.rule, t.num_elements) for t in layout.tensors} == {
        "average": ("float32", "mean", 2),
        "count": ("int64", "rounded", 2),
        "flags": ("bool", "rounded", 4),
        "linear.bias": ("float32", "aggregated", 2),
        "linear.weight": ("float32", "aggregated", 4),
    }
    assert layout.num_parameters == layout.row_size == 14


def test_replaced_buffers_are_state_and_what_is_not_persistent_is_none() -> None:
    module = FlatModule(Counting())
    start = module.snapshot()
    module.module(torch.zeros(4, 2))
    state = module.layout.to_state_dict(module.flat)
    assert state["average"].tolist() == [0.25, -0.5] and state["count"].dtype == np.int64 and state["count"] == 7
    assert state["flags"].tolist() == [True, False] and state["flags"].dtype == np.bool_
    assert module.module.scratch.tolist() == [1, 1]
    module.load(start)
    assert (module.module.count.item(), module.module.scratch.tolist()) == (3, [0, 0])
    assert module.flat.tobytes() == start.tobytes()


@pytest.mark.parametrize("value", [torch.zeros(3), torch.zeros(2, dtype=torch.float64), None])
def test_a_buffer_that_has_become_something_else_is_refused_by_name(value: torch.Tensor | None) -> None:
    module = FlatModule(Counting())
    module.module.average = value
    with pytest.raises(IcrfError, match=r"W010 average: buffer 'average' differs.*float32 \(2,\)"):
        module.snapshot()


def grown(module: Counting) -> None:
    module.linear.weight.data = torch.zeros(3, 3)


def moved(module: Counting) -> None:
    module.linear.weight.data = module.linear.weight.data + 1


def halved(module: Counting) -> None:
    module.half()


def another(module: Counting) -> None:
    module.linear.weight = torch.nn.Parameter(torch.zeros(2, 2))


def another_layer(module: Counting) -> None:
    module.linear = torch.nn.Linear(2, 2)


def removed(module: Counting) -> None:
    module.linear.weight = None  # type: ignore[assignment]


@pytest.mark.parametrize("change", [grown, moved, halved, another, another_layer, removed])
def test_a_parameter_that_was_replaced_is_refused_by_name_and_gone_with_the_next_load(change: Any) -> None:
    module = FlatModule(Counting())
    start = module.snapshot()
    change(module.module)
    with pytest.raises(IcrfError, match=r"W010 (linear\.\w+|average): .*(was replaced|differs)"):
        module.snapshot()
    module.load(start)
    assert module.flat.tobytes() == start.tobytes()
    module.module.linear(torch.ones(1, 2)).sum().backward()
    with torch.no_grad():
        module.module.linear.weight += module.module.linear.weight.grad
    learned = module.layout.to_state_dict(module.flat)["linear.weight"]
    np.testing.assert_array_equal(learned, module.layout.to_state_dict(start)["linear.weight"] + 1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_integers_are_exact_up_to_their_bound(dtype: str) -> None:
    layout = Layout((TensorSpec("n", (5,), "int64", "rounded"), TensorSpec("w", (1,), dtype)))
    numbers = np.array([0, -1, 2**44 - 1, 1 - 2**44, 2**24 + 1])
    flat = layout.from_state_dict({"n": numbers, "w": np.ones(1, dtype)})
    assert np.isfinite(flat).all() and layout.to_state_dict(flat)["n"].tolist() == numbers.tolist()
    data = layout.to_safetensors(flat)
    assert layout.from_safetensors(data).tobytes() == flat.tobytes()
    tensors = safetensors.numpy.load(data)
    by_hand = hashlib.sha256(tensors["n"].tobytes() + tensors["w"].tobytes()).hexdigest()
    assert tensors["n"].dtype == np.int64 and layout.model_sha256(flat) == by_hand
    with pytest.raises(IcrfError, match=r"W010.*'n' has integers out of range.*below 2\^44"):
        layout.from_state_dict({"n": numbers * 2, "w": np.ones(1, dtype)})


def test_a_mean_of_integers_is_the_nearest_integer_in_any_grouping() -> None:
    layout = Layout((TensorSpec("n", (4,), "int64", "rounded"), TensorSpec("w", (1,), "float32")))
    weights = [3, 1, 1, 2]
    numbers = np.array([[7, 2**30, -5, 10], [7, 2**30, 5, 11], [7, 2**30, 8, 10], [7, 2**30, 1, 12]])
    rows = [layout.from_state_dict({"n": n, "w": np.float32([k])}) for k, n in enumerate(numbers)]
    grid = choose_grid(layout.absmax(rows[3]), 7)

    def sum_of(members: list[int]) -> ExactSum:
        total = ExactSum(layout.sizes, grid, 7, layout.names)
        assert not any(total.add(rows[k], weights[k]) for k in members)
        return total

    means = []
    for groups in ([[0, 1, 2, 3]], [[3, 1], [2, 0]]):
        total = ExactSum(layout.sizes, grid, 7, layout.names)
        for members in groups:
            total.merge(sum_of(members))
        means.append(total.mean(layout.dtype))
        layout.settle(means[-1])
    assert means[0].tobytes() == means[1].tobytes()
    wanted = np.rint(np.average(numbers, axis=0, weights=weights)).astype(int).tolist()
    assert layout.to_state_dict(means[0])["n"].tolist() == wanted


def test_private_tensors_lie_behind_the_shared_ones() -> None:
    module = nn.Sequential(OrderedDict(bn=nn.BatchNorm1d(2), out=nn.Linear(2, 1)))
    layout = Layout.of_module(module, ["bn*"])
    assert layout.names == ("out.bias", "out.weight") and layout.num_parameters == 3
    assert layout.private == ("bn.bias", "bn.num_batches_tracked", "bn.running_mean", "bn.running_var", "bn.weight")
    assert layout.row_size == 3 + 8 + 2 and len(layout.absmax(np.zeros(3, np.float32))) == 2
    flat_module = FlatModule(module, layout)
    start = flat_module.row.copy()
    flat_module.module.bn(torch.ones(4, 2))
    changed = flat_module.row.copy()
    assert changed[:3].tobytes() == start[:3].tobytes() and changed[3:].tobytes() != start[3:].tobytes()
    flat_module.load(changed[:3])
    assert flat_module.row.tobytes() == start.tobytes(), "without private tensors those of the beginning"
    flat_module.load(changed)
    assert flat_module.row.tobytes() == changed.tobytes()
    assert set(layout.to_state_dict(changed[:3])) == set(layout.names)
    assert layout.to_state_dict(changed)["bn.num_batches_tracked"] == 1
    changed[5] = np.nan
    assert layout.first_nonfinite(changed) in layout.private and layout.first_nonfinite(changed[:3]) is None
    with pytest.raises(IcrfError, match=r"C010 private_keys: no tensor of the model is called 'norm\*'"):
        Layout.of_module(module, ["norm*"])
    for everything in (["*"], ["*.weight", "*.bias"]):
        with pytest.raises(IcrfError, match=r"C008 private_keys: .*nothing would be shared"):
            Layout.of_module(module, everything)


def test_the_private_keys_of_the_page_fit_the_model_that_it_names() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    keys, model = re.findall(r"`private_keys: (\[.*\])`, which fits `(\w+)`", page)[0]
    layout = Layout.of_module(build_model(model, (3, 32, 32), 10, 0), json.loads(keys))
    assert layout.private and layout.names
