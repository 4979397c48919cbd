"""Compile every kernel for a card that need not be here: `compiled_kernels.py 90`.

Prints each kernel's name, its shared memory in bytes, and for how many sets of arguments it was
compiled. `test_cuda_kernels.py` runs this file in a process of its own, for Triton is
made to believe in the card.
"""

import sys
from importlib import import_module

import torch
import triton
from kernel_cases import OPERATORS, SIZES, arguments
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

SIZES["largest blocks"] = (1, 4096, (64,), 128, 1)
SIZES["of another layer"] = (1, 77, (56,), 126, 1)


class Card:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only() -> dict[str, dict[str, int]]:
    """Let kernels be compiled where they would be launched; the shared memory of each way."""
    shared: dict[str, dict[str, int]] = {}
    run = triton.JITFunction.run

    def compiled(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"]
        shared.setdefault(self.fn.__name__, {})[kernel.hash] = kernel.metadata.shared

    triton.JITFunction.run = compiled
    driver.set_active(Card())
    return shared


if __name__ == "__main__":
    found = compile_only()
    for name, operator in OPERATORS.items():
        module = operator._init_fn.__module__.rpartition(".")[2]
        kernel = getattr(import_module(f"effseg.kernels.cuda.{module}"), name)
        for size in ("largest blocks", "of another layer"):
            kernel(*arguments(name, size, torch.bfloat16))
    for name, ways in found.items():
        print(name, max(ways.values()), len(ways))
