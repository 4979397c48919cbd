"""What a convolution takes on a CPU beside its tensors: oneDNN's copies, torch's columns.

oneDNN convolves channels in blocks as wide as a vector register. Where channels are not innermost
its operands are copied to that layout, and its result back, in memory that no tensor owns
(`ONEDNN_VERBOSE=1` prints the kernels and the reorders). Where they are, it reads and writes in
place. torch's own kernel, for small single samples, lays out a column of each voxel's neighbourhood
(slow_conv3d in aten/src/ATen/native/ConvolutionMM3d.cpp).

Which kernel oneDNN takes of few channels, and what it holds beside them, is measured on AVX512
(`tests/test_host_convolution.py` does it again). Of other processors the general case is taken.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from effseg.memory.shapes import convolution_layout

VECTOR_BYTES = {"AVX512": 64, "AVX2": 32}
"""By `torch.backends.cpu.get_cpu_capability()`; channels fill such a vector of float32, and as many
of them those of shorter types."""
BLOCKED = {"Mkldnn", "MkldnnTranspose"}
COLUMNS = {"Slow2d", "Slow3d", "SlowTranspose2d", "SlowTranspose3d"}
UNNAMED = "???"
"""What torch's Python binding calls a kernel that it has no name for; of those for CPUs, oneDNN's
transposed convolution."""
FIRST_LAYER_CHANNELS = 3
"""As many channels of float32 oneDNN's kernels for a network's first layer read, in place."""


@dataclass(frozen=True)
class Convolution:
    """A convolution's tensors, of which only shapes, types and strides are looked at.

    Attributes:
        inputs: (N, C, *S).
        weight: of the convolution, (C', C, *K); transposed (C, C', *K).
        bias: (C') or none.
        outputs: (N, C', *S'), or its gradient.
        options: stride, padding, dilation, transposed, output_padding, groups.
    """

    inputs: Tensor
    weight: Tensor
    bias: Tensor | None
    outputs: Tensor
    options: Sequence[Any]

    @cached_property
    def kernel(self) -> str:
        """The name that torch has for what it computes with."""
        name: str = torch._C._select_conv_backend(
            self.inputs, self.weight, self.bias, *self.options, None
        ).name
        return "MkldnnTranspose" if name == UNNAMED and self.transposed else name

    @property
    def transposed(self) -> bool:
        """Whether it is the gradient of another convolution."""
        return bool(self.options[3])

    @property
    def strided(self) -> bool:
        """Whether it steps over voxels along some axis."""
        steps: Sequence[int] = self.options[0]
        return max(steps) > 1

    @property
    def pointwise(self) -> bool:
        """Whether a voxel sees but itself."""
        return math.prod(self.weight.shape[2:]) == 1

    @cached_property
    def copied(self) -> bool:
        """Whether tensors are copied to blocks of channels and back."""
        layout = convolution_layout(self.inputs, self.weight, self.bias, self.options, device="cpu")
        return self.kernel in BLOCKED and layout == torch.contiguous_format

    def forward_bytes(self) -> int:
        """Beside the operands and the result."""
        if self.kernel in COLUMNS:
            return 0 if self.pointwise else self._column_bytes()
        if not self.copied:
            return 0
        result, inputs = _bytes(self.outputs), _blocked_bytes(self.inputs)
        weight = _blocked_bytes(self.weight)
        if self.transposed:
            # it is written as wide as it is, then turned, then it is the result
            return result + max(result, inputs + weight)
        if _has_few(self.inputs) and not self._is_product:
            inputs = 0  # read in place
        outputs = _blocked_bytes(self.outputs)
        return max(outputs, inputs + outputs + weight - result)  # the result is made at the end

    def backward_bytes(self, *, to_inputs: bool) -> int:
        """Beside the operands and the gradients: the more of its two halves, one after the other.

        Args:
            to_inputs: whether the inputs have a gradient.
        """
        if self.kernel in COLUMNS:
            if self.pointwise and not to_inputs:
                return 0
            return self._column_bytes()
        if self.kernel not in BLOCKED:
            return 0
        return max(self._to_weight_bytes(), self._to_inputs_bytes() if to_inputs else 0)

    @property
    def _is_product(self) -> bool:
        """Whether it is but a product of matrices, channels by channels."""
        return self.pointwise and not self.strided

    def _column_bytes(self) -> int:
        source, target = self.inputs, self.outputs
        places = math.prod((source if self.transposed else target).shape[2:])
        if not self.transposed:
            places *= target.shape[0]  # the gradient of one sample after the other
        return self.weight[0].numel() * places * self.weight.element_size()

    def _to_inputs_bytes(self) -> int:
        if not self.copied or self.transposed:
            return 0  # of a transposed one it is a convolution forward, less than the other half
        gradient, outputs = _bytes(self.inputs), _blocked_bytes(self.outputs)
        weight = _blocked_bytes(self.weight)
        if self.strided:
            return gradient + max(gradient, outputs + weight)  # as a transposed one forward
        inputs = _blocked_bytes(self.inputs)
        return max(inputs, inputs + outputs + weight - gradient)

    def _to_weight_bytes(self) -> int:
        source, target = self.inputs, self.outputs
        if self.transposed:  # the gradient of its result is convolved, to that of its inputs
            source, target = target, source
        sources, targets = _blocked_bytes(source), _blocked_bytes(target)
        if _has_few(source) and not self._is_product:
            sources = _bytes(source)
            if self.copied:
                if self._sums_columns(source.shape[1], target.shape[1]):
                    # those of a plane at a time
                    n_values: int = math.prod((*target.shape[3:], *self.weight.shape[2:]))
                    n_values *= source.shape[1]
                    return n_values * self.weight.element_size()
                if self._short or source.shape[1] <= FIRST_LAYER_CHANNELS:
                    sources = 0  # read in place
        turned = 0
        if self._short and not self._is_product:
            # two voxels into one register, of as many samples as threads take at a time
            n_samples, n_threads = source.shape[0], torch.get_num_threads()
            if self.strided:
                n_threads = -(-n_threads // (_n_blocks(source) * _n_blocks(target)))
            turned = (sources + targets) * min(n_threads, n_samples) // n_samples
        if not self.copied:
            return turned
        weights = _blocked_bytes(self.weight)
        summed = 3 if self._short else 1  # of shorter types they are summed in float32
        return max(weights, sources + targets + turned + summed * weights - _bytes(self.weight))

    @property
    def _short(self) -> bool:
        return self.weight.element_size() < 4

    def _sums_columns(self, n_sources: int, n_targets: int) -> bool:
        """Whether the weights' gradient of few channels is a product with columns of voxels."""
        if self._short:
            return n_targets % _channels_of_a_vector() != 0
        return n_sources > FIRST_LAYER_CHANNELS and min(self.weight.shape[2:]) > 2


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _blocked_bytes(tensor: Tensor) -> int:
    """Of a copy whose channels fill whole vectors."""
    n_channels = tensor.shape[1]
    n_filled = _n_blocks(tensor) * _channels_of_a_vector()
    return tensor.numel() // n_channels * n_filled * tensor.element_size()


def _n_blocks(tensor: Tensor) -> int:
    return -(-tensor.shape[1] // _channels_of_a_vector())


def _has_few(tensor: Tensor) -> bool:
    """Whether channels fill no vector, where it is known what that means."""
    known = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return known and tensor.shape[1] < _channels_of_a_vector()


def _channels_of_a_vector() -> int:
    n_bytes = VECTOR_BYTES.get(torch.backends.cpu.get_cpu_capability(), 4)
    return n_bytes // 4
