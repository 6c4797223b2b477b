"""Pictures of prompts: decoded as a viewer shows them, and cropped to the aspect ratio of the video.

What the model gets is the same for calibration, generation and the comparison of the first frame:

    upright       the EXIF orientation is applied
    opaque        transparent parts show white, as on a white page; the hidden colors under them never do
    8-bit RGB     16-bit greys are scaled; modes without one clear rendering (CMYK, Lab, 32-bit) are refused
    one picture   animations and pages are refused; of an MPO file, as phones write them, the photo is taken
    not squashed  the middle of the picture, in the aspect ratio of the video
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from stepquant.errors import InvalidInput, MissingFile

OPAQUE_MODES = ("1", "L", "P", "RGB", "YCbCr")
TRANSPARENT_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N")
# A picture whose used part has less than this fraction of the video's pixels is refused: enlarged more than twice in
# each direction it has no detail, and calibration would see activations that no real picture gives.
SMALLEST_AREA = 1 / 4


def read_picture(path: Path) -> Image.Image:
    """The picture of a file, upright, opaque and RGB.

    Args:
        path: an image file.

    Raises:
        MissingFile: there is no such file.
        InvalidInput: the file is no picture, is damaged, holds several pictures, or has a mode that is refused.
    """
    try:
        with Image.open(path) as image:
            image.load()
            count: int = getattr(image, "n_frames", 1)
            if count > 1 and image.format != "MPO":
                raise InvalidInput(f"{path}: holds {count} pictures; allowed: one")
            upright = ImageOps.exif_transpose(image)
            return _opaque(upright, path)
    except FileNotFoundError:
        raise MissingFile(f"{path}: no such picture") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"{path}: no readable picture: {error}") from None


def _opaque(image: Image.Image, path: Path) -> Image.Image:
    if image.mode in TRANSPARENT_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode in OPAQUE_MODES:
        return image.convert("RGB")
    if image.mode in SIXTEEN_BIT_MODES:
        grey = np.rint(np.asarray(image).astype(np.float64) / 257).astype(np.uint8)  # 65535 is 255
        return Image.fromarray(grey).convert("RGB")
    raise InvalidInput(f"{path}: a picture of mode {image.mode}; allowed: RGB or grey, so convert it to sRGB")


def used_part(size: tuple[int, int], height: int, width: int) -> tuple[int, int, int, int]:
    """The middle of a picture in the aspect ratio of a video.

    Args:
        size: (width, height) of the picture.
        height: height of the video.
        width: width of the video.

    Returns:
        left, upper, right and lower edge; right and lower are exclusive.
    """
    w, h = size
    cut_w, cut_h = min(w, max(1, round(h * width / height))), min(h, max(1, round(w * height / width)))
    left, upper = (w - cut_w) // 2, (h - cut_h) // 2
    return left, upper, left + cut_w, upper + cut_h


def fit_picture(image: Image.Image, height: int, width: int) -> Image.Image:
    """The part of a picture that a video of this size shows. diffusers resizes it, which would squash the whole one.

    Args:
        image: the picture.
        height: height of the video.
        width: width of the video.

    Returns:
        The picture, cropped to `used_part`; equal pixels if it has the aspect ratio already.
    """
    return image.crop(used_part(image.size, height, width))


def too_small(size: tuple[int, int], height: int, width: int) -> bool:
    """Whether the used part of a picture has less than SMALLEST_AREA of the video's pixels."""
    left, upper, right, lower = used_part(size, height, width)
    return (right - left) * (lower - upper) < SMALLEST_AREA * height * width
