"""Runs a part of a network and keeps on the host what it saves for backward.

Autograd hands each tensor that an operator saves to `_Ferry.pack` and keeps what that returns. A
tensor that lives anyway stays: a parameter, a buffer, an input or an output of the part. So does a
small one, and one that lies on the host already. Everything else goes to the host a storage at a
time, so that views and tensors saved twice are copied once.

On CUDA the copy runs beside the computation, on a stream of its own into pinned memory. One storage
at a time is under way: the computation waits for it before the next one leaves, which bounds what
lives on the device without a word from the allocator.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._pytree import tree_leaves

from effseg.memory.cuda_rules import CudaRules

LEAST_BYTES = 64 * 1024
"""Smaller storages, a norm's means for one, stay: each copy costs its latency."""

Hooks: TypeAlias = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


def offload(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `forward`; what it saves for backward is kept on the host until backward asks for it.

    What stays on the device is handed to the hooks around this call, if there are any: the parts
    of a part have borders of their own, and the outer one may well send those to the host.

    Args:
        module: whose parameters and buffers stay where they are.
        forward: a function of tensors.
        args: of `forward`.
        kwargs: of `forward`.
    """
    inputs = tensors_of((args, kwargs))
    ferry = _Ferry((*inputs, *module.parameters(), *module.buffers()))
    with saved_tensors_hooks(ferry.pack, _unpack):
        output = forward(*args, **kwargs)
    ferry.land(tensors_of(output))
    return output


def tensors_of(nest: Any) -> list[Tensor]:
    """The tensors in a nest of lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(nest) if isinstance(leaf, Tensor)]


def stands_for_cuda() -> bool:
    """Whether CPU tensors are those of a CUDA device, in a trace."""
    return any(isinstance(mode, CudaRules) for mode in _get_current_function_mode_stack())


class _Kept:
    """A saved tensor that stays where it is."""

    def __init__(self, tensor: Tensor, outer: Hooks | None) -> None:
        # Kept as it is, an output would hold its own node: a cycle that outlives backward.
        self._kept: Any = tensor.detach() if outer is None else outer[0](tensor)
        self._version = tensor._version
        self._outer = outer

    def read(self) -> Tensor:
        if self._outer is not None:
            return self._outer[1](self._kept)
        tensor: Tensor = self._kept
        if tensor._version != self._version:
            raise _changed(tensor.shape)
        return tensor


class _Parked:
    """A storage whose bytes lie on the host.

    Args:
        flat: the whole storage on the device, in one dimension.
        traced: it is hollow and stands for one of a device: its copy is not made, since the bytes
            would be counted as the device's.
    """

    def __init__(self, flat: Tensor, *, traced: bool) -> None:
        self.storage = weakref.ref(flat.untyped_storage())
        self.version = flat._version
        self.n_readers = 0
        self.kept: _Kept | None = None
        self._like = (flat.shape, flat.dtype, flat.device)
        self._leaving: Tensor | None = flat
        self._event: torch.cuda.Event | None = None
        self._changed = False
        self._host: Tensor | None = None
        self._back: Tensor | None = None
        if not traced:
            self._depart(flat)

    def _depart(self, flat: Tensor) -> None:
        if not flat.is_cuda:
            self._host = flat.to("cpu", copy=True)
            return
        stream = torch.cuda.Stream(flat.device)
        stream.wait_stream(torch.cuda.current_stream(flat.device))
        with torch.cuda.stream(stream):
            self._host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            self._host.copy_(flat, non_blocking=True)
            self._event = stream.record_event()

    def land(self) -> None:
        """Let the device's bytes go: what is computed from here on waits for the copy."""
        if self._leaving is None:
            return
        if self._event is not None:
            torch.cuda.current_stream(self._leaving.device).wait_event(self._event)
        self._changed = self._leaving._version != self.version
        self._leaving = self._event = None

    def keep(self, tensor: Tensor, outer: Hooks | None) -> None:
        """It lives anyway: forget the copy."""
        self.kept = _Kept(_flat(tensor), outer)
        self._host = None

    def read(self) -> Tensor:
        """The storage on the device; it is let go when all who saved it have read it."""
        if self.kept is not None:
            return self.kept.read()
        shape, dtype, device = self._like
        if self._changed:
            raise _changed(shape)
        if self._back is None:
            self._back = torch.empty(shape, dtype=dtype, device=device)
            if self._host is not None:
                self._back.copy_(self._host, non_blocking=True)
        back = self._back
        self.n_readers -= 1
        if self.n_readers <= 0:
            self._back = None
        return back


class _View:
    """A saved tensor whose storage is parked."""

    def __init__(self, tensor: Tensor, parked: _Parked) -> None:
        parked.n_readers += 1
        self._parked = parked
        self._dtype = tensor.dtype
        self._like = (tensor.size(), tensor.stride(), tensor.storage_offset())

    def read(self) -> Tensor:
        return self._parked.read().view(self._dtype).as_strided(*self._like)


class _Ferry:
    """Decides, for one pass of a part, what stays and what goes, and takes it there."""

    def __init__(self, stays: Iterable[Tensor]) -> None:
        self._stays = {id(tensor.untyped_storage()) for tensor in stays if _is_plain(tensor)}
        self._outer: Hooks | None = torch._C._autograd._top_saved_tensors_default_hooks(False)
        self._traced = stands_for_cuda()
        self._parked: dict[int, _Parked] = {}
        self._last: _Parked | None = None

    def pack(self, tensor: Tensor) -> _Kept | _View:
        if not self._goes(tensor):
            return _Kept(tensor, self._outer)
        with torch.no_grad():
            return _View(tensor, self._park(tensor))

    def _goes(self, tensor: Tensor) -> bool:
        if not _is_plain(tensor) or not _is_away(tensor, traced=self._traced):
            return False
        storage = tensor.untyped_storage()
        leaf = tensor.is_leaf and tensor.requires_grad
        return not leaf and id(storage) not in self._stays and storage.nbytes() >= LEAST_BYTES

    def _known(self, tensor: Tensor) -> _Parked | None:
        """What was parked of a tensor's storage, unless it has been written since."""
        storage = tensor.untyped_storage()
        known = self._parked.get(id(storage))
        if known is None or known.storage() is not storage:  # the address was another's
            return None
        return known if known.version == tensor._version else None

    def _park(self, tensor: Tensor) -> _Parked:
        known = self._known(tensor)
        if known is None:
            if self._last is not None:
                self._last.land()
            known = self._last = _Parked(_flat(tensor), traced=self._traced)
            self._parked[id(tensor.untyped_storage())] = known
        return known

    def land(self, outputs: list[Tensor]) -> None:
        """End the pass: what is an output stays after all, and nothing is left under way."""
        for output in outputs:
            known = self._known(output) if _is_plain(output) else None
            if known is not None and known.kept is None:
                known.keep(output, self._outer)
        if self._last is not None:
            self._last.land()
        self._parked.clear()
        self._last = None


def _unpack(saved: _Kept | _View) -> Tensor:
    return saved.read()


def _flat(tensor: Tensor) -> Tensor:
    n_values = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((n_values,), (1,), 0)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is its storage, read by strides, and nothing more."""
    ordinary = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return ordinary and not tensor.is_conj() and not tensor.is_neg()


def _is_away(tensor: Tensor, *, traced: bool) -> bool:
    return traced or tensor.device.type != "cpu"


def _changed(shape: torch.Size) -> RuntimeError:
    return RuntimeError(
        f"a tensor of {shape.numel()} values that backward needs was changed in place after an "
        "offloaded stage had saved it; change a copy of it instead"
    )
