"""The metrics file of one variant, `artifacts/metrics/V.json`: its schema, its builder, reader and writer.

Files are sorted, indented and end with a newline, so that equal numbers are equal bytes. Decibels are capped at
`fidelity.PSNR_CAP`, errors are relative, bytes are bytes. `bf16` is the reference: its psnr, ssim and format are null
and it has no layers.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stepquant.errors import UserError
from stepquant.evaluate.fidelity import first_frame_psnr, psnr, psnr_frames, ssim_frames
from stepquant.evaluate.layers import LayerError, geometric_mean, mean_by
from stepquant.evaluate.summary import Bootstrap, interval, paired_difference
from stepquant.evaluate.temporal import motion, temporal_flickering
from stepquant.recipe.variants import ORDER
from stepquant.storage.atomic import finished_or_absent

AGAINST_BF16 = ("psnr", "ssim")  # need the BF16 video, so BF16 itself has none
ON_ITS_OWN = ("first_frame_psnr", "temporal_flickering", "motion")
Error = Annotated[float, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class FormatPair(_Part):
    """Formats of weights and activations; activation is null where it stays in BF16 (W4A16)."""

    weight: str
    activation: str | None


class Estimate(_Part):
    """Mean over videos with its bootstrap interval."""

    mean: float
    low: float
    high: float


class Compared(Estimate):
    """An Estimate, and the paired difference to BF16 (null for BF16): the absolute value says little by itself."""

    difference: Estimate | None


class VideoMetrics(_Part):
    """Numbers of one video. psnr_frames shows whether the distance to BF16 grows along the video."""

    psnr: float | None
    psnr_frames: list[float] | None
    ssim: float | None
    first_frame_psnr: float
    temporal_flickering: float
    motion: float


class Videos(_Part):
    """Numbers over all evaluated videos; `per_video` is keyed by sample id."""

    count: Annotated[int, Field(ge=1)]
    psnr: Estimate | None
    ssim: Estimate | None
    first_frame_psnr: Compared
    temporal_flickering: Compared
    motion: Compared
    per_video: dict[str, VideoMetrics]


class Layers(_Part):
    """Geometric means of the layer errors of one expert: over all, per site, per bin and per block.

    Position i of a list is bin or block i, null where nothing was measured. Sites that do not depend on t have no bin.
    """

    mean: Error
    sites: dict[str, Error]
    bins: list[Error | None]
    blocks: list[Error | None]


class Memory(_Part):
    """Bytes of all experts' weights as packed and as BF16, and packed / BF16."""

    packed_bytes: Annotated[int, Field(ge=1)]
    bf16_bytes: Annotated[int, Field(ge=1)]
    ratio: Annotated[float, Field(gt=0)]


class Record(_Part):
    """All that is known of one variant. layers is keyed by expert."""

    variant: Annotated[str, Field(min_length=1)]
    format: FormatPair | None
    videos: Videos
    layers: dict[str, Layers]
    memory: Memory

    @model_validator(mode="after")
    def _reference_or_quantized(self) -> "Record":
        if (self.format is None) != (self.videos.psnr is None):
            raise ValueError("format and videos.psnr must both be null (BF16) or both be given")
        return self


def measure_video(video: np.ndarray, bf16: np.ndarray | None, image: np.ndarray) -> VideoMetrics:
    """All metrics of one video (uint8 [F, H, W, 3]).

    bf16: the video BF16 made from the same noise, null if `video` is that one. image: uint8 [H, W, 3], the input image
    as the model was given it. Raises UserError if sizes differ or there is a single frame.
    """
    return VideoMetrics(
        psnr=None if bf16 is None else psnr(video, bf16),
        psnr_frames=None if bf16 is None else psnr_frames(video, bf16),
        ssim=None if bf16 is None else float(np.mean(ssim_frames(video, bf16))),
        first_frame_psnr=first_frame_psnr(video, image),
        temporal_flickering=temporal_flickering(video),
        motion=motion(video),
    )


def summarize_videos(
    videos: Mapping[str, VideoMetrics], bf16: Mapping[str, VideoMetrics] | None, bootstrap: Bootstrap
) -> Videos:
    """Aggregates {sample id: metrics}; bf16 holds the same ids for BF16, and is null if `videos` is BF16.

    Raises UserError if there is no video or the ids differ.
    """

    def estimate(name: str) -> Estimate:
        return Estimate(**interval(_column(videos, name), bootstrap))

    def compared(name: str) -> Compared:
        pair = bf16 and paired_difference(_column(videos, name), _column(bf16, name), bootstrap)
        return Compared(**estimate(name).model_dump(), difference=pair and Estimate(**pair))

    return Videos(
        count=len(videos),
        **{name: None if bf16 is None else estimate(name) for name in AGAINST_BF16},
        **{name: compared(name) for name in ON_ITS_OWN},
        per_video=dict(videos),
    )


def summarize_layers(errors: Iterable[LayerError]) -> dict[str, Layers]:
    """Geometric means of raw layer errors, per expert. No errors (BF16): an empty dict."""
    experts: dict[str, list[LayerError]] = {}
    for record in errors:
        experts.setdefault(record.expert, []).append(record)
    return {expert: _layers(records) for expert, records in sorted(experts.items())}


def memory(packed_bytes: int, bf16_bytes: int) -> Memory:
    """Memory of a variant; for BF16 both counts are equal."""
    return Memory(packed_bytes=packed_bytes, bf16_bytes=bf16_bytes, ratio=packed_bytes / bf16_bytes)


def write_record(path: Path, record: Record) -> None:
    """Writes a metrics file; the same record gives the same bytes."""
    with finished_or_absent(path) as partial:
        text = json.dumps(record.model_dump(mode="json"), indent=2, sort_keys=True, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")


def read_record(path: Path) -> Record:
    """Reads a metrics file. Raises UserError if it is missing, no JSON, or departs from the schema (names the field)."""
    try:
        return Record.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); stage evaluate writes it") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"{path}: {field}: {first['msg']}; not a metrics file that stage evaluate writes") from error


def read_records(folder: Path) -> list[Record]:
    """Every metrics file of a folder, from the reference to the full recipe. Raises UserError if there is none."""
    paths = sorted(
        folder.glob("*.json"),
        key=lambda path: (ORDER.index(path.stem) if path.stem in ORDER else len(ORDER), path.stem),
    )
    if not paths:
        raise UserError(f"{folder}: holds no metrics; `dvc repro` writes them")
    return [read_record(path) for path in paths]


def _column(videos: Mapping[str, VideoMetrics], name: str) -> dict[str, float]:
    return {sample: getattr(metrics, name) for sample, metrics in videos.items()}


def _layers(records: Sequence[LayerError]) -> Layers:
    return Layers(
        mean=geometric_mean(record.error for record in records),
        sites=mean_by(records, lambda record: record.site),
        bins=_as_list(mean_by(records, lambda record: record.bin)),
        blocks=_as_list(mean_by(records, lambda record: record.block)),
    )


def _as_list(by_index: Mapping[int, float]) -> list[float | None]:
    return [by_index.get(i) for i in range(max(by_index, default=-1) + 1)]
