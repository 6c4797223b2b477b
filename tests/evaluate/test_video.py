import numpy as np
import pytest
from diffusers.video_processor import VideoProcessor
from PIL import Image

from stepquant.errors import UserError
from stepquant.evaluate.video import (
    LABEL_HEIGHT,
    encode_gif,
    fit_width,
    model_image,
    read_video,
    write_preview,
    write_video,
)
from stepquant.models.pictures import fit_picture


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def gif_frames(path) -> np.ndarray:
    with Image.open(path) as gif:
        frames = []
        for i in range(gif.n_frames):
            gif.seek(i)
            frames.append(np.asarray(gif.convert("RGB")))
    return np.stack(frames)


@pytest.mark.parametrize("shape", [(9, 64, 64, 3), (3, 33, 35, 3), (1, 16, 48, 3)])
def test_round_trip_is_exact(tmp_path, shape):
    frames = noise(*shape)  # noise is what a codec finds hardest
    write_video(tmp_path / "clip.mp4", frames, fps=16)
    np.testing.assert_array_equal(read_video(tmp_path / "clip.mp4"), frames)


def test_same_frames_same_bytes(tmp_path):
    frames = noise(17, 64, 64, 3)
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, frames, fps=16)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize(
    "frames", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 8, 8), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)]
)
def test_only_uint8_rgb_is_a_video(tmp_path, frames):
    with pytest.raises(ValueError, match="uint8"):
        write_video(tmp_path / "clip.mp4", frames, fps=8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, b"", b"no video at all", b"truncated"])
def test_unreadable_videos_are_named(tmp_path, content):
    path = tmp_path / "clip.mp4"
    if content == b"truncated":
        write_video(path, noise(3, 16, 16, 3), fps=8)
        content = path.read_bytes()[:200]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="clip.mp4.*expected an MP4"):
        read_video(path)


def test_small_videos_repeat_whole_pixels():
    np.testing.assert_array_equal(
        fit_width(noise(2, 4, 4, 3), width=11), np.kron(noise(2, 4, 4, 3), np.ones((1, 2, 2, 1)))
    )


def test_large_videos_average_over_boxes():
    frames = noise(2, 8, 8, 3)
    boxes = frames.reshape(2, 4, 2, 4, 2, 3).mean(axis=(2, 4))  # 2 x 2 pixels become one
    np.testing.assert_allclose(fit_width(frames, width=4), boxes, atol=1)  # rounded in width, then in height


def test_a_gif_of_few_colours_is_exact_and_plays_at_its_speed(tmp_path):
    frames = noise(5, 1, 1, 3).repeat(16, axis=1).repeat(16, axis=2)  # 5 plain colours
    (tmp_path / "clip.gif").write_bytes(encode_gif(frames, fps=8))
    np.testing.assert_array_equal(gif_frames(tmp_path / "clip.gif"), frames)
    with Image.open(tmp_path / "clip.gif") as gif:
        assert (gif.info["duration"], gif.info["loop"]) == (120, 0)  # 1/8 s in whole hundredths; endless


def test_previews_stand_side_by_side_under_their_labels(tmp_path):
    red, blue = np.zeros((2, 2, 3, 8, 8), np.uint8).transpose(0, 1, 3, 4, 2)
    red[..., 0], blue[..., 2] = 255, 255
    red[1], blue[1] = red[1] // 2, blue[1] // 2
    for name in ("a.gif", "b.gif"):
        write_preview(tmp_path / name, [red, blue], ["red", ""], fps=10, width=16)
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()
    shown = gif_frames(tmp_path / "a.gif")
    assert shown.shape == (2, LABEL_HEIGHT + 16, 32, 3)
    np.testing.assert_array_equal(shown[:, LABEL_HEIGHT:, :16], red.repeat(2, axis=1).repeat(2, axis=2))
    np.testing.assert_array_equal(shown[:, LABEL_HEIGHT:, 16:], blue.repeat(2, axis=1).repeat(2, axis=2))
    assert shown[:, :LABEL_HEIGHT, :16].min() < 128, "the label is written"
    assert shown[:, :LABEL_HEIGHT, 16:].min() > 250, "an empty label leaves the band white, within the palette"


@pytest.mark.parametrize("size", [(1280, 720), (832, 480), (300, 500)])
def test_the_model_s_image_is_what_diffusers_makes_of_it(size):
    """Of its middle part. A rough picture: bicubic, PIL's default, is 33 dB away from it."""
    picture = Image.fromarray(noise(size[1], size[0], 3))
    pixels = VideoProcessor(vae_scale_factor=8).preprocess(fit_picture(picture, 480, 832), height=480, width=832)
    expected = ((pixels[0].permute(1, 2, 0) * 0.5 + 0.5) * 255).round().numpy().astype(np.uint8)
    np.testing.assert_array_equal(model_image(picture, 480, 832), expected)
