"""A plan as text: a table per machine, warnings with the parameter that helps, and the assumptions."""

from collections.abc import Iterator

from rich.table import Table

from stepquant.advice import LESS_MEMORY
from stepquant.plan import sizes
from stepquant.plan.costs import stage_costs
from stepquant.plan.rates import GB, GEMM_SHARE, Machine
from stepquant.plan.workload import ASSUMED_PROMPTS, Workload, summed_tokens
from stepquant.recipe.site_statistics import FEW_TOKENS

SAMPLING = ("trajectories", "generate")

LESS_DISK = (
    "lower capture.steps_per_bin or the numbers of prompts in trajectories: each replayed call leaves its hidden states"
)


def plan_table(run: Workload, machine: Machine) -> Table:
    """A row per stage: time, peak memory, and bytes on disk of its out and of its scratch files."""
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
    most = (
        max(cost.host for cost in own),
        max(cost.device for cost in own),
        sum(cost.out for cost in own),
        max(cost.scratch for cost in own),
    )
    table.add_row("all but sampling", duration(sum(cost.seconds for cost in own)), *map(_size, most), style="bold")
    return table


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
            yield f"{cost.stage} needs {', '.join(short)}: {LESS_MEMORY[cost.stage.split('@')[0]]}"
    disk = sum(cost.out for cost in costs) + max(cost.scratch for cost in costs)
    if disk > machine.disk_bytes:
        yield f"{_size(disk)} of disk are needed, {_size(machine.disk_bytes)} are there: {LESS_DISK}"


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
                yield f"{expert.name} {site.name}: {found}; raise trajectories.calibration_prompts"


def model_lines(run: Workload) -> Iterator[str]:
    """The size of the model before and after, and the recorded calls."""
    for expert in run.experts:
        steps = "/".join(map(str, expert.steps))
        packed = sizes.packed_expert(run, expert).bytes
        yield (
            f"{expert.name}: {expert.blocks} blocks, {_size(expert.bf16_bytes)} in BF16, {_size(packed)} packed; "
            f"steps per bin {steps}, {expert.all_calls} replayed calls of {run.tokens} tokens"
        )
    before = sum(expert.bf16_bytes for expert in run.experts)
    after = sum(sizes.packed_expert(run, expert).bytes for expert in run.experts)
    yield (
        f"resident at inference, with {_size(run.other_bytes)} of other components: "
        f"{_size(after + run.other_bytes)} packed, {_size(before + run.other_bytes)} in BF16; "
        f"the experts alone {after / before:.0%}"
    )


def prompt_line(run: Workload) -> str:
    """The number of prompts, and its source."""
    assumed = ", ".join(map(str, ASSUMED_PROMPTS.values()))
    counts = ", ".join(f"{count} {split}" for split, count in run.prompts.items())
    return f"prompts: {counts} (from the parameters, else from their manifests, else {assumed})"


def assumptions(machine: Machine) -> str:
    """The rates behind the times of a machine."""
    rates = {"bfloat16": machine.bf16, "Hessian": machine.hessian, "float32": machine.fp32}
    tera = ", ".join(f"{rate / 1e12:.3g} {name}" for name, rate in rates.items())
    source = "measured" if machine.device_bytes is None else f"{GEMM_SHARE:.0%} of the vendor's peak"
    devices = "" if machine.devices == 1 else f"; {machine.devices} devices divide blocks and calls evenly"
    pcie = "" if machine.device_bytes is None else f"PCIe {machine.pcie / GB:.0f} GB/s, "
    return (
        f"assumed: TFLOPS of a device {tera} ({source}); {machine.column_seconds * 1e6:.0f} us per column of GPTQ; "
        f"{pcie}disk {machine.disk / GB:.0f} GB/s, SHA-256 {machine.hash / GB:.1f} GB/s{devices}"
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
