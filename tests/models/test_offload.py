"""Every mode of `compute.offload` makes the video of the CPU, and `disk` keeps the experts' weights in files."""

import shutil
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file, save_file

from stepquant.calibration.trajectories import record_prompt
from stepquant.models.families.wan_transformer import WAN_TRANSFORMER
from stepquant.models.offload import load_mapped, place_pipeline
from stepquant.models.prompts import read_manifest
from stepquant.models.source import describe_experts, load_source_pipeline
from stepquant.models.weights import open_weights
from stepquant.params import Compute, Sampling
from stepquant.storage.digests import file_digests
from tests.pretend_device import pretend_device
from tests.wan import load_expert, random_calls, save_expert
from tests.workspace import ROOT, SOURCE_MODEL, TINY, cut_model

DEVICE = "pretend:1"
MODES = ("none", "model", "group", "disk")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The demo model with two blocks per expert, one stored in float32 and one in bfloat16."""
    folder = tmp_path_factory.mktemp("offload") / "source"
    cut_model(ROOT / SOURCE_MODEL, folder)
    for name, dtype in (("transformer", torch.float32), ("transformer_2", torch.bfloat16)):
        stored = load_file(folder / name / WEIGHTS)
        save_file({key: tensor.to(dtype) for key, tensor in stored.items()}, folder / name / WEIGHTS)
    return folder


def compute(device: str, offload: str) -> Compute:
    values = {"device": device, "dtype": "bfloat16", "threads": 1, "offload": offload, "executor": "local"}
    return Compute.model_validate(values | {"workers": 1, "address": None, "gpus_per_unit": 0.0})


@torch.no_grad()
def video(source: Path, device: str, offload: str, scratch: Path) -> torch.Tensor:
    experts = list(describe_experts(source, str(source), None).experts.values())
    pipe = load_source_pipeline(source, experts, compute(device, offload), scratch)
    shutil.rmtree(scratch)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4, "max_sequence_length": 16}
    generator = torch.Generator().manual_seed(0)
    return pipe(image=image, prompt="a dog", negative_prompt="", **size, generator=generator, output_type="pt").frames


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory) -> torch.Tensor:
    return video(source, "cpu", "none", tmp_path_factory.mktemp("scratch"))


@pytest.mark.parametrize("offload", MODES)
def test_the_same_video_to_the_bit(source, expected, offload, tmp_path):
    (tmp_path / "scratch").mkdir()
    with pretend_device():
        found = video(source, DEVICE, offload, tmp_path / "scratch").cpu()
    assert torch.equal(found, expected)


@torch.no_grad()
def recorded(source: Path, device: str, offload: str, folder: Path) -> dict[str, str]:
    """SHA-256 of the files of one recorded prompt: the arguments of all calls, samples of blocks and outputs."""
    manifest = describe_experts(source, str(source), None)
    sampling = Sampling.model_validate({"guidance_scale": 3.0, "guidance_scale_2": 3.0} | TINY["sampling"])
    (folder / "scratch").mkdir(parents=True)
    settings = compute(device, offload)
    pipe = load_source_pipeline(source, list(manifest.experts.values()), settings, folder / "scratch")
    prompt = read_manifest(ROOT / "data/calibration/manifest.jsonl")[0]
    record_prompt(pipe, manifest, sampling, prompt, folder / "out", None)
    return file_digests(folder / "out")


def test_the_same_recording_to_the_bit(source, tmp_path):
    expected = recorded(source, "cpu", "none", tmp_path / "cpu")
    with pretend_device():
        assert recorded(source, DEVICE, "disk", tmp_path / "disk") == expected


@torch.no_grad()
def peak(offload: str) -> int:
    """Most bytes on the device during a call of a denoiser of 8 blocks, about 0.4 MB each."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 512, "text_dim": 32, "freq_dim": 32}
    expert = WanTransformer3DModel(**sizes, in_channels=36, num_layers=8, rope_max_seq_len=32)
    nothing = {"tokenizer": None, "text_encoder": None, "vae": None}
    pipe = WanPipeline(transformer=expert, scheduler=UniPCMultistepScheduler(), **nothing)
    with pretend_device() as ledger:
        place_pipeline(pipe, DEVICE, offload)
        assert pipe._execution_device == torch.device(DEVICE)
        call = {name: tensor.to(DEVICE) for name, tensor in random_calls(1, torch.float32).items()}
        expert(**call, return_dict=False)
        return ledger.peak[1]


def test_groups_are_blocks():
    """Without streams one block is there at a time, beside what is outside the blocks; 8 blocks are 3.2 MB."""
    assert peak("model") - peak("group") > 6 * 0.4e6


def test_on_cuda_blocks_are_prefetched_by_a_stream_of_the_same_gpu(monkeypatch):
    """diffusers makes the stream on the current GPU, and waits for the current GPU before it frees a block."""
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    pipe = MagicMock()
    assert place_pipeline(pipe, "cuda:1", "disk") is pipe
    options = pipe.enable_group_offload.call_args.kwargs
    assert current == [options["onload_device"]] == [torch.device("cuda:1")]
    assert options["use_stream"] and options["low_cpu_mem_usage"]


def stored_in_files(tensors: list[torch.Tensor]) -> list[bool]:
    """Whether each tensor's memory is the mapping of a safetensors file."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines if "safetensors" in line[-1]]
    return [any(low <= tensor.data_ptr() < high for low, high in ranges) for tensor in tensors]


def linears(expert) -> list[torch.Tensor]:
    return [module.weight for module in expert.blocks.modules() if isinstance(module, torch.nn.Linear)]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_mapped_weights_are_those_that_diffusers_loads(tmp_path, stored):
    """From float32 and fp8 by a converted copy, from bfloat16 as they are. The copy may be deleted once mapped."""
    folder, scratch = save_expert(tmp_path / "expert", torch.float32), tmp_path / "scratch"
    weights = {key: tensor.to(stored) for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS)
    scratch.mkdir()
    found = load_mapped(WAN_TRANSFORMER, folder, open_weights(folder), torch.bfloat16, scratch)
    copied = any(scratch.iterdir())
    shutil.rmtree(scratch)
    expected = load_expert(folder, torch.bfloat16)
    assert copied == (stored != torch.bfloat16)
    assert all(stored_in_files(linears(found)))
    state = expected.state_dict()
    assert found.state_dict().keys() == state.keys()
    for key, tensor in found.state_dict().items():
        assert tensor.dtype == state[key].dtype and torch.equal(tensor, state[key]), key
    assert not any(stored_in_files(linears(expected))) or stored == torch.bfloat16
