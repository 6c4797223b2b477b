"""The recipe of one layer on a device: smoothing, its gradient, branch, GPTQ, refit and clip give the CPU's bytes."""

from functools import partial

import pytest
import torch
from torch import Tensor

from stepquant.formats import get_format
from stepquant.quantize.alternate import (
    RoundingProblem,
    initial_branch,
    make_problem,
    refit_branch,
    rounded_by_gptq,
    select_rows,
)
from stepquant.quantize.clip import choose_clip, clip_candidates, clip_errors
from stepquant.quantize.damping import search_damping, validation_rows
from stepquant.quantize.lowrank import Branch
from stepquant.quantize.quantized_layer import QuantizedLayer, rounding_noise
from stepquant.quantize.smooth import TransformCandidates, TransformSearch, search_transform
from stepquant.quantize.smooth_gradient import refine_smoothing
from stepquant.quantize.weight_scales import scales_by_error
from tests.quantize.scheme import layer_spec, scheme

RANK, SEED = 8, 0


@pytest.fixture
def problem_data(make_layer) -> tuple[Tensor, Tensor]:
    W, x = make_layer(seed=3, rows=48, channels=128, tokens=768)
    return W, x + 3.0


def searched(W: Tensor, x: Tensor, name: str) -> TransformSearch:
    """Smoothing by search, then by gradient."""
    mean = x.mean(0).to(torch.bfloat16)
    magnitude = (x - mean.float()).square().mean(0).sqrt()
    candidates, spec = TransformCandidates([(0.4, 0.6), (0.6, 0.4)], [0, 32]), layer_spec(name, RANK)
    found = search_transform(W, x[:512], magnitude, mean, candidates, spec)
    return refine_smoothing(W, x[:256], x[256:512], found, spec, steps=5)


def rounded(problem: RoundingProblem, branch: Branch, name: str) -> QuantizedLayer:
    return rounded_by_gptq(problem, branch, scheme(name), partial(scales_by_error, get_format(name)), column_block=32)


def damped(W: Tensor, x: Tensor, search: TransformSearch, name: str) -> RoundingProblem:
    """The problem under the better of two dampings, on some rows."""
    transform = search.transform
    z = transform.apply(x[:512])
    noise = 0.25 * rounding_noise([x[:256], x[256:512]], transform, scheme(name))
    rows = validation_rows(W, RANK)

    def error(problem: RoundingProblem) -> float:
        part = select_rows(problem, rows)
        layer = rounded(part, initial_branch(part, (search.proj_down, search.proj_up[rows]), seed=SEED), name)
        return clip_errors([x[512:]], part.W, layer, clip_candidates([1.0], [0], get_format(name))).item()

    problem = make_problem(W, transform, z.T @ z / len(z), noise, damping=0.01, act_order=True)
    return search_damping(problem, [0.01, 0.1], error, act_order=True)[0]


def recipe(W: Tensor, x: Tensor, name: str) -> dict[str, Tensor]:
    """Everything that a checkpoint would hold of the layer."""
    search = searched(W, x, name)
    problem = damped(W, x, search, name)
    layer = rounded(problem, initial_branch(problem, (search.proj_down, search.proj_up), seed=SEED), name)
    layer = refit_branch(problem, layer, seed=SEED)
    candidates = clip_candidates([0.7, 0.85, 1.0], [-1, 0], get_format(name))
    errors = clip_errors([x[:256], x[512:]], W, layer, candidates)
    choice = torch.tensor([*choose_clip(errors).per_bin], device=errors.device)
    transform = {"smooth": layer.transform.smooth, "mean": layer.transform.mean}
    branch = {"proj_down": layer.proj_down, "proj_up": layer.proj_up, "offset": layer.offset}
    return transform | branch | {"codes": layer.codes, "scales": layer.scales.group, "errors": errors, "clip": choice}


@pytest.mark.parametrize("name", ["int4", "mxfp4", "nvfp4"])
def test_the_recipe_of_a_layer(device, problem_data, name):
    expected, found = recipe(*problem_data, name), recipe(*(tensor.to(device) for tensor in problem_data), name)
    assert all(tensor.device == torch.ones(1, device=device).device for tensor in found.values())
    # CUDA adds in another order, so a value between two codes may be rounded to the other one.
    if device.startswith("cuda"):
        torch.testing.assert_close(found["errors"].cpu(), expected["errors"], rtol=0.05, atol=0)
        return
    for key, tensor in found.items():
        assert torch.equal(tensor.cpu(), expected[key]), key
