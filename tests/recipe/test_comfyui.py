"""The recipe of the target comfyui_w4a8 on one site: what comfy-kitchen computes from its codes, and what it gains."""

from pathlib import Path

import torch

import stepquant.profiles
from benchmarks.layers import seeded_layer
from stepquant.checkpoint.packed import pack_site
from stepquant.params import section
from stepquant.quantize.quantized_layer import layer_output, relative_error
from stepquant.recipe.clip import clip_site
from stepquant.recipe.factor import factor_site
from stepquant.recipe.round import round_site
from stepquant.recipe.settings import ClipSettings, FactorSettings, RoundSettings, quant_scheme
from stepquant.recipe.site_files import ResidualFactors, TransformFactors, block_tensors
from tests.peers import import_peer

kitchen = import_peer("comfy_kitchen.backends.eager.w4a8_int8")
PROFILE = Path(stepquant.profiles.__file__).parent / "comfyui_w4a8.yaml"
NAMES = ("format", "smooth", "center", "rotate", "lowrank", "gptq", "clip")


def test_gptq_codes_in_comfy_kitchen_have_half_the_error_of_its_own_rounding(tmp_path):
    s = {name: section(PROFILE, name) for name in NAMES}
    layer = seeded_layer("heavy", 256, 0, tokens_per_column=16)
    statistics, scheme, K = layer.activations(), quant_scheme(s["format"]), 256
    factors, _ = factor_site(
        layer.W, statistics, FactorSettings(s["format"], s["smooth"], s["center"], s["rotate"], s["lowrank"])
    )
    assert torch.equal(factors.smooth, torch.ones(K, dtype=torch.bfloat16)) and not factors.mean.any()
    assert (factors.rotation, factors.hadamard, factors.proj_down.shape) == (256, "regular", (K, 0))
    residual, _ = round_site(layer.W, statistics, factors, RoundSettings(s["format"], s["lowrank"], s["gptq"]))

    again = stored_and_read(factors, residual, tmp_path)
    quantized = again[1].layer(again[0].transform, scheme)
    table, _ = clip_site(layer.W, quantized, statistics, ClipSettings(s["format"], s["clip"]))
    assert torch.equal(table.ratio, torch.ones(1))
    clip = table.ratio, None
    packed = pack_site(quantized, {"a": (100, K), "b": (156, K)}, {}, clip, mean_subtraction=False)["b"]

    x = statistics.heldout[0][:500]
    reference = x @ layer.W.T
    codebook = torch.tensor(kitchen._FIXED_LUT)
    file = (packed.qweight, packed.wscales.T.contiguous(), packed.wcscales, codebook)
    theirs = kitchen.w4a8_int8_linear(x, *file, out_dtype=torch.float32)
    ours = layer_output(x, quantized, 1.0, 0)
    assert relative_error(ours[:, 100:], theirs) < 1e-6
    # In BF16 comfy-kitchen also rounds the rotated input, before its 8 bits.
    rounded = kitchen.w4a8_int8_linear(x.bfloat16(), *file).float()
    assert relative_error(rounded, reference[:, 100:]) < 1.1 * relative_error(ours[:, 100:], reference[:, 100:])
    own = kitchen.w4a8_int8_linear(
        x, *kitchen.quantize_w4a8_int8_weight(layer.W)[:3], codebook, out_dtype=torch.float32
    )
    assert relative_error(ours, reference) < 0.5 * relative_error(own, reference)


def stored_and_read(factors, residual, folder) -> tuple[TransformFactors, ResidualFactors]:
    """The records as the stages hand them on; their tensors have the announced shapes."""
    from safetensors.torch import save_file

    N, K = 256, 256
    assert {name: (tuple(t.shape), t.dtype) for name, t in factors.tensors().items()} == factors.shapes(N, K, 0)
    shapes = residual.shapes(N, K, 0, quant_scheme(section(PROFILE, "format")).weight)
    assert {name: (tuple(t.shape), t.dtype) for name, t in residual.tensors().items()} == shapes
    found = []
    for name, record in (("lowrank", factors), ("residual", residual)):
        (folder / name / "0").mkdir(parents=True)
        save_file(block_tensors({"site": record}), folder / name / "0" / "factors.safetensors")
        found.append(type(record).from_file(folder / name / "0", "site", "cpu"))
    return found[0], found[1]
