"""The parameters: one strict model per section of params.yaml.

There are no defaults here, on purpose: DVC sees only what stands in params.yaml, so every value has to stand there.
A stage names the sections it reads and gets nothing else; `experts.<expert>.<section>` holds that expert's overrides.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from stepquant.errors import UserError

FormatName = Literal["int4", "mxfp4", "nvfp4"]
Rounding = Literal["floor", "ceil"]
Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """plumbing: the keys that say only where work runs. They enter no unit's key, and no stage but report depends on them."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    plumbing: ClassVar[tuple[str, ...]] = ()

    def decisive(self) -> dict[str, Any]:
        """The values that can change a result: all but the plumbing."""
        return self.model_dump(exclude=set(self.plumbing))


class Compute(Section):
    """How arithmetic runs (device, dtype, threads), and where: by which executor, in how many processes, on which cluster.

    address: host:port of a running Ray cluster; null starts one on this machine. gpus_per_unit: what Ray gives to one unit of work,
    a fraction of one GPU or a whole number.
    """

    plumbing = ("executor", "workers", "address", "gpus_per_unit")

    device: str
    dtype: Literal["float32", "bfloat16", "float16"]
    threads: Positive
    executor: Literal["local", "ray"]
    workers: Positive
    address: Annotated[str, Field(pattern=r"^[^:/]+:\d+$")] | None
    gpus_per_unit: Annotated[float, Field(ge=0)]

    @field_validator("gpus_per_unit")
    @classmethod
    def _fraction_or_whole(cls, value: float) -> float:
        if value > 1 and value % 1:
            raise ValueError(f"{value}: allowed are fractions of one GPU, and whole numbers")
        return value


class Model(Section):
    """A local diffusers folder, or a hub id with a revision."""

    source: str
    revision: str | None


class Sampling(Section):
    """How a video is sampled, for calibration and for evaluation alike (diffusers' WanImageToVideoPipeline call)."""

    height: Positive
    width: Positive
    num_frames: Positive
    steps: Positive
    flow_shift: Annotated[float, Field(gt=0)]
    guidance_scale: Annotated[float, Field(ge=1)]
    guidance_scale_2: Annotated[float, Field(ge=1)]
    max_sequence_length: Positive


class Trajectories(Section):
    """manifest: JSONL of calibration prompts; prompts: how many of its rows per split (null: all)."""

    manifest: str
    calibration_prompts: Positive | None
    validation_prompts: Positive | None
    heldout_prompts: Positive | None


class Storage(Section):
    """url: folder of an object store for what only stages read, trajectories and activations; null keeps them in artifacts/."""

    url: Annotated[str, Field(pattern=r"^(s3|gs|az)://[^/]+")] | None


class Capture(Section):
    """Steps that are replayed per prompt and bin (null: all); tokens kept per site and bin, for searches (of calibration and of validation
    prompts) and for held-out errors; of how many tokens one goes into second moments and means; calls that run through a block at
    once; calls and blocks of one unit of work."""

    steps_per_bin: Positive | None
    search_tokens: Positive
    heldout_tokens: Positive
    hessian_stride: Positive
    calls_per_chunk: Positive
    calls_per_shard: Positive
    blocks_per_shard: Positive
    seed: Seed


class Format(Section):
    """4-bit formats. The E8M0 roundings say how mxfp4 chooses a power-of-two scale; other formats do not read them."""

    weight: FormatName
    activation: FormatName
    e8m0_weight: Rounding
    e8m0_activation: Rounding


class Smooth(Section):
    """s = magnitude(X)^alpha / absmax(W)^beta. magnitude: of each input channel over all tokens. alpha: one value, or `search` over the
    candidates; beta null means 1 - alpha. gradient_steps: by which s is moved afterwards."""

    magnitude: Literal["rms", "absmax"]
    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["search"]
    beta: Annotated[float, Field(ge=0, le=1)] | None
    candidates: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)]
    gradient_steps: Annotated[int, Field(ge=0)]


class Center(Section):
    """Whether each site's channel means are taken off its input before it is quantized."""

    means: bool


class Rotate(Section):
    """Candidates for the size of each site's block-Hadamard rotation; 0 is none."""

    hadamard_sizes: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]

    @field_validator("hadamard_sizes")
    @classmethod
    def _powers_of_two(cls, value: list[int]) -> list[int]:
        if len(set(value)) != len(value) or any(size.bit_count() > 1 for size in value):
            raise ValueError(f"{value}: allowed are 0 and powers of two, each once")
        return value


class LowRank(Section):
    rank: Annotated[int, Field(ge=0)]
    seed: Seed


class Gptq(Section):
    """refits: how often the branch is fitted to what rounding lost. scales: by each group's rounding error, or its absmax. noise: share of
    the activations' rounding variance that weights and branch reckon with. dampings: candidates, rising, chosen from per site."""

    scales: Literal["error", "absmax"]
    refits: Annotated[int, Field(ge=0)]
    noise: Annotated[float, Field(ge=0)]
    dampings: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
    act_order: bool
    column_block: Positive

    @field_validator("dampings")
    @classmethod
    def _rising(cls, value: list[float]) -> list[float]:
        if value != sorted(set(value)):
            raise ValueError(f"{value}: allowed are rising values, each once")
        return value


class Clip(Section):
    """Candidates of the clip search; the exponent offsets apply to mxfp4 activations only."""

    ratios: Annotated[list[Annotated[float, Field(gt=0, le=2)]], Field(min_length=1)]
    exponent_offsets: Annotated[list[Annotated[int, Field(ge=-4, le=4)]], Field(min_length=1)]

    @field_validator("ratios", "exponent_offsets")
    @classmethod
    def _no_repeats(cls, value: list) -> list:
        if len(set(value)) != len(value):
            raise ValueError(f"values repeat: {value}")
        return value


class Generate(Section):
    """manifest: JSONL of evaluation prompts; prompts: how many of its rows (null: all)."""

    manifest: str
    prompts: Positive | None
    fps: Positive


class Evaluate(Section):
    """Paired bootstrap over videos: resamples, and the share of them inside an interval."""

    bootstrap_samples: Positive
    confidence: Annotated[float, Field(gt=0, lt=1)]
    seed: Seed


class Report(Section):
    title: Annotated[str, Field(min_length=1)]


class Bins(Section):
    """Timestep bins per expert: a count, or edges in t."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, Positive | list[float]]

    @property
    def by_expert(self) -> dict[str, int | list[float]]:
        return self.__pydantic_extra__


SECTIONS: dict[str, Any] = {
    "compute": Compute,
    "model": Model,
    "sampling": Sampling,
    "trajectories": Trajectories,
    "bins": Bins,
    "storage": Storage,
    "capture": Capture,
    "format": Format,
    "smooth": Smooth,
    "center": Center,
    "rotate": Rotate,
    "lowrank": LowRank,
    "gptq": Gptq,
    "clip": Clip,
    "generate": Generate,
    "evaluate": Evaluate,
    "report": Report,
}
OVERRIDABLE = ("smooth", "center", "rotate", "lowrank", "gptq", "clip")


class _Experts(BaseModel):
    """What each expert does differently; dvc.yaml runs over its keys."""

    model_config = ConfigDict(extra="ignore", strict=True)
    experts: Annotated[dict[str, dict[str, dict[str, Any]]], Field(min_length=1)]

    @model_validator(mode="after")
    def _known_overrides(self) -> "_Experts":
        for expert, sections in self.experts.items():
            if set(sections) != set(OVERRIDABLE):
                raise ValueError(
                    f"{expert} has {sorted(sections)}; allowed: exactly {sorted(OVERRIDABLE)} (empty is fine)"
                )
        return self


def read_params(path: Path) -> dict[str, Any]:
    """The whole file as plain data. Raises UserError if it is missing or is not YAML of sections."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such file; `stepquant profile demo` writes one") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: found {type(raw).__name__}; expected sections such as {', '.join(SECTIONS)}")
    unknown = sorted(set(raw) - set(SECTIONS) - {"experts"})
    if unknown:
        raise UserError(f"{path}: unknown section '{unknown[0]}'; allowed: {', '.join([*SECTIONS, 'experts'])}")
    return raw


def section(path: Path, name: str, expert: str | None = None) -> Any:
    """One validated section, with the expert's overrides merged in if an expert is named and the section has them."""
    raw = read_params(path)
    values = _take(raw, path, name)
    prefix = name
    if expert is not None and name in OVERRIDABLE:
        overrides = _take(raw, path, f"experts.{expert}.{name}")
        if overrides:
            values, prefix = values | overrides, f"experts.{expert}.{name} over {name}"
    return _validate(SECTIONS[name], values, path, prefix)


def check(path: Path) -> None:
    """Validate the whole file: every section, and every section as each expert sees it. Raises UserError."""
    experts = _validate(_Experts, read_params(path), path, "").experts
    binned = section(path, "bins").by_expert
    if set(binned) != set(experts):
        raise UserError(f"{path}: bins has {sorted(binned)}; allowed: exactly the experts, {sorted(experts)}")
    for name in SECTIONS:
        section(path, name)
        for expert in experts if name in OVERRIDABLE else ():
            section(path, name, expert)


def _take(raw: dict[str, Any], path: Path, dotted: str) -> dict[str, Any]:
    node: Any = raw
    for part in dotted.split("."):
        if not isinstance(node, dict) or part not in node:
            raise UserError(f"{path}: missing key '{dotted}'")
        node = node[part]
    if not isinstance(node, dict):
        raise UserError(f"{path}: {dotted}: found {node!r}; expected a section of keys")
    return node


def _validate(model: Any, values: dict[str, Any], path: Path, prefix: str) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(_message(error, model, path, prefix)) from None


def _message(error: ValidationError, model: Any, path: Path, prefix: str) -> str:
    # A misspelt key is both unknown and missing; its own name is what the user can find in the file.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    # Only the first part of a location is a key: the rest are list positions and the branches of a union.
    field = first["loc"][:1]
    key = ".".join([prefix] * bool(prefix) + [str(part) for part in field])
    allowed = ", ".join(model.model_fields)
    if first["type"] == "extra_forbidden":
        return f"{path}: {key}: unknown parameter; allowed: {allowed}"
    if first["type"] == "missing":
        return f"{path}: {key}: missing; expected the keys {allowed}"
    reasons = dict.fromkeys(e["msg"] for e in error.errors() if e["loc"][:1] == field)
    return f"{path}: {key}: found {first['input']!r}; {'; or '.join(reasons)}"
