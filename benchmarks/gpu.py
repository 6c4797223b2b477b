"""What happens on a GPU: tests, stages at the real width, the linear, and a sampled video. `make gpu` calls it.

    python benchmarks/gpu.py                                   everything, on cuda:0; writes docs/gpu.md
    python benchmarks/gpu.py --parts linear --out /tmp/gpu.md  one part

Parts, each of which becomes a section of the page:

    tests    pytest -m gpu
    stages   capture, lowrank, gptq and clip on one block with the shapes of Wan2.2-I2V-A14B, each twice from nothing:
             seconds, peak device memory, and whether the bytes repeat
    linear   the quantized linear at ffn.down of Wan2.2-I2V-A14B (32,760 tokens) against a BF16 linear
    video    the demo pipeline on the GPU up to one video of `full`, and the same checkpoint sampled on the CPU

Exit code 1 if a part fails; the page then says which, and why.
"""

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.checkout import temporary_checkout
from benchmarks.gpu_parts import linear_table, stages_table, video_lines
from ci.reproduce import ROOT


def run_tests(options: argparse.Namespace) -> str:
    """The last line of the tests marked `gpu`."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"pytest -m gpu failed:\n{result.stdout[-4000:]}")
    return "`pytest -m gpu`: " + result.stdout.strip().splitlines()[-1]


def run_stages(options: argparse.Namespace) -> str:
    with tempfile.TemporaryDirectory(prefix="stepquant-gpu-") as folder:
        return stages_table(Path(folder), options.device, options.shape)


def run_linear(options: argparse.Namespace) -> str:
    return linear_table(options.device, options.tokens, options.inputs, options.outputs)


def run_video(options: argparse.Namespace) -> str:
    with temporary_checkout() as checkout:
        return video_lines(checkout, options.device)


PARTS: dict[str, Callable[[argparse.Namespace], str]] = {
    "tests": run_tests,
    "stages": run_stages,
    "linear": run_linear,
    "video": run_video,
}


def machine(device: str) -> str:
    """The device, and the versions that decide its numbers."""
    if torch.device(device).type != "cuda":
        return f"{device} ({platform.processor() or platform.machine()}), torch {torch.__version__}"
    properties = torch.cuda.get_device_properties(device)
    memory = f"{properties.total_memory / 1e9:.0f} GB"
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return f"{properties.name}, {memory}, compute capability {properties.major}.{properties.minor}; {versions}"


def commit() -> str:
    if shutil.which("git") is None:
        return "unknown"
    result = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gpu.md")
    parser.add_argument("--tokens", type=int, default=32760, help="rows of the linear's input")
    parser.add_argument("--inputs", type=int, default=13824, help="of the linear")
    parser.add_argument("--outputs", type=int, default=5120, help="of the linear")
    options, options.shape = parser.parse_known_args()  # what is left goes to make_shape.py
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        print(f"error: --device {options.device}: this torch ({torch.__version__}) sees no GPU", file=sys.stderr)
        return 2
    command = f"`make gpu`, that is `python benchmarks/gpu.py`, at commit {commit()}"
    page, failed = [f"# On a GPU\n\n{machine(options.device)}.\n\n{command}.\n"], False
    for name in options.parts:
        try:
            text = PARTS[name](options)
        except Exception:
            failed, text = True, f"FAILED:\n\n```\n{traceback.format_exc()}```"
        page.append(f"## {name.capitalize()}\n\n{text}\n")
        options.out.write_text("\n".join(page))  # what is there stays, if a later part takes the machine down
        print(page[-1], flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
