"""A replay that is not what the pipeline computed is refused in the first share, with the block where it begins."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.local_compute import local_compute
from benchmarks.tiny_pipelines import TINY_PIPELINES, save_pipeline
from stepquant.calibration.replay import Shard
from stepquant.calibration.replay_check import departures, tolerance
from stepquant.calibration.trajectories import Trajectories, record_prompt
from stepquant.errors import UserError
from stepquant.models.bins import Bins
from stepquant.models.prompts import Prompt
from stepquant.models.sampling import source_pipeline
from stepquant.models.source import describe_experts
from stepquant.params import Capture, Sampling
from stepquant.storage.zarr_groups import group_metadata

BLOCKS = 3
SPLITS = ("calibration", "heldout", "validation")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A dense text-to-video pipeline, loaded, and its description."""
    folder = save_pipeline(tmp_path_factory.mktemp("model") / "model", TINY_PIPELINES["Wan2.1-T2V"], BLOCKS)
    return load(folder, "float32")


def load(folder, dtype, text=16):
    manifest = describe_experts(folder, str(folder), None)
    settings = {"height": 32, "width": 32, "num_frames": 5, "steps": 2, "flow_shift": 4.0, "max_sequence_length": text}
    sampling = Sampling(**settings, guidance_scale=3.0, guidance_scale_2=3.0)
    pipe = source_pipeline(manifest, local_compute(dtype), sampling, folder / "no_scratch")
    return SimpleNamespace(manifest=manifest, sampling=sampling, pipe=pipe, dtype=dtype)


def write_picture(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return path


@torch.no_grad()
def record(model, root, change=nullcontext, images=()):
    """Record a prompt of each split while the pipeline is changed by a context."""
    pictures = {column: write_picture(root.parent / f"{column}.png") for column in images}
    with change():
        for seed, split in enumerate(SPLITS):
            prompt = Prompt(split, split, "a red crab runs", "", pictures, seed)
            record_prompt(model.pipe, model.manifest, model.sampling, prompt, root / split, None)
    (root / "zarr.json").write_text(group_metadata({"prompts": dict.fromkeys(SPLITS, "")}))
    return root


@torch.no_grad()
def capture(model, root, folder, blocks=range(BLOCKS), expert="denoiser"):
    """Replay all calls through all blocks, as one unit of stage capture."""
    settings = Capture(
        steps_per_bin=None,
        search_tokens=8,
        heldout_tokens=8,
        hessian_stride=1,
        calls_per_chunk=5,
        calls_per_shard=100,
        blocks_per_shard=BLOCKS,
        seed=0,
    )
    low, high = model.manifest.expert(expert).t_range
    calls = range(len(Trajectories(root).calls(expert)))
    folder.mkdir()
    Shard(
        expert,
        model.manifest,
        root,
        local_compute(model.dtype),
        settings,
        Bins((high, low)),
        blocks,
        calls,
        previous=None,
    )(folder)


class changed:
    """A forward hook on a module while something is recorded."""

    def __init__(self, module, hook):
        self.module, self.hook = module, hook

    def __enter__(self):
        self.handle = self.module.register_forward_hook(self.hook)

    def __exit__(self, *error):
        self.handle.remove()


def hint(size):
    """What a VACE block or a ControlNet does: something is added to the output, of `size` times its length."""
    pattern = torch.randn(64, generator=torch.Generator().manual_seed(3))

    def hook(module, args, output):
        return output + size * output.std() * pattern.to(output.dtype)

    return hook


def per_step():
    """A module that a pipeline changes from step to step: right in the first of two steps, then 5 % larger."""
    calls = []

    def hook(module, args, output):
        calls.append(None)
        return 1.05 * output if len(calls) % 4 in (3, 0) else output

    return hook


def refusal(model, tmp_path, change):
    root = record(model, tmp_path / "trajectories", change)
    with pytest.raises(UserError) as caught:
        capture(model, root, tmp_path / "unit")
    message = str(caught.value)
    assert message.startswith("denoiser: replay departs from the pipeline at ") and "\n" not in message
    assert message.endswith("it cannot be calibrated")
    return message.removeprefix("denoiser: replay departs from the pipeline at ")


@pytest.mark.parametrize("block", range(BLOCKS))
@pytest.mark.parametrize("size", [0.18, 0.001])
def test_a_hint_between_blocks_is_found_in_its_block(model, tmp_path, block, size):
    hooked = changed(model.pipe.transformer.blocks[block], hint(size))
    assert refusal(model, tmp_path, lambda: hooked).startswith(f"block {block} by ")


def test_in_bfloat16_rounding_hides_little(tmp_path):
    folder = save_pipeline(tmp_path / "model", TINY_PIPELINES["Wan2.1-T2V"], BLOCKS)
    model = load(folder, "bfloat16")
    hooked = changed(model.pipe.transformer.blocks[0], hint(0.03))
    assert refusal(model, tmp_path, lambda: hooked).startswith("block 0 by 0.0")


def test_a_module_that_changes_from_step_to_step_is_found(model, tmp_path):
    message = refusal(model, tmp_path, lambda: changed(model.pipe.transformer.blocks[1].ffn, per_step()))
    assert message.startswith("block 1 by ") and "step 2, branch" in message


def test_something_that_is_added_before_the_blocks_is_found_in_the_first(model, tmp_path):
    hooked = changed(model.pipe.transformer.condition_embedder.text_embedder, hint(0.01))
    assert refusal(model, tmp_path, lambda: hooked).startswith("block 0 by ")


def test_something_that_is_added_after_the_blocks_is_found(model, tmp_path):
    hooked = changed(model.pipe.transformer.norm_out, hint(0.01))
    assert refusal(model, tmp_path, lambda: hooked).startswith("the layers after the last block by ")


def test_the_message_says_where_and_what_was_allowed(model, tmp_path):
    hooked = changed(model.pipe.transformer.blocks[0], lambda module, args, output: 1.25 * output)
    message = refusal(model, tmp_path, lambda: hooked)  # of 1.25 x the output, the fifth is missing
    assert message.startswith("block 0 by 0.2 of its output (prompt ")
    assert "rounding to float32 explains 0.00012. The pipeline gives this model something that is not" in message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_every_published_model_is_replayed_exactly(name, dtype, tmp_path):
    """Departures are printed by benchmarks/replay_departure.py; here none may be refused."""
    described = TINY_PIPELINES[name]
    folder = save_pipeline(tmp_path / "model", described)
    model = load(folder, dtype, 512 if described.image_tokens else 16)
    root = record(model, tmp_path / "trajectories", images=described.images)
    for expert in model.manifest.experts:
        capture(model, root, tmp_path / expert, range(2), expert)
    files = {path.stem for path in (tmp_path / expert / "block_01").iterdir()}
    assert files == set(model.manifest.expert(expert).sites)


def test_tolerance_follows_the_dtype_and_the_depth():
    """Twice the spacing of the dtype, and float32 sums: 2 x 2^-7 and 2^-13 for bfloat16."""
    assert tolerance(torch.bfloat16, 1) == 2 * 2**-7 + 2**-13
    assert tolerance(torch.float32, 1) == 2 * 2**-23 + 2**-13
    assert tolerance(torch.bfloat16, 40) < 0.18  # the departure of Wan2.1-I2V without its image tokens
    assert tolerance(torch.float32, 16) == 4 * tolerance(torch.float32, 1)


def test_departure_is_relative():
    found = departures(torch.tensor([[3.0, 5.0], [6.0, 8.0]]), torch.tensor([[3.0, 4.0], [6.0, 8.0]]))
    assert found.tolist() == pytest.approx([0.2, 0.0])
