"""Connected components of a label map, and the removal of those too small to be believed.

Components are 26-connected (voxels that share a face, an edge or a corner) and never cross from
one label to another.
"""

from effseg.postprocess.components import foreground_box, label_components, remove_components
from effseg.postprocess.rules import DEFAULT_FRACTION, Removal, describe
from effseg.postprocess.table import Component

__all__ = [
    "DEFAULT_FRACTION",
    "Component",
    "Removal",
    "describe",
    "foreground_box",
    "label_components",
    "remove_components",
]
