import json
import math

import numpy as np
import pytest

from stepquant.errors import UserError
from stepquant.evaluate.layers import LayerError
from stepquant.evaluate.metrics_file import (
    FormatPair,
    Record,
    VideoMetrics,
    measure_video,
    memory,
    read_record,
    read_records,
    summarize_layers,
    summarize_videos,
    write_record,
)
from stepquant.evaluate.summary import Bootstrap

BOOTSTRAP = Bootstrap(samples=200, confidence=0.9, seed=0)
ERRORS = [
    LayerError("low_noise", 0, "attn1.qkv", 0, 0.1),
    LayerError("low_noise", 2, "attn1.qkv", 1, 0.4),
    LayerError("low_noise", 2, "attn2.kv", None, 0.2),
    LayerError("high_noise", 0, "ffn.up", 1, 0.5),
]


def video(step: int, start: int = 100) -> np.ndarray:
    """Four frames of 16 x 16, each `step` grey levels above the one before."""
    return (start + step * np.arange(4)).astype(np.uint8)[:, None, None, None].repeat(16, 1).repeat(16, 2).repeat(3, 3)


def metrics(value: float, against: float | None) -> VideoMetrics:
    return VideoMetrics(
        psnr=against,
        psnr_frames=None if against is None else [against],
        ssim=None if against is None else 0.5,
        first_frame_psnr=value,
        temporal_flickering=0.9,
        motion=value,
    )


def record(variant: str = "full") -> Record:
    bf16 = {"a": metrics(30, None), "b": metrics(40, None)}
    videos = {"a": metrics(29, 20.0), "b": metrics(39, 22.0)}
    if variant == "bf16":
        return Record(
            variant="bf16",
            format=None,
            videos=summarize_videos(bf16, None, BOOTSTRAP),
            layers={},
            memory=memory(400, 400),
        )
    return Record(
        variant=variant,
        format=FormatPair(weight="nvfp4", activation="nvfp4"),
        videos=summarize_videos(videos, bf16, BOOTSTRAP),
        layers=summarize_layers(ERRORS),
        memory=memory(100, 400),
    )


def test_metrics_of_one_video_by_hand():
    found = measure_video(video(10), bf16=video(0), image=video(0, start=110)[0])
    # Frames are off by 0, 10, 20, 30: MSE (0 + 100 + 400 + 900) / 4 = 350.
    assert found.psnr == pytest.approx(10 * math.log10(65025 / 350))
    assert found.psnr_frames == pytest.approx([100, *(10 * math.log10(65025 / mse) for mse in (100, 400, 900))])
    assert found.first_frame_psnr == pytest.approx(10 * math.log10(65025 / 100))
    assert found.temporal_flickering == pytest.approx(245 / 255)
    assert found.motion == pytest.approx(20)
    assert found.ssim == pytest.approx(
        np.mean([(2 * 100 * y + 6.5025) / (100**2 + y**2 + 6.5025) for y in (100, 110, 120, 130)])
    )


def test_bf16_is_compared_with_nothing():
    found = measure_video(video(10), bf16=None, image=video(0)[0])
    assert (found.psnr, found.psnr_frames, found.ssim) == (None, None, None)
    summary = record("bf16").videos
    assert (summary.psnr, summary.ssim, summary.motion.difference) == (None, None, None)
    assert summary.motion.mean == 35


def test_videos_are_averaged_and_compared_in_pairs():
    found = record().videos
    assert (found.count, found.psnr.mean, found.motion.mean) == (2, 21, 34)
    assert found.motion.difference.model_dump() == {"mean": -1, "low": -1, "high": -1}  # both videos: one less
    assert found.temporal_flickering.difference.mean == 0


def test_layers_are_averaged_geometrically():
    found = summarize_layers(ERRORS)
    assert list(found) == ["high_noise", "low_noise"]
    assert found["low_noise"].mean == pytest.approx(0.2)  # (0.1 * 0.4 * 0.2)^(1/3) = 0.008^(1/3)
    assert found["low_noise"].sites == pytest.approx({"attn1.qkv": 0.2, "attn2.kv": 0.2})
    assert found["low_noise"].bins == pytest.approx([0.1, 0.4])
    assert found["low_noise"].blocks == [pytest.approx(0.1), None, pytest.approx(math.sqrt(0.08))]
    assert found["high_noise"].bins == [None, pytest.approx(0.5)]


def test_files_come_back_and_are_the_same_bytes(tmp_path):
    for name in ("a.json", "b.json"):
        write_record(tmp_path / name, record())
    assert read_record(tmp_path / "a.json") == record()
    text = (tmp_path / "a.json").read_text()
    assert text == (tmp_path / "b.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    assert json.loads(text)["memory"] == {"packed_bytes": 100, "bf16_bytes": 400, "ratio": 0.25}


def test_bf16_file_has_nulls(tmp_path):
    write_record(tmp_path / "bf16.json", record("bf16"))
    raw = json.loads((tmp_path / "bf16.json").read_text())
    assert (raw["format"], raw["videos"]["psnr"], raw["layers"]) == (None, None, {})


def _set(raw: dict, *path_and_value) -> dict:
    *path, last, value = path_and_value
    node = raw
    for key in path:
        node = node[key]
    node[last] = value
    return raw


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda raw: "{", "the file"),
        (lambda raw: json.dumps([]), "the file"),
        (lambda raw: json.dumps({k: v for k, v in raw.items() if k != "memory"}), "memory: Field required"),
        (lambda raw: json.dumps(_set(raw, "extra", 1)), "extra: Extra inputs"),
        (lambda raw: json.dumps(_set(raw, "videos", "psnr", "mean", "high")), "videos.psnr.mean"),
        (lambda raw: json.dumps(_set(raw, "videos", "psnr", "mean", math.nan)), "videos.psnr.mean"),
        (lambda raw: json.dumps(_set(raw, "format", None)), "the file: .*must both be null"),
        (lambda raw: json.dumps(_set(raw, "layers", "low_noise", "mean", -1.0)), "layers.low_noise.mean"),
    ],
)
def test_damaged_files_are_refused_by_field(tmp_path, damage, message):
    path = tmp_path / "full.json"
    path.write_text(damage(record().model_dump(mode="json")))
    with pytest.raises(UserError, match=f"full.json: {message}"):
        read_record(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="full.json.*stage evaluate"):
        read_record(tmp_path / "full.json")


def test_some_variants_are_read_in_their_order(tmp_path):
    for variant in ("full", "rtn", "bf16"):
        write_record(tmp_path / f"{variant}.json", record(variant))
    assert [found.variant for found in read_records(tmp_path)] == ["bf16", "rtn", "full"]
    assert [found.variant for found in read_records(tmp_path, ["full", "bf16"])] == ["bf16", "full"]
    with pytest.raises(UserError, match="svdquant.json: cannot be read .*; stage evaluate writes it"):
        read_records(tmp_path, ["svdquant"])
    with pytest.raises(UserError, match="--variant fll; allowed: bf16, w4a16, "):
        read_records(tmp_path, ["fll"])


def test_what_an_earlier_run_left_is_not_mixed_in(tmp_path):
    """Metrics of the demo, say, beside those of a model of which only bf16 and full were made."""
    for variant in ("bf16", "rtn", "full"):
        write_record(tmp_path / f"{variant}.json", record(variant))
    earlier = record("rtn").model_copy(update={"memory": memory(10, 40)})
    write_record(tmp_path / "rtn.json", earlier)
    with pytest.raises(
        UserError,
        match="rtn.json: is of another model or other prompts than that of bf16.* to show with --variant",
    ):
        read_records(tmp_path)
    assert len(read_records(tmp_path, ["bf16", "full"])) == 2
