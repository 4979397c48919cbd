"""The manners of everything in a plan, and the ranges that several parts share."""

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

Positive3 = tuple[
    Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]
]
PositiveSpacing = tuple[
    Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]
]
Share = Annotated[float, Field(ge=0, le=1)]
Heap: TypeAlias = Literal["system", "mapped", "kept"]
"""How a CPU's freed memory is kept; see `effseg.memory.heap_of`."""


class Config(BaseModel):
    """Frozen, no unknown keys, no NaN: the manners of everything in a plan."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
