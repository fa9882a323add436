"""The flat form of a model: all tensors in one contiguous buffer, and the rule by which each is brought together.

Everything that moves or averages a model works on this buffer; names and shapes live once, in the layout. Torch is
needed only where a module is touched, so that gateways and commands can read layouts without loading it.

The buffer has one element type. Tensors that nodes share come first, in name order, those that stay with their node
(``private``) after them, in name order too. Integers take :data:`icrf.protocol.LIMBS` elements each, ``high * 2**22 +
low`` with ``-2**21 <= low < 2**21``: both are exact in float32, and so are their sums on the exact grid. A mean of such
pairs is a pair with fractions; :meth:`Layout.settle` makes the nearest integer of it. Where all nodes have the same
integer, it is that one.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from icrf.errors import ConfigError, WeightsError
from icrf.protocol import AGGREGATED, LIMBS, MEAN, PRIVATE, ROUNDED, TensorSpec
from icrf.registry import did_you_mean
from icrf.update import HEADROOM_BITS

FlatArray = np.ndarray[Any, np.dtype[Any]]

_DTYPES = ("float32", "float64")
_INTEGERS = ("bool", "uint8", "int8", "int16", "int32", "int64")
_PLACE = "model"
_BASE_BITS = 22
# The high part is below 2^22 too.
MAX_INTEGER = 1 << (2 * _BASE_BITS)


@dataclass(frozen=True)
class Layout:
    """Names, shapes, rules and offsets of a model's tensors within its flat buffer.

    Args:
        tensors: the tensors in strictly ascending name order; those of floats all float32 or all float64.

    Attributes:
        dtype: the common NumPy dtype.
        names: names of the shared tensors, whose rule is not ``private``.
        sizes: elements per shared tensor.
        offsets: first element per shared tensor.
        slices: the shared tensor's part of the flat buffer.
        num_parameters: elements that nodes share; the length of what is sent and averaged.
        row_size: the same with the private ones; the length of what a node keeps.
        places: every tensor and its part of the flat buffer, in name order.

    Raises:
        WeightsError: W010 for names out of order or nothing to share, W011 for a dtype without an aggregation rule.
    """

    tensors: tuple[TensorSpec, ...]
    dtype: np.dtype[Any] = field(init=False, compare=False)
    names: tuple[str, ...] = field(init=False, compare=False)
    sizes: tuple[int, ...] = field(init=False, compare=False)
    offsets: tuple[int, ...] = field(init=False, compare=False)
    slices: tuple[slice, ...] = field(init=False, compare=False)
    num_parameters: int = field(init=False, compare=False)
    row_size: int = field(init=False, compare=False)
    places: tuple[tuple[TensorSpec, slice], ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        for before, after in itertools.pairwise(t.name for t in self.tensors):
            if before >= after:
                raise WeightsError("W010", f"tensors are not in name order: {before!r} before {after!r}", place=_PLACE)
        floats = [t for t in self.tensors if not t.is_integer]
        if not any(t.rule in (AGGREGATED, MEAN) for t in floats):
            raise WeightsError("W010", "the model has no parameters", place=_PLACE)
        for tensor in self.tensors:
            fits = tensor.dtype in (_INTEGERS if tensor.is_integer else (floats[0].dtype,))
            rules = (ROUNDED, PRIVATE) if tensor.is_integer else (AGGREGATED, MEAN, PRIVATE)
            if not fits or tensor.rule not in rules or floats[0].dtype not in _DTYPES:
                raise _no_rule(tensor.name, tensor.dtype, floats[0].dtype)
        shared = tuple(t for t in self.tensors if t.rule != PRIVATE)
        ordered = (*shared, *(t for t in self.tensors if t.rule == PRIVATE))
        ends = tuple(itertools.accumulate(t.num_elements for t in ordered))
        offsets = (0, *ends[:-1])
        slices = tuple(slice(a, b) for a, b in zip(offsets, ends, strict=True))
        places = sorted(zip(ordered, slices, strict=True), key=lambda place: place[0].name)
        values = {
            "dtype": np.dtype(floats[0].dtype),
            "names": tuple(t.name for t in shared),
            "sizes": tuple(t.num_elements for t in shared),
            "offsets": offsets[: len(shared)],
            "slices": slices[: len(shared)],
            "num_parameters": ends[len(shared) - 1],
            "row_size": ends[-1],
            "places": tuple(places),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of_module(cls, module: Any, private: Collection[str] = ()) -> Layout:
        """The layout of a ``torch.nn.Module``: its parameters and its persistent buffers.

        Parameters follow the aggregation rule or the mixing (``aggregated``), buffers are averaged (``mean``), those of
        integers rounded to the nearest one (``rounded``).

        Args:
            private: patterns (``bn*``) of the names of tensors that stay with their node, whatever their type
                (FedBN, Li et al. 2021, arXiv 2102.07623).

        Raises:
            ConfigError: C010 for a pattern that no tensor has, C008 for patterns that leave no parameter to share.
            WeightsError: W011 for a tied parameter or a dtype that has no aggregation rule, by name; W010 for a module
                without parameters or with one that is not materialised.
        """
        kept = module.state_dict()
        parameters = dict(module.named_parameters(remove_duplicate=False))
        named = {**parameters, **_buffers(module)}
        for name in kept:
            if name not in named:
                raise WeightsError(
                    "W011", f"{name!r} is no tensor and has no aggregation rule", place=name, allowed="tensors"
                )
        owners: dict[int, str] = {}
        tensors = []
        for name, tensor in sorted(named.items()):
            twin = owners.setdefault(id(tensor), name)
            if twin != name:
                raise WeightsError(
                    "W011",
                    f"tensors {twin!r} and {name!r} are tied, which has no aggregation rule yet",
                    place=name,
                    hint="Give each layer a tensor of its own",
                )
            if str(tensor.device) == "meta" or not hasattr(tensor, "shape"):
                raise WeightsError("W010", f"parameter {name!r} is not materialised", place=name)
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in (*_DTYPES, *_INTEGERS):
                raise _no_rule(name, dtype, _DTYPES[0])
            rule = ROUNDED if dtype not in _DTYPES else AGGREGATED if name in parameters else MEAN
            rule = PRIVATE if any(fnmatchcase(name, pattern) for pattern in private) else rule
            tensors.append(TensorSpec(name, tuple(int(n) for n in tensor.shape), dtype, rule))
        _check_private(private, tensors)
        return cls(tuple(tensors))

    @property
    def private(self) -> tuple[str, ...]:
        """Names of the tensors that stay with their node."""
        return tuple(t.name for t in self.tensors if t.rule == PRIVATE)

    def parts(self, array: FlatArray) -> Iterator[tuple[TensorSpec, FlatArray]]:
        """The tensors that are in a flat buffer, in name order, and their flat elements as views."""
        self.check(array)
        for tensor, part in self.places:
            if part.stop <= len(array):
                yield tensor, array[part]

    def check(self, array: FlatArray, *, size: int | None = None) -> None:
        """Raise W010 unless `array` is a flat buffer of this layout: with or without private tensors, or of `size`."""
        sizes = (self.num_parameters, self.row_size) if size is None else (size,)
        if array.ndim != 1 or len(array) not in sizes or array.dtype != self.dtype:
            raise WeightsError(
                "W010",
                "array differs from the model's layout",
                value=f"{array.dtype} {array.shape}",
                allowed=f"{self.dtype} ({sizes[0]},)",
            )

    def repeated(self, count: int) -> Layout:
        """The layout of so many models one after the other, whose tensors carry the names of :func:`model_names`.

        None of the tensors may be private.
        """
        if count == 1:
            return self
        tensors = (replace(t, name=f"{name}.{t.name}") for name in model_names(count) for t in self.tensors)
        return Layout(tuple(tensors))

    def settle(self, array: FlatArray) -> None:
        """Round the integers of a buffer that a mean has made to the nearest ones, half to even; in place."""
        for tensor, part in self.parts(array):
            if tensor.is_integer:
                part[:] = _limbs(integers(part), part.dtype)

    def take_medians(self, arrays: Sequence[FlatArray], out: FlatArray) -> None:
        """Make every shared integer of `out` the median of those in `arrays`, of an even number the mean of both middle
        ones, rounded; the pairs that stand for integers have no order of their own."""
        for tensor, part in self.places:
            if tensor.rule == ROUNDED:
                numbers = np.stack([integers(array[part]) for array in arrays])
                put(tensor, out[part], np.rint(np.median(numbers, axis=0)))

    def to_state_dict(self, flat: FlatArray) -> dict[str, FlatArray]:
        """The tensors within `flat` by name: views, and copies of the integers."""
        found = {}
        for tensor, part in self.parts(flat):
            values = integers(part).astype(tensor.dtype) if tensor.is_integer else part
            found[tensor.name] = values.reshape(tensor.shape)
        return found

    def from_state_dict(self, state: Mapping[str, FlatArray], *, place: str = _PLACE) -> FlatArray:
        """Copy named tensors into a new flat buffer of the shared tensors.

        Raises:
            WeightsError: W010 naming the first tensor that is missing, unexpected, of another shape or dtype, or an
                integer out of range.
        """
        for name in sorted(set(state) ^ set(self.names)):
            problem = "is missing" if name not in state else "is not part of the model"
            raise WeightsError("W010", f"tensor {name!r} {problem}", place=place)
        flat = np.empty(self.num_parameters, self.dtype)
        for tensor, part in self.parts(flat):
            found = state[tensor.name]
            if found.shape != tensor.shape or found.dtype != np.dtype(tensor.dtype):
                raise WeightsError(
                    "W010",
                    f"tensor {tensor.name!r} differs from the model's layout",
                    place=place,
                    value=f"{found.dtype} {found.shape}",
                    allowed=f"{tensor.dtype} {tensor.shape}",
                )
            put(tensor, part, found, place=place)
        return flat

    def to_safetensors(self, flat: FlatArray, metadata: Mapping[str, str] | None = None) -> bytes:
        """A safetensors file of the model; `metadata` goes into its header."""
        packed: bytes = safetensors.numpy.save(self.to_state_dict(flat), dict(metadata) if metadata else None)
        return packed

    def from_safetensors(self, data: bytes) -> FlatArray:
        """The flat buffer of a safetensors file.

        Raises:
            WeightsError: W010 if it is no such file, or its names, shapes or dtypes are not the model's.
        """
        place = "model.safetensors"
        try:
            state = safetensors.numpy.load(data)
        except (safetensors.SafetensorError, KeyError) as error:  # KeyError: a dtype that NumPy does not have
            raise WeightsError("W010", f"not a readable safetensors file: {error}", place=place) from error
        return self.from_state_dict(state, place=place)

    def model_sha256(self, flat: FlatArray) -> str:
        """Hex sha256 over the tensors' bytes in name order, little endian."""
        digest = hashlib.sha256()
        for tensor, part in self.parts(flat):
            values = integers(part).astype(tensor.dtype) if tensor.is_integer else np.ascontiguousarray(part)
            digest.update((values.byteswap() if sys.byteorder == "big" else values).view(np.uint8).data)
        return digest.hexdigest()

    def first_nonfinite(self, flat: FlatArray) -> str | None:
        """Name of the first tensor with a NaN or an infinity, or None."""
        for tensor, part in self.parts(flat):
            if not math.isfinite(_largest(part)):
                return tensor.name
        return None

    def absmax(self, flat: FlatArray) -> tuple[float, ...]:
        """Largest absolute value per shared tensor; 0 for an empty one, NaN or infinity where there is any.

        For integers it is what their pairs are below for good, less the head room that the grid of a sum adds.
        """
        self.check(flat)
        return tuple(
            float(1 << (_BASE_BITS - HEADROOM_BITS)) if tensor.is_integer else _largest(flat[part])
            for tensor, part in self.places
            if tensor.rule != PRIVATE
        )


def model_names(count: int) -> tuple[str, ...]:
    """``model_0``, ``model_1``, ...: the models of a federation that learns several, in an order that sorting keeps."""
    width = len(str(count - 1))
    return tuple(f"model_{number:0{width}d}" for number in range(count))


def put(tensor: TensorSpec, part: FlatArray, values: FlatArray, *, place: str = "") -> None:
    """Write a tensor's values into its part of a flat buffer; W010 for integers that are out of range."""
    if not tensor.is_integer:
        part[:] = values.reshape(-1)
        return
    numbers = values.reshape(-1).astype(np.int64)
    if numbers.size and not -MAX_INTEGER < numbers.min() <= numbers.max() < MAX_INTEGER:
        raise WeightsError(
            "W010",
            f"tensor {tensor.name!r} has integers out of range",
            place=place or tensor.name,
            value=f"{numbers.min()} to {numbers.max()}",
            allowed=f"below 2^{2 * _BASE_BITS} in size",
        )
    part[:] = _limbs(numbers, part.dtype)


def _limbs(numbers: FlatArray, dtype: Any) -> FlatArray:
    """int64 numbers as pairs, the high parts first."""
    high = (numbers + (1 << (_BASE_BITS - 1))) >> _BASE_BITS
    return np.concatenate([high, numbers - (high << _BASE_BITS)]).astype(dtype)


def integers(part: FlatArray) -> FlatArray:
    """The nearest int64 numbers of pairs."""
    high, low = part.astype(np.float64).reshape(LIMBS, -1)
    numbers: FlatArray = np.rint(high * (1 << _BASE_BITS) + low).astype(np.int64)
    return numbers


def _largest(part: FlatArray) -> float:
    """Largest absolute value; 0 of nothing."""
    # min and max read the data without a temporary, unlike abs; both pass a NaN on, and np.maximum too.
    return float(np.maximum(-part.min(), part.max())) + 0.0 if part.size else 0.0


def _buffers(module: Any) -> dict[str, Any]:
    """The buffers that belong to the state; the others are constants of the module's code."""
    kept = module.state_dict()
    return {name: buffer for name, buffer in module.named_buffers(remove_duplicate=False) if name in kept}


def _check_private(private: Collection[str], tensors: Sequence[TensorSpec]) -> None:
    """C010 for a pattern that no tensor has, C008 where nothing is left to share."""
    names = [tensor.name for tensor in tensors]
    for pattern in private:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                "C010",
                f"no tensor of the model is called '{pattern}'",
                place="private_keys",
                allowed=", ".join(names[:12]),
                hint=did_you_mean(pattern, names),
            )
    if private and not any(tensor.rule == AGGREGATED for tensor in tensors):
        raise ConfigError(
            "C008",
            f"private_keys {list(private)} keep every parameter with its node: nothing would be shared",
            place="private_keys",
            allowed="patterns that leave a parameter to share",
        )


def _no_rule(name: str, dtype: str, wanted: str) -> WeightsError:
    return WeightsError(
        "W011",
        f"tensor {name!r} of type {dtype} has no aggregation rule yet",
        place=name,
        value=dtype,
        allowed=f"{wanted if wanted in _DTYPES else 'float32 or float64'} throughout the model",
    )
