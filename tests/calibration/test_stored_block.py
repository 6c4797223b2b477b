"""What a block reads from disk, as the read-ahead is told."""

import torch
from safetensors.torch import save_file

from stepquant.calibration.stored_block import StoredBlock
from stepquant.models.denoiser import Denoiser
from stepquant.models.families.wan_transformer import WAN_TRANSFORMER

SITES = WAN_TRANSFORMER.sites({})


def test_the_files_of_a_block_hold_its_weights_and_nothing_of_other_blocks(tmp_path):
    weights = {}
    for block in range(12):  # with two digits, so that "blocks.1" is a prefix of others
        for site in SITES:
            weights |= {f"blocks.{block}.{path}.weight": torch.full((2, 3), 1.0 * block) for path in site.linears}
    (tmp_path / "model").mkdir()
    save_file(weights, tmp_path / "model" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "model" / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    for name in ("block_01/attn1.qkv/hessian/c/0", "block_01/zarr.json", "block_10/zarr.json", "manifest.json"):
        (tmp_path / "activations" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "activations" / name).write_text("x")
    model = Denoiser(tmp_path / "model", "cpu", torch.float32)
    ranges = StoredBlock(1, model, {"activations": tmp_path / "activations"}).file_ranges(SITES)
    parts = [(file, start, count) for file, start, count in ranges if count]
    values = [
        torch.frombuffer(bytearray(file.read_bytes()[start : start + count]), dtype=torch.float32)
        for file, start, count in parts
    ]
    assert len(values) == 10 and all(torch.equal(value, torch.ones(6)) for value in values)
    whole = [str(file.relative_to(tmp_path / "activations")) for file, _, count in ranges if not count]
    assert whole == ["block_01/attn1.qkv/hessian/c/0", "block_01/zarr.json"]
