"""CPU tensors that own no memory, and modes in which operators on them cost nothing.

A hollow tensor is an ordinary CPU tensor whose storage has a length and nothing in it. To autograd,
autocast and Python it is like any other; torch's own fake tensors are not: they replay views where
real tensors take strides, so an in-place activation behind a view costs less in their backward
than in truth. Below autograd the mode answers each operator by shape alone: views run as they are,
in-place operators hand their argument back, and all else is asked of torch's shape rules (once for
each combination of operator and shapes).

Small tensors of known values, an optimizer's step count for one, stay real and are computed.
"""

import mmap
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from effseg.devices import DeviceKind
from effseg.memory.shapes import Outcome, Result, UnknownValueError, infer_outcome

LARGEST_REAL_BYTES = 64 * 1024
"""What is made from known values alone is computed up to this size."""

ADDRESS_SPACE_BYTES = 2**40
READERS = {"numpy", "tolist", "__array__", "__dlpack__"}


def hollow(tensor: Tensor) -> Tensor:
    """A hollow tensor of the same type, shape and strides."""
    strides = zip(tensor.size(), tensor.stride(), strict=True)
    length = 1 + sum((n - 1) * stride for n, stride in strides) if tensor.numel() else 0
    storage = _storage(length * tensor.element_size())
    return _tensor(storage, 0, tensor.size(), tensor.stride(), tensor.dtype)


def hollow_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A hollow, contiguous tensor."""
    return hollow(torch.empty(shape, dtype=dtype, device="meta"))


@cache
def _nowhere() -> tuple[int, object]:
    """The address of a terabyte of read-only zeros without a page behind it, and its owner.

    No operator reads there; a debugger that prints a hollow tensor may. Null where so much address
    space is not to be had.
    """
    try:
        zeros = mmap.mmap(-1, ADDRESS_SPACE_BYTES, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    except OSError:
        return 0, None
    array = np.frombuffer(zeros, dtype=np.uint8)
    return array.ctypes.data, array


def _storage(n_bytes: int) -> Any:
    address, _ = _nowhere()
    storage = torch._C._construct_storage_from_data_pointer(address, torch.device("cpu"), n_bytes)
    _empty_out(storage)
    return storage


def _empty_out(storage: Any) -> None:
    storage.hollow = True  # the attribute lives as long as the storage itself


def _is_hollow(tensor: Tensor) -> bool:
    return hasattr(tensor.untyped_storage(), "hollow")


def _tensor(storage: Any, offset: int, size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)


class HollowFunctions(TorchFunctionMode):
    """Copies tensors hollow (`copy.deepcopy`), and refuses to show the values of hollow ones."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Answer what goes past operators, let all else pass."""
        del types
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = hollow(tensor)
            return memo[id(tensor)]
        name = getattr(func, "__name__", "")
        if name in READERS and isinstance(args[0], Tensor) and _is_hollow(args[0]):
            raise UnknownValueError(f"Tensor.{name}")
        return func(*args, **(kwargs or {}))


class HollowMode(TorchDispatchMode):
    """Answers operators on hollow tensors; makes tensors hollow where they would be large.

    Args:
        device: whose kernels to stand for, where they differ in what they return.
    """

    def __init__(self, *, device: DeviceKind) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._outcomes: dict[Any, Outcome] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Answer an operator.

        Raises:
            UnknownValueError: if it needs the values of a hollow tensor.
        """
        del types
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):
            raise UnknownValueError(f"operator {func}")
        if func.namespace == "profiler" or func.is_view or torch.Tag.inplace_view in func.tags:
            return func(*args, **kwargs)
        tensors: list[Tensor] = []
        _collect(args, tensors)
        _collect(tuple(kwargs.values()), tensors)
        unknown = any(_is_hollow(tensor) for tensor in tensors)
        schema = func._schema
        if schema.is_mutable:
            if not unknown:
                return func(*args, **kwargs)
            _empty_out_written(func, args, kwargs)
            if not schema.returns:
                return None
            if schema.name.endswith("_") and len(schema.returns) == 1:
                return args[0]
        try:
            outcome = self._outcome(func, args, kwargs)
        except UnknownValueError:
            if unknown:
                raise
            return func(*args, **kwargs)
        if not unknown and sum(outcome.storage_bytes) <= LARGEST_REAL_BYTES:
            return func(*args, **kwargs)
        storages = [_storage(n_bytes) for n_bytes in outcome.storage_bytes]
        return _build(outcome.result, storages, tensors)

    def _outcome(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome:
        key = (func, _key(args), _key(tuple(kwargs.items())))
        try:
            known = self._outcomes.get(key)
        except TypeError:  # an argument that cannot be hashed
            return infer_outcome(func, args, kwargs, device=self._device)
        if known is None:
            known = infer_outcome(func, args, kwargs, device=self._device)
            self._outcomes[key] = known
        return known


def _empty_out_written(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What an operator writes from unknown values is unknown."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            named = kwargs.get(argument.name)
            written: list[Tensor] = []
            _collect((args[position] if position < len(args) else named,), written)
            for tensor in written:
                _empty_out(tensor.untyped_storage())


def _collect(values: tuple[Any, ...] | list[Any], into: list[Tensor]) -> None:
    for value in values:
        if isinstance(value, Tensor):
            into.append(value)
        elif isinstance(value, list | tuple):
            _collect(value, into)


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (Tensor, value.size(), value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        return (tuple, *(_key(part) for part in value))
    return (type(value), value)  # 1, 1.0 and True are equal to a dict, not to an operator


def _build(result: Any, storages: list[Any], arguments: list[Tensor]) -> Any:
    if isinstance(result, Result):
        if result.of == "argument":
            return arguments[result.index]
        if result.of == "new":
            storage, offset = storages[result.index], result.offset
        else:
            argument = arguments[result.index]
            storage = argument.untyped_storage()
            offset = int(argument.storage_offset()) + result.offset
        return _tensor(storage, offset, result.size, result.stride, result.dtype)
    if isinstance(result, list):
        return [_build(part, storages, arguments) for part in result]
    if isinstance(result, tuple):
        return tuple(_build(part, storages, arguments) for part in result)
    return result
