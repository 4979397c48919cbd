"""Connected components of a label map, and the removal of those too small to be believed.

Components are 26-connected (voxels that share a face, an edge or a corner) and never cross from
one label to another. `label_components` and `remove_components` take a whole label map;
`ComponentStream` takes it slab after slab and keeps little of it, with the same result voxel for
voxel.
"""

from effseg.postprocess.components import foreground_box, label_components, remove_components
from effseg.postprocess.rules import DEFAULT_FRACTION, Removal, describe, judge
from effseg.postprocess.stream import COMPONENT_BYTES, ComponentStream
from effseg.postprocess.table import Component

__all__ = [
    "COMPONENT_BYTES",
    "DEFAULT_FRACTION",
    "Component",
    "ComponentStream",
    "Removal",
    "describe",
    "foreground_box",
    "judge",
    "label_components",
    "remove_components",
]
