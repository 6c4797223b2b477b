"""Runs stages one after the other in this process, each in its own folder: `alone.py CALLS`.

CALLS is JSON, {stage: {"folder": ..., "command": ["stages.capture", "--expert", "low_noise"]}}. Each folder gets a
result.json: "done", or what went wrong.
"""

import contextlib
import importlib
import io
import json
import os
import sys
import traceback
from pathlib import Path

import typer


def run(folder: str, command: list[str]) -> str:
    module, *arguments = command
    options = {flag.removeprefix("--"): value for flag, value in zip(arguments[::2], arguments[1::2])}
    stage = getattr(importlib.import_module(module), module.removeprefix("stages."))
    os.chdir(folder)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            stage(**options)
    except typer.Exit:
        return errors.getvalue()
    except Exception:
        return traceback.format_exc()
    return "done"


if __name__ == "__main__":
    for call in json.loads(Path(sys.argv[1]).read_text()).values():
        Path(call["folder"], "result.json").write_text(json.dumps(run(**call)))
