"""What a checkpoint computes is what the searches measured: the packed linears against the factors they were made of."""

import pytest
import torch

from stages import artifacts
from stages.blocks import Block, precision_of, site_layer
from stages.common import read_json
from stages.evaluate import PackedExpert
from stages.expert import open_expert
from stepquant import params
from stepquant.calibration.activations import read_activations, site_folder
from stepquant.models.sites import WAN_SITES
from stepquant.quantize.layer import layer_output


@pytest.mark.parametrize("expert", ["high_noise", "low_noise"])
def test_packed_linears_compute_what_their_factors_do(workspace, monkeypatch, expert):
    monkeypatch.chdir(workspace.root)
    compute, precision = (params.section(workspace.root / "params.yaml", name) for name in ("compute", "format"))
    manifest = read_json(artifacts.MODEL)
    model = open_expert(manifest, expert, compute)
    folders = {"lowrank": artifacts.lowrank(expert), "residual": artifacts.residual(expert), "clip": artifacts.clip(expert)}
    block = Block(1, model, folders)
    packed = PackedExpert(artifacts.checkpoint("full") / manifest["experts"][expert]["subfolder"], "cpu")
    assert packed.settings.centred and packed.settings.rotations
    for site in WAN_SITES:
        layer = site_layer(block, site, precision_of(precision))
        bias = torch.cat([model.linear_bias(1, linear) for linear in site.linears]).float()
        ratios = block.factor("clip", f"{site.name}.ratio")
        for b, x in enumerate(read_activations(site_folder(artifacts.activations(expert), 1, site.name), "cpu").heldout):
            expected = layer_output(x, layer, ratios[b].item(), 0) + bias
            # The bias is stored in bfloat16: eight significant bits, a rounding error of 2^-8 at most; sums are taken in another order.
            tolerance = 2**-8 * (bias + layer.offset).abs().max() + 1e-4 * expected.abs().max()
            assert (packed.output(1, site, x, b) - expected).abs().max() < tolerance, (site.name, b)


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
