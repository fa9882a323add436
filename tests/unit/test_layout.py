"""The flat form of a model: order, identity, files, and what it refuses by name."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn

from icrf.errors import IcrfError
from icrf.learning.architectures import mlp
from icrf.learning.layout import FlatModule, Layout
from icrf.protocol import TensorSpec


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
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "1.running_mean"),
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
