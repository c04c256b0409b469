"""Sprites: small binary images of one shape each, drawn from known factors of variation.

What a model's codes say of the world can only be scored where the world is known. Every image is one combination of
five factors, and all 14,400 combinations are there: 3 shapes x 4 scales x 12 orientations x 10 positions in x x 10 in
y, in this order, the last factor fastest. No shape has a rotational symmetry, so no two images are the same.

Shapes: N images, F factors, H W image; S scales, O orientations, X Y positions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vaelab.data.readers import Images

SIDE = 32  # pixels
SHAPES = ("triangle", "crescent", "corner")
RADII = (3.5, 4.5, 5.5, 6.5)  # pixels, of the circle that a shape fills
ORIENTATIONS = 12  # 30 degrees apart, counter-clockwise
POSITIONS = 10  # of the centre along each axis
STEP = 2  # pixels between two positions
NAMES = ("shape", "scale", "orientation", "x", "y")
SIZES = (len(SHAPES), len(RADII), ORIENTATIONS, POSITIONS, POSITIONS)
COUNT = int(np.prod(SIZES))

Array = NDArray[np.float64]
Outline = Callable[[Array, Array], NDArray[np.bool_]]  # is a point (u, v), in units of the radius, inside?


def images() -> Images:
    """All images (14400, 1, 32, 32), 0 or 255, with the shape as their class. The same bits on every call.

    Example:
        >>> images().x.shape, COUNT
        ((14400, 1, 32, 32), 14400)
    """
    drawn = np.stack([_draw(outline) for outline in (_triangle, _crescent, _corner)])
    x = np.where(drawn, np.uint8(255), np.uint8(0)).reshape(COUNT, 1, SIDE, SIDE)
    return Images(x, factors(np.arange(COUNT))[:, 0], SHAPES, binary=True)


def factors(index: NDArray[np.int64]) -> NDArray[np.int64]:
    """The factors (N, 5) of images by their row numbers (N,), as a split's ``index`` has them: each counted from 0.

    Args:
        index: row numbers in the whole data set, whatever split or order they are in.

    Raises:
        IndexError: for a row that is not there.

    Example:
        >>> factors(np.array([0, 1, 14399])).tolist()
        [[0, 0, 0, 0, 0], [0, 0, 0, 0, 1], [2, 3, 11, 9, 9]]
    """
    index = np.asarray(index)
    if len(index) and (index.min() < 0 or index.max() >= COUNT):
        raise IndexError(f"sprites has the rows 0 to {COUNT - 1}: asked for {index.min()} to {index.max()}")
    return np.stack(np.unravel_index(index, SIZES), 1).astype(np.int64)


# --- drawing --------------------------------------------------------------------------------------------------------


def _draw(outline: Outline) -> NDArray[np.bool_]:
    """One shape at all scales, orientations and positions, (S, O, X, Y, H, W): pixels whose centres lie inside."""
    centres = (SIDE - 1) / 2 + STEP * (np.arange(POSITIONS) - (POSITIONS - 1) / 2)
    pixels = np.arange(SIDE)
    across = (pixels - centres[:, None])[:, None, None, :]  # (X, 1, 1, W), to the right
    up = (pixels - centres[:, None])[:, ::-1][None, :, :, None]  # (1, Y, H, 1): rows count downwards, y upwards
    inside = np.empty((*SIZES[1:], SIDE, SIDE), np.bool_)
    for scale, radius in enumerate(RADII):
        for turn, angle in enumerate(2 * np.pi * np.arange(ORIENTATIONS) / ORIENTATIONS):
            cos, sin = np.cos(angle) / radius, np.sin(angle) / radius
            inside[scale, turn] = outline(cos * across + sin * up, cos * up - sin * across)
    return inside


def _triangle(u: Array, v: Array) -> NDArray[np.bool_]:
    """A slim isosceles triangle that points along u, within the unit circle."""
    # Its base at u = -0.8 reaches |v| = 0.6 on the circle, its tip is (1, 0).
    return (u > -0.8) & (np.abs(v) * 1.8 < 0.6 * (1 - u))


def _crescent(u: Array, v: Array) -> NDArray[np.bool_]:
    """The unit disk without another one that bites into it from the side of u."""
    return (u**2 + v**2 < 1) & ((u - 0.55) ** 2 + v**2 > 0.75**2)


def _corner(u: Array, v: Array) -> NDArray[np.bool_]:
    """Two bars of unequal lengths that meet at a right angle."""
    upright = (np.abs(u + 0.35) < 0.25) & (np.abs(v) < 0.8)
    foot = (u > -0.6) & (u < 0.6) & (v > -0.8) & (v < -0.3)
    return upright | foot
