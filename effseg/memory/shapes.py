"""What an operator returns, told from the shapes of its arguments alone.

torch's own shape rules ("meta" tensors) are asked, and set right where they are wrong about a real
device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._prims_common import suggest_memory_format

from effseg.devices import DeviceKind

VALUE_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
NORMS = {"native_batch_norm", "_native_batch_norm_legit", "native_group_norm", "native_layer_norm"}


class UnknownValueError(Exception):
    """An operator needs the values of a tensor that has none, or has no shape rule."""


@dataclass(frozen=True, slots=True)
class Result:
    """A tensor that an operator returns: an argument, one that shares its storage, or a new one."""

    of: Literal["argument", "shared", "new"]
    index: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an operator returns for arguments of certain shapes.

    Attributes:
        result: a nest of tuples and lists as the operator's own, a `Result` for each tensor.
        storage_bytes: the length of each new storage.
    """

    result: Any
    storage_bytes: tuple[int, ...]


def infer_outcome(
    func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], *, device: DeviceKind
) -> Outcome:
    """Ask for the outcome of an operator.

    Args:
        func: the operator.
        args: its arguments; only the shapes of tensors are looked at.
        kwargs: its named arguments.
        device: whose kernel is meant.

    Raises:
        UnknownValueError: if the outcome hangs on values, or the operator has no shape rule.
    """
    shapes: list[Tensor] = []

    def shape_of(tensor: Tensor) -> Tensor:
        size, stride, dtype = tensor.size(), tensor.stride(), tensor.dtype
        shapes.append(torch.empty_strided(size, stride, dtype=dtype, device="meta"))
        return shapes[-1]

    shape_args = map_tensors(shape_of, args)
    shape_kwargs = {name: map_tensors(shape_of, value) for name, value in kwargs.items()}
    if any(argument.name == "device" for argument in func._schema.arguments):
        shape_kwargs |= {"device": torch.device("meta"), "pin_memory": False}
    try:
        result = func(*shape_args, **shape_kwargs)
    except Exception as error:
        if isinstance(error, NotImplementedError) or VALUE_TAGS.intersection(func.tags):
            raise UnknownValueError(f"operator {func}") from error
        raise
    result = _correct_norm(func, args, result, device=device)
    result = _correct_convolution(func, args, result, device=device)

    arguments = {id(part.untyped_storage()): at for at, part in reversed([*enumerate(shapes)])}
    new: dict[int, int] = {}
    storage_bytes: list[int] = []

    def describe(tensor: Tensor) -> Result:
        of: Literal["argument", "shared", "new"]
        storage = tensor.untyped_storage()
        if id(storage) in arguments:
            index = arguments[id(storage)]
            of = "argument" if tensor is shapes[index] else "shared"
        else:
            if id(storage) not in new:
                new[id(storage)] = len(storage_bytes)
                storage_bytes.append(storage.nbytes())
            of, index = "new", new[id(storage)]
        return Result(
            of=of,
            index=index,
            offset=int(tensor.storage_offset()),
            size=tuple(tensor.size()),
            stride=tensor.stride(),
            dtype=tensor.dtype,
        )

    described = map_tensors(describe, result)
    return Outcome(result=described, storage_bytes=tuple(storage_bytes))


def map_tensors(change: Callable[[Tensor], Any], value: Any) -> Any:
    """Change the tensors in a nest of lists and tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list):
        return [map_tensors(change, part) for part in value]
    if isinstance(value, tuple):
        return tuple(map_tensors(change, part) for part in value)
    return value


def _correct_norm(
    func: OpOverload, args: tuple[Any, ...], result: Any, *, device: DeviceKind
) -> Any:
    """Set right what the shape rules say of norms in mixed precision.

    The mean and the deviation that a norm saves are float32 on CUDA, and on the CPU as soon as a
    parameter is; gradients have the types of what they are gradients of.
    """
    name = func._schema.name.removeprefix("aten::")
    if name.removesuffix("_backward") not in NORMS:
        return result
    given = {
        argument.name: value
        for argument, value in zip(func._schema.arguments, args, strict=False)
        if isinstance(value, Tensor)
    }
    first, *rest = result
    if name.endswith("_backward"):
        source = given["grad_out"]
        dtype = given["weight"].dtype if "weight" in given else source.dtype
    else:
        source = given["input"]
        parameters = (given.get(part) for part in ("weight", "bias", "running_mean"))
        wide = any(part is not None and part.dtype == torch.float32 for part in parameters)
        low = source.dtype in (torch.bfloat16, torch.float16)
        dtype = torch.float32 if low and (wide or device == "cuda") else source.dtype
    return (_typed(first, source.dtype), *(_typed(part, dtype) for part in rest))


def _correct_convolution(
    func: OpOverload, args: tuple[Any, ...], result: Any, *, device: DeviceKind
) -> Any:
    """Lay out what a convolution returns as the kernel does that would be chosen."""
    name = func._schema.name.removeprefix("aten::")
    if name == "convolution":
        inputs, weight, bias, *options = args
        return _laid_out(result, convolution_layout(inputs, weight, bias, options, device=device))
    if name == "convolution_backward":
        _, inputs, weight, _, *options, _ = args
        layout = convolution_layout(inputs, weight, None, options, device=device)
        of_inputs, of_weight, of_bias = result
        return _laid_out(of_inputs, layout), _laid_out(of_weight, layout), of_bias
    return result


def convolution_layout(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: Sequence[Any],
    *,
    device: DeviceKind,
) -> torch.memory_format:
    """How the tensors lie that a convolution reads and returns.

    On CUDA as cuDNN wants them: channels innermost as soon as those of the input or of the weight
    are (`cudnn_conv_suggest_memory_format` in ATen/native/ConvUtils.h). On the CPU as torch says of
    the kernel that it would choose.

    Args:
        inputs: (N, C, *S).
        weight: of the convolution.
        bias: of the convolution.
        options: stride, padding, dilation, transposed, output_padding, groups.
        device: whose kernels.
    """
    if device == "cuda":
        if weight.dtype == torch.float64:
            return torch.contiguous_format
        for tensor in (inputs, weight):
            layout: torch.memory_format = suggest_memory_format(tensor)
            if layout != torch.contiguous_format:
                return layout
        return torch.contiguous_format
    stride, padding, dilation, transposed, output_padding, groups = options
    kernel = torch._C._select_conv_backend(
        inputs, weight, bias, stride, padding, dilation, transposed, output_padding, groups, None
    )
    chosen: torch.memory_format = torch._C._conv_determine_backend_memory_format(
        inputs, weight, kernel
    )
    return chosen


def _laid_out(tensor: Tensor | None, layout: torch.memory_format) -> Tensor | None:
    if tensor is None:
        return None
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta", memory_format=layout)


def _typed(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
