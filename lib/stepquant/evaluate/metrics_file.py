"""The metrics file of one variant, `artifacts/metrics/V.json`: its schema, its builder, reader and writer.

Files are sorted, indented and end with a newline, so that equal numbers are equal bytes. Decibels are capped at
`fidelity.PSNR_CAP`, and layer errors are relative. `bf16` is the reference: its psnr, ssim and format are null, and it
has no layers.
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

Error = Annotated[float, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class FormatPair(_Part):
    """Formats of weights and activations; activation is null if activations stay in BF16 (W4A16)."""

    weight: str
    activation: str | None


class Estimate(_Part):
    """Mean over videos with its bootstrap interval."""

    mean: float
    low: float
    high: float


class Compared(Estimate):
    """An Estimate and the paired difference to BF16 (null for BF16), because the absolute value alone says little."""

    difference: Estimate | None


class VideoMetrics(_Part):
    """Metrics of one video. psnr_frames shows whether the distance to BF16 grows along the video; first_frame_psnr is
    null for a video that was made from text alone."""

    psnr: float | None
    psnr_frames: list[float] | None
    ssim: float | None
    first_frame_psnr: float | None
    temporal_flickering: float
    motion: float


class Videos(_Part):
    """Metrics over all evaluated videos; `per_video` is keyed by prompt id."""

    count: Annotated[int, Field(ge=1)]
    psnr: Estimate | None
    ssim: Estimate | None
    first_frame_psnr: Compared | None
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
    """Bytes of the weights of all experts, packed and in BF16, and their ratio."""

    packed_bytes: Annotated[int, Field(ge=1)]
    bf16_bytes: Annotated[int, Field(ge=1)]
    ratio: Annotated[float, Field(gt=0)]


class Record(_Part):
    """All measurements of one variant. layers is keyed by expert."""

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


def measure_video(video: np.ndarray, bf16: np.ndarray | None, image: np.ndarray | None) -> VideoMetrics:
    """All metrics of one video.

    Args:
        video: uint8 [F, H, W, 3].
        bf16: The video that BF16 made from the same noise; None if `video` is that one.
        image: The input image as the model was given it, uint8 [H, W, 3]; None for text-to-video.

    Raises:
        UserError: The sizes differ, or there is a single frame.
    """
    return VideoMetrics(
        psnr=None if bf16 is None else psnr(video, bf16),
        psnr_frames=None if bf16 is None else psnr_frames(video, bf16),
        ssim=None if bf16 is None else float(np.mean(ssim_frames(video, bf16))),
        first_frame_psnr=None if image is None else first_frame_psnr(video, image),
        temporal_flickering=temporal_flickering(video),
        motion=motion(video),
    )


def summarize_videos(
    videos: Mapping[str, VideoMetrics], bf16: Mapping[str, VideoMetrics] | None, bootstrap: Bootstrap
) -> Videos:
    """Means over videos with their intervals.

    Args:
        videos: Prompt id -> metrics.
        bf16: The same of BF16; None if `videos` is BF16.
        bootstrap: How the intervals are computed.

    Raises:
        UserError: There is no video, or the ids differ.
    """

    def estimate(name: str) -> Estimate:
        return Estimate(**interval(_column(videos, name), bootstrap))

    def compared(name: str) -> Compared:
        difference = None
        if bf16 is not None:
            difference = Estimate(**paired_difference(_column(videos, name), _column(bf16, name), bootstrap))
        return Compared(**estimate(name).model_dump(), difference=difference)

    return Videos(
        count=len(videos),
        psnr=None if bf16 is None else estimate("psnr"),
        ssim=None if bf16 is None else estimate("ssim"),
        first_frame_psnr=None if None in _column(videos, "first_frame_psnr").values() else compared("first_frame_psnr"),
        temporal_flickering=compared("temporal_flickering"),
        motion=compared("motion"),
        per_video=dict(videos),
    )


def summarize_layers(errors: Iterable[LayerError]) -> dict[str, Layers]:
    """Expert -> geometric means of its layer errors; empty if there are none (BF16)."""
    experts: dict[str, list[LayerError]] = {}
    for record in errors:
        experts.setdefault(record.expert, []).append(record)
    return {expert: _layers(records) for expert, records in sorted(experts.items())}


def memory(packed_bytes: int, bf16_bytes: int) -> Memory:
    """Bytes of a variant; for BF16 both counts are equal."""
    return Memory(packed_bytes=packed_bytes, bf16_bytes=bf16_bytes, ratio=packed_bytes / bf16_bytes)


def write_record(path: Path, record: Record) -> None:
    """Write a metrics file. The same record gives the same bytes."""
    with finished_or_absent(path) as partial:
        text = json.dumps(record.model_dump(mode="json"), indent=2, sort_keys=True, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")


def read_record(path: Path) -> Record:
    """Read a metrics file.

    Raises:
        UserError: The file is missing, is not JSON, or does not match the schema; the message names the field.
    """
    try:
        return Record.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); stage evaluate writes it") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"{path}: {field}: {first['msg']}; not a metrics file that stage evaluate writes") from error


def read_records(folder: Path, variants: Sequence[str] | None = None) -> list[Record]:
    """The metrics files of a folder.

    Args:
        folder: Where stage evaluate writes.
        variants: Names of variants, each of which must be there; None for every file.

    Returns:
        The records in the order of the variants, others last.

    Raises:
        UserError: There is no file, one of the wanted ones is missing or damaged, or they are not of one model and of
            the same prompts, as after a run that made only some variants.
    """
    if variants:
        if unknown := [name for name in variants if name not in ORDER]:
            raise UserError(f"--variant {unknown[0]}; allowed: {', '.join(ORDER)}")
        return _comparable(folder, [read_record(folder / f"{name}.json") for name in ORDER if name in variants])
    paths = sorted(
        folder.glob("*.json"),
        key=lambda path: (ORDER.index(path.stem) if path.stem in ORDER else len(ORDER), path.stem),
    )
    if not paths:
        raise UserError(f"{folder}: no metrics; `dvc repro` writes them")
    return _comparable(folder, [read_record(path) for path in paths])


def _comparable(folder: Path, records: list[Record]) -> list[Record]:
    """The records, if they are of one model and of the same prompts. Raises UserError if they are not."""
    first = records[0]
    for record in records[1:]:
        own, other = ((r.memory.bf16_bytes, r.videos.per_video.keys()) for r in (record, first))
        if own != other:
            raise UserError(
                f"{folder / record.variant}.json: is of another model or other prompts than that of {first.variant}; "
                f"run `dvc repro evaluate@{record.variant}`, or name the variants to show with --variant"
            )
    return records


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
