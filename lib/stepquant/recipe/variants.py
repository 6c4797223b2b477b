"""The variants: recipes assembled from the same cached factors, from the source model to the full recipe.

dvc.yaml lists the same names with their dependencies; a test compares the two.
"""

from dataclasses import dataclass
from typing import Literal

from stepquant.errors import InvalidInput

REFERENCE = "bf16"


@dataclass(frozen=True)
class Variant:
    """Which of the cached factors a packed variant uses.

    Attributes:
        description: One sentence for reports.
        low_rank: Input transform and low-rank branch; else the plain weight.
        gptq: Codes by GPTQ with the refitted branch; else rounded to nearest.
        activations: Quantized activations; else BF16.
        clip: One clip per site for all bins ("single"), one per site and bin ("per_bin"), or none.
        scheduled: 8-bit activations where the precision schedule says so.
    """

    description: str
    low_rank: bool
    gptq: bool
    activations: bool
    clip: Literal["single", "per_bin"] | None
    scheduled: bool = False


# In the order of tables and figures, after the reference.
VARIANTS = {
    "w4a16": Variant(
        "The weights of full, solved for quantized activations, with activations left in BF16.",
        low_rank=True,
        gptq=True,
        activations=False,
        clip=None,
    ),
    "rtn": Variant(
        "Weights and activations rounded to nearest, without input transform and low-rank branch.",
        low_rank=False,
        gptq=False,
        activations=True,
        clip=None,
    ),
    "svdquant": Variant(
        "SVDQuant: centered, smoothed and rotated inputs (as params.yaml says), and a BF16 low-rank branch for the "
        "outliers of the weights.",
        low_rank=True,
        gptq=False,
        activations=True,
        clip=None,
    ),
    "svdquant_gptq": Variant(
        "svdquant with the residual rounded by GPTQ and the low-rank branch refitted to the rounding error.",
        low_rank=True,
        gptq=True,
        activations=True,
        clip=None,
    ),
    "one_clip": Variant(
        "svdquant_gptq with one activation clip per site for the whole trajectory.",
        low_rank=True,
        gptq=True,
        activations=True,
        clip="single",
    ),
    "full": Variant(
        "svdquant_gptq with an activation clip per site and timestep bin.",
        low_rank=True,
        gptq=True,
        activations=True,
        clip="per_bin",
    ),
    "scheduled": Variant(
        "full with 8-bit activations where their rounding errors reach the video most (precision.activation_budget).",
        low_rank=True,
        gptq=True,
        activations=True,
        clip="per_bin",
        scheduled=True,
    ),
}
DESCRIPTIONS = {REFERENCE: "The source model, the reference of all comparisons."} | {
    name: v.description for name, v in VARIANTS.items()
}
ORDER = tuple(DESCRIPTIONS)


def packed_variant(name: str) -> Variant:
    """The variant of that name. Raises InvalidInput if stage pack makes no such variant."""
    if name not in VARIANTS:
        raise InvalidInput(f"--variant {name}; allowed: {', '.join(VARIANTS)}")
    return VARIANTS[name]
