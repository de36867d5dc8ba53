"""Images as arrays: what is shown of them, without Matplotlib."""

import numpy as np


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Float images in [0, 1] as uint8."""
    return (images * 255).round().astype("uint8")


def difference(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """How much images differ, mean over the channels: white where they do not, black from half of
    the range on.

    Args:
        before: uint8 images (n, H, W, C).
        after: likewise.

    Returns:
        uint8 images (n, H, W, 1).
    """
    change = np.abs(np.asarray(after, dtype=np.float32) - before).mean(
        -1, keepdims=True
    )  # (n, H, W, 1)
    return (255 - np.minimum(2 * change, 255)).round().astype("uint8")
