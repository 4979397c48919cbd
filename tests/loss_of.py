"""A loss of some settings, as several test files want it."""

from effseg.losses import CompoundLoss
from effseg.plans import LossConfig


def loss_of(*, ignore_label=None, n_channels=None, **settings) -> CompoundLoss:
    """The usual loss but for these settings of `LossConfig`."""
    return CompoundLoss(LossConfig(**settings), n_channels=n_channels, ignore_label=ignore_label)
