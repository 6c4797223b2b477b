"""The products of stage sensitivity are derivatives: errors of the packed linears, put into the model of diffusers."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from stepquant.calibration.sensitivity import PRODUCTS
from stepquant.calibration.step_gradients import Probes
from stepquant.calibration.trajectories import Trajectories
from stepquant.checkpoint.linears import read_linear, read_settings
from stepquant.models.bins import Bins
from stepquant.models.manifest import read_manifest
from stepquant.models.weights import open_weights
from stepquant.params import section
from stepquant.recipe.precision import ERRORS
from stepquant.storage.json_files import read_json
from tests.workspace import TINY_MODEL

EXPERT, BLOCK = "low_noise", 1
# Of the error: the derivative is wanted, not the effect of the whole error. Less would drown in rounding: diffusers
# computes norms in float32, whatever the dtype is.
SMALL = 0.2


def in_double(arguments):
    """Rounding in float32 would be as large as the effect of a small error."""
    return {name: value.double() if value.is_floating_point() else value for name, value in arguments.items()}


@pytest.mark.parametrize("site_name", ["attn1.qkv", "attn2.kv", "ffn.down"])
@pytest.mark.parametrize("kind", ["activations", "weights"])
@torch.no_grad()
def test_products_are_derivatives_by_the_errors_of_the_packed_linears(workspace, site_name, kind):
    artifacts, params = workspace.root / "artifacts", workspace.root / "params.yaml"
    manifest = read_manifest(artifacts / "model/manifest.json")
    described, sampling = manifest.expert(EXPERT), section(params, "sampling")
    folder = artifacts / "sensitivity" / EXPERT
    step = read_json(folder / "manifest.json")["steps"][-1]
    trajectories = Trajectories(artifacts / "trajectories.zarr")
    calls = [call for call in trajectories.calls(EXPERT) if (call.prompt, call.t) == (step["prompt"], step["t"])]
    site = next(site for site in described.ordered_sites if site.name == site_name)

    model = WanTransformer3DModel.from_pretrained(workspace.root / TINY_MODEL / described.subfolder).double().eval()
    packed = artifacts / "checkpoints/full" / described.subfolder
    weights, settings = open_weights(packed), read_settings(packed)
    size = 0.0

    def put_error(target):
        linear = read_linear(weights, settings, target, "cpu")
        linear.bin.set(Bins(settings.bin_edges).index(step["t"]))
        narrow = linear.activation_format

        def hook(module, args, output):
            x = args[0].float()
            linear.activation_format = None
            unrounded = linear(x)
            linear.activation_format = narrow
            error = linear(x) - unrounded if kind == "activations" else unrounded - output
            return output + size * error

        model.get_submodule(target).register_forward_hook(hook)

    for name in site.linears:
        put_error(f"blocks.{BLOCK}.{name}")
    probes = Probes(1, f"{section(params, 'sensitivity').seed}/{step['prompt']}", sampling.guidance_scale_2)

    def probed() -> float:
        outputs = [model(**in_double(trajectories.inputs([call])), return_dict=False)[0] for call in calls]
        (probe,) = probes.draw(outputs[0].shape)
        factors = (sampling.guidance_scale_2, 1 - sampling.guidance_scale_2)
        return sum(factor * (probe * output).sum().item() for factor, output in zip(factors, outputs, strict=True))

    size = SMALL
    above = probed()
    size = -SMALL
    below = probed()
    products = load_file(folder / step["name"] / PRODUCTS)["products"]
    found = products[0, ERRORS.index(kind), BLOCK, list(described.sites).index(site_name)]
    # Groups of tokens have both signs; their rounding is relative to what is added, not to the sum.
    assert found.sum().item() == pytest.approx((above - below) / (2 * SMALL), abs=0.01 * found.abs().sum().item())
