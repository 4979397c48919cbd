"""A network that must not change while another learns, and looks at both that leave no trace."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from effseg.errors import EffsegError


def fingerprint_of(network: nn.Module) -> str:
    """A hash of all parameters and buffers, bit by bit, with names, types and shapes."""
    found = hashlib.sha256()
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        data = tensor.detach().cpu().contiguous()
        found.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
        found.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


class Frozen:
    """A network in eval mode, without gradients, that is held to what it was.

    In training mode a batch norm's running statistics would move, and dropout would make it
    another network, without any optimizer: what freezes parameters alone does not see that.

    Args:
        network: to freeze.
        name: of the network in messages.
        stage: of the training in messages.
    """

    def __init__(self, network: nn.Module, *, name: str, stage: str) -> None:
        self.network, self.name, self.stage = network, name, stage
        network.eval().requires_grad_(requires_grad=False)
        self.fingerprint = fingerprint_of(network)

    def check_mode(self) -> None:
        """Refuse a network that somebody put back into training mode; quick.

        Raises:
            EffsegError: if any part of it is in training mode.
        """
        astray = next((name for name, part in self.network.named_modules() if part.training), None)
        if astray is not None:
            raise EffsegError(
                f"stage {self.stage}: the {self.name} is frozen, but "
                f"{astray or 'it'} is in training mode; an evaluation must leave each network in "
                "the mode it found (training.frozen.evaluating)"
            )

    def check(self) -> None:
        """Refuse a network that changed.

        Raises:
            EffsegError: if it is in training mode, or a bit of a parameter or buffer is another.
        """
        self.check_mode()
        now = fingerprint_of(self.network)
        if now != self.fingerprint:
            raise EffsegError(
                f"stage {self.stage}: the {self.name} is frozen, but its parameters or buffers "
                f"changed, from {self.fingerprint[:12]} to {now[:12]}; something trained it, or "
                "ran it in training mode"
            )


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients within; each part is then in the mode it was found in.

    Not simply back in training mode: one of the networks is frozen, and would move from then on.
    """
    found = [(part, part.training) for network in networks for part in network.modules()]
    for network in networks:
        network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in found:
            part.training = mode
