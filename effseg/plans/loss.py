"""What a training minimises."""

from pydantic import Field

from effseg.plans.config import Config


class LossConfig(Config):
    """Dice plus cross-entropy."""

    dice_weight: float = Field(1.0, ge=0)
    cross_entropy_weight: float = Field(1.0, ge=0)
    dice_background: bool = Field(False, description="count the background as a class in Dice")
    dice_over_batch: bool = Field(
        True, description="one Dice a class over the whole batch, not one a sample"
    )
    dice_smooth: float = Field(
        1e-5, gt=0, description="voxels added above and below: what false voxels are held against"
    )
