"""Which cases a training learns from and which it holds out."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from effseg.plans.config import Config


class ExternalData(Config):
    """Another data set of the same channels and labels, learnt from and never validated on."""

    dataset: str = Field(min_length=1, description="its folder or CSV")
    share: Annotated[float, Field(gt=0, lt=1)] = Field(description="of a training's patches")


class DataConfig(Config):
    """What is held out, and what is mixed in."""

    stratified: bool = Field(
        False,
        description="deal the cases to the folds by their foreground volume, so that each fold "
        "has large and small ones",
    )
    external: tuple[ExternalData, ...] = Field((), description="mixed in by weight")

    @model_validator(mode="after")
    def _leave_room(self) -> Self:
        total = sum(one.share for one in self.external)
        if total >= 1:
            raise ValueError(
                f"external data take {total:g} of the patches; expected less than 1, so that the "
                "data set itself is learnt from too"
            )
        return self
