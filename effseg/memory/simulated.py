"""A CUDA card that is not there: its allocator, and what kernels ask of it beside tensors."""

from typing import Any

from effseg.memory.allocator import Block, CachingAllocator, Request
from effseg.memory.cuda_workspace import CudaCard, scratch_of


class SimulatedCard:
    """Follows storages and operators, and says what `torch.cuda` and nvidia-smi would say.

    Args:
        card: its figures.
    """

    def __init__(self, card: CudaCard) -> None:
        self._card = card
        self._allocator = CachingAllocator(expandable_segments=card.expandable_segments)
        self._cublas_threads: set[bool] = set()

    def allocate(self, length: int) -> Block | None:
        """The block for a storage of so many bytes; None for an empty one."""
        return self._allocator.allocate(length) if length else None

    def free(self, block: Block | None) -> None:
        """Take the block of a storage that has died."""
        if block is not None:
            self._allocator.free(block)

    def work(self, name: str, args: Any, result: Any, *, backward: bool) -> tuple[int, int]:
        """Run an operator whose results exist already.

        Args:
            name: its schema's, `aten::mm`.
            args: of the call.
            result: of the call.
            backward: in the thread that runs backward.

        Returns:
            Bytes that it takes for good, and those that it gives back when it is done.
        """
        scratch = scratch_of(name, args, result, self._card)
        if scratch is None:
            return 0, 0
        kept = 0
        if scratch.cublas and self._card.cublas_bytes and backward not in self._cublas_threads:
            self._cublas_threads.add(backward)
            kept = self._allocator.allocate(self._card.cublas_bytes).n_bytes
        blocks = [self._allocator.allocate(n_bytes) for n_bytes in scratch.blocks]
        passing = sum(block.n_bytes for block in blocks)  # before they become one with neighbours
        for block in blocks:
            self._allocator.free(block)
        return kept, passing

    @property
    def n_requests(self) -> int:
        """How often memory was asked for or given back: a place to `repeat` from or up to."""
        return len(self._allocator.requests)

    def repeat(self, *stretches: slice) -> None:
        """Do once more what was asked within these stretches of requests, as one."""
        requests: list[Request] = []
        for stretch in stretches:
            requests.extend(self._allocator.requests[stretch])
        self._allocator.repeat(requests)

    @property
    def reserved_bytes(self) -> int:
        """What `torch.cuda.max_memory_reserved` would say."""
        return self._allocator.reserved_bytes

    @property
    def device_bytes(self) -> int:
        """What nvidia-smi would show for the process."""
        return self.reserved_bytes + self._card.context_bytes
