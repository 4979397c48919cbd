"""How patches are changed before they are learnt from."""

from collections.abc import Mapping
from typing import Any, Final, Literal, Self, TypeAlias

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from effseg.plans.config import Config, Share

Policy: TypeAlias = Literal["off", "light", "default", "strong"]

CHANGES: Final = (
    "flip",
    "rotate90",
    "affine",
    "gamma",
    "brightness",
    "contrast",
    "noise",
    "blur",
    "low_resolution",
)
"""What may happen to a patch; each is a field of `AugmentConfig`, its chance."""

POLICIES: Final[Mapping[str, Mapping[str, Any]]] = {
    "off": dict.fromkeys(CHANGES, 0.0),
    "light": {
        "affine": 0.1,
        "rotate_degrees": 8.0,
        "scale": (0.92, 1.08),
        "gamma": 0.1,
        "brightness": 0.1,
        "contrast": 0.1,
        "noise": 0.0,
        "blur": 0.0,
        "low_resolution": 0.0,
    },
    "default": {},
    "strong": {
        "affine": 0.4,
        "rotate_degrees": 30.0,
        "scale": (0.7, 1.4),
        "gamma": 0.3,
        "brightness": 0.3,
        "contrast": 0.3,
        "noise": 0.2,
        "blur": 0.2,
        "low_resolution": 0.25,
    },
}
"""What a policy sets otherwise than the fields' own defaults, which are the policy `default`.

`strong` is about nnU-Net's: its angles, zooms and chance of low resolution, and about twice its
chances of the others (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z, supplementary note 4).
"""


class AugmentConfig(Config):
    """A named policy, what is changed of it, and when in a run it counts how much.

    In JSON a name alone will do (`"augment": "strong"`), and what stands beside the name counts in
    place of the policy's own (`{"policy": "strong", "gamma": 0.1}`). So it is written, too: a field
    that is as the policy has it is left out, so that another name can be put in the file's place
    and counts.
    """

    policy: Policy = Field("default", description="sets each chance and range not given beside it")
    probability: Share = Field(
        1.0, description="scales every chance below, from the start of the run; 0 turns all off"
    )
    final_probability: Share | None = Field(
        None, description="where probability goes in a straight line over the run; None: it stays"
    )
    off_for_last: Share = Field(
        0.0, description="share of the run, its last part, that sees patches as they are"
    )
    flip_axes: tuple[Literal["z", "y", "x"], ...] = Field(
        ("x",), description="canonical axes; of the data, whatever the policy"
    )
    ignore_outside: bool = Field(
        False,
        description="what an affine brings in from outside the patch is left out of the loss; "
        "false: only where the data set has an ignore label, else it repeats the edge",
    )
    flip: Share = Field(0.5, description="for each of flip_axes")
    rotate90: Share = Field(0.0, description="quarter turns in the plane of equal spacings")
    affine: Share = Field(0.2, description="small rotation and scaling")
    rotate_degrees: float = Field(15.0, ge=0, le=180, description="at most, about each axis")
    scale: tuple[float, float] = Field((0.85, 1.18), description="smallest and largest zoom")
    gamma: Share = Field(0.15, description="a power of the intensities")
    brightness: Share = Field(0.15, description="a shift")
    contrast: Share = Field(0.15, description="a stretch about the mean")
    noise: Share = Field(0.1, description="Gaussian")
    blur: Share = Field(0.1, description="Gaussian")
    low_resolution: Share = Field(0.1, description="fewer voxels and back")

    @property
    def highest_probability(self) -> float:
        """The largest that scales the chances at any time of a run."""
        if self.off_for_last == 1:
            return 0.0
        return max(self.probability, self.final_probability or 0.0)

    @property
    def is_scheduled(self) -> bool:
        """Whether what scales the chances changes over a run."""
        return self.final_probability is not None or self.off_for_last > 0

    @property
    def may_bring_in(self) -> bool:
        """Whether voxels from outside a patch can come into it."""
        return self.affine * self.highest_probability > 0

    def probability_at(self, share: float) -> float:
        """What scales the chances when so much of a run is over.

        Args:
            share: 0 to 1.
        """
        length = 1 - self.off_for_last
        if share >= length and self.off_for_last > 0:
            return 0.0
        if self.final_probability is None:
            return self.probability
        return self.probability + (self.final_probability - self.probability) * share / length

    def as_content(self, policy: str) -> dict[str, Any]:
        """What JSON says of another policy with all that is no policy's: axes, times, outside."""
        content = self.model_dump(exclude={*CHANGES, "rotate_degrees", "scale"})
        return content | {"policy": policy}

    @model_validator(mode="before")
    @classmethod
    def _of_policy(cls, given: Any) -> Any:
        """A name alone, and what a name stands for."""
        if isinstance(given, str):
            given = {"policy": given}
        if not isinstance(given, Mapping):
            return given
        return {**POLICIES.get(str(given.get("policy")), {}), **given}

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if len(set(self.flip_axes)) < len(self.flip_axes):
            raise ValueError(f"flip_axes {self.flip_axes}; each axis may stand there once")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale {self.scale}; expected two zooms above 0, the smaller first")
        return self

    @model_serializer(mode="wrap")
    def _differences(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The policy, the data's axes, and what is not as the policy has it."""
        written: dict[str, Any] = write(self)
        usual = type(self)(policy=self.policy)
        return {
            name: value
            for name, value in written.items()
            if name in ("policy", "flip_axes") or getattr(self, name) != getattr(usual, name)
        }
