"""A checkpoint computes what the searches measured: the packed linears against the factors they were made from."""

import pytest
import torch

from stages import _artifacts as artifacts
from stepquant import params
from stepquant.calibration.statistics_files import read_statistics, site_folder
from stepquant.calibration.stored_block import StoredBlock
from stepquant.evaluate.packed_layers import PackedExpert
from stepquant.models.expert import open_expert
from stepquant.models.manifest import read_manifest
from stepquant.quantize.quantized_layer import layer_output
from stepquant.recipe.settings import quant_scheme
from stepquant.recipe.site_files import ClipTable
from stepquant.storage.json_files import read_json


@pytest.mark.parametrize("expert", ["high_noise", "low_noise"])
def test_packed_linears_compute_what_their_factors_do(workspace, monkeypatch, expert):
    monkeypatch.chdir(workspace.root)
    compute, formats = (params.section(workspace.root / "params.yaml", name) for name in ("compute", "format"))
    manifest = read_manifest(artifacts.MODEL)
    model = open_expert(manifest, expert, compute)
    block = StoredBlock(1, model, {"lowrank": artifacts.lowrank(expert), "residual": artifacts.residual(expert)})
    packed = PackedExpert(artifacts.checkpoint("full") / manifest.expert(expert).subfolder, "cpu")
    assert packed.settings.mean_subtraction and packed.settings.rotations
    for site in manifest.expert(expert).ordered_sites:
        layer = block.quantized_layer(site, quant_scheme(formats))
        bias = torch.cat([model.linear_bias(1, linear) for linear in site.linears]).float()
        ratios = ClipTable.from_file(artifacts.clip(expert) / "block_01", site.name, "cpu").ratio
        linears = packed.linears(1, site)
        for b, x in enumerate(read_statistics(site_folder(artifacts.activations(expert), 1, site.name), "cpu").heldout):
            expected = layer_output(x, layer, ratios[b].item(), 0) + bias
            # The bias is stored in bfloat16, with a rounding error of 2^-8 at most, and sums have another order.
            tolerance = 2**-8 * (bias + layer.offset).abs().max() + 1e-4 * expected.abs().max()
            assert (packed.output(linears, x, b) - expected).abs().max() < tolerance, (site.name, b)


@pytest.mark.parametrize("expert", ["high_noise", "low_noise"])
def test_the_damping_is_the_best_that_was_tried(workspace, monkeypatch, expert):
    """By the record of stage gptq: it goes up while validation error falls by more than 0.2 %."""
    monkeypatch.chdir(workspace.root)
    for site, record in read_json(artifacts.residual(expert) / "block_00" / "record.json").items():
        errors, dampings = record["validation_errors"], record["dampings"]
        assert 2 <= len(errors) <= len(dampings), site
        steps = [after < 0.998 * before for before, after in zip(errors, errors[1:])]
        assert all(steps[:-1]) and (len(errors) == len(dampings) or not steps[-1]), site
        assert record["damping"] == dampings[sum(steps)], site
