"""Products of a gradient with the errors of a layer: against the layer's outputs, which are tested on their own."""

from dataclasses import replace

import pytest
import torch

from stepquant.formats import eight_bit_partner, get_format
from stepquant.quantize.error_products import LayerPass, error_products
from stepquant.quantize.quantized_layer import layer_output
from tests.quantize.test_clip import FORMATS, factors_of


@pytest.mark.parametrize("name", FORMATS)
def test_each_error_is_a_difference_of_outputs(layer, name):
    """With slabs of tokens, of which the last one is shorter."""
    W, x = layer
    x = x.repeat(2100 // len(x) + 1, 1)[:2100]
    factors, fmt = factors_of(W, x, name), get_format(name)
    G = torch.randn(len(x), len(W), generator=torch.Generator().manual_seed(1))
    found = error_products(LayerPass(x, x @ W.T, G), factors, 0.8, 0, eight_bit_partner(fmt))

    def output(activation, clip):
        return layer_output(x, replace(factors, scheme=replace(factors.scheme, activation=activation)), clip, 0)

    unrounded = output(None, 1.0)
    expected = [output(fmt, 0.8) - unrounded, output(eight_bit_partner(fmt), 1.0) - unrounded, unrounded - x @ W.T]
    torch.testing.assert_close(found, torch.stack([(G * error).sum(1) for error in expected]), rtol=1e-3, atol=1e-3)
    narrow, wide, _ = found.square().sum(1)
    # 18 times finer steps for int8; two more bits of mantissa for mxfp8, so 4 times.
    assert wide < narrow / (100 if name == "int4" else 10)
