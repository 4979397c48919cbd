"""How a segmenter and a discriminator are trained against each other."""

from pydantic import Field

from effseg.plans.config import Config


class AdversarialConfig(Config):
    """Criteria of the stages, and the discriminator.

    The defaults are a start: none of them was chosen by measurement.
    """

    voe: float = Field(
        0.4,
        gt=0,
        lt=1,
        description="bound on the segmenter's training VOE, 1 - Jaccard; below it"
        " the discriminator's turn comes",
    )
    tighten: float = Field(
        0.9, gt=0, le=1, description="the bound on VOE times this from one turn to the next"
    )
    accuracy: float = Field(
        0.75,
        gt=0.5,
        lt=1,
        description="bound on the discriminator's accuracy; above it the segmenter's turn comes",
    )
    chance: float = Field(
        0.55,
        ge=0,
        lt=1,
        description="an accuracy up to this, at the limit of its steps, means that the "
        "discriminator finds nothing to tell: training ends; 0: it goes on whatever it is",
    )
    turns: int = Field(3, ge=1, description="of both, after the segmenter alone")
    segmenter_steps: int = Field(2000, ge=1, description="limit of a stage of the segmenter")
    discriminator_steps: int = Field(500, ge=1, description="limit of one of the discriminator")
    check_every: int = Field(25, ge=1, description="steps between looks at VOE or accuracy")
    check_patches: int = Field(16, ge=1, description="fixed patches of each kind it looks at")
    save_every: int = Field(100, ge=1, description="steps after which a killed run goes on")
    weight: float = Field(
        0.05, gt=0, description="of the discriminator's verdict in the segmenter's loss"
    )
    learning_rate: float = Field(3e-4, gt=0, description="the discriminator's, AdamW, constant")
    warmup_steps: int = Field(
        50, ge=0, description="over which the segmenter's rate rises to the plan's, to stay there"
    )
    channels: int = Field(16, ge=1, description="of the discriminator's first convolution")
    depth: int = Field(4, ge=1, description="of the discriminator, convolutions of stride 2")
