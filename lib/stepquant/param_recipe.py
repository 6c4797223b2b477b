"""The sections of params.yaml that describe the recipe. An expert can override all but `target` and `format`."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from stepquant.param_sections import NonNegative, Positive, Section

WeightFormat = Literal["int4", "mxfp4", "nvfp4", "asym_w4a8"]
ActivationFormat = Literal["int4", "mxfp4", "nvfp4", "int8_row"]
Rounding = Literal["floor", "ceil"]
UnitInterval = Annotated[float, Field(ge=0, le=1)]


class Target(Section):
    """Who will run the checkpoint; the recipe may use what that program can carry (stepquant.targets).

    Attributes:
        program: Name of the target.
    """

    program: Literal["stepquant", "comfyui_w4a8"]


class Format(Section):
    """Number formats.

    Attributes:
        weight: Format of the weights.
        activation: Format of the activations.
        e8m0_weight: How mxfp4 rounds the power-of-two scale of weights; other formats do not use it.
        e8m0_activation: The same for activations.
        activation_scales: Scale of an activation group from its `absmax`, or of two the one with the smaller rounding
            `error` (nvfp4).
    """

    weight: WeightFormat
    activation: ActivationFormat
    e8m0_weight: Rounding
    e8m0_activation: Rounding
    activation_scales: Literal["absmax", "error"]

    @property
    def eight_bit_activations(self) -> bool:
        """Whether activations have 8 bits in every timestep bin. stepquant.formats knows too, but imports torch."""
        return self.activation == "int8_row"

    @field_validator("activation_scales")
    @classmethod
    def _of_this_format(cls, value: str, info: ValidationInfo) -> str:
        activation = info.data.get("activation")  # None if it is wrong itself
        if value == "error" and activation not in ("nvfp4", None):
            raise ValueError(f"format.activation is {activation!r}; allowed: 'absmax', or 'error' with 'nvfp4'")
        return value


class Smooth(Section):
    """Smoothing factors s = magnitude(X)^alpha / absmax(W)^beta per input channel.

    Attributes:
        magnitude: Magnitude of an input channel over all tokens.
        alpha: One exponent, or `search` to try the candidates.
        beta: Exponent of the weight; null means 1 - alpha.
        candidates: Exponents that the search tries.
        gradient_steps: Iterations of Adam that refine s; 0 for none.
    """

    magnitude: Literal["rms", "absmax"]
    alpha: UnitInterval | Literal["search"]
    beta: UnitInterval | None
    candidates: Annotated[list[UnitInterval], Field(min_length=1)]
    gradient_steps: NonNegative


class Center(Section):
    """Mean subtraction.

    Attributes:
        means: Whether the channel means of a site are subtracted from its input before quantization.
    """

    means: bool


class Rotate(Section):
    """Block-Hadamard rotation of a site's input.

    Attributes:
        hadamard: Kind of the Hadamard matrix (quantize/rotate.py).
        hadamard_sizes: Candidate sizes, powers of two; of four if the matrix is regular. 0 is no rotation.
    """

    hadamard: Literal["sylvester", "regular"]
    hadamard_sizes: Annotated[list[NonNegative], Field(min_length=1)]

    @field_validator("hadamard_sizes")
    @classmethod
    def _sizes_of_the_kind(cls, value: list[int], info: ValidationInfo) -> list[int]:
        regular = info.data.get("hadamard") == "regular"
        powers_of_two = all(size.bit_count() <= 1 for size in value)
        powers_of_four = powers_of_two and all(size == 0 or size.bit_length() % 2 for size in value)
        if len(set(value)) != len(value) or not (powers_of_four if regular else powers_of_two):
            power = "four, as rotate.hadamard is regular" if regular else "two"
            raise ValueError(f"{value}: allowed are 0 and powers of {power}, each once")
        return value


class LowRank(Section):
    """The low-rank branch.

    Attributes:
        rank: Rank of the branch; 0 for none.
        seed: Seed of the random sketch of its truncated SVD.
    """

    rank: NonNegative
    seed: NonNegative


class Gptq(Section):
    """Rounding of the residual.

    Attributes:
        scales: Weight scales with the smallest rounding `error` of the group, or from its `absmax`.
        refits: How often the low-rank branch is refitted to the rounding error, with GPTQ after each refit.
        noise: Fraction of the activations' rounding-noise variance that the weight and branch solvers account for.
        dampings: Candidates for the Hessian damping, rising. Validation prompts select one per site.
        act_order: Whether GPTQ takes the columns in order of their Hessian diagonal.
        column_block: Columns per block of lazy updates.
    """

    scales: Literal["error", "absmax"]
    refits: NonNegative
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


class Precision(Section):
    """The precision schedule.

    Attributes:
        activation_budget: Share of the multiply-adds of a sampled video's quantized linears that may take 8-bit
            activations; 0 leaves all in `format.activation`.
    """

    activation_budget: UnitInterval


class Clip(Section):
    """Candidates of the clipping search.

    Attributes:
        ratios: Factors on the dynamic activation scale.
        exponent_offsets: Offsets of the exponent of the scale; mxfp4 activations only.
    """

    ratios: Annotated[list[Annotated[float, Field(gt=0, le=2)]], Field(min_length=1)]
    exponent_offsets: Annotated[list[Annotated[int, Field(ge=-4, le=4)]], Field(min_length=1)]

    @field_validator("ratios", "exponent_offsets")
    @classmethod
    def _no_repeats(cls, value: list[float]) -> list[float]:
        if len(set(value)) != len(value):
            raise ValueError(f"values repeat: {value}")
        return value
