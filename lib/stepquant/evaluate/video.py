"""Video files: lossless MP4 for measurements, animated GIF for viewing.

A video is a uint8 array [F, H, W, 3] (frames, height, width, RGB).

Storage contract of the MP4: H.264 High 4:4:4 Predictive, GBR planes (no RGB -> YUV rounding), quantizer 0, hence
exact. Frame i has pts i in units of 1/fps. The same frames give the same bytes, because the encoder uses one thread
(the output of x264 depends on the number of threads), every pts is explicit, and the muxer writes no dates.
"""

from collections.abc import Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
from av.container import Flags
from PIL import Image, ImageDraw, ImageFont

from stepquant.errors import UserError
from stepquant.models.pictures import fit_picture
from stepquant.storage.atomic import finished_or_absent

LABEL_HEIGHT = 16  # pixels of the caption band of a preview


def model_image(image: Image.Image, height: int, width: int) -> np.ndarray:
    """An input image as the model is given it: cropped to the aspect ratio, then resized by Lanczos as in diffusers
    (its VideoProcessor.preprocess).

    Args:
        image: The picture of a prompt, RGB.
        height: Height of the video in pixels.
        width: Width of the video in pixels.

    Returns:
        uint8 [height, width, 3].
    """
    return np.asarray(fit_picture(image, height, width).resize((width, height), Image.Resampling.LANCZOS))


def write_video(path: Path, frames: np.ndarray, fps: int) -> None:
    """Write a lossless MP4. Identical frames give identical bytes.

    Args:
        path: The file.
        frames: uint8 [F, H, W, 3].
        fps: Frames per second.

    Raises:
        ValueError: frames is not such an array.
    """
    check_video(frames)
    with finished_or_absent(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        container.flags |= Flags.bitexact.value
        stream = container.add_stream("libx264rgb", rate=fps, options={"qp": "0"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        stream.thread_count = 1
        stream.codec_context.time_base = Fraction(1, fps)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def read_video(path: Path) -> np.ndarray:
    """Read every frame of a video file.

    Returns:
        uint8 [F, H, W, 3].

    Raises:
        UserError: The file is missing, cannot be decoded or has no frame.
    """
    try:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (OSError, av.FFmpegError, IndexError) as error:
        raise UserError(
            f"{path}: cannot be read as a video ({error}); expected an MP4 that stage generate wrote"
        ) from error
    if not frames:
        raise UserError(f"{path}: has no frame; expected an MP4 that stage generate wrote")
    return np.stack(frames)


def check_video(frames: np.ndarray) -> None:
    """Raise ValueError unless frames is uint8 [F, H, W, 3] with at least one frame."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(f"a video is uint8 [F, H, W, 3] with F >= 1, not {frames.dtype} {list(frames.shape)}")


def write_preview(path: Path, clips: Sequence[np.ndarray], labels: Sequence[str], fps: int, width: int) -> None:
    """Write a GIF of clips side by side, each below its label.

    Args:
        path: The file.
        clips: Videos of one shape, uint8 [F, H, W, 3].
        labels: One per clip; it may be empty.
        fps: Frames per second.
        width: Approximate width of one clip in pixels, see `fit_width`.

    Raises:
        ValueError: The shapes differ, or the numbers of labels and clips.
    """
    columns = [_captioned(fit_width(clip, width), label) for clip, label in zip(clips, labels, strict=True)]
    with finished_or_absent(path) as partial:
        partial.write_bytes(encode_gif(np.concatenate(columns, axis=2), fps))


def fit_width(frames: np.ndarray, width: int) -> np.ndarray:
    """Scale a video to about `width` pixels.

    Small videos repeat every pixel by a whole factor, which keeps the original pixels visible. Large ones average over
    boxes.

    Args:
        frames: uint8 [F, H, W, 3].
        width: Pixels.

    Returns:
        uint8 [F, H', W', 3].
    """
    check_video(frames)
    _, high, wide, _ = frames.shape
    if wide <= width:
        factor = width // wide
        return frames.repeat(factor, axis=1).repeat(factor, axis=2)
    size = (width, max(1, round(high * width / wide)))
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in frames])


def encode_gif(frames: np.ndarray, fps: int) -> bytes:
    """A looping GIF with 256 colors, for viewing only.

    All frames have one palette and no dithering, because a palette or dither pattern per frame would flicker, and
    flicker is one of the artifacts that viewers look for. Frame times are rounded to 1/100 s, the unit of GIF.

    Args:
        frames: uint8 [F, H, W, 3].
        fps: Frames per second.
    """
    check_video(frames)
    palette = Image.fromarray(frames.reshape(-1, *frames.shape[2:])).quantize(256, Image.Quantize.MEDIANCUT)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    buffer = BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=round(100 / fps) * 10, loop=0)
    return buffer.getvalue()


def _captioned(frames: np.ndarray, label: str) -> np.ndarray:
    """A white band with the label above every frame: uint8 [F, LABEL_HEIGHT + H, W, 3]."""
    band = Image.new("RGB", (frames.shape[2], LABEL_HEIGHT), "white")
    ImageDraw.Draw(band).text((2, 1), label, fill="black", font=ImageFont.load_default(size=LABEL_HEIGHT - 5))
    bands = np.broadcast_to(np.asarray(band), (len(frames), *np.asarray(band).shape))
    return np.concatenate([bands, frames], axis=1)
