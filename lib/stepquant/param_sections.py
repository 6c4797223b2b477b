"""The sections of params.yaml, one strict model each, but for those of the recipe (param_recipe.py).

The models have no defaults. DVC tracks only the values in params.yaml, so every value has to be there.
docs/parameters.md explains the effect of each key.
"""

from os.path import normpath
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Base of all sections.

    Attributes:
        plumbing: The keys that only say where the work runs. They do not enter the key of a unit, and no stage but
            report depends on them.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    plumbing: ClassVar[tuple[str, ...]] = ()

    def decisive(self) -> dict[str, Any]:
        """The values that can change a result: all but the plumbing."""
        return self.model_dump(exclude=set(self.plumbing))


class Compute(Section):
    """How the arithmetic runs, and where.

    Attributes:
        device: torch device, such as `cpu`, `cuda` or `cuda:1`.
        dtype: dtype of the unquantized parts.
        threads: CPU threads. Matrix decompositions give other bytes with another number of threads.
        offload: Where the pipeline is while it samples (models/offload.py); `none` on a CPU.
        executor: `local` processes or a `ray` cluster.
        workers: Units of work at a time. With `local`, 1 runs them in the process of the stage.
        address: host:port of a running Ray cluster; null starts one on this machine.
        gpus_per_unit: GPUs that Ray gives to one unit of work: a fraction of one GPU, or a whole number.
    """

    plumbing = ("offload", "executor", "workers", "address", "gpus_per_unit")

    device: str
    dtype: Literal["float32", "bfloat16", "float16"]
    threads: Positive
    offload: Literal["none", "model", "group", "disk"]
    executor: Literal["local", "ray"]
    workers: Positive
    address: Annotated[str, Field(pattern=r"^[^:/]+:\d+$")] | None
    gpus_per_unit: Annotated[float, Field(ge=0)]

    @field_validator("offload")
    @classmethod
    def _no_offload_from_a_cpu(cls, value: str, info: ValidationInfo) -> str:
        if value != "none" and info.data.get("device", "").partition(":")[0] == "cpu":
            raise ValueError(
                "there is no GPU memory to save with compute.device: cpu; set compute.offload: none, or a GPU"
            )
        return value

    @field_validator("executor")
    @classmethod
    def _no_index_under_ray(cls, value: str, info: ValidationInfo) -> str:
        device = info.data.get("device", "")
        if value == "ray" and ":" in device:
            raise ValueError(
                f"Ray assigns the GPUs and numbers those of a worker from 0, so compute.device: {device} names no GPU; "
                f"set compute.device: {device.split(':')[0]}"
            )
        return value

    @field_validator("gpus_per_unit")
    @classmethod
    def _fraction_or_whole(cls, value: float) -> float:
        if value > 1 and value % 1:
            raise ValueError(f"{value}: allowed are fractions of one GPU, and whole numbers")
        return value


class Lora(Section):
    """A LoRA that is fused into one expert before anything else.

    Attributes:
        expert: Name of the expert.
        file: safetensors file in data/models, which DVC watches.
        weight: Factor of what it adds.
    """

    expert: str
    file: str
    weight: float

    @field_validator("file")
    @classmethod
    def _watched(cls, value: str) -> str:
        if not PurePosixPath(normpath(value)).is_relative_to("data/models"):
            raise ValueError("allowed: a file in data/models/, whose changes DVC notices")
        return value


class Model(Section):
    """The source pipeline.

    Attributes:
        source: A local diffusers folder, or a hub id.
        revision: Revision of the hub id; null for a folder.
        loras: LoRAs that are fused into it, in this order; may be empty.
    """

    source: str
    revision: str | None
    loras: list[Lora]


class Sampling(Section):
    """How a video is sampled, for calibration and evaluation alike.

    Attributes:
        height: Pixels, as in diffusers' WanImageToVideoPipeline.__call__ (and so are the next two).
        width: Pixels.
        num_frames: Frames of the video.
        steps: Steps of the sampler.
        flow_shift: Timestep shift of the scheduler.
        guidance_scale: Classifier-free guidance of the first expert.
        guidance_scale_2: The same of the second expert.
        max_sequence_length: Text tokens per prompt.
    """

    height: Positive
    width: Positive
    num_frames: Positive
    steps: Positive
    flow_shift: Annotated[float, Field(gt=0)]
    guidance_scale: Annotated[float, Field(ge=1)]
    guidance_scale_2: Annotated[float, Field(ge=1)]
    max_sequence_length: Positive


class Trajectories(Section):
    """The prompts whose trajectories are recorded.

    Attributes:
        manifest: JSONL file of prompts.
        calibration_prompts: Prompts of this split; null takes all.
        validation_prompts: The same.
        heldout_prompts: The same.
        text_prompts: Text file with one caption per line; null for none. They are encoded, not sampled, and calibrate
            the sites that read the text tokens alone.
    """

    manifest: str
    calibration_prompts: Positive | None
    validation_prompts: Positive | None
    heldout_prompts: Positive | None
    text_prompts: str | None


class Storage(Section):
    """Where trajectories and statistics are kept.

    Attributes:
        url: Folder of an object store; null keeps them in artifacts/.
    """

    url: Annotated[str, Field(pattern=r"^(s3|gs|az)://[^/]+")] | None


class Capture(Section):
    """What is replayed, and which statistics are kept.

    Attributes:
        steps_per_bin: Recorded steps per prompt and bin that are replayed; null for all.
        search_tokens: Tokens per site and bin for the searches, and as many again from validation prompts.
        heldout_tokens: Tokens per site and bin for the reported errors.
        hessian_stride: One token in this many enters the Hessian and the channel means.
        calls_per_chunk: Calls in one forward pass of a block.
        calls_per_shard: Calls of one unit of work.
        blocks_per_shard: Transformer blocks of one unit of work.
        seed: Seed of the token samples.
    """

    steps_per_bin: Positive | None
    search_tokens: Positive
    heldout_tokens: Positive
    hessian_stride: Positive
    calls_per_chunk: Positive
    calls_per_shard: Positive
    blocks_per_shard: Positive
    seed: NonNegative


class Sensitivity(Section):
    """How the effect of rounding errors on the denoiser's output is measured.

    Attributes:
        prompts: Calibration prompts whose steps are measured.
        steps_per_bin: Recorded steps per prompt and bin; null for all.
        probes: Random probes of the output per step.
        seed: Seed of the probes.
    """

    prompts: Positive
    steps_per_bin: Positive | None
    probes: Positive
    seed: NonNegative


class Generate(Section):
    """The evaluation prompts.

    Attributes:
        manifest: JSONL file of prompts.
        prompts: How many of its prompts; null takes all.
        fps: Frames per second of the video files.
    """

    manifest: str
    prompts: Positive | None
    fps: Positive


class Evaluate(Section):
    """Paired bootstrap over videos.

    Attributes:
        bootstrap_samples: Resamples.
        confidence: Fraction of the resamples inside an interval.
        seed: Seed of the resampling.
    """

    bootstrap_samples: Positive
    confidence: Annotated[float, Field(gt=0, lt=1)]
    seed: NonNegative


class Report(Section):
    """The report page.

    Attributes:
        title: Title of the page.
    """

    title: Annotated[str, Field(min_length=1)]


class Bins(Section):
    """Timestep bins: the keys are the experts, the values a number of bins or their edges in t."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, Positive | list[float]]

    @property
    def by_expert(self) -> dict[str, int | list[float]]:
        """The number of bins, or their edges, of each expert."""
        return self.__pydantic_extra__
