"""CUDA's rules for tensors that say they are on the CPU.

Autocast picks its rules by the device of the tensors, and tensors of a device that is not there
cannot run backward. So a trace for CUDA runs on CPU tensors under the CPU's own autocast, which
agrees with CUDA's on convolutions and matrix products, and the function mode below sets right where
the two differ. Code that asks `torch.is_autocast_enabled(x.device.type)` or switches autocast off
for `x.device.type` is answered and obeyed as on the real device. What functions written in Python
call inside (attention weights, say) keeps the CPU's rules.

The rules of autocast: torch/include/ATen/autocast_mode.h, the lists named AT_FORALL_*.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Rule: TypeAlias = Literal["float32", "dtype", "widest", "lower", "as is"]
"""
float32: floating inputs are cast to float32. dtype: computed in float32 by the operator's own
argument. widest: inputs are cast to the widest of their types. lower: inputs are cast to the
autocast type. as is: CUDA leaves the operator alone and the CPU does not.
"""

ATEN: dict[Rule, tuple[str, ...]] = {
    "float32": (
        *("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p"),
        *("reciprocal", "rsqrt", "sinh", "tan", "pow", "softplus", "layer_norm"),
        *("native_layer_norm", "rms_norm", "group_norm", "frobenius_norm", "nuclear_norm"),
        *("cosine_similarity", "dist", "pdist", "renorm", "logsumexp", "norm"),
        *("upsample_nearest1d", "_upsample_nearest_exact1d", "upsample_nearest2d"),
        *("_upsample_nearest_exact2d", "upsample_nearest3d", "_upsample_nearest_exact3d"),
        *("upsample_linear1d", "upsample_bilinear2d", "_upsample_bilinear2d_aa"),
        *("upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bicubic2d_aa"),
    ),
    "dtype": (
        *("prod", "softmax", "log_softmax", "cumprod", "cumsum", "linalg_vector_norm"),
        *("linalg_matrix_norm", "sum"),
    ),
    "widest": (
        *("addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler"),
        *("index_put", "tensordot", "scatter_add"),
    ),
    "lower": (
        *("addmv", "addr", "mv", "einsum", "chain_matmul", "linalg_multi_dot", "lstm_cell"),
        *("gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
    ),
    "as is": (
        *("adaptive_avg_pool3d", "adaptive_max_pool3d", "avg_pool3d", "max_pool3d", "cat", "stack"),
        *("fractional_max_pool2d", "fractional_max_pool3d", "index_copy", "max_unpool2d"),
        *("max_unpool3d", "nanquantile", "quantile", "trace", "reflection_pad1d"),
        *("reflection_pad2d", "replication_pad1d", "replication_pad2d", "replication_pad3d"),
    ),
}
"""Operators that autocast treats differently on the CPU and on CUDA, by CUDA's rule."""

PYTHON: dict[str, str] = {
    "__pow__": "pow",
    "__rpow__": "pow",
    "__rdiv__": "reciprocal",
    "__rtruediv__": "reciprocal",
    "vector_norm": "linalg_vector_norm",
    "matrix_norm": "linalg_matrix_norm",
    "grid_sample": "grid_sampler",
    "concat": "cat",
    "concatenate": "cat",
    "interpolate": "upsample_trilinear3d",
    "upsample": "upsample_trilinear3d",
    "pad": "replication_pad3d",
    "adaptive_max_pool3d_with_indices": "adaptive_max_pool3d",
    "max_pool3d_with_indices": "max_pool3d",
}
"""Names under which Python calls some of them."""


def build_rules() -> dict[str, Rule]:
    """The rule of each Python function; an operator that this torch does not cast is left out."""
    casts = torch._C._dispatch_has_kernel_for_dispatch_key
    overloads: dict[str, list[str]] = {}
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::"):
            overloads.setdefault(name[6:].split(".")[0], []).append(name)
    rules: dict[str, Rule] = {}
    for rule, names in ATEN.items():
        key = "AutocastCPU" if rule == "as is" else "AutocastCUDA"
        for name in names:
            if any(casts(overload, key) for overload in overloads.get(name, ())):
                rules[name] = rule
    rules |= {alias: rules[name] for alias, name in PYTHON.items() if name in rules}
    return rules


class CudaRules(TorchFunctionMode):
    """Where autocast is on for the CPU, cast as CUDA would; keep a dropout's mask as CUDA does."""

    def __init__(self) -> None:
        super().__init__()
        self._rules = build_rules()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a function of torch by CUDA's rule."""
        del types
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "dropout":
            return _dropout(func, args, kwargs)
        rule = self._rules.get(name)
        if rule is None or "out" in kwargs or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        if rule == "dtype":
            if kwargs.get("dtype") is None and _is_low(args[0] if args else kwargs.get("input")):
                kwargs = {**kwargs, "dtype": torch.float32}
            return func(*args, **kwargs)
        if rule == "lower":
            args, kwargs = _cast((args, kwargs), torch.get_autocast_dtype("cpu"))
        elif rule == "widest":
            wide = any(tensor.dtype == torch.float32 for tensor in _tensors((args, kwargs)))
            if wide:
                args, kwargs = _cast((args, kwargs), torch.float32)
        elif rule == "float32" and not (name == "interpolate" and kwargs.get("mode") == "area"):
            args, kwargs = _cast((args, kwargs), torch.float32)
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*args, **kwargs)


def _dropout(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """On CUDA a fused kernel keeps a mask of one byte a value (`_dropout` in Dropout.cpp)."""
    given = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
    p = given.get("p", 0.5)
    training = given.get("training", given.get("train", True))
    if training and 0 < p < 1 and not given.get("inplace", False):
        return torch.native_dropout(given["input"], p, True)[0]
    return func(*args, **kwargs)


def _is_low(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        return _tensors(tuple(value.values()))
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return []


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast the floating tensors in a nest of lists, tuples and dicts; float64 stays."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.dtype not in (dtype, torch.float64):
            return value.to(dtype)
        return value
    if isinstance(value, dict):
        return {key: _cast(part, dtype) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [_cast(part, dtype) for part in value]
        return type(value)(parts) if type(value) in (list, tuple) else value
    return value
