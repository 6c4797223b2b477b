"""Pictures are decoded as a viewer shows them, and cropped to the aspect ratio of the video."""

import numpy as np
import pytest
from PIL import Image

from stepquant.errors import InvalidInput, MissingFile
from stepquant.evaluate.video import model_image
from stepquant.models.pictures import fit_picture, read_picture, too_small, used_part

RED, BLUE = (255, 0, 0), (0, 0, 255)


def stored(tmp_path, image, name="picture.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def halves():
    """Red above blue, 4 x 6."""
    pixels = np.zeros((6, 4, 3), dtype=np.uint8)
    pixels[:3], pixels[3:] = RED, BLUE
    return Image.fromarray(pixels)


# What a viewer does with the orientation 1 to 8 (EXIF 2.32, 4.6.4): the corner at which the stored first row begins.
@pytest.mark.parametrize(
    ("orientation", "size", "corner"),
    [(1, (4, 6), RED), (3, (4, 6), BLUE), (4, (4, 6), BLUE), (5, (6, 4), RED), (6, (6, 4), BLUE), (8, (6, 4), RED)],
)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_the_orientation_of_a_camera_is_applied(tmp_path, orientation, size, corner, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = stored(tmp_path, halves().resize((40, 60), Image.Resampling.NEAREST), f"picture.{suffix}", exif=exif)
    image = read_picture(path)
    assert image.size == (10 * size[0], 10 * size[1])
    np.testing.assert_allclose(image.getpixel((2, 2)), corner, atol=12)  # jpg and webp lose a little


def test_transparent_parts_are_white_and_hidden_colors_stay_hidden(tmp_path):
    pixels = np.zeros((1, 3, 4), dtype=np.uint8)
    pixels[0, 0], pixels[0, 1], pixels[0, 2] = (*RED, 255), (*RED, 0), (*RED, 51)
    image = read_picture(stored(tmp_path, Image.fromarray(pixels)))
    # alpha 51/255 = 1/5: 255, and 4/5 of white
    assert [image.getpixel((x, 0)) for x in range(3)] == [RED, (255, 255, 255), (255, 204, 204)]


def test_transparent_grey_and_palette_pictures(tmp_path):
    assert read_picture(stored(tmp_path, Image.new("LA", (2, 2), (90, 0)))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putdata([0, 1])
    image = read_picture(stored(tmp_path, palette, transparency=0))
    assert [image.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), BLUE]
    image = read_picture(stored(tmp_path, halves(), transparency=RED))
    assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((0, 5)) == BLUE


def test_a_16_bit_grey_is_scaled(tmp_path):
    grey = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    image = read_picture(stored(tmp_path, Image.fromarray(grey)))
    assert [image.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (100, 100, 100), (255, 255, 255)]


@pytest.mark.parametrize(("mode", "suffix"), [("CMYK", "jpg"), ("F", "tiff"), ("I", "tiff"), ("LAB", "tiff")])
def test_a_mode_without_one_clear_rendering_is_refused(tmp_path, mode, suffix):
    path = stored(tmp_path, Image.new(mode, (4, 4)), f"picture.{suffix}")
    with pytest.raises(InvalidInput, match=f"{path}: a picture of mode {mode}; allowed: RGB or grey"):
        read_picture(path)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_an_animation_is_refused(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, BLUE)]
    path = stored(tmp_path, frames[0], f"picture.{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(InvalidInput, match=f"{path}: holds 2 pictures; allowed: one"):
        read_picture(path)


def test_the_photo_of_a_phone_s_mpo_file_is_taken(tmp_path):
    photo, preview = Image.new("RGB", (16, 16), RED), Image.new("RGB", (16, 16), BLUE)
    image = read_picture(stored(tmp_path, photo, "picture.mpo", save_all=True, append_images=[preview]))
    np.testing.assert_allclose(image.getpixel((4, 4)), RED, atol=3)


def test_no_file_and_no_picture(tmp_path):
    with pytest.raises(MissingFile, match="none.png: no such picture"):
        read_picture(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InvalidInput, match="text.png: no readable picture: "):
        read_picture(tmp_path / "text.png")


@pytest.mark.parametrize(
    ("size", "part"),
    [
        ((832, 480), (0, 0, 832, 480)),
        ((1664, 960), (0, 0, 1664, 960)),
        ((1000, 480), (84, 0, 916, 480)),  # 832 of 1000 columns
        ((480, 832), (0, 277, 480, 554)),  # portrait: 480 x 480 / 832 = 277 rows
        ((1, 500), (0, 249, 1, 250)),
    ],
)
def test_the_middle_in_the_aspect_ratio_of_the_video_is_used(size, part):
    assert used_part(size, 480, 832) == part


def test_a_picture_is_not_squashed():
    """A circle in a portrait picture is a circle in the landscape video, for calibration and evaluation alike."""
    y, x = np.mgrid[:832, :480]
    disk = np.where((y - 416) ** 2 + (x - 240) ** 2 < 100**2, 255, 0).astype(np.uint8)
    picture = Image.fromarray(disk).convert("RGB")
    for shown in (
        np.asarray(fit_picture(picture, 240, 416).resize((416, 240), Image.Resampling.LANCZOS)),
        model_image(picture, 240, 416),
    ):
        rows, columns = np.nonzero(shown[..., 0] > 127)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert abs(height - width) <= 2 and abs(width - 200 * 416 / 480) <= 2


def test_a_picture_of_the_right_aspect_ratio_stays_as_it_is():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    np.testing.assert_array_equal(np.asarray(fit_picture(picture, 480, 480)), np.asarray(picture))


@pytest.mark.parametrize(
    ("size", "small"),
    [((64, 64), True), ((416, 240), False), ((415, 240), True), ((832, 480), False), ((240, 2000), True)],
)
def test_a_picture_with_less_than_a_quarter_of_the_pixels_is_too_small(size, small):
    assert too_small(size, 480, 832) == small
