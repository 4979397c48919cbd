"""What a training minimises."""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from effseg.plans.config import Config, Share

Weight = Annotated[float, Field(ge=0)]

OVERLAPS = ("dice_weight", "squared_dice_weight", "jaccard_weight", "tversky_weight")
TERMS = (*OVERLAPS, "cross_entropy_weight")


ALONE: Final = {"dice_weight": 0.0, "cross_entropy_weight": 0.0}

LOSSES: Final[Mapping[str, Mapping[str, Any]]] = {
    "dice_cross_entropy": {},
    "dice": {"cross_entropy_weight": 0.0},
    "squared_dice": ALONE | {"squared_dice_weight": 1.0},
    "focal_dice": {"cross_entropy_weight": 0.0, "overlap_power": 0.75},
    "jaccard": ALONE | {"jaccard_weight": 1.0},
    "tversky": ALONE | {"tversky_weight": 1.0},
    "focal_tversky": ALONE | {"tversky_weight": 1.0, "overlap_power": 0.75},
    "cross_entropy": {"dice_weight": 0.0},
    "weighted_cross_entropy": {"dice_weight": 0.0, "class_weights": "voxel_shares"},
    "focal": {"dice_weight": 0.0, "focal_gamma": 2.0},
    "bce_jaccard": {"dice_weight": 0.0, "jaccard_weight": 1.0, "one_vs_rest": True},
    "balanced": {"balanced": True},
    "edges": {"edge_weight": 4.0},
}
"""What a name alone sets otherwise than the fields' own defaults, Dice and cross-entropy."""


class LossConfig(Config):
    """A sum of named terms, each times its weight; a weight of 0 leaves a term out.

    All are taken of the same sums over voxels, so none costs memory or a pass of its own, but for
    `edge_weight`. In JSON the name of one of `LOSSES` will do (`"loss": "focal"`); its settings are
    what is kept.
    """

    dice_weight: Weight = Field(1.0, description="of 1 - Dice")
    squared_dice_weight: Weight = Field(
        0.0, description="of 1 - Dice whose denominator has squared probabilities"
    )
    jaccard_weight: Weight = Field(0.0, description="of 1 - Jaccard, the volumetric overlap error")
    tversky_weight: Weight = Field(0.0, description="of 1 - Tversky")
    cross_entropy_weight: Weight = Field(1.0, description="of the cross-entropy")
    dice_background: bool = Field(
        False, description="count the background as a class in Dice and its kin"
    )
    dice_over_batch: bool = Field(
        True, description="one Dice a class over the whole batch, not one a sample"
    )
    dice_smooth: float = Field(
        1e-5, gt=0, description="voxels added above and below: what false voxels are held against"
    )
    tversky_false_positives: Weight = Field(
        0.3, description="what a false voxel counts; a half, as below, is Dice, and 1 Jaccard"
    )
    tversky_false_negatives: Weight = Field(0.7, description="what a missed voxel counts")
    overlap_power: float = Field(
        1.0, gt=0, description="focal Dice and its kin: of each class's 1 - Dice, 0.75 for one"
    )
    class_weights: tuple[Weight, ...] | Literal["voxel_shares"] | None = Field(
        None,
        description="of each class in every term, background first; voxel_shares: the inverse of "
        "each label's share of the voxels",
    )
    focal_gamma: float = Field(
        0.0, ge=0, description="cross-entropy counts (1 - p)^gamma of a voxel, p of its label"
    )
    edge_weight: Weight = Field(
        0.0, description="what cross-entropy adds to the weight of a voxel at the edge of a label"
    )
    edge_mm: float = Field(
        2.0, gt=0, description="distance from the edge at which 61 % of edge_weight are left"
    )
    one_vs_rest: bool = Field(
        False, description="a sigmoid for each class and binary cross-entropy, no softmax"
    )
    balanced: bool = Field(
        False,
        description="cross-entropy with weights of classes and samples that follow from the "
        "batches of late: the dynamic balanced loss",
    )
    balance_smoothing: Share = Field(
        0.9, lt=1, description="share of its counts that the balance keeps from batch to batch"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_name(cls, given: Any) -> Any:
        if not isinstance(given, str):
            return given
        if given not in LOSSES:
            raise ValueError(f'loss "{given}"; expected settings, or one of {", ".join(LOSSES)}')
        return dict(LOSSES[given])

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        terms = {name: getattr(self, name) for name in TERMS}
        if not any(terms.values()):
            raise ValueError(f"{', '.join(terms)} are all 0; one term at least must count")
        if isinstance(self.class_weights, tuple) and not any(self.class_weights):
            raise ValueError(f"class_weights {self.class_weights}; expected one above 0")
        both = self.tversky_false_positives + self.tversky_false_negatives
        if self.tversky_weight > 0 and both == 0:
            raise ValueError("tversky counts neither false nor missed voxels; expected one above 0")
        if self.balanced and self.cross_entropy_weight == 0:
            raise ValueError("balanced weighs the cross-entropy, but cross_entropy_weight is 0")
        if self.balanced and self.class_weights is not None:
            raise ValueError("balanced finds class weights itself; leave class_weights out")
        if self.balanced and self.one_vs_rest:
            raise ValueError("balanced weighs the classes of a softmax; leave one_vs_rest out")
        if self.edge_weight > 0 and self.cross_entropy_weight == 0:
            raise ValueError("edge_weight is of the cross-entropy, but cross_entropy_weight is 0")
        return self

    @property
    def words(self) -> str:
        """Its terms, and what differs from the usual settings, for people."""
        names = (name for name in TERMS if getattr(self, name) > 0)
        terms = (
            f"{getattr(self, name):g} {name.removesuffix('_weight').replace('_', ' ')}"
            for name in names
        )
        usual = LossConfig()
        more = [
            name if value is True else f"{name} {value}"
            for name, value in self
            if name not in TERMS and value != getattr(usual, name)
        ]
        return " + ".join(terms) + (f" ({', '.join(more)})" if more else "")


class LossChange(Config):
    """A loss that takes the place of the one before, from an epoch on or when that one stalls."""

    loss: LossConfig
    from_epoch: int | None = Field(None, ge=1, description="from 0, as metrics.csv counts")
    stalled_epochs: int | None = Field(
        None,
        ge=1,
        description="epochs without a better validation Dice from the loss before",
    )

    @model_validator(mode="after")
    def _has_a_reason(self) -> Self:
        if self.from_epoch is None and self.stalled_epochs is None:
            raise ValueError("a change of loss needs from_epoch, stalled_epochs or both")
        return self
