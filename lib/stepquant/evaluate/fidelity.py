"""Fidelity: how close a video is to the one that BF16 makes from the same noise.

Videos are uint8 [F, H, W, 3] without a lossy codec, which would limit PSNR to about 44 dB.

The PSNR of identical pictures is infinite. JSON cannot store that, and it would make every mean infinite, so PSNR is
capped at PSNR_CAP. Different 8-bit videos reach the cap only if fewer than one value in 150,000 differs.
"""

import numpy as np
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from stepquant.errors import UserError
from stepquant.evaluate.video import check_video

PSNR_CAP = 100.0  # dB


def psnr(video: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio of a video, 10 log10(255^2 / MSE), with the MSE over all values.

    The error is pooled, not the decibels of the frames: an image-to-video model reproduces its first frame almost
    exactly, and that frame alone would raise a mean of decibels.

    Args:
        video: uint8 [F, H, W, 3].
        reference: The same.

    Returns:
        dB, capped at PSNR_CAP.

    Raises:
        UserError: The shapes differ.
    """
    _check_pair(video, reference)
    return _capped_psnr(video, reference)


def psnr_frames(video: np.ndarray, reference: np.ndarray) -> list[float]:
    """PSNR of each frame, in dB and capped at PSNR_CAP. Arguments and errors as in `psnr`."""
    _check_pair(video, reference)
    return [_capped_psnr(frame, expected) for frame, expected in zip(video, reference)]


def ssim_frames(video: np.ndarray, reference: np.ndarray) -> list[float]:
    """Structural similarity of each frame, averaged over RGB, in [-1, 1].

    Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP 2004: Gaussian
    window of sigma 1.5 (11 x 11), K1 = 0.01, K2 = 0.03, population covariance.

    Args:
        video: uint8 [F, H, W, 3].
        reference: The same.

    Raises:
        UserError: The shapes differ, or a side has fewer than 11 pixels.
    """
    _check_pair(video, reference)
    if min(video.shape[1:3]) < 11:
        raise UserError(
            f"SSIM needs at least 11 x 11 pixels, its window; the video has {video.shape[1]} x {video.shape[2]}"
        )
    return [_ssim(frame, expected) for frame, expected in zip(video, reference)]


def first_frame_psnr(video: np.ndarray, image: np.ndarray) -> float:
    """PSNR of the first frame against the input image.

    Args:
        video: uint8 [F, H, W, 3].
        image: uint8 [H, W, 3], as the model was given it (`stepquant.evaluate.video.model_image`).

    Returns:
        dB, capped at PSNR_CAP.

    Raises:
        UserError: Image and frame differ in size.
    """
    return psnr(video[:1], image[None])


def _capped_psnr(a: np.ndarray, b: np.ndarray) -> float:
    if mean_squared_error(a, b) == 0:
        return PSNR_CAP
    return min(PSNR_CAP, float(peak_signal_noise_ratio(b, a, data_range=255)))


def _ssim(frame: np.ndarray, expected: np.ndarray) -> float:
    return float(
        structural_similarity(
            expected,
            frame,
            data_range=255,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def _check_pair(video: np.ndarray, reference: np.ndarray) -> None:
    check_video(video)
    check_video(reference)
    if video.shape != reference.shape:
        raise UserError(
            f"cannot compare a video of {list(video.shape)} with one of {list(reference.shape)} "
            "(frames, height, width, RGB): both must come from the same generation settings"
        )
