"""The ray caster of `ident3d.py`: a teapot-like object over a ground plane, in a cone of light.

World: x to the right, y away from the camera, z up; the ground is z = 0. Each image is computed by
itself, in single precision, with only arithmetic and square roots. So its bytes do not depend on
the other images.

    rays (S, H*W) --ground or object?--> light, ambient light and highlight (S, H*W)
        --mean over S, colours--> (H, W, 3)
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


# The object, in its own frame (x along the spout, z up): an ellipsoid and capsules.
BODY = np.array([0.6, 0.6, 0.48], dtype=np.float32)  # half axes
CAPSULES = np.array(  # from (3), to (3), radius: spout, knob, handle in three parts
    [
        [0.45, 0.0, -0.10, 0.82, 0.0, 0.28, 0.11],
        [0.00, 0.0, 0.48, 0.00, 0.0, 0.58, 0.11],
        [-0.45, 0.0, 0.22, -0.86, 0.0, 0.22, 0.08],
        [-0.86, 0.0, 0.22, -0.78, 0.0, -0.18, 0.08],
        [-0.78, 0.0, -0.18, -0.45, 0.0, -0.22, 0.08],
    ],
    dtype=np.float32,
)
REACH = 0.98  # radius of a sphere around the whole object

CAMERA = np.array([0.0, -6.5, 5.2])
LOOKS_AT = np.array([0.0, 0.0, 0.85])
ZOOM = 0.255  # half of the visible width at distance 1
LIT = np.array([0.0, 0.0, 0.7])  # the point at which the light is directed
# Cosines of angles to the axis of the light: outside the first there is no light, inside the second
# it is full.
CONE = (0.87, 0.94)
AMBIENT = 0.22
SPOT = 0.95
SPECULAR = 0.45
# Four rays per pixel on a rotated grid: no two share a row or a column.
_OFFSETS = ((0.375, 0.125), (0.875, 0.375), (0.125, 0.625), (0.625, 0.875))
# A point of the object is in the shadow if the object is closer to the light by this share of the
# distance. Rounding could put the point into its own shadow otherwise.
_BLIND = 4e-3
_SIDES = 0.7  # ambient light on upright faces, as a share of that on the ground

_FROM, _AXIS = CAPSULES[:, :3], CAPSULES[:, 3:6] - CAPSULES[:, :3]
_RADIUS = CAPSULES[:, 6:]
_AXIS_SQUARE = (_AXIS * _AXIS).sum(1, keepdims=True)


@dataclass(frozen=True)
class Scene:
    """What an image shows.

    Args:
        centre: centre of the object, (3,).
        rotation: rotation of the object, (3, 3), from its frame to the world.
        light: position of the light, (3,). It is directed at `LIT`.
        ground, object, spotlight: colours, (3,) in [0, 1].
    """

    centre: np.ndarray
    rotation: np.ndarray
    light: np.ndarray
    ground: np.ndarray
    object: np.ndarray
    spotlight: np.ndarray


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the inner product of vectors (3, ...), always with the same order of additions."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def rays(resolution: int) -> np.ndarray:
    """Return unit directions from the camera, float64 (3, S, H*W): S rays per pixel, row by row."""
    forward = (LOOKS_AT - CAMERA) / np.sqrt(dot(LOOKS_AT - CAMERA, LOOKS_AT - CAMERA))
    right = np.array([1.0, 0.0, 0.0])  # the camera is level and looks along y
    up = np.array([0.0, -forward[2], forward[1]])
    # each (S, resolution)
    x, y = (
        ((np.arange(resolution) + np.array(offsets)[:, None]) / resolution * 2 - 1) * ZOOM
        for offsets in zip(*_OFFSETS)
    )
    x, y = np.broadcast_arrays(x[:, None, :], y[:, :, None])
    directions = np.stack([forward[i] + right[i] * x - up[i] * y for i in range(3)])
    return (directions / np.sqrt(dot(directions, directions))).reshape(3, len(_OFFSETS), -1)


@lru_cache(maxsize=2)
def _views(resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """Return unit directions from the camera and where they meet the ground, float32 (3, S*H*W)."""
    directions = rays(resolution).reshape(3, -1)
    ground = CAMERA[:, None] - directions * (CAMERA[2] / directions[2])
    return directions.astype(np.float32), ground.astype(np.float32)


def cast(scene: Scene, resolution: int) -> np.ndarray:
    """Draw the image of a scene, uint8 (resolution, resolution, 3)."""
    directions, ground = _views(resolution)  # (3, M), M = S*H*W
    centre, light, camera = (
        point.astype(np.float32) for point in (scene.centre, scene.light, CAMERA)
    )
    turn = scene.rotation.T.astype(np.float32)  # into the object's frame

    # The ground: the light of the cone, and none in the shadow.
    beams = ground - light[:, None]  # (3, M), from the light
    squares = dot(beams, beams)
    inverse = 1 / np.sqrt(squares)
    lit = _cone(beams, inverse, light) * (-beams[2] * inverse)  # (M,)
    near = np.flatnonzero(_near(beams, squares, centre - light) & (lit > 0))
    t, _ = _meet(_turned(turn, light - centre), _turned(turn, beams[:, near]))
    lit[near[t < 1]] = 0

    # The visible points of the object, in its frame.
    near = np.flatnonzero(_near(directions, np.float32(1), centre - camera))
    views = _turned(turn, directions[:, near])
    t, part = _meet(_turned(turn, camera - centre), views)
    hit = np.flatnonzero(t < np.inf)
    near, views = near[hit], views[:, hit]  # (P,), (3, P)
    points = _turned(turn, camera - centre)[:, None] + views * t[hit]
    normals = _normals(points, part[hit])
    source = _turned(turn, light - centre)
    beams = points - source[:, None]
    inverse = 1 / np.sqrt(dot(beams, beams))
    t, _ = _meet(source, beams)
    cone = _cone(beams, inverse, source, _turned(turn, LIT.astype(np.float32) - centre))
    cone[t < 1 - _BLIND] = 0
    bright = cone * np.maximum(-dot(normals, beams) * inverse, 0)
    half = -(beams * inverse + views)  # half-way between light and camera
    shine = np.maximum(dot(normals, half), 0) / np.sqrt(dot(half, half))
    for _ in range(5):
        shine = shine * shine  # to the power 32
    shine = np.where(bright > 0, shine * cone, 0)
    dim = _SIDES + (1 - _SIDES) * dot(turn[:, 2], normals)  # ambient light comes from above

    lit[near] = 0
    fields = np.zeros((4, lit.size), dtype=np.float32)
    fields[:, near] = np.stack([np.ones_like(dim), dim, bright, shine])
    lit, covered, dim, bright, shine = (
        _pixels(field)[:, None] for field in (lit, *fields)
    )  # (H*W, 1)
    red_green_blue = scene.ground * (AMBIENT * (1 - covered) + SPOT * lit * scene.spotlight)
    red_green_blue = red_green_blue + scene.object * (
        AMBIENT * dim + SPOT * bright * scene.spotlight
    )
    red_green_blue = red_green_blue + SPECULAR * shine * scene.spotlight
    levels = 255 * np.sqrt(np.minimum(red_green_blue, 1))
    return np.rint(levels).astype(np.uint8).reshape(resolution, resolution, 3)


def _turned(turn: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return np.stack([dot(row, vectors) for row in turn])


def _near(
    directions: np.ndarray, squares: np.ndarray | np.float32, offset: np.ndarray
) -> np.ndarray:
    """Return which rays meet the sphere around the object, bool (N,).

    Args:
        directions: (3, N).
        squares: squared lengths of the directions, (N,), or one for all.
        offset: from the start of the rays to the centre of the object, (3,).
    """
    along = dot(directions, offset)
    return (along > 0) & (along * along >= (dot(offset, offset) - np.float32(REACH**2)) * squares)


def _cone(
    beams: np.ndarray, inverse: np.ndarray, light: np.ndarray, aim: np.ndarray = LIT
) -> np.ndarray:
    """Return the light along its beams, (N,): 1 in the middle of the cone, 0 outside.

    Args:
        beams: vectors from the light, (3, N).
        inverse: 1 over their lengths, (N,).
        light: position of the light, (3,).
        aim: the point at which the light is directed, (3,).
    """
    axis = aim.astype(np.float32) - light
    axis = axis / np.sqrt(dot(axis, axis))
    share = np.clip((dot(beams, axis) * inverse - CONE[0]) / (CONE[1] - CONE[0]), 0, 1)
    return share * share * (3 - 2 * share)


def _meet(origin: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find where rays first meet the object, in its frame.

    Args:
        origin: start of the rays, outside the object, (3,).
        directions: directions of any length, (3, N).

    Returns:
        The distances in lengths of the directions, (N,), `inf` for rays that miss the object; and
        the number of the part that each ray meets, (N,), capsules first, the body last.
    """
    times = np.empty((len(CAPSULES) + 1, directions.shape[1]), dtype=np.float32)
    scaled, start = directions / BODY[:, None], origin / BODY
    a, b = dot(scaled, scaled), dot(scaled, start)
    h = b * b - a * (dot(start, start) - 1)
    times[-1] = np.where(h >= 0, (-b - np.sqrt(np.maximum(h, 0))) / a, np.inf)

    # Capsules (K, N): the side of a cylinder, or, if the ray meets it beyond an end, the sphere at
    # that end.
    offset = origin - _FROM
    axis_offset = dot(_AXIS.T, offset.T)[:, None]  # (K, 1), like all values shared by the rays
    offset_square = dot(offset.T, offset.T)[:, None]
    squares = dot(directions, directions)
    along = sum(_AXIS[:, i : i + 1] * directions[i] for i in range(3))
    across = sum(offset[:, i : i + 1] * directions[i] for i in range(3))
    a = np.maximum(_AXIS_SQUARE * squares - along * along, 1e-12)
    b = _AXIS_SQUARE * across - axis_offset * along
    h = b * b - a * (_AXIS_SQUARE * (offset_square - _RADIUS**2) - axis_offset**2)
    t = (-b - np.sqrt(np.maximum(h, 0))) / a
    height = axis_offset + t * along
    low = height <= 0
    b = np.where(low, across, across - along)
    c = np.where(low, offset_square, offset_square - 2 * axis_offset + _AXIS_SQUARE) - _RADIUS**2
    end = b * b - c * squares
    sides = ~low & (height < _AXIS_SQUARE)
    t = np.where(sides, t, (-b - np.sqrt(np.maximum(end, 0))) / squares)
    times[:-1] = np.where((h >= 0) & (sides | (end >= 0)), t, np.inf)
    return times.min(0), times.argmin(0)


def _normals(points: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Return the outward unit normals (3, P) at points of the object's surface (3, P)."""
    capsule = np.minimum(part, len(CAPSULES) - 1)
    axis, offset = _AXIS[capsule].T, points - _FROM[capsule].T
    share = np.clip(dot(offset, axis) / _AXIS_SQUARE[capsule, 0], 0, 1)
    normals = np.where(part < len(CAPSULES), offset - share * axis, points / (BODY * BODY)[:, None])
    return normals / np.sqrt(dot(normals, normals))


def _pixels(field: np.ndarray) -> np.ndarray:
    """Return the mean over the rays of each pixel: (S*H*W,) to (H*W,)."""
    rays = field.reshape(len(_OFFSETS), -1)
    return sum(rays[1:], start=rays[0]) / np.float32(len(rays))
