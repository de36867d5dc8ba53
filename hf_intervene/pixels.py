"""Arrays of images for display, without Matplotlib."""

import numpy as np


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Return float images in [0, 1] as uint8."""
    return (images * 255).round().astype("uint8")


def difference(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return images of the difference of two images, mean over the channels.

    They are white where the images are equal, and black from half of the range on.

    Args:
        before, after: uint8 images (n, H, W, C).

    Returns:
        uint8 images (n, H, W, 1).
    """
    change = np.abs(np.asarray(after, dtype=np.float32) - before)
    change = change.mean(-1, keepdims=True)  # (n, H, W, 1)
    return (255 - np.minimum(2 * change, 255)).round().astype("uint8")
