"""What CUDA takes beside tensors: kernels' workspaces, and the context that no allocator sees.

Everything here that no source states is marked as an estimate, and `CudaCard` is the one place
where such figures are set: `benchmarks/cuda_trace.py` compares them with a real card.

- cuBLAS: 32 MiB on Hopper and Blackwell, 8.125 MiB before; once for the thread that runs forward,
  once for the one that runs backward (aten/src/ATen/cuda/CublasHandlePool.cpp).
- Convolution where cuDNN is passed over: the columns of one sample (`use_cudnn` in
  aten/src/ATen/native/Convolution.cpp, slow_conv_dilated3d in cuda/NaiveDilatedConvolution.cu).
- Convolution by cuDNN: copies of its operands with channels innermost, as its tensor-core kernels
  want them; nothing for 1x1, which is a matrix product. Estimate.
- Our own operators: partial sums of their Triton kernels (effseg/kernels/cuda/partials.py), or
  a few tiles where torch's operators run instead (effseg/kernels/tiles.py). Tests count both.
- Context: the driver's, with the kernels and handles loaded so far. Estimate, or measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from effseg.kernels.cuda.dispatch import HALF, LARGEST_INT, triton_is_installed
from effseg.kernels.cuda.partials import partial_bytes
from effseg.kernels.tiles import accumulator_dtype, tile_length
from effseg.memory.shapes import convolution_layout
from effseg.plans import Config

MIB = 2**20

CUBLAS_BYTES = {9: 32 * MIB, 10: 32 * MIB, 11: 32 * MIB, 12: 32 * MIB}
"""By the major number of the compute capability, CUBLAS_WORKSPACE_CONFIG unset ..."""

OLDER_CUBLAS_BYTES = 2 * 4 * MIB + 8 * 16 * 1024
"""... and for any other: its default there, `:4096:2:16:8` (KiB and how often)."""

CUBLAS_OPERATORS = {
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addbmm", "aten::mv"),
    *("aten::addmv", "aten::dot", "aten::vdot", "aten::_addmm_activation"),
    *("effseg::affine_act_linear", "effseg::affine_act_linear_backward"),
}

TILES: dict[str, tuple[float, float]] = {
    "effseg::moments": (2, 1),
    "effseg::affine_act_linear": (2, 1),
    "effseg::affine_act_linear_backward": (3.5, 2),
    "effseg::affine_act": (2, 1),
    "effseg::affine_act_": (2, 1),
    "effseg::activation_backward": (3, 1),
    "effseg::affine_combine": (2, 1),
}
"""Tiles in the accumulator's type that live at once: of half-precision features, of others."""


def installed_cudnn() -> int:
    """This torch's; of one without CUDA that which the same release brings where it has CUDA."""
    brought = 91002 if torch.__version__.startswith("2.10.") else 91900
    version: int | None = torch.backends.cudnn.version()
    return version or brought


class CudaCard(Config):
    """The card, driver and libraries that a trace is made for.

    The defaults are those of a Hopper card with the cuDNN of the installed torch; `of_this_machine`
    asks the card that is there.
    """

    cublas_bytes: int = Field(
        CUBLAS_BYTES[9], ge=0, description="one cuBLAS workspace; each of two threads takes one"
    )
    cudnn_version: int = Field(
        default_factory=installed_cudnn,
        ge=8000,
        description="as torch.backends.cudnn.version()",
    )
    operand_copies: float = Field(
        1.0,
        ge=0,
        description="cuDNN's workspace of a convolution whose channels are not innermost: how many "
        "copies of input, output and weight (estimate)",
    )
    context_bytes: int = Field(
        512 * MIB,
        ge=0,
        description="what nvidia-smi shows beyond the allocator's reserved bytes (estimate)",
    )
    triton: bool = Field(
        True,
        description="whether Triton is installed there, as CUDA builds of torch for Linux bring it",
    )
    expandable_segments: bool = Field(False, description="as in PYTORCH_ALLOC_CONF")

    @classmethod
    def of_this_machine(cls, *, expandable_segments: bool = False) -> "CudaCard":
        """The current CUDA device; its context is measured as it stands now.

        Args:
            expandable_segments: as the process was started with.
        """
        major, _ = torch.cuda.get_device_capability()
        return cls(
            cublas_bytes=CUBLAS_BYTES.get(major, OLDER_CUBLAS_BYTES),
            context_bytes=bytes_beyond_allocator(torch.cuda.current_device()),
            triton=triton_is_installed(),
            expandable_segments=expandable_segments,
        )


def bytes_beyond_allocator(device: int) -> int:
    """What a card holds beyond what torch's allocator reserved there: the context, above all.

    It grows as kernels are loaded, so ask after a first step. Whatever other processes hold on the
    card is in it.
    """
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


@dataclass(frozen=True, slots=True)
class Scratch:
    """What a kernel takes while it runs.

    Attributes:
        blocks: bytes of each request to the allocator; all are given back when the kernel is done.
        cublas: whether it multiplies by cuBLAS, whose workspace stays.
    """

    blocks: tuple[int, ...] = ()
    cublas: bool = False


def scratch_of(name: str, args: Sequence[Any], result: Any, card: CudaCard) -> Scratch | None:
    """The scratch of an operator on a card; None for one that needs none.

    Args:
        name: the schema's, `aten::mm`.
        args: of the call; of tensors, shapes and strides are looked at.
        result: of the call.
        card: where it runs.
    """
    if name == "aten::convolution":
        inputs, weight = args[:2]
        return _convolution(result, inputs, weight, args[3:9], (inputs, weight), card)
    if name == "aten::convolution_backward":
        gradient, inputs, weight = args[:3]
        return _convolution(gradient, inputs, weight, args[4:10], (gradient, inputs, weight), card)
    partials = partial_bytes(name, args) if card.triton else None
    if partials is not None:
        return Scratch(partials) if partials else None
    cublas = name in CUBLAS_OPERATORS
    if name in TILES:
        segments = [args[0]] if isinstance(args[0], Tensor) else args[0]
        rows, n_channels = segments[0], sum(segment.shape[2] for segment in segments)
        n_tiles = TILES[name][0 if rows.dtype in HALF else 1]
        values = min(rows.shape[1], tile_length(n_channels, "cuda")) * n_channels
        tile = values * accumulator_dtype(rows.dtype).itemsize
        half = (tile // 2,) if n_tiles % 1 else ()
        joined = (values * rows.element_size(),) if len(segments) > 1 else ()
        return Scratch((tile,) * int(n_tiles) + half + joined, cublas)
    return Scratch(cublas=True) if cublas else None


def _convolution(
    output: Tensor,
    inputs: Tensor,
    weight: Tensor,
    options: Sequence[Any],
    read: tuple[Tensor, ...],
    card: CudaCard,
) -> Scratch:
    """Of a convolution of any direction; `read` are the tensors that its kernels read.

    Tensors that do not lie as the kernels want them are copied by torch. cuDNN's own copies come
    on top where channels are not innermost, but for a 1x1 kernel, a matrix product as it is, for
    float64, which has no tensor cores here, and for depthwise kernels, which are torch's own.
    """
    stride, _, _, transposed, _, groups = options
    kernel = weight.shape[2:]
    layout = convolution_layout(inputs, weight, None, options, device="cuda")
    innermost = layout != torch.contiguous_format
    copies = [
        tensor.numel() * tensor.element_size()
        for tensor in read
        if not tensor.is_contiguous(memory_format=layout)
    ]
    depthwise = not transposed and groups == inputs.shape[1] > 1
    if not depthwise and _passes_over_cudnn(output, inputs, weight, card, innermost=innermost):
        places = (inputs if transposed else output).shape[2:]
        columns = weight[0].numel() * math.prod(places) * weight.element_size()
        return Scratch((*copies, columns), cublas=True)
    pointwise = math.prod(kernel) == 1 and math.prod(stride) == 1 and not transposed
    if not (depthwise or pointwise or innermost or weight.dtype == torch.float64):
        copied = sum(map(_bytes_channels_padded, (output, inputs, weight)))
        copies.append(round(card.operand_copies * copied))
    return Scratch(tuple(filter(None, copies)))


def _passes_over_cudnn(
    output: Tensor, inputs: Tensor, weight: Tensor, card: CudaCard, *, innermost: bool
) -> bool:
    """Whether torch falls back to columns, a matrix of each voxel's whole neighbourhood.

    cuDNN before 9.3 cannot index a sample of more than 2^31 - 1 values; for cuDNN 9.8 to 9.14 torch
    does not trust its three-dimensional kernels in half precision, unless channels are innermost.
    The wheels of torch 2.10 bring cuDNN 9.10, those of 2.11 bring 9.19.
    """
    if 90800 <= card.cudnn_version < 91500 and weight.dtype in HALF and weight.ndim == 5:
        return not innermost and math.prod(weight.shape[2:]) > 1
    samples = (tensor.shape[1:].numel() for tensor in (output, inputs))
    return card.cudnn_version < 90300 and max(samples) > LARGEST_INT


def _bytes_channels_padded(tensor: Tensor) -> int:
    """With channels filled up to 16 bytes, as tensor-core kernels ask (cuDNN developer guide)."""
    n_channels = tensor.shape[1]
    return tensor.numel() // n_channels * (-(-n_channels * tensor.element_size() // 16) * 16)
