"""What a data set of one image with one label would say of itself: plans need it, no data does."""

from effseg.plans import ChannelFacts, Fingerprint, LabelFacts


def made_up_facts(side: int, *, spacing: float = 1.0) -> Fingerprint:
    """The fingerprint of one cube of `side` voxels along each axis, isotropic, `spacing` in mm."""
    return Fingerprint(
        dataset="benchmark",
        n_cases=1,
        spacings=((spacing,) * 3,),
        shapes=((side,) * 3,),
        channels=(
            ChannelFacts(
                name="image",
                is_ct=False,
                why="made up",
                foreground_mean=0.0,
                foreground_std=1.0,
                foreground_percentiles=(-1.0, 0.0, 1.0),
                minimum=-1.0,
                maximum=1.0,
            ),
        ),
        labels=(
            LabelFacts(
                value=1,
                name="label",
                n_cases=1,
                voxel_share=1.0,
                n_components=1,
                component_mm3=(1.0,) * 7,
                small_share=0.0,
            ),
        ),
    )
