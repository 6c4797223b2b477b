"""Files of a site's statistics, and what a read costs."""

import json

import pytest
import torch
from zarr.storage import LocalStore

from stepquant.calibration.statistics_files import read_statistics, site_folder, tokens_per_column, write_statistics
from stepquant.errors import UserError
from stepquant.storage.zarr_groups import write_group
from tests.calibration.calls import BINS, collect

BIN_COUNT, K, ROWS = 3, 96, 128


def make_tensors(rows=(ROWS,) * 9):
    generator = torch.Generator().manual_seed(0)
    H = torch.randn(K, K, generator=generator)
    tensors = {"hessian": H @ H.T, "shift": torch.randn(K, generator=generator)}
    tensors |= {name: torch.randn(BIN_COUNT, K, generator=generator) for name in ("absmax", "mean")}
    names = [f"{kind}.{b}" for kind in ("search", "validation", "heldout") for b in range(BIN_COUNT)]
    return tensors | {name: torch.randn(n, K, generator=generator).bfloat16() for name, n in zip(names, rows)}


@pytest.fixture
def tensors():
    return make_tensors()


@pytest.fixture
def folder(tmp_path, tensors):
    write_statistics(tmp_path / "site", tensors, [10, 20, 30])
    return tmp_path / "site"


@pytest.fixture
def reads(monkeypatch):
    """Bytes read per array, by every read of a chunk file."""
    counted: dict[str, int] = {}
    get = LocalStore.get

    async def counting(self, key, prototype=None, byte_range=None):
        found = await get(self, key, prototype, byte_range)
        if found is not None and "/c/" in key:
            name = key.split("/")[0]
            counted[name] = counted.get(name, 0) + len(found)
        return found

    monkeypatch.setattr(LocalStore, "get", counting)
    return counted


def test_statistics_are_read_as_written(folder, tensors):
    found = read_statistics(folder, "cpu")
    assert found.bins == BIN_COUNT
    for name in ("hessian", "shift", "absmax", "mean"):
        assert torch.equal(getattr(found, name), tensors[name])
    for kind in ("search", "validation", "heldout"):
        for b, sample in enumerate(getattr(found, kind)):
            assert sample.dtype == torch.float32 and torch.equal(sample, tensors[f"{kind}.{b}"].float())
    assert tokens_per_column(folder) == 60 / K


@pytest.mark.parametrize("rows", [(100, 3, 50, 7, 1, 2, 90, 64, 65), (5, 4, 3, 2, 1, 1, 1, 1, 1)])
def test_samples_of_any_size(tmp_path, rows):
    tensors = make_tensors(rows)
    write_statistics(tmp_path / "site", tensors, [1, 1, 1])
    found = read_statistics(tmp_path / "site", "cpu")
    samples = found.search + found.validation + found.heldout
    assert all(torch.equal(a, b.float()) for a, b in zip(samples, list(tensors.values())[4:], strict=True))


def test_a_sample_costs_its_own_bytes(folder, reads):
    """2 bytes for each of 128 x 96 values, and the index of the nine parts: 16 bytes each and a checksum of 4."""
    read_statistics(folder, "cpu").load("validation.1")
    assert reads == {"samples": 2 * ROWS * K + 9 * 16 + 4}


def test_a_sample_is_read_if_the_others_are_damaged(folder, tensors):
    """The first sample comes first in the file."""
    file = folder / "samples/c/0/0"
    content = bytearray(file.read_bytes())
    content[2 * ROWS * K : -(9 * 16 + 4)] = bytes(8 * 2 * ROWS * K)
    file.write_bytes(content)
    assert torch.equal(read_statistics(folder, "cpu").load("search.0"), tensors["search.0"].float())


def test_the_variance_is_computed_without_the_hessian(folder, tensors, reads):
    found = read_statistics(folder, "cpu")
    point = tensors["mean"][1]
    variance = found.variance_about(point)
    assert "hessian" not in reads
    shift, average = tensors["shift"].double(), tensors["mean"].double().mean(0)
    expected = tensors["hessian"].double().diagonal() - 2 * (average - shift) * (point - shift) + (point - shift) ** 2
    assert torch.allclose(variance.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("length", [0, 100])
def test_truncated_samples_are_refused(folder, length):
    file = folder / "samples/c/0/0"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UserError, match="samples: a chunk is truncated"):
        read_statistics(folder, "cpu").load("search.0")


def test_statistics_without_the_diagonal_are_refused(folder, tensors):
    """Version 1 had no such row, and absmax would be read in its place."""
    channels = torch.cat([tensors["shift"][None], tensors["absmax"], tensors["mean"]])
    arrays = {"hessian": tensors["hessian"], "channels": channels, "samples": tensors["search.0"]}
    write_group(folder, arrays, {"rows": {"search.0": ROWS}, "tokens": [10, 20, 30]})
    with pytest.raises(UserError, match="site: not the statistics of this version; run stage capture again"):
        read_statistics(folder, "cpu")


def test_missing_samples_are_refused(folder):
    (folder / "samples/c/0/0").unlink()
    with pytest.raises(UserError, match="samples: 0 of 9 chunks are there"):
        read_statistics(folder, "cpu").load("search.0")


def test_a_site_is_three_arrays_of_one_file(tmp_path, x):
    """40 blocks of 7 sites, with the metadata of each array and group, are 1,960 files."""
    collect(tmp_path, x, BINS, chunk=5)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    arrays = ("channels", "samples", "hessian")
    assert found == {"zarr.json", *(f"{name}/zarr.json" for name in arrays), *(f"{name}/c/0/0" for name in arrays)}
    assert 40 * 7 * len(found) == 1960
    assert json.loads((tmp_path / "zarr.json").read_text())["attributes"]["complete"]


def test_the_folder_of_a_site(tmp_path):
    assert site_folder(tmp_path, 3, "attn1.qkv") == tmp_path / "block_03" / "attn1.qkv"
