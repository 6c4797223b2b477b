"""The parts of benchmarks/gpu.py: what each runs, and the text that it gives."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from benchmarks.checkout import Checkout
from ci.reproduce import ROOT
from stepquant.checkpoint.pipeline import load_pipeline
from stepquant.evaluate.fidelity import psnr
from stepquant.evaluate.video import read_video
from stepquant.models.prompts import evaluation_prompts
from stepquant.models.sampling import ready_to_sample, sample
from stepquant.params import section
from stepquant.runtime.layout import QuantizationSettings, linear_layout
from stepquant.runtime.linear import W4A4Linear
from stepquant.storage.digests import file_digests

EXPERT = "denoiser"
STAGES = {"capture": "activations/denoiser.zarr", "lowrank": "lowrank/denoiser", "gptq": "residual/denoiser"}
STAGES |= {"clip": "clip/denoiser"}
FORMATS = ("int4", "mxfp4", "nvfp4")
WARM_UP, ROUNDS = 2, 5


# --- stages -----------------------------------------------------------------------------------------------------------


def stages_table(folder: Path, device: str, shape: list[str]) -> str:
    """A row per stage on one block: seconds of two runs from nothing, peak device memory, whether the bytes repeat."""
    _python(["benchmarks/make_shape.py", str(folder), "--blocks", "1", *shape], ROOT)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["compute"]["device"] = device
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    _python(["-m", "stages.model"], folder)
    lines = ["| stage | seconds | again | peak device memory | same bytes |", "|---|---|---|---|---|"]
    for stage, out in STAGES.items():
        first, digests = run_stage(folder, device, stage), file_digests(folder / "artifacts" / out)
        shutil.rmtree(folder / ".units")
        second, again = run_stage(folder, device, stage), file_digests(folder / "artifacts" / out)
        peak, same = max(first["bytes"], second["bytes"]) / 1e9, "yes" if digests == again else "**no**"
        lines.append(f"| {stage} | {first['seconds']:.1f} | {second['seconds']:.1f} | {peak:.2f} GB | {same} |")
    return "\n".join(lines)


def run_stage(folder: Path, device: str, stage: str) -> dict[str, float]:
    """Run a stage in a process of its own; its seconds and peak device bytes."""
    script = str(ROOT / "benchmarks" / "device_stage.py")
    return json.loads(_python([script, device, stage, "--expert", EXPERT], folder).splitlines()[-1])


def _python(arguments: list[str], folder: Path) -> str:
    path = os.pathsep.join([str(ROOT / "lib"), str(ROOT)])
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{result.stdout[-2000:]}{result.stderr[-4000:]}")
    return result.stdout


# --- linear -----------------------------------------------------------------------------------------------------------


def linear_table(device: str, tokens: int, inputs: int, outputs: int) -> str:
    """A row per format: milliseconds of a forward, and peak memory beside weights and input, against a BF16 linear."""
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    lines = [
        f"{tokens:,} tokens, {inputs:,} inputs, {outputs:,} outputs; the input is {x.nbytes / 1e9:.2f} GB.\n",
        "| weights and activations | milliseconds | peak beside weights and input |",
        "|---|---|---|",
    ]
    plain = nn.Linear(inputs, outputs, device=device, dtype=torch.bfloat16)
    lines.append(_linear_row("bf16", plain, x))
    for name in FORMATS:
        lines.append(_linear_row(name, random_linear(name, inputs, outputs, device), x))
    return "\n".join(lines)


@torch.no_grad()
def _linear_row(name: str, linear: nn.Module, x: Tensor) -> str:
    for _ in range(WARM_UP):
        linear(x)
    before = _reset_peak(x)
    start = time.monotonic()
    for _ in range(ROUNDS):
        linear(x)
    peak = _peak(x) - before
    seconds = (time.monotonic() - start) / ROUNDS
    return f"| {name} | {1000 * seconds:.1f} | {peak / 1e9:.2f} GB |"


def random_linear(name: str, inputs: int, outputs: int, device: str) -> W4A4Linear:
    """A quantized linear with random codes, rank 32, no rotation, one bin."""
    settings = QuantizationSettings(name, name, "ceil", "absmax", 32, True, {}, (1000.0, 0.0), ("a",))
    linear = W4A4Linear(inputs, outputs, True, settings, device).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    for key, (shape, dtype) in linear_layout(settings, outputs, inputs).items():
        linear.register_buffer(key, random_buffer(shape, dtype, generator).to(device))
    nn.init.zeros_(linear.bias)
    return linear


def random_buffer(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Values that every tensor of the layout may have: codes of all kinds, E8M0 exponents near one, positive scales."""
    if dtype == torch.int8:
        size = torch.tensor(shape).prod()
        return (
            torch.zeros(shape, dtype=dtype)
            if size < 2
            else torch.randint(-128, 128, shape, generator=generator).to(dtype)
        )
    if dtype == torch.uint8:
        return torch.randint(117, 122, shape, generator=generator).to(dtype)
    return (0.01 + 0.02 * torch.rand(shape, generator=generator)).to(dtype)


def _reset_peak(x: Tensor) -> int:
    if x.device.type != "cuda":
        return 0
    torch.cuda.synchronize(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    return torch.cuda.memory_allocated(x.device)


def _peak(x: Tensor) -> int:
    if x.device.type != "cuda":
        return 0
    torch.cuda.synchronize(x.device)
    return torch.cuda.max_memory_allocated(x.device)


# --- video ------------------------------------------------------------------------------------------------------------


def video_lines(checkout: Checkout, device: str) -> str:
    """The demo up to one video of `full` on the device, and the same checkpoint, prompt and noise on the CPU."""
    checkout.set("compute.device", device)
    checkout.set("generate.prompts", 1)
    seconds = timed(lambda: checkout.repro("generate@full"))
    os.chdir(checkout.root)
    params = Path("params.yaml")
    (prompt,) = evaluation_prompts(section(params, "generate"))
    made = read_video(Path(f"artifacts/videos/full/{prompt.id}/video.mp4"))
    sampling = section(params, "sampling")
    pipe: Any = ready_to_sample(
        lambda: load_pipeline(Path("artifacts/checkpoints/full"), dtype=torch.float32), sampling
    )
    pipe.set_progress_bar_config(disable=True)
    frames = sample(pipe, sampling, prompt.prompt, prompt.negative_prompt, prompt.load_images(), prompt.seed, "pt")
    on_cpu = (frames.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    os.chdir(ROOT)
    return (
        f"`dvc repro generate@full` of the demo with `compute.device: {device}`: {seconds:.0f} s.\n"
        f"The video against the same checkpoint, prompt and noise on the CPU: {psnr(made, on_cpu):.1f} dB."
    )


def timed(work: Callable[[], object]) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start
