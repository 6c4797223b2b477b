"""A variant's layer and clips from cached factors."""

import pytest
import torch

from stepquant.formats import get_format
from stepquant.quantize.quantized_layer import dequantized_weight
from stepquant.recipe.assemble import nearest_layer, variant_clip
from stepquant.recipe.factor import factor_site
from stepquant.recipe.settings import quant_scheme
from stepquant.recipe.site_files import ClipTable
from stepquant.recipe.variants import VARIANTS


@pytest.fixture
def factored(site, settings):
    chosen = settings("int4")
    factors, _ = factor_site(site.W, site.statistics, chosen.factor)
    return factors, quant_scheme(chosen.factor.format)


def test_low_rank_alone_rounds_the_residual_to_nearest(site, factored):
    """(W - up @ down^T) * s, rotated, rounded to nearest with scales absmax / 7."""
    factors, scheme = factored
    layer = nearest_layer(site.W, factors, scheme)
    assert layer.proj_down is factors.proj_down
    rest = factors.transform.weight(site.W - factors.proj_up.float() @ factors.proj_down.float().T)
    steps = rest.unflatten(1, (-1, 64)).abs().amax(-1, keepdim=True) / 7
    wrong = (dequantized_weight(layer) - rest).unflatten(1, (-1, 64)).abs()
    assert (wrong <= 0.51 * steps).all()


def test_rtn_rounds_the_plain_weight(site, factored):
    scheme = factored[1]
    layer = nearest_layer(site.W, None, scheme)
    fmt = get_format("int4")
    assert torch.equal(layer.codes, fmt.encode(site.W, fmt.scales(site.W)))
    assert layer.proj_down.shape == (128, 0) and not layer.offset.any()


TABLE = ClipTable(
    ratio=torch.tensor([0.8, 0.9]),
    exponent=torch.tensor([-1, 1], dtype=torch.int8),
    single_ratio=torch.tensor([0.7, 0.7]),
    single_exponent=torch.tensor([0, 0], dtype=torch.int8),
)


@pytest.mark.parametrize(
    ("variant", "ratios", "exponents"),
    [("full", [0.8, 0.9], [-1, 1]), ("one_clip", [0.7, 0.7], [0, 0])],
)
def test_clips_of_a_variant(settings, variant, ratios, exponents):
    found = variant_clip(VARIANTS[variant], TABLE, 2, quant_scheme(settings("mxfp4").factor.format))
    assert found[0].tolist() == pytest.approx(ratios) and found[1].tolist() == exponents
    assert found[1].dtype == torch.int8


@pytest.mark.parametrize("name", ["int4", "nvfp4"])
def test_only_mxfp4_stores_exponent_offsets(settings, name):
    ratio, exponent = variant_clip(VARIANTS["full"], TABLE, 2, quant_scheme(settings(name).factor.format))
    assert ratio.tolist() == pytest.approx([0.8, 0.9]) and exponent is None


def test_without_a_table_nothing_is_clipped(settings):
    ratio, exponent = variant_clip(VARIANTS["svdquant"], None, 3, quant_scheme(settings("mxfp4").factor.format))
    assert ratio.tolist() == [1.0] * 3 and exponent.tolist() == [0] * 3


def test_unquantized_activations_have_no_clips(settings):
    scheme = quant_scheme(settings("mxfp4").factor.format)
    assert variant_clip(VARIANTS["w4a16"], TABLE, 2, scheme) == (None, None)


def test_a_site_without_timestep_has_one_clip_for_every_bin(settings):
    one = ClipTable(*(tensor[:1] for tensor in TABLE.tensors().values()))
    ratio, exponent = variant_clip(VARIANTS["full"], one, 3, quant_scheme(settings("mxfp4").factor.format))
    assert ratio.tolist() == pytest.approx([0.8] * 3) and exponent.tolist() == [-1] * 3
