"""Functions under the names of the reference's utils: `from kolors_core.utils import load_image`."""

from kolors_core.compat.utils import load_image, make_image_grid, randn_tensor

__all__ = ["load_image", "make_image_grid", "randn_tensor"]
