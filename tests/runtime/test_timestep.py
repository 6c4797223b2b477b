import copy
import math

import pytest
import torch
from torch import nn

from stepquant.errors import UserError
from stepquant.models.bins import make_bins
from stepquant.runtime.layout import QuantizationSettings
from stepquant.runtime.linear import W4A4Linear
from stepquant.runtime.timestep import bin_index, follow_timestep

EDGES = (1000.0, 950.0, 925.0, 900.0)


@pytest.mark.parametrize(
    "spec", [1, 3, 7, [900, 933.3, 966.6, 1000]], ids=["one", "three", "seven, edges no float32 holds", "explicit"]
)
def test_agrees_with_bins(spec):
    bins = make_bins(spec, 900.0, 1000.0, "bins")
    around = [t for edge in bins.edges for t in (math.nextafter(edge, 0), edge, math.nextafter(edge, 2000))]
    inside = [t for t in (*around, *torch.linspace(900, 1000, 37).tolist()) if 900 <= t <= 1000]
    for t in inside:
        for dtype in (torch.float64, torch.float32):
            timestep = torch.tensor([t, t], dtype=dtype)
            held = timestep[0].item()  # float32 may have moved t over the edge: what counts is the value it holds
            if 900 <= held <= 1000:
                index = bin_index(timestep, bins.edges)
                assert index.dtype == torch.int64
                assert index.tolist() == [bins.index(held)] * 2, held


@pytest.mark.parametrize(
    ("t", "expected"), [(999, 0), (951, 0), (950, 1), (926, 1), (925, 2), (900, 2), (1200, 0), (3, 2)]
)
def test_integer_timesteps_by_hand(t, expected):
    """Edges 1000, 950, 925, 900: bin 0 is t > 950, bin 1 is 925 < t <= 950, bin 2 the rest, also beyond the ends."""
    assert bin_index(torch.tensor([t]), EDGES).item() == expected


def test_timestep_per_token():
    """Wan 2.2 TI2V passes t per token, 0 for the tokens of the given frame. Each sample has its own largest t."""
    assert bin_index(torch.tensor([[0.0, 0.0, 940.0, 940.0]]), EDGES).tolist() == [1]
    assert bin_index(torch.tensor([[0.0, 910.0], [0.0, 999.0], [940.0, 0.0]]), EDGES).tolist() == [2, 0, 1]


def test_every_sample_has_its_own_timestep():
    assert bin_index(torch.tensor([940, 999, 910]), EDGES).tolist() == [1, 0, 2]
    assert bin_index(torch.tensor(940), EDGES).tolist() == [1]


def current(linear):
    return linear.bin.on(torch.device("cpu")).item()


class Denoiser(nn.Module):
    """A denoiser with one quantized linear, whose own forward does not use the timestep."""

    def __init__(self, fmt):
        super().__init__()
        settings = QuantizationSettings(fmt, fmt, "ceil", "absmax", 0, False, {}, EDGES, ("linear",))
        self.linear = W4A4Linear(128, 8, False, settings, device="cpu")
        g = torch.Generator().manual_seed(1)
        self.linear.qweight.copy_(torch.randint(-128, 128, (8, 64), generator=g))
        self.linear.wscales.copy_(torch.full(self.linear.wscales.shape, 120 if fmt == "mxfp4" else 0.5))
        self.linear.smooth_factor.copy_(torch.ones(128))
        self.linear.clip_ratio.copy_(torch.tensor([1.0, 0.4, 0.15]))
        if fmt == "nvfp4":
            self.linear.wtscale.fill_(1)
            self.linear.wcscales.fill_(1)
        if fmt == "mxfp4":
            self.linear.clip_exponent.zero_()

    def forward(self, hidden_states, timestep, scale=1.0):
        return self.linear(hidden_states) * scale


@pytest.mark.parametrize("fmt", ["int4", "mxfp4", "nvfp4"])
def test_the_timestep_chooses_the_clip(fmt):
    denoiser = Denoiser(fmt)
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(2))
    expected = []
    for i in range(3):
        denoiser.linear.bin.set(torch.tensor([i]))
        expected.append(denoiser(x, torch.tensor([0, 0])))
    assert not any(torch.equal(expected[i], expected[j]) for i, j in ((0, 1), (1, 2), (0, 2)))

    follow_timestep(denoiser, EDGES)
    for t, i in ((1000, 0), (940, 1), (925, 2), (951, 0), (901, 2)):
        assert torch.equal(denoiser(hidden_states=x, timestep=torch.tensor([t, t])), expected[i])
        assert torch.equal(denoiser(x, torch.tensor([t, t], dtype=torch.float32)), expected[i])


@pytest.mark.parametrize("fmt", ["int4", "mxfp4", "nvfp4"])
def test_a_batch_of_mixed_timesteps_is_its_samples_one_by_one(fmt):
    denoiser = Denoiser(fmt)
    follow_timestep(denoiser, EDGES)
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([1000.0, 940.0, 901.0])
    alone = torch.cat([denoiser(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(denoiser(x, t), alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(denoiser(x, t.flip(0)), alone, atol=1e-2)
    assert torch.equal(denoiser(x, t[:1]), denoiser(x, t[:1].expand(3)))  # one timestep for all samples


def test_a_copy_follows_its_own_timestep():
    denoiser = Denoiser("int4")
    follow_timestep(denoiser, EDGES)
    other = copy.deepcopy(denoiser)
    x = torch.zeros(1, 128)
    denoiser(x, torch.tensor([1000]))
    other(x, torch.tensor([900]))
    assert current(denoiser.linear) == 0 and current(other.linear) == 2


def test_denoiser_without_timestep():
    with pytest.raises(UserError, match="Linear.forward has no parameter `timestep`"):
        follow_timestep(nn.Linear(2, 2), EDGES)
