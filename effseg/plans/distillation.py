"""What a student learns from teachers, beside labels."""

from pydantic import Field

from effseg.plans.config import Config, Share


class DistillationConfig(Config):
    """Soft targets from trained runs (Hinton et al. 2015, arXiv:1503.02531)."""

    teachers: tuple[str, ...] = Field(
        min_length=1, description="folders of runs; what they say is averaged"
    )
    temperature: float = Field(
        2.0, gt=0, description="logits are divided by; above 1 small probabilities say more"
    )
    weight: Share = Field(
        0.5, description="of the teachers' part in the loss; the labels' is 1 less this"
    )
    unannotated: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="scans without labels to learn from too: the image files of each, by name",
    )
