"""The records of a site: shapes() predicts exactly what tensors() gives and what is read back from the file."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepquant.errors import DamagedFile, MissingFile, UserError
from stepquant.formats import get_format
from stepquant.quantize.quantized_layer import layer_output
from stepquant.quantize.smooth import round_to_nearest
from stepquant.recipe.clip import clip_site
from stepquant.recipe.factor import factor_site
from stepquant.recipe.settings import quant_scheme
from stepquant.recipe.site_files import FACTORS, ClipTable, ResidualFactors, TransformFactors, block_tensors

FORMATS = ["int4", "mxfp4", "nvfp4"]
N, K, RANK, SITE = 48, 128, 8, "ffn.up"


@pytest.fixture(params=FORMATS)
def records(request, site, settings):
    """Every record of one site in one format, with what shapes() says of it."""
    chosen, fmt = settings(request.param), get_format(request.param)
    factors, _ = factor_site(site.W, site.statistics, chosen.factor)
    layer = round_to_nearest(site.W, factors.transform, *factors.branch, quant_scheme(chosen.factor.format))
    clips, _ = clip_site(site.W, layer, site.statistics, chosen.clip)
    residual = ResidualFactors.of_layer(layer)
    return [
        (factors, TransformFactors.shapes(N, K, RANK)),
        (residual, ResidualFactors.shapes(N, K, RANK, fmt)),
        (clips, ClipTable.shapes(bins=2)),
    ]


def test_shapes_are_those_of_the_tensors_written_and_read_back(records, tmp_path):
    for record, shapes in records:
        save_file(block_tensors({SITE: record}), tmp_path / FACTORS)
        stored = load_file(tmp_path / FACTORS)
        assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == {
            f"{SITE}.{name}": shape for name, shape in shapes.items()
        }
        again = type(record).from_file(tmp_path, SITE, "cpu").tensors()
        assert again.keys() == record.tensors().keys()
        for name, tensor in record.tensors().items():
            assert again[name].dtype == tensor.dtype and torch.equal(bits(again[name]), bits(tensor))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes; float8 has no equality."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_a_layer_read_back_gives_the_same_output(records, site, settings, tmp_path):
    (factors, _), (residual, _), _ = records
    scheme = next(quant_scheme(settings(n).factor.format) for n in FORMATS if matches(residual, n))
    save_file(block_tensors({SITE: residual}), tmp_path / FACTORS)
    again = ResidualFactors.from_file(tmp_path, SITE, "cpu").layer(factors.transform, scheme)
    x = site.statistics.heldout[0]
    expected = layer_output(x, residual.layer(factors.transform, scheme), 0.9, 0)
    assert torch.equal(layer_output(x, again, 0.9, 0), expected)


def matches(residual: ResidualFactors, name: str) -> bool:
    return residual.scales.dtype == get_format(name).scale_dtype


@pytest.mark.parametrize("kind", [TransformFactors, ResidualFactors, ClipTable])
@pytest.mark.parametrize("damage", ["missing", "truncated", "another site"])
def test_a_missing_or_damaged_file_is_refused(kind, damage, tmp_path):
    if damage == "truncated":
        (tmp_path / FACTORS).write_bytes(b"\x10\x00")
    elif damage == "another site":
        save_file({"attn1.out.mean": torch.zeros(2)}, tmp_path / FACTORS)
    with pytest.raises(
        MissingFile if damage == "missing" else DamagedFile, match="missing or damaged.*run its stage again"
    ):
        kind.from_file(tmp_path, SITE, "cpu")


def test_nvfp4_without_its_tensor_scale_is_refused(site, settings):
    """The name is optional in the file, since the other formats have none."""
    chosen = settings("nvfp4")
    factors, _ = factor_site(site.W, site.statistics, chosen.factor)
    scheme = quant_scheme(chosen.factor.format)
    residual = ResidualFactors.of_layer(round_to_nearest(site.W, factors.transform, *factors.branch, scheme))
    tensors = residual.tensors() | {"tensor_scale": None, "row_scale": None}
    with pytest.raises(UserError, match="nvfp4 scales: the per-tensor scale is missing"):
        layer_output(site.W, ResidualFactors(**tensors).layer(factors.transform, scheme), 1.0, 0)
