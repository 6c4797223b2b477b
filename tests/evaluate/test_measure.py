"""One variant, measured from its files."""

from types import SimpleNamespace

import numpy as np
import pytest
from diffusers.video_processor import VideoProcessor
from PIL import Image

from stepquant.evaluate import measure
from stepquant.evaluate.fidelity import PSNR_CAP
from stepquant.evaluate.measure import format_pair, measure_videos
from stepquant.evaluate.video import write_video
from stepquant.models.prompts import Prompt


def test_the_first_frame_is_compared_with_the_image_that_the_model_was_given(tmp_path):
    """A video whose first frame is that image is at the cap; it was not, by the picture's resampling."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (72, 128, 3), dtype=np.uint8))
    picture.save(tmp_path / "picture.png")
    middle = picture.crop((4, 0, 124, 72))  # 120 x 72, as 80 x 48
    pixels = VideoProcessor(vae_scale_factor=8).preprocess(middle, height=48, width=80)[0].permute(1, 2, 0)
    frame = ((pixels * 0.5 + 0.5) * 255).round().numpy().astype(np.uint8)
    write_video(tmp_path / "full.mp4", np.stack([frame, frame]), fps=8)
    write_video(tmp_path / "bf16.mp4", np.stack([frame, 255 - frame]), fps=8)
    prompt = Prompt("full", "evaluation", "a crab", "", {"image": tmp_path / "picture.png"}, 0)
    measured = measure_videos([prompt], lambda name: tmp_path / f"{name}.mp4", lambda name: tmp_path / "bf16.mp4")
    assert measured["full"].first_frame_psnr == PSNR_CAP
    assert measured["full"].psnr_frames == pytest.approx([PSNR_CAP, measured["full"].psnr_frames[1]])
    assert measured["full"].psnr_frames[1] < 10


@pytest.mark.parametrize(
    ("activations", "expected"),
    [
        ([("int4", None), ("int4", None)], "int4"),
        ([("int4", None), ("int4", "int8")], "int4+int8"),
        ([(None, None), (None, None)], None),
    ],
)
def test_formats_name_eight_bits(activations, expected, monkeypatch, tmp_path):
    """Of either expert: the report would else show a checkpoint with 8-bit bins as W4A4."""
    settings = {
        f"expert_{i}": SimpleNamespace(weight_format="int4", activation_format=four, eight_bit_format=eight)
        for i, (four, eight) in enumerate(activations)
    }
    monkeypatch.setattr(measure, "read_settings", lambda folder: settings[folder.name])
    manifest = SimpleNamespace(experts={name: SimpleNamespace(subfolder=name) for name in settings})
    found = format_pair(manifest, tmp_path)
    assert (found.weight, found.activation) == ("int4", expected)
