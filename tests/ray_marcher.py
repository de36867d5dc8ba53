"""A slow renderer of ident3d scenes, which finds the object by small steps along each ray."""

import numpy as np

from hf_intervene.data import raycast


def inside(point):
    """Whether points of the object's frame, (..., 3), are inside the object."""
    body = (np.square(point / np.array(raycast.BODY, dtype=float))).sum(-1) < 1
    for capsule in raycast.CAPSULES.astype(float):
        start, end, radius = capsule[:3], capsule[3:6], capsule[6]
        share = np.clip(((point - start) @ (end - start)) / ((end - start) @ (end - start)), 0, 1)
        body |= np.linalg.norm(point - start - share[..., None] * (end - start), axis=-1) < radius
    return body


def first_hit(scene, origin, direction):
    """Return the distance to the object along a unit direction, or `inf`.

    It is found by small steps and bisection.
    """

    def within(t):
        return inside((origin + np.multiply.outer(t, direction) - scene.centre) @ scene.rotation)

    middle = (scene.centre - origin) @ direction
    steps = np.linspace(middle - 1, middle + 1, 801)
    hits = np.flatnonzero(within(steps))
    if not len(hits):
        return np.inf
    low, high = steps[hits[0]] - 2 / 800, steps[hits[0]]
    for _ in range(30):
        half = (low + high) / 2
        low, high = (low, half) if within(half) else (half, high)
    return high


def slow_normal(scene, point):
    """Return the mean direction from a point of the surface to the outside of the object."""
    directions = np.random.default_rng(0).standard_normal((20_000, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    free = ~inside((point + 0.004 * directions - scene.centre) @ scene.rotation)
    normal = directions[free].sum(0)
    return normal / np.linalg.norm(normal)


def unit(vector):
    return vector / np.linalg.norm(vector)


def slow_colour(scene, direction):
    """Return the colour at the end of a ray, linear RGB."""
    camera = raycast.CAMERA
    t = first_hit(scene, camera, direction)
    on_object = t < np.inf
    point = camera + direction * (t if on_object else -camera[2] / direction[2])
    normal = slow_normal(scene, point) if on_object else np.array([0.0, 0.0, 1.0])
    to_light, distance = unit(scene.light - point), np.linalg.norm(scene.light - point)
    x = np.clip(
        (unit(raycast.LIT - scene.light) @ -to_light - raycast.CONE[0])
        / (raycast.CONE[1] - raycast.CONE[0]),
        0,
        1,
    )
    facing = normal @ to_light
    clear = first_hit(scene, scene.light, -to_light) > distance - 0.03
    light = max(facing, 0) * x * x * (3 - 2 * x) * clear
    ambient = raycast.AMBIENT * (0.7 + 0.3 * normal[2])
    colour = (scene.object if on_object else scene.ground) * (
        ambient + raycast.SPOT * light * scene.spotlight
    )
    if on_object and light > 0:
        shine = max(normal @ unit(to_light - direction), 0) ** 32 * x * x * (3 - 2 * x)
        colour = colour + raycast.SPECULAR * shine * scene.spotlight
    return colour
