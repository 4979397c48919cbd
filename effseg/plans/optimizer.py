"""How weights move."""

from pydantic import Field

from effseg.plans.config import Config, Share


class OptimizerConfig(Config):
    """AdamW under a one-cycle schedule: linear warm-up, then cosine to zero."""

    learning_rate: float = Field(3e-3, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    warmup: Share = Field(0.05, description="share of the run spent warming up")
    gradient_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    ema_decay: float = Field(
        0.99, ge=0, lt=1, description="of the averaged weights that are kept; 0: no averaging"
    )
