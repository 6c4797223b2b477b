"""What each stage computes, moves and holds: floating-point operations and bytes from shapes, seconds for a machine.

Counted are matrix products, factorizations, GPTQ's column loop, and what goes to and from the scratch disk; the rest is small
beside them. Units are independent (blocks; in capture shards of the calls), so they are taken to spread evenly over the devices, as far
as there are as many.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil

from stepquant.calibration.observer import PANEL, SLAB
from stepquant.plan import sizes
from stepquant.plan.rates import CONTEXT_BYTES, DIFFUSERS_BYTES, PROCESS_BYTES, Machine
from stepquant.plan.workload import ExpertRun, SiteShape, Workload, runs, search_rows, summed_tokens, validation_rows
from stepquant.quantize.damping import VALIDATION_ROWS
from stepquant.quantize.gptq import PANEL as TRIANGLE
from stepquant.quantize.lowrank import OVERSAMPLING, POWER_ITERATIONS

# Tensors that are alive at once at the worst moment of a stage, in multiples of: the site's weight in float32, its second
# moments, its tokens, its outputs on them. Checked against benchmarks/memory.py (docs/scale.md).
LOWRANK = (2, 2, 3, 2)
GPTQ = (5, 6, 0, 0)
CLIP = (3, 0, 3, 3)
# A block's forward, per token: values of the width and of the ffn's width that are alive at once, in float32 and in the block's dtype.
FORWARD_WIDTHS, FORWARD_FFN = (3, 7), (0, 2)
TRIED = 2.4  # dampings a site tries: the mean over the demo's sites
STAGING_BYTES = int(2e9)  # host buffers for what is read onto a GPU


@dataclass(frozen=True)
class Cost:
    """One stage on one machine: seconds, peak bytes on the host and on each device (0: there is none), bytes of its out, and
    bytes of scratch that it needs meanwhile."""

    stage: str
    seconds: float
    host: float
    device: float
    out: float
    scratch: float = 0.0


def stage_costs(run: Workload, machine: Machine) -> list[Cost]:
    """Every stage but evaluate and report, which are short, in the order in which they run; of the variants `full`, and bf16.

    Sampling and packing take one device, however many there are.
    """
    recorded, shown = run.recorded_prompts, run.prompts["evaluation"]
    whole = [expert.bf16_bytes * run.itemsize / 2 for expert in run.experts]
    packed = [float(sizes.packed_expert(run, expert).bytes) for expert in run.experts]
    costs = [sampling(run, machine, "trajectories", recorded, whole, on_disk(run, sizes.trajectories(run).bytes))]
    for stage in (capture, lowrank, gptq, clip):
        costs += [stage(run, expert, machine) for expert in run.experts]
    costs.append(pack(run, machine))
    return [
        *costs,
        sampling(run, machine, "generate@bf16", shown, whole),
        sampling(run, machine, "generate@full", shown, packed),
    ]


def sampling(run: Workload, machine: Machine, stage: str, prompts: int, experts: list[float], out: float = 0.0) -> Cost:
    """Whole videos: one expert on the device, all components on the host. experts: bytes of each.

    That packed linears are decoded in every forward is not counted.
    """
    flops = prompts * sum(sum(e.steps) * e.branches * e.blocks * forward_flops(run, e) for e in run.experts)
    everything, working = PROCESS_BYTES + sum(experts) + run.other_bytes, forward_bytes(run, run.experts[0], 1)
    if machine.device_bytes is None:
        return Cost(stage, flops / machine.bf16, everything + working, 0, out)
    return Cost(stage, flops / machine.bf16, everything, CONTEXT_BYTES + max(experts) + working, out)


def capture(run: Workload, expert: ExpertRun, machine: Machine) -> Cost:
    """Every block's forward over all calls, second moments of the calibration calls, hidden states and sums by way of the disk."""
    settings, blocks, hidden = run.parameter("capture"), expert.blocks, sizes.hidden_state(run, expert)
    forward = expert.all_calls * blocks * forward_flops(run, expert)
    moments = blocks * sum(moment_flops(run, expert, site) for site in expert.sites)
    scratch, kept = (
        sizes.hidden_states(run, expert).bytes + sizes.shard_sums(run, expert).bytes,
        sizes.activations(run, expert).bytes,
    )
    sums = ceil(expert.calls("calibration") / settings.calls_per_shard) * sum(4 * site.K**2 for site in expert.sites)
    moved = (runs(run, expert) - 1) * expert.all_calls * hidden + blocks * sums
    shards = ceil(expert.all_calls / settings.calls_per_shard)
    workers = min(machine.devices, shards)
    disk = (
        (2 * moved + kept) / machine.disk + moved / machine.hash / workers + kept / machine.hash
    )  # whoever makes a shard hashes it
    statistics = sum(4 * site.K**2 for site in expert.sites)
    block = expert.weights / blocks * run.itemsize + expert.rest_bytes * run.itemsize / 2
    largest = max(site.K for site in expert.sites)
    device = (
        block
        + statistics
        + 12 * SLAB * largest
        + DIFFUSERS_BYTES
        + forward_bytes(run, expert, settings.calls_per_chunk)
    )
    seconds = (forward / machine.bf16 + moments / machine.moments) / workers + disk
    held = workers * min(settings.calls_per_shard, expert.all_calls) * hidden
    return _cost(f"capture@{expert.name}", seconds, device, machine, on_disk(run, kept), scratch, host=held)


def lowrank(run: Workload, expert: ExpertRun, machine: Machine) -> Cost:
    """Candidates of smoothing and rotation on the search tokens, a truncated SVD for each exponent and for what gradients found."""
    smooth, rank = run.parameter("smooth", expert.name), run.parameter("lowrank", expert.name).rank
    exponents = len(smooth.candidates) if smooth.alpha == "search" else 1
    products = exponents + len(
        run.parameter("rotate", expert.name).hadamard_sizes
    )  # the reference, the exponents, the other rotations
    if smooth.gradient_steps:
        exponents, products = exponents + 1, products + 1.5  # scored on half of the tokens: reference, before, after

    def seconds(site: SiteShape) -> float:
        flops = products * 2 * search_rows(run, expert, site) * site.weights + exponents * sketch_flops(
            rank, site.weights
        )
        return (
            flops / machine.fp32 + (products - 1) * site.weights * machine.per_weight / 3
        )  # a candidate has fewer steps than a pass of GPTQ

    total = expert.blocks * sum(map(seconds, expert.sites))
    device = _worst(run, expert, LOWRANK, lambda site: search_rows(run, expert, site))
    return _factors(run, expert, machine, "lowrank", total, device, sizes.lowrank(run, expert).bytes)


def gptq(run: Workload, expert: ExpertRun, machine: Machine) -> Cost:
    """A factorization and an aim per site and damping that it tries; a pass over the columns and a weighted fit for each refit."""
    rank, settings = run.parameter("lowrank", expert.name).rank, run.parameter("gptq", expert.name)
    refits = settings.refits if rank else 0
    passes, tried = max(1, refits), min(len(settings.dampings), TRIED)

    def one_pass(site: SiteShape, rows: float) -> float:
        columns = site.K * (machine.column_seconds + machine.column_per_row * rows)
        return rows * site.K**2 / machine.fp32 + columns + rows * site.K * machine.per_weight

    def seconds(site: SiteShape) -> float:
        scored_rows = min(site.N, max(VALIDATION_ROWS, rank)) if tried > 1 else 0
        fit, thin_fit = (fit_flops(rank, rows, site.K, iterations=1) for rows in (site.N, scored_rows))
        flops = tried * 2 / 3 * site.K**3 + refits * fit  # Cholesky, and the inverse of its triangle
        flops += tried * 2 * validation_rows(run, expert, site) * site.K * 2 * scored_rows  # reference and output
        if settings.noise:  # two products with a triangle, in panels; the first branch
            flops += 2 * (site.weights + tried * scored_rows * site.K) * (site.K + TRIANGLE) + tried * thin_fit + fit
        return (
            flops / machine.fp32
            + passes * one_pass(site, site.N)
            + tried * (one_pass(site, scored_rows) if scored_rows else 0)
        )

    device = _worst(run, expert, GPTQ, lambda site: 0)
    total = expert.blocks * sum(map(seconds, expert.sites))
    return _factors(run, expert, machine, "gptq", total, device, sizes.residual(run, expert).bytes)


def clip(run: Workload, expert: ExpertRun, machine: Machine) -> Cost:
    """The reference and every candidate on the search tokens."""
    settings = run.parameter("clip", expert.name)
    candidates = len(settings.ratios) * (
        len(settings.exponent_offsets) if run.parameter("format").activation == "mxfp4" else 1
    )
    flops = sum((1 + candidates) * 2 * search_rows(run, expert, site) * site.weights for site in expert.sites)
    device = _worst(
        run, expert, CLIP, lambda site: search_rows(run, expert, site) / (len(expert.steps) if site.per_bin else 1)
    )
    return _factors(
        run, expert, machine, "clip", expert.blocks * flops / machine.fp32, device, sizes.clip(run, expert).bytes
    )


def pack(run: Workload, machine: Machine) -> Cost:
    """Codes and scales laid out anew, a block at a time; what is not quantized is copied."""
    packed = sizes.checkpoint(run).bytes
    block = max(
        sizes.packed_expert(run, e).bytes / e.blocks + 8 * max(site.weights for site in e.sites) for e in run.experts
    )
    rest = max(expert.rest_bytes for expert in run.experts)
    return Cost("pack@full", packed * (2 / machine.disk), PROCESS_BYTES + 2 * max(block, rest), 0, packed)


def on_disk(run: Workload, size: float) -> float:
    """Bytes of trajectories or activations that stay on this machine's disk: none where an object store has them."""
    return size if run.parameter("storage").url is None else 0


# --- counts ---------------------------------------------------------------------------------------------------------------


def forward_flops(run: Workload, expert: ExpertRun) -> float:
    """One block's forward of one call: the linears, self-attention, cross-attention."""
    linears = sum(2 * site.weights * site.tokens for site in expert.sites)
    text = run.parameter("sampling").max_sequence_length
    return linears + 4 * run.tokens * (run.tokens + text) * expert.width


def forward_bytes(run: Workload, expert: ExpertRun, calls: int) -> float:
    """What one block's forward of some calls holds beside its weights."""
    ffn = max(site.K for site in expert.sites)
    each = expert.width * (4 * FORWARD_WIDTHS[0] + run.itemsize * FORWARD_WIDTHS[1]) + ffn * (
        4 * FORWARD_FFN[0] + run.itemsize * FORWARD_FFN[1]
    )
    return calls * run.tokens * each


def moment_flops(run: Workload, expert: ExpertRun, site: SiteShape) -> float:
    """Second moments of one site of one block; only the panels on and right of the diagonal."""
    panels = ceil(site.K / PANEL)
    return summed_tokens(run, expert, site) * 2 * site.K**2 * (panels + 1) / (2 * panels)


def sketch_flops(rank: int, weights: float) -> float:
    """A truncated SVD by sketching: products of a matrix of so many weights with thin ones."""
    return 0.0 if rank == 0 else (2 + 2 * POWER_ITERATIONS) * 2 * weights * (rank + OVERSAMPLING)


def fit_flops(rank: int, rows: float, columns: float, iterations: int) -> float:
    """A branch in the norm of K x K moments: each iteration is two thin products with the weight and one with the moments."""
    if rank == 0:
        return 0.0
    return 2 * (rank + OVERSAMPLING) * ((2 * iterations + 2) * rows * columns + (iterations + 2) * columns**2)


def _worst(
    run: Workload, expert: ExpertRun, copies: tuple[int, int, int, int], rows: Callable[[SiteShape], float]
) -> float:
    """Peak bytes over the sites, from how many copies of what are alive."""
    weights, moments, tokens, outputs = copies
    each: Iterable[float] = (
        4 * (weights * site.weights + moments * site.K**2 + rows(site) * (tokens * site.K + outputs * site.N))
        for site in expert.sites
    )
    return max(each)


def _factors(
    run: Workload, expert: ExpertRun, machine: Machine, stage: str, seconds: float, device: float, out: float
) -> Cost:
    """A stage over independent blocks that reads weights and activations from disk."""
    read = (2 * expert.weights + sizes.activations(run, expert).bytes) / machine.disk
    return _cost(f"{stage}@{expert.name}", seconds / machine.devices + read, device, machine, out)


def _cost(
    stage: str, seconds: float, working: float, machine: Machine, out: float, scratch: float = 0.0, host: float = 0.0
) -> Cost:
    """working: what the arithmetic holds, on the host where there is no device of its own. host: what stays there in any case."""
    if machine.device_bytes is None:
        return Cost(stage, seconds, PROCESS_BYTES + working + host, 0, out, scratch)
    return Cost(stage, seconds, PROCESS_BYTES + STAGING_BYTES + host, CONTEXT_BYTES + working, out, scratch)
