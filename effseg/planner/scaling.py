"""One dial for a network's size: depth, width and what it is meant to see grow together.

Compound scaling after Tan and Le, "EfficientNet", 2019 (arXiv:1905.11946): from one size to the
next depth grows by 1.2, width by 1.1 and the side of the input by 1.11. In three dimensions a step
costs about DEPTH * WIDTH^2 * SIDE^3 = 2 times as much.
"""

from dataclasses import dataclass

from effseg.errors import PlanError

DEPTH, WIDTH, SIDE = 1.2, 1.1, 1.11
SMALLEST_SIDE = 48
"""Voxels along an axis that the first size above b0 grows from; b0 takes any patch."""
SIZES = tuple(f"b{n}" for n in range(8))


@dataclass(frozen=True)
class Scale:
    """How much larger than b0 a network is.

    Attributes:
        name: of the size.
        depth: factor of the layers of each stage.
        width: factor of stem and growth rate.
        side: voxels along an axis (the geometric mean of a patch's) that it wants to see.
    """

    name: str
    depth: float
    width: float
    side: float

    def layers(self, of_b0: tuple[int, ...]) -> tuple[int, ...]:
        """Of each stage."""
        return tuple(max(1, round(n * self.depth)) for n in of_b0)

    def channels(self, of_b0: int) -> int:
        """In whole fours, so that no size wastes much of a vector register."""
        return max(4, round(of_b0 * self.width / 4) * 4)


def scale_of(size: str) -> Scale:
    """The scale of a size, "b0" to "b7".

    Raises:
        PlanError: if there is no such size.
    """
    if size not in SIZES:
        raise PlanError(f"size {size!r}; expected one of {', '.join(SIZES)}")
    n = SIZES.index(size)
    return Scale(
        name=size,
        depth=DEPTH**n,
        width=WIDTH**n,
        side=SMALLEST_SIDE * SIDE**n if n else 0.0,
    )
