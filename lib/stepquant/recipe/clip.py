"""Clips one site: searches the factor of the dynamic activation scale, per timestep bin, on the final weights."""

from typing import Any

import torch
from torch import Tensor

from stepquant.quantize.clip import choose_clip, clip_candidates, clip_errors
from stepquant.quantize.quantized_layer import QuantizedLayer
from stepquant.recipe.settings import ClipSettings, quant_scheme
from stepquant.recipe.site_files import ClipTable
from stepquant.recipe.site_statistics import SiteStatistics


def clip_site(
    W: Tensor, layer: QuantizedLayer, statistics: SiteStatistics, settings: ClipSettings
) -> tuple[ClipTable, dict[str, Any]]:
    """The best clip of each bin, and the best single clip for all bins, by the output error on search tokens.

    Args:
        W: Stacked weight of the unquantized site, [N, K].
        layer: The site's final quantized layer.
        statistics: The site's statistics, on the device of W.
        settings: Sections of params.yaml.

    Returns:
        What is stored (small tables, on the CPU), and a record of all candidates' errors in JSON types.

    Raises:
        UserError: As `choose_clip`.
    """
    activation = quant_scheme(settings.format).activation_format
    candidates = clip_candidates(settings.clip.ratios, settings.clip.exponent_offsets, activation)
    errors = clip_errors(statistics.search, W, layer, candidates)
    choice = choose_clip(errors)
    ratios = torch.tensor([c.ratio for c in candidates])
    offsets = torch.tensor([c.exponent_offset for c in candidates], dtype=torch.int8)
    per_bin, single = list(choice.per_bin), [choice.single] * len(errors)
    record = {
        "candidates": [[c.ratio, c.exponent_offset] for c in candidates],
        "search_errors": errors.tolist(),
        "chosen": per_bin,
        "single": choice.single,
    }
    return ClipTable(ratios[per_bin], offsets[per_bin], ratios[single], offsets[single]), record
