"""Temporal metrics without a reference. Videos are uint8 [F, H, W, 3].

The two belong together: a frozen video has the best flicker score, and only `motion` shows that nothing moves.
"""

import numpy as np

from stepquant.errors import UserError
from stepquant.evaluate.video import check_video


def temporal_flickering(video: np.ndarray) -> float:
    """VBench's `temporal_flickering` (Huang et al., CVPR 2024, supplementary): (255 - mean |f_t - f_t+1|) / 255.

    Returns:
        A value in [0, 1]; 1 means that no frame differs from the one before.

    Raises:
        UserError: The video has one frame.
    """
    _check_moves(video)
    frames = video.astype(np.int16)
    return float((255 - np.abs(np.diff(frames, axis=0)).mean()) / 255)


def motion(video: np.ndarray) -> float:
    """Mean |f_t - f_0| over all later frames: a proxy for the amount of motion.

    Returns:
        Gray levels in [0, 255]; 0 for a frozen video.

    Raises:
        UserError: The video has one frame.
    """
    _check_moves(video)
    frames = video.astype(np.int16)
    return float(np.abs(frames[1:] - frames[0]).mean())


def _check_moves(video: np.ndarray) -> None:
    check_video(video)
    if len(video) < 2:
        raise UserError("a video of one frame has no temporal metric; set sampling.num_frames to at least 2")
