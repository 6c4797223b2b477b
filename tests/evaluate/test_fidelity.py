import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from stepquant.errors import UserError
from stepquant.evaluate.fidelity import PSNR_CAP, first_frame_psnr, psnr, psnr_frames, ssim_frames


def clip(seed: int, frames: int = 3, side: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, side, side, 3), dtype=np.uint8)


def grey(value: int, frames: int = 2) -> np.ndarray:
    return np.full((frames, 16, 16, 3), value, np.uint8)


def test_psnr_by_hand():
    # Every value is off by 10, so MSE = 100 and PSNR = 10 log10(65025 / 100) = 28.1308 dB.
    assert psnr(grey(110), grey(100)) == pytest.approx(28.1308, abs=1e-4)
    # The sign does not matter, and neither may uint8 wrap around: 0 against 255 is 10 log10(1) = 0 dB.
    assert psnr(grey(0), grey(255)) == 0


def test_psnr_of_a_video_pools_the_error_of_its_frames():
    video = np.concatenate([grey(100, 1), grey(120, 1)])
    # Frame 0 is identical (capped), frame 1 is off by 20: MSE 400, 22.1102 dB. Over both: MSE 200, 25.1205 dB.
    assert psnr_frames(video, grey(100)) == pytest.approx([PSNR_CAP, 22.1102], abs=1e-4)
    assert psnr(video, grey(100)) == pytest.approx(25.1205, abs=1e-4)


def test_psnr_is_capped_near_identity():
    reference = np.zeros((1, 256, 256, 3), np.uint8)
    video = reference.copy()
    video[0, 0, 0, 0] = 1  # MSE = 1 / 196608: 10 log10(65025 * 196608) = 101.07 dB
    assert psnr(video, reference) == PSNR_CAP == 100


def test_ssim_is_the_formula_of_wang_et_al():
    video, reference = clip(0), clip(1) // 2 + clip(0) // 2

    def window(x: np.ndarray) -> np.ndarray:  # Gaussian of sigma 1.5 cut at 5 pixels, i.e. 11 x 11
        return gaussian_filter(x, (1.5, 1.5, 0), truncate=3.5)

    expected = []
    for frame, other in zip(video.astype(float), reference.astype(float)):
        mu_x, mu_y = window(frame), window(other)
        var_x, var_y = window(frame**2) - mu_x**2, window(other**2) - mu_y**2
        cov = window(frame * other) - mu_x * mu_y
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        index = (2 * mu_x * mu_y + c1) * (2 * cov + c2) / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))
        expected.append(index[5:-5, 5:-5].mean())  # where the window fits
    np.testing.assert_allclose(ssim_frames(video, reference), expected, rtol=1e-10)


def test_ssim_of_two_plain_greys_by_hand():
    # Without variance only the luminance term is left: (2 * 100 * 110 + c1) / (100^2 + 110^2 + c1), c1 = 6.5025.
    assert ssim_frames(grey(110), grey(100)) == pytest.approx([22006.5025 / 22106.5025] * 2, abs=1e-9)


def test_identical_videos():
    assert psnr(clip(0), clip(0)) == PSNR_CAP
    assert ssim_frames(clip(0), clip(0)) == pytest.approx([1, 1, 1])


def test_first_frame_is_compared_with_the_image():
    video = np.concatenate([grey(100, 1), grey(0, 4)])  # what comes later must not count
    assert first_frame_psnr(video, grey(110)[0]) == pytest.approx(28.1308, abs=1e-4)


@pytest.mark.parametrize("metric", [psnr, psnr_frames, ssim_frames])
def test_sizes_must_match(metric):
    with pytest.raises(UserError, match=r"\[3, 24, 24, 3\].*\[2, 24, 24, 3\]"):
        metric(clip(0), clip(0, frames=2))


def test_ssim_needs_room_for_its_window():
    with pytest.raises(UserError, match="11 x 11"):
        ssim_frames(clip(0, side=10), clip(1, side=10))
