"""Measures what moves in a clip with dense optical flow (TV-L1 of scikit-image): the sprite, and the camera.

All displacements are screen pixels (x to the right, y downwards).
"""

import numpy as np
from skimage.registration import optical_flow_tvl1

from demo_model.clips import CAMERAS, DIRECTIONS, ZOOMS

# A sprite must cover this much of the way that its caption promises, or the clip counts as standing still.
LEAST_SHARE_OF_TRAVEL = 0.25
# Mean background flow, in pixels per frame, below which the camera counts as static.
STILL = 0.35


def flow_between(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Where each pixel of `before` goes: (H, W, 2) float32 (x, y) for two (H, W, 3) uint8 frames."""
    grey = [frame.astype(np.float32).mean(axis=-1) / 255 for frame in (before, after)]
    down, right = optical_flow_tvl1(grey[0], grey[1])
    return np.stack([right, down], axis=-1)


def inside(box: np.ndarray, shape: tuple[int, int], shrink: float) -> tuple[slice, slice]:
    """The middle of a box (left, top, right, bottom), `shrink` of its width and height, cut off at the frame."""
    centre = (box[:2] + box[2:]) / 2
    half = (box[2:] - box[:2]) / 2 * shrink
    low = np.clip(np.rint(centre - half), 0, np.array(shape[::-1]) - 2).astype(int)
    high = np.clip(np.rint(centre + half), low + 2, shape[::-1]).astype(int)
    return slice(low[1], high[1]), slice(low[0], high[0])


def track(clip: np.ndarray, box: list[int]) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Follows the thing that is in `box` in frame 0 of a (T, H, W, 3) uint8 clip.

    Returns its total displacement (x, y), and for each pair of frames the flow and a mask of the background.
    """
    place = np.array(box, dtype=np.float64)
    flows, backgrounds = [], []
    for before, after in zip(clip[:-1], clip[1:], strict=True):
        flow = flow_between(before, after)
        background = np.ones(flow.shape[:2], dtype=bool)
        background[inside(place, flow.shape[:2], 1.3)] = False
        rows, columns = inside(place, flow.shape[:2], 0.7)
        place += np.tile(np.median(flow[rows, columns].reshape(-1, 2), axis=0), 2)
        flows.append(flow)
        backgrounds.append(background)
    return place[:2] - np.array(box[:2]), flows, backgrounds


def direction_of(displacement: np.ndarray, travel: float) -> str | None:
    """The direction that a displacement stands for, or None where it is shorter than a share of `travel`."""
    names = list(DIRECTIONS)
    along = [float(np.dot(displacement, DIRECTIONS[name])) for name in names]
    best = int(np.argmax(along))
    return names[best] if along[best] >= LEAST_SHARE_OF_TRAVEL * travel else None


def camera_of(flows: list[np.ndarray], backgrounds: list[np.ndarray]) -> str:
    """The camera phrase that fits the background's mean flow best: a shift, a zoom, or neither."""
    height, width = flows[0].shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float64)
    outwards = np.stack([x - (width - 1) / 2, y - (height - 1) / 2], axis=-1)
    outwards /= np.abs(outwards).mean()
    shifts, growths = [], []
    for flow, background in zip(flows, backgrounds, strict=True):
        # Least squares of flow = shift + growth * outwards over the background.
        away, moved = outwards[background], flow[background]
        centred = away - away.mean(axis=0)
        growths.append((centred * moved).sum() / (centred * centred).sum())
        shifts.append(moved.mean(axis=0) - growths[-1] * away.mean(axis=0))
    shift, growth = np.mean(shifts, axis=0), float(np.mean(growths))
    strengths = {name: float(np.dot(shift, step)) for name, step in CAMERAS.items() if any(step)}
    strengths |= {name: sign * growth for name, sign in ZOOMS.items()}
    best = max(strengths, key=lambda name: strengths[name])
    return best if strengths[best] >= STILL else "camera static"
