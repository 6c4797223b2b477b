"""Operations per column of GPTQ, and what makes its column block fit for a CUDA graph."""

import pytest
import torch

from benchmarks.gptq_launches import identity_factor, operations, seeded_block
from stepquant.formats import get_format, weight_scales
from stepquant.quantize.gptq import ColumnBlock, gptq, round_column_block

# mul, round, clamp, addcmul, div, addr; E2M1 needs five operations to round instead of two. Each 16 columns need one
# more (addmm) and one less (addr of the last one).
LAUNCHES = {"int4": 6, "mxfp4": 9, "nvfp4": 9}
VIEWS = {"int4": 3, "mxfp4": 7, "nvfp4": 7}
BLOCK_OVERHEAD = 0.2  # per column: load, encode and update for each block of 128 columns
BUFFERS = ("columns", "U", "scale", "reciprocal", "errors", "rounded")


@pytest.mark.parametrize("name", LAUNCHES)
def test_operations_per_column_are_bounded(name):
    fmt, W = get_format(name), torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    scales = weight_scales(fmt, W, rounding="ceil")
    found = operations(lambda: gptq(W, identity_factor(512), scales, fmt, column_block=128))
    assert len(found.names) <= (LAUNCHES[name] + BLOCK_OVERHEAD) * 512
    assert len(found.views) <= VIEWS[name] * 512


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_operations_of_a_column_block_do_not_depend_on_its_values(name):
    """The same operations on the same shapes, none of which reads a value on the host: they can be replayed."""
    fmt = get_format(name)
    blocks = [seeded_block(128, 24, fmt, seed=seed) for seed in (0, 1)]
    blocks[1].columns.mul_(1e3)  # everything saturates
    one, two = (operations(lambda block=block: round_column_block(block, fmt)) for block in blocks)
    assert one.names == two.names and one.shapes == two.shapes
    host_reads = {"_local_scalar_dense.default", "item.default", "nonzero.default", "is_nonzero.default"}
    assert not host_reads.intersection(one.names)


@pytest.mark.parametrize("name", LAUNCHES)
def test_buffers_are_used_again_for_the_next_block(name):
    """Loading a second block into the buffers of the first gives what fresh buffers give, at the same addresses."""
    fmt = get_format(name)
    used, fresh = seeded_block(64, 24, fmt, seed=0), seeded_block(64, 24, fmt, seed=1)
    addresses = [getattr(used, buffer).data_ptr() for buffer in BUFFERS]
    round_column_block(used, fmt)
    load(used, fresh)
    round_column_block(used, fmt)
    round_column_block(fresh, fmt)
    assert torch.equal(used.columns, fresh.columns) and torch.equal(used.errors, fresh.errors)
    assert [getattr(used, buffer).data_ptr() for buffer in BUFFERS] == addresses


def load(block: ColumnBlock, source: ColumnBlock) -> None:
    """Copies one block's buffers into another's; each column is one group."""
    every = torch.arange(len(source.columns))
    block.load(source.columns, source.U, source.scale, source.reciprocal, every)


def test_errors_and_updates_follow_the_formula():
    """Two columns by hand: q = round(w), E = (w - q) / U_ii, and the second column loses E_1 U_12 first."""
    fmt = get_format("int4")
    block = ColumnBlock.allocate(2, 1, torch.device("cpu"))
    ones = torch.ones(1, 1)
    block.load(
        torch.tensor([[2.25], [3.0]]), torch.tensor([[0.5, 0.75], [0.0, 2.0]]), ones, ones, torch.zeros(2).long()
    )
    round_column_block(block, fmt)
    # Column 1: q = 2, E = 0.25 / 0.5 = 0.5. Column 2: 3 - 0.5 * 0.75 = 2.625, q = 3, E = -0.375 / 2.
    assert block.columns.flatten().tolist() == [2.25, 2.625]
    assert block.errors.flatten().tolist() == [0.5, -0.1875]


@pytest.mark.parametrize("columns", [64, 192, 200])
def test_a_last_block_of_fewer_columns_has_buffers_of_its_own(columns):
    """Under an identity factor every column is rounded to nearest, also those of a shorter last block."""
    fmt = get_format("int4")
    W = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    scales = weight_scales(fmt, W, rounding="ceil")
    codes = gptq(W, identity_factor(256), scales, fmt, column_block=columns)
    nearest = (W.unflatten(1, (-1, 64)) * scales.group.float().reciprocal()[..., None]).round().clamp(-8, 7).flatten(1)
    assert torch.equal(fmt.decode(codes, scales), (nearest.unflatten(1, (-1, 64)) * scales.group[..., None]).flatten(1))
