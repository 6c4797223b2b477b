"""`stepquant doctor` checks this machine. Every finding is one line, with the remedy if something is wrong."""

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from stepquant import params as parameters
from stepquant.errors import UserError
from stepquant.preflight import look_at_model, look_at_prompts
from stepquant.torch_setup import check_device

PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "zarr")
# Distributions of the extra `pipeline`, and what needs them.
PIPELINE = {
    "dvc": "dvc repro",
    "scikit-image": "SSIM in stage evaluate",
    "matplotlib": "plots in stage report",
    "jinja2": "the page of stage report",
}
LITTLE_SPACE = 20e9  # bytes; the demo takes 1 GB, a real model some hundred GB (`stepquant plan`)


@dataclass(frozen=True)
class Finding:
    """One line of the output.

    Attributes:
        line: What was found.
        fine: False if it has to be fixed before the pipeline can run here.
    """

    line: str
    fine: bool = True


def examine(params: Path) -> Iterator[Finding]:
    """All findings, in the order in which they are shown. params: the params file, which need not exist."""
    python = f"python {platform.python_version()} on {platform.system()}"
    yield Finding(f"{python}, {os.cpu_count()} processors, {_memory() / 1e9:.0f} GB memory")
    yield from _packages()
    yield from _devices()
    yield from _space()
    yield from _params(params)


def _packages() -> Iterator[Finding]:
    found = {name: _version(name) for name in ("stepquant", *PACKAGES)}
    if missing := [name for name, number in found.items() if number is None]:
        yield Finding(f"missing: {', '.join(missing)}; install stepquant again", fine=False)
    yield Finding(", ".join(f"{name} {number}" for name, number in found.items() if number))
    for name, use in PIPELINE.items():
        if _version(name) is None:
            yield Finding(f"missing: {name}, which {use} needs; pip install 'stepquant[pipeline]'", fine=False)
    if _version("dvc") and _version("ruamel.yaml.clib") is None:
        yield Finding("slow: DVC reads YAML without ruamel.yaml.clib; pip install 'ruamel.yaml[oldlibyaml]'")


def _devices() -> Iterator[Finding]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(count):
        properties = torch.cuda.get_device_properties(i)
        yield Finding(f"cuda:{i}: {properties.name}, {properties.total_memory / 1e9:.0f} GB")
    if not count:
        yield Finding(f"no GPU that this torch ({torch.__version__}) can use; compute.device: cpu works")


def _space() -> Iterator[Finding]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    hint = "" if free >= LITTLE_SPACE else "; enough for the demo, `stepquant plan` prints what your model needs"
    yield Finding(f"{free / 1e9:.0f} GB free in {here}{hint}")
    for name, folder in {
        "current folder": here,
        "DVC's state": Path(os.environ.get("DVC_SITE_CACHE_DIR", "/var/tmp")),
    }.items():
        if not os.access(folder, os.W_OK):
            fix = "make it writable" if folder == here else "set DVC_SITE_CACHE_DIR to a folder of yours"
            yield Finding(f"{name}: {folder} cannot be written; {fix}", fine=False)


def _params(file: Path) -> Iterator[Finding]:
    """The params file, and the packages, the device, the model and the prompts that it needs."""
    if not file.is_file():
        yield Finding(f"{file}: no such file; `stepquant profile demo` writes one")
        return
    first = _finding(_checked, file)
    yield first
    if first.fine:  # else the sections cannot be read
        for look in (_extras, _device, look_at_model, look_at_prompts):
            yield _finding(look, file)


def _finding(look: Callable[[Path], str], file: Path) -> Finding:
    try:
        return Finding(look(file))
    except UserError as error:
        return Finding(str(error), fine=False)


def _checked(file: Path) -> str:
    parameters.check(file)
    return f"{file}: fine"


def _extras(file: Path) -> str:
    """Packages that only some parameters need."""
    wanted = {}
    if parameters.section(file, "compute").executor == "ray":
        wanted["ray"] = ("ray", "compute.executor: ray")
    if parameters.section(file, "storage").url is not None:
        wanted["obstore"] = ("s3", "storage.url")
    for name, (extra, use) in wanted.items():
        if _version(name) is None:
            raise UserError(f"missing: {name}, which {use} needs; pip install 'stepquant[{extra}]'")
    return f"extras: {', '.join(wanted) or 'none'} needed, none missing"


def _device(file: Path) -> str:
    device = parameters.section(file, "compute").device
    check_device(device)
    return f"compute.device: {device} works"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
