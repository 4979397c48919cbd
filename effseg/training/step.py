"""How a batch becomes a loss and gradients: all samples at once, or one after the other."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from effseg.losses import SoftLabels
from effseg.networks import for_loss, one_of_batch
from effseg.types import Features


class BatchLoss(Protocol):
    """A loss that reads each sample by itself first, as `effseg.losses` do."""

    def __call__(self, outputs: Any, labels: Any, /) -> Tensor:
        """The loss of a batch, a scalar."""
        ...

    def terms(self, outputs: Any, labels: Any, /) -> Tensor:
        """All that the loss reads of each sample, one row a sample."""
        ...

    def of_terms(self, terms: Tensor, /) -> Tensor:
        """The loss of a batch from the `terms` of all its samples."""
        ...


class Step(Protocol):
    """Forward and backward of a batch; gradients come to lie on the network's parameters."""

    def loss(self, image: Features, label: Tensor | SoftLabels) -> Tensor:
        """The loss of a batch, a scalar."""
        ...

    def backward(self, loss: Tensor) -> None:
        """The gradients of what `loss` returned, or of a multiple of it."""
        ...


class WholeBatch:
    """All samples of a batch at once, as torch does it."""

    def __init__(self, network: nn.Module, batch_loss: BatchLoss) -> None:
        self.network = network
        self.batch_loss = batch_loss

    def loss(self, image: Features, label: Tensor | SoftLabels) -> Tensor:
        """Forward and loss."""
        return self.batch_loss(for_loss(self.network, image), label)

    def backward(self, loss: Tensor) -> None:
        """As autograd does it."""
        loss.backward()


class SampleBySample:
    """One sample of a batch at a time: the memory of a batch of one, the numbers of the whole.

    The loss reads a few sums of each sample (`CompoundLoss.terms`). Forward takes these without
    gradients and makes the loss of the whole batch of them, Dice over the batch included. Backward
    runs each sample once more, with the slope of that loss on its sums. So a step takes two
    forwards. Dropout drops what it would drop of the whole batch. Only a network whose samples do
    not see each other gives the same numbers so: instance norm, not batch norm.
    """

    def __init__(self, network: nn.Module, batch_loss: BatchLoss) -> None:
        self.network = network
        self.batch_loss = batch_loss
        self._pending: _Pending | None = None

    def loss(self, image: Features, label: Tensor | SoftLabels) -> Tensor:
        """Each sample's forward, nothing of which is kept, and the loss of all."""
        pending = self._pending = _Pending(image, label)
        with torch.no_grad():
            rows = []
            for index in range(len(image)):
                with one_of_batch(self.network, index, len(image)):
                    rows.append(self._terms(pending, index))
        pending.terms = torch.cat(rows).requires_grad_()
        loss = self.batch_loss.of_terms(pending.terms)
        return loss if image.dtype == torch.float64 else loss.float()

    def backward(self, loss: Tensor) -> None:
        """Each sample's forward and backward; random numbers go on as if after one forward."""
        pending, self._pending = self._pending, None
        assert pending is not None, "backward of a loss that was not taken"
        assert pending.terms is not None
        loss.backward()
        slope = pending.terms.grad
        assert slope is not None
        after = RandomState.of(pending.image.device)
        for index in range(len(pending.image)):
            # around backward too: stages that are recomputed draw once more
            with one_of_batch(self.network, index, len(pending.image)):
                with pending.autocast():
                    terms = self._terms(pending, index)
                torch.autograd.backward(terms, slope[index, None])
                del terms
        after.restore()

    def _terms(self, pending: "_Pending", index: int) -> Tensor:
        image, label = pending.image[index, None], pending.label[index, None]
        pending.random.restore()
        return self.batch_loss.terms(for_loss(self.network, image), label)


class _Pending:
    """A batch between forward and backward."""

    def __init__(self, image: Tensor, label: Tensor | SoftLabels) -> None:
        self.image, self.label = image, label
        self.random = RandomState.of(image.device)
        self.terms: Tensor | None = None
        kind = image.device.type
        self._autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def autocast(self) -> torch.autocast:
        """The rules of mixed precision that held in forward."""
        enabled, dtype = self._autocast
        return torch.autocast(self.image.device.type, dtype=dtype, enabled=enabled)


class RandomState:
    """Where torch's random numbers are, on the host and on a device."""

    def __init__(self, host: Tensor, device: torch.device, card: Tensor | None) -> None:
        self._host, self._device, self._card = host, device, card

    @classmethod
    def of(cls, device: torch.device) -> "RandomState":
        """Where they are now."""
        card = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), device, card)

    def restore(self) -> None:
        """Go back there."""
        torch.set_rng_state(self._host)
        if self._card is not None:
            torch.cuda.set_rng_state(self._card, self._device)
