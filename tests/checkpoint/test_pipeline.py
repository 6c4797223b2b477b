"""The whole way: write a checkpoint, load it as a pipeline, make a video."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import WanImageToVideoPipeline
from PIL import Image

import stepquant
from stepquant.checkpoint.writer import write_checkpoint
from stepquant.errors import DamagedFile, MissingFile, UnsupportedCheckpoint
from stepquant.runtime.linear import W4A4Linear

NO_TEXT = {"text_encoder": None, "tokenizer": None}


FORMATS = [("int4", "int4"), ("mxfp4", "mxfp4"), ("nvfp4", "nvfp4"), ("nvfp4", None)]


@pytest.fixture(scope="module", params=FORMATS, ids=str)
def checkpoint(request, source, tools, tmp_path_factory):
    out = tmp_path_factory.mktemp("checkpoint") / "out"
    settings = {name: tools.settings(name, *request.param, rank=8) for name in tools.edges}
    write_checkpoint(
        source,
        out,
        {name: (s, tools.blocks(source / name, s)) for name, s in settings.items()},
        dtype=torch.float32,
        flow_shift=5.0,
    )
    return out


def make_video(pipe, steps=3):
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn(1, 5, 128, generator=generator)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        image=image,
        prompt_embeds=prompt,
        negative_prompt_embeds=-prompt,
        height=32,
        width=32,
        num_frames=9,
        num_inference_steps=steps,
        generator=generator,
        output_type="pt",
    ).frames


@pytest.mark.parametrize(
    "dtype", [torch.float32, {"default": torch.bfloat16, "vae": torch.float32}], ids=["fp32", "bf16"]
)
def test_makes_a_video(checkpoint, dtype):
    pipe = stepquant.load_pipeline(checkpoint, dtype=dtype, **NO_TEXT)
    assert isinstance(pipe, WanImageToVideoPipeline)
    assert all(
        sum(isinstance(m, W4A4Linear) for m in e.modules()) == 20 for e in (pipe.transformer, pipe.transformer_2)
    )
    linears = [expert.blocks[1].ffn.net[2] for expert in (pipe.transformer, pipe.transformer_2)]
    for linear in linears:
        linear.bin.set(1)
    frames = make_video(pipe)
    assert frames.shape == (1, 9, 3, 32, 32) and frames.isfinite().all()
    # Three steps: t = 1000 (high noise, edges 1000, 950, 925, 900: bin 0), then 834.7 and 24.4 (low noise, edges 900,
    # 600, 300, 0: bin 2).
    assert [linear.bin.on(torch.device("cpu")).item() for linear in linears] == [0, 2]


def test_sequential_offload_of_a_denoiser(checkpoint, tools):
    """What pipe.enable_sequential_cpu_offload() does, with the CPU in place of the GPU."""
    pipe = stepquant.load_pipeline(checkpoint, dtype=torch.bfloat16, **NO_TEXT)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 36, 2, 4, 4, generator=generator).bfloat16(),
        "encoder_hidden_states": torch.randn(1, 3, 128, generator=generator).bfloat16(),
    }
    timesteps = [torch.tensor([t]) for t in (960, 940, 910)]  # one in each bin
    before = [pipe.transformer(**inputs, timestep=t).sample for t in timesteps]
    cpu_offload(pipe.transformer, torch.device("cpu"), offload_buffers=True)
    assert pipe.transformer.blocks[0].attn1.to_q.qweight.device.type == "meta"
    for t, expected in zip(timesteps, before):
        assert torch.equal(pipe.transformer(**inputs, timestep=t).sample, expected)


def test_stock_diffusers_after_register(checkpoint):
    stepquant.register()
    stock = WanImageToVideoPipeline.from_pretrained(checkpoint, dtype=torch.float32, **NO_TEXT)
    ours = stepquant.load_pipeline(checkpoint, dtype=torch.float32, **NO_TEXT)
    assert torch.equal(make_video(stock), make_video(ours))


def test_pipeline_save_pretrained_round_trip(checkpoint, tmp_path):
    first = stepquant.load_pipeline(checkpoint, dtype=torch.float32, **NO_TEXT)
    first.save_pretrained(tmp_path)
    second = stepquant.load_pipeline(tmp_path, dtype=torch.float32, **NO_TEXT)
    # Tensors, not videos: their offsets in the new files differ, and CPU kernels round differently by alignment.
    for name in ("transformer", "transformer_2", "vae"):
        before, after = getattr(first, name).state_dict(), getattr(second, name).state_dict()
        assert set(before) == set(after)
        for key, tensor in before.items():
            assert tensor.dtype == after[key].dtype
            assert torch.equal(tensor.contiguous().view(torch.uint8), after[key].contiguous().view(torch.uint8)), key
    assert make_video(second).isfinite().all()


def test_damaged_checkpoint(checkpoint, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    shard = folder / "transformer_2" / "diffusion_pytorch_model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DamagedFile, match="00002-of-00003.safetensors: truncated"):
        stepquant.load_pipeline(folder, dtype=torch.float32, **NO_TEXT)
    shard.unlink()
    with pytest.raises(MissingFile, match="names the shard .*00002-of-00003.safetensors', which is no file"):
        stepquant.load_pipeline(folder, dtype=torch.float32, **NO_TEXT)
    (folder / "transformer_2" / "config.json").write_text("{")
    with pytest.raises(DamagedFile, match="transformer_2/config.json: not JSON"):
        stepquant.load_pipeline(folder, dtype=torch.float32, **NO_TEXT)


def test_a_checkpoint_of_version_2(checkpoint, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"version": 3', '"version": 2'))
    with pytest.raises(UnsupportedCheckpoint, match="version is 2, written by an older stepquant; .* stage pack"):
        stepquant.load_pipeline(folder, dtype=torch.float32, **NO_TEXT)


def test_unquantized_pipeline(source):
    pipe = stepquant.load_pipeline(source, dtype=torch.float32, **NO_TEXT)
    assert not any(isinstance(m, W4A4Linear) for m in pipe.transformer.modules())
    assert make_video(pipe).isfinite().all()


def test_folder_that_is_no_pipeline(source):
    with pytest.raises(FileNotFoundError, match="no model_index.json; expected a diffusers pipeline folder"):
        stepquant.load_pipeline(source / "transformer", dtype=torch.float32)


def test_importing_stepquant_is_light():
    code = "import stepquant, sys; assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules); print(dir(stepquant))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "load_pipeline" in result.stdout and "register" in result.stdout


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        stepquant.quantise
