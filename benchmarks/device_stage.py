"""Runs one stage in this process and prints, as the last line, its seconds and the peak memory of its device in JSON.

cd FOLDER && python CHECKOUT/benchmarks/device_stage.py cuda capture --expert denoiser
"""

import importlib
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    device, name, *arguments = sys.argv[1:]
    function = getattr(importlib.import_module(f"stages.{name}"), name)
    values = {key.removeprefix("--"): value for key, value in zip(arguments[::2], arguments[1::2])}
    start = time.monotonic()
    function(**values)
    seconds = time.monotonic() - start
    peak = torch.cuda.max_memory_allocated(device) if torch.device(device).type == "cuda" else 0
    print(json.dumps({"seconds": seconds, "bytes": peak}))


if __name__ == "__main__":
    main()
