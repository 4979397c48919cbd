"""The operators on wide features, as CUDA devices run them: one or two Triton kernels each.

The same operators, to `torch.compile`, to autocast and to whoever counts memory, and the same
numbers: what is allocated inside is a few MiB of partial sums, added in a fixed order. `dispatch`
says where torch's own operators run instead. Importing this package gives the operators their
kernels; Triton itself is imported when the first of them runs.
"""

from collections.abc import Callable

from torch._library.custom_ops import CustomOpDef

from effseg.kernels.class_sums import head_sums, head_sums_backward
from effseg.kernels.cuda.dispatch import (
    fits_head,
    fits_head_backward,
    fits_matrices,
    fits_rows,
    with_kernel,
)
from effseg.kernels.norm import affine_combine, moments
from effseg.kernels.pointwise import (
    activation_backward,
    affine_act,
    affine_act_,
    affine_act_linear,
    affine_act_linear_backward,
)

KERNELS: dict[CustomOpDef, Callable[..., bool]] = {
    moments: fits_rows,
    affine_combine: fits_rows,
    affine_act: fits_rows,
    affine_act_: fits_rows,
    activation_backward: fits_rows,
    affine_act_linear: fits_matrices,
    affine_act_linear_backward: fits_matrices,
    head_sums: fits_head,
    head_sums_backward: fits_head_backward,
}
"""Operators that have one, and for which arguments."""

for operator, fits in KERNELS.items():
    operator.register_kernel("cuda", with_kernel(operator._init_fn, fits))
