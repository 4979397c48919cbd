"""The smallest `DenseUNet` that goes down and up again."""

from effseg.networks import MemoryMode
from effseg.plans import NetworkConfig


def two_stages(memory: MemoryMode, *, out_channels: int) -> NetworkConfig:
    """Its configuration."""
    return NetworkConfig(
        in_channels=1,
        out_channels=out_channels,
        stem_channels=8,
        growth_rate=8,
        encoder_layers=(2, 2),
        decoder_layers=(1,),
        strides=((1, 1, 1), (2, 2, 2)),
        kernels=((3, 3, 3), (3, 3, 3)),
        memory=memory,
    )
