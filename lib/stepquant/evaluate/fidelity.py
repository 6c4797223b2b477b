"""Fidelity: how close a video is to the one that BF16 makes from the same noise.

Videos are uint8 [F, H, W, 3] as the model made them: a lossy codec in between would cap PSNR near 44 dB.

The PSNR of identical pictures is infinite, which JSON cannot hold and which would swallow every mean: it is capped at
PSNR_CAP. Two 8-bit videos come near the cap only when they differ in less than one value in 150,000.
"""

import numpy as np
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from stepquant.errors import UserError
from stepquant.evaluate.video import check_video

PSNR_CAP = 100.0  # dB


def psnr(video: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(255^2 / MSE), with the MSE over all values of the video.

    Pooling the error, not the decibels of the frames, keeps one perfect frame (an image-to-video model has its first
    frame given) from lifting the whole. Capped at PSNR_CAP. Raises UserError if the shapes differ.
    """
    _check_pair(video, reference)
    return _capped_psnr(video, reference)


def psnr_frames(video: np.ndarray, reference: np.ndarray) -> list[float]:
    """PSNR in dB of each frame, capped at PSNR_CAP. Raises UserError if the shapes differ."""
    _check_pair(video, reference)
    return [_capped_psnr(frame, expected) for frame, expected in zip(video, reference)]


def ssim_frames(video: np.ndarray, reference: np.ndarray) -> list[float]:
    """Structural similarity of each frame, averaged over RGB, in [-1, 1].

    Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP 2004: Gaussian
    window of sigma 1.5 (11 x 11), K1 = 0.01, K2 = 0.03, population covariance. Raises UserError if the shapes differ
    or a side is under 11 pixels.
    """
    _check_pair(video, reference)
    if min(video.shape[1:3]) < 11:
        raise UserError(
            f"SSIM looks through an 11 x 11 window; the video has {video.shape[1]} x {video.shape[2]} pixels"
        )
    return [_ssim(frame, expected) for frame, expected in zip(video, reference)]


def first_frame_psnr(video: np.ndarray, image: np.ndarray) -> float:
    """PSNR in dB of the first frame against the input image (uint8 [H, W, 3], as the model was given it).

    Capped at PSNR_CAP. Raises UserError if image and frame differ in size.
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
            f"cannot compare a video of {list(video.shape)} with one of {list(reference.shape)} (frames, height, width, "
            "RGB): both must come from the same generation settings"
        )
