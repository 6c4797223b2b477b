"""A plan as text: a table per machine, warnings with the parameter that helps, and the assumptions."""

from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from stepquant.advice import LESS_MEMORY
from stepquant.formats import eight_bit_partner, get_format
from stepquant.plan import sizes
from stepquant.plan.cost import Cost
from stepquant.plan.costs import FEW, stage_costs
from stepquant.plan.rates import GB, GEMM_SHARE, Machine
from stepquant.plan.sampling_costs import fitting_offload
from stepquant.plan.workload import ASSUMED_PROMPTS, Workload, summed_tokens
from stepquant.recipe.site_statistics import FEW_TOKENS, more_tokens
from stepquant.recipe.variants import ORDER

SAMPLING = ("trajectories", "generate")

TOTAL = "dvc repro"
LESS_DISK = (
    "lower capture.steps_per_bin or the numbers of prompts in trajectories, because each replayed call leaves its "
    "hidden states; or make some variants only (see below)"
)


def plan_table(run: Workload, machine: Machine) -> Table:
    """A row per stage of `dvc repro`: time, peak memory, and bytes on disk of its out and of its scratch files.

    Below it the totals: of all stages, of those that make the variants `costs.FEW`, and of those without sampling.
    """
    table = Table(
        title=f"{machine.title}, {_size(machine.host_bytes)} of memory, {_size(machine.disk_bytes)} of disk",
        title_justify="left",
    )
    for column in ("stage", "time", "host", "device", "out", "scratch"):
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    costs = stage_costs(run, machine)
    for cost in costs:
        table.add_row(cost.stage, duration(cost.seconds), *map(_size, (cost.host, cost.device, cost.out, cost.scratch)))
    own = [cost for cost in costs if not cost.stage.startswith(SAMPLING)]
    few = stage_costs(run, machine, FEW)
    for name, counted in ((TOTAL, costs), (f"{' and '.join(FEW)} only", few), ("all but sampling", own)):
        table.add_row(name, *_total(counted), style="bold")
    return table


def _total(costs: list[Cost]) -> Iterator[str]:
    """Time and bytes on disk of some stages together, and the most memory that one of them needs."""
    yield duration(sum(cost.seconds for cost in costs))
    yield _size(max(cost.host for cost in costs))
    yield _size(max(cost.device for cost in costs))
    yield _size(sum(cost.out for cost in costs))
    yield _size(max(cost.scratch for cost in costs))


def disk_line(run: Workload, machine: Machine) -> str:
    """Bytes on disk of the totals, with the largest scratch."""
    every, few = (_disk(stage_costs(run, machine, variants)) for variants in (ORDER, FEW))
    return f"disk: {_size(every)} for {TOTAL}, {_size(few)} for {' and '.join(FEW)} only, scratch included"


def _disk(costs: list[Cost]) -> float:
    return sum(cost.out for cost in costs) + max(cost.scratch for cost in costs)


def only_lines() -> Iterator[str]:
    """How to run the stages of the second total."""
    targets = " ".join(f"evaluate@{variant}" for variant in FEW)
    options = " ".join(f"--variant {variant}" for variant in FEW)
    commands = f"dvc repro {targets} && stepquant report {options}"
    yield f"{TOTAL} makes every variant; for {' and '.join(FEW)} only: {commands}"


def warnings(run: Workload, machine: Machine) -> Iterator[str]:
    """The stages for which this machine is too small, and the parameter that helps."""
    costs = stage_costs(run, machine)
    for cost in costs:
        short = [
            f"{_size(needed)} of {what} and has {_size(there)}"
            for what, needed, there in (
                ("memory", cost.host, machine.host_bytes),
                ("device memory", cost.device, machine.device_bytes),
            )
            if there is not None and needed > there
        ]
        if short:
            yield f"{cost.stage} needs {', '.join(short)}: {_remedy(run, machine, cost)}"
    disk = _disk(costs)
    if disk > machine.disk_bytes:
        yield f"{_size(disk)} of disk are needed, {_size(machine.disk_bytes)} are there: {LESS_DISK}"


def _remedy(run: Workload, machine: Machine, cost: Cost) -> str:
    """What helps a stage; for one that samples the mode of offload under which it fits, if there is one."""
    if cost.stage.startswith(SAMPLING) and machine.device_bytes is not None:
        offload = fitting_offload(run, machine, cost.stage)
        if offload is not None:
            return f"set compute.offload: {offload}"
    return LESS_MEMORY[cost.stage.split("@")[0]]


def calibration_warnings(run: Workload) -> Iterator[str]:
    """Bins without a step, and Hessians of too few tokens."""
    for expert in run.experts:
        for b, steps in enumerate(expert.steps):
            if steps == 0:
                remedy = "set fewer or wider bins, or raise sampling.steps"
                yield f"bins.{expert.name}: no sampling step has t in bin {b}; {remedy}"
        for site in expert.sites:
            tokens = summed_tokens(run, expert, site)
            if tokens < FEW_TOKENS * site.K:
                found = f"{tokens / site.K:.1f} calibration tokens per column, fewer than {FEW_TOKENS}"
                remedy = more_tokens(text_alone=site.described.text_alone)
                yield f"{expert.name} {site.name}: {found}; {remedy}"


def prompt_warnings(run: Workload) -> Iterator[str]:
    """Manifests of prompts that are not there, and what to put there."""
    images = run.manifest.images
    pictures = " and ".join([*images.required, *(f"optionally {name}" for name in images.optional)])
    for section in ("trajectories", "generate"):
        path = run.parameter(section).manifest
        if not Path(path).is_file():
            columns = (
                f"id, split, prompt, negative_prompt, seed{f' and {pictures}' if pictures else ', without pictures'}"
            )
            yield f"{section}.manifest: {path} is not there; write your own prompts with {columns}"


def model_lines(run: Workload) -> Iterator[str]:
    """The size of the model before and after, and the recorded calls."""
    for expert in run.experts:
        steps = "/".join(map(str, expert.steps))
        packed = sizes.packed_expert(run, expert).bytes
        yield (
            f"{expert.name}: {expert.blocks} blocks, {_size(expert.bf16_bytes)} in BF16, {_size(packed)} packed; "
            f"steps per bin {steps}, {expert.all_calls} replayed calls of {run.tokens} tokens"
        )
    if run.model.stored:
        origin = "downloaded" if run.model.download else "here"
        yield f"source on disk: {_size(run.model.stored_bytes)}, {origin}"
    before = sum(expert.bf16_bytes for expert in run.experts)
    after = sum(sizes.packed_expert(run, expert).bytes for expert in run.experts)
    others = run.model.others_loaded(2)
    yield (
        f"resident at inference, with {_size(others)} of other components: "
        f"{_size(after + others)} packed, {_size(before + others)} in BF16; the experts alone {after / before:.0%}"
    )


def precision_line(run: Workload) -> str:
    """Formats of weights and activations, and the budget of 8-bit activations."""
    formats, budget = run.parameter("format"), run.parameter("precision").activation_budget
    wide = eight_bit_partner(get_format(formats.activation)).name
    return (
        f"formats: {formats.weight} weights, {formats.activation} activations; in variant scheduled {wide} activations "
        f"in at most {budget:.0%} of a video's multiply-adds (precision.activation_budget)"
    )


def prompt_line(run: Workload) -> str:
    """The number of prompts, and its source."""
    assumed = ", ".join(map(str, ASSUMED_PROMPTS.values()))
    counts = ", ".join(f"{count} {split}" for split, count in run.prompts.items())
    return f"prompts: {counts} (from the parameters, else from their manifests, else {assumed})"


def assumptions(run: Workload, machine: Machine) -> str:
    """The mode of offload, and the rates behind the times of a machine."""
    offload = "none" if machine.device_bytes is None else run.parameter("compute").offload
    rates = {"bfloat16": machine.bf16, "Hessian": machine.hessian, "float32": machine.fp32}
    tera = ", ".join(f"{rate / 1e12:.3g} {name}" for name, rate in rates.items())
    source = "measured" if machine.device_bytes is None else f"{GEMM_SHARE:.0%} of the vendor's peak"
    devices = "" if machine.devices == 1 else f"; {machine.devices} devices divide blocks and calls evenly"
    pcie = "" if machine.device_bytes is None else f"PCIe {machine.pcie / GB:.0f} GB/s, "
    return (
        f"assumed: compute.offload: {offload}; TFLOPS of a device {tera} ({source}); "
        f"{machine.column_seconds * 1e6:.0f} us per column of GPTQ; {pcie}disk {machine.disk / GB:.0f} GB/s, "
        f"SHA-256 {machine.hash / GB:.1f} GB/s, download {machine.network / GB:.1f} GB/s{devices}"
    )


def duration(seconds: float) -> str:
    """Seconds as text, such as 1 h 02 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def _size(value: float) -> str:
    """Bytes in decimal units; "-" for none or very few."""
    for unit, size in (("GB", GB), ("MB", 1e6), ("kB", 1e3)):
        if value >= 0.1 * size:
            return f"{value / size:.1f} {unit}"
    return "-"
