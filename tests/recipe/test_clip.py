"""clip_site without any stage: the table against errors that are computed candidate by candidate."""

import pytest
import torch

from stepquant.errors import UserError
from stepquant.quantize.quantized_layer import layer_output
from stepquant.quantize.smooth import round_to_nearest
from stepquant.recipe.clip import clip_site
from stepquant.recipe.factor import factor_site
from stepquant.recipe.settings import quant_scheme

RATIOS, OFFSETS = [0.7, 0.85, 1.0], [-1, 0]


@pytest.fixture
def layer_of(site, settings):
    def make(name: str):
        chosen = settings(name, clip={"ratios": RATIOS, "exponent_offsets": OFFSETS})
        factors, _ = factor_site(site.W, site.statistics, chosen.factor)
        scheme = quant_scheme(chosen.factor.format)
        return round_to_nearest(site.W, factors.transform, *factors.branch, scheme), chosen

    return make


@pytest.mark.parametrize("name", ["int4", "mxfp4", "nvfp4"])
def test_each_bin_has_the_candidate_with_the_smallest_error(site, layer_of, name):
    layer, chosen = layer_of(name)
    table, record = clip_site(site.W, layer, site.statistics, chosen.clip)
    candidates = [(ratio, offset) for ratio in RATIOS for offset in (OFFSETS if name == "mxfp4" else [0])]
    assert record["candidates"] == [list(candidate) for candidate in candidates]
    squares = torch.zeros(len(candidates))
    for b, x in enumerate(site.statistics.search):
        reference = x @ site.W.T
        errors = torch.stack([(layer_output(x, layer, *c) - reference).norm() / reference.norm() for c in candidates])
        torch.testing.assert_close(torch.tensor(record["search_errors"][b]), errors)
        squares += errors.square()
        best = candidates[int(errors.argmin())]
        assert (table.ratio[b].item(), table.exponent[b].item()) == (pytest.approx(best[0]), best[1])
    best = candidates[int(squares.argmin())]
    assert table.single_ratio.tolist() == pytest.approx([best[0]] * 2)
    assert table.single_exponent.tolist() == [best[1]] * 2


def test_a_bin_with_broken_tokens_is_refused(site, layer_of):
    layer, chosen = layer_of("int4")
    load = site.statistics.load
    site.statistics.load = lambda name: load(name) * (torch.nan if name == "search.1" else 1)
    with pytest.raises(UserError, match="timestep bin 1"):
        clip_site(site.W, layer, site.statistics, chosen.clip)
