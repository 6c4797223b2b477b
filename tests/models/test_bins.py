import pytest
import torch

from stepquant.errors import UserError
from stepquant.models.bins import Bins, make_bins
from stepquant.runtime.timestep import bin_index

KEY = "bins.low_noise"


def test_a_count_gives_equal_widths():
    assert make_bins(3, 0, 900, KEY) == Bins((900.0, 600.0, 300.0, 0))
    assert make_bins(1, 900, 1000, KEY) == Bins((1000.0, 900))


@pytest.mark.parametrize("count", [3, 7, 11])
def test_a_count_reaches_both_ends_exactly(count):
    bins = make_bins(count, 0.0, 875.0, KEY)
    assert bins.count == count
    assert (bins.edges[0], bins.edges[-1]) == (875.0, 0.0)


def test_edges_may_come_in_either_order():
    assert make_bins([0, 300, 900], 0, 900, KEY) == make_bins([900, 300, 0], 0, 900, KEY) == Bins((900.0, 300.0, 0.0))


def test_edges_may_reach_beyond_the_range():
    assert make_bins([1000, 500, -10], 0, 900, KEY).edges == (1000.0, 500.0, -10.0)


def test_bin_0_is_the_noisiest_and_a_boundary_belongs_to_the_bin_below_it():
    """Bin i holds edges[i] >= t > edges[i + 1]; the lowest edge is inclusive too."""
    bins = make_bins([1000, 975, 940, 900], 900, 1000, KEY)
    expected = {1000: 0, 975.001: 0, 975: 1, 940.5: 1, 940: 2, 900.25: 2, 900: 2}
    assert {t: bins.index(t) for t in expected} == expected


@pytest.mark.parametrize("t", [1000.1, 899.9, float("nan")])
def test_a_timestep_outside_the_range_is_refused(t):
    with pytest.raises(UserError, match=r"outside the bins' range \[900.0, 1000.0\]"):
        make_bins(2, 900.0, 1000.0, KEY).index(t)


@pytest.mark.parametrize("spec", [1, 3, 7, [1000, 975, 940, 900], [1000.0, 999.9, 900.1, 900.0]])
def test_the_runtime_counts_the_same_bins(spec):
    """The clip is searched per Bins.index and looked up per bin_index: they must agree, most of all on the edges."""
    bins = make_bins(spec, 900, 1000, KEY)
    edges = torch.tensor(bins.edges, dtype=torch.float64)
    grid = torch.linspace(900, 1000, 1001, dtype=torch.float64)
    for t in torch.cat([grid, edges, (edges + 1e-9).clamp(max=1000), (edges - 1e-9).clamp(min=900)]).tolist():
        assert bin_index(torch.tensor([t], dtype=torch.float64), bins.edges).item() == bins.index(t)


@pytest.mark.parametrize("spec", [[900, 300, 600, 0], [900, 300, 300, 0], [900], [], [0, 600, 300, 900]])
def test_edges_that_overlap_or_repeat(spec):
    with pytest.raises(UserError) as caught:
        make_bins(spec, 0, 900, KEY)
    assert (
        str(caught.value)
        == f"{KEY}: edges {spec} overlap or repeat; allowed: at least two strictly ordered values of t"
    )


@pytest.mark.parametrize("spec", [[899, 300, 0], [900, 300, 1], [300, 200]])
def test_edges_that_leave_a_gap(spec):
    with pytest.raises(UserError) as caught:
        make_bins(spec, 0, 900, KEY)
    assert (
        str(caught.value) == f"{KEY}: edges {spec} do not cover [0, 900]; allowed: first and last edge at or beyond it"
    )


@pytest.mark.parametrize("count", [0, -2])
def test_a_count_below_one(count):
    with pytest.raises(UserError, match=f"{KEY}: {count} bins; allowed: a count of at least 1"):
        make_bins(count, 0, 900, KEY)
