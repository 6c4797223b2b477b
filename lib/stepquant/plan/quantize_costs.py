"""What the stages of the quantization compute, move and hold on a machine: seconds and peak bytes, from shapes.

Counted are matrix products, factorizations, GPTQ's column loop, and the traffic to the scratch disk and over PCIe. The
rest is small. Units are independent (blocks; in capture, shards of the calls), so they are assumed to be spread evenly
over the devices, up to one unit per device.
"""

from collections.abc import Callable
from math import ceil

from stepquant.calibration.observer import SLAB
from stepquant.plan import sizes
from stepquant.plan.cost import Cost
from stepquant.plan.counts import (
    backward_flops,
    block_input_bytes,
    fit_flops,
    forward_bytes,
    forward_flops,
    gradient_bytes,
    hessian_flops,
    sketch_flops,
)
from stepquant.plan.rates import CONTEXT_BYTES, DIFFUSERS_BYTES, PROCESS_BYTES, STAGING_BYTES, Machine
from stepquant.plan.workload import (
    ExpertRun,
    SiteShape,
    Workload,
    block_ranges,
    measured_steps,
    search_rows,
    validation_rows,
)
from stepquant.quantize.damping import VALIDATION_ROWS
from stepquant.quantize.gptq import PANEL as TRIANGLE

# Tensors that exist at a time at the peak of a stage, in multiples of: the site's weight in float32, its Hessian, its
# tokens, its outputs on them. Checked against benchmarks/memory.py (docs/scale.md).
LOWRANK = (2, 2, 3, 2)
GPTQ = (5, 6, 0, 0)
CLIP = (3, 0, 3, 3)
TRIED = 2.4  # dampings that a site tries: the mean over the demo's sites
COPIES = 3  # chunks of hidden states on a GPU besides those of the forward: two inputs and an output under way


def capture(run: Workload, expert: ExpertRun, machine: Machine) -> Cost:
    """Every block's forward over all calls, Hessians of the calibration calls, hidden states and sums through the disk.

    On a GPU the hidden states of each call cross PCIe to and from every block while other calls are computed, so the
    slower of the two counts.
    """
    settings, hidden = run.parameter("capture"), sizes.hidden_state(run, expert)
    hessians = expert.blocks * sum(hessian_flops(run, expert, site) for site in expert.sites)
    forward = expert.all_calls * expert.blocks * forward_flops(run, expert)
    crossing = 2 * expert.all_calls * expert.blocks * hidden / machine.pcie
    scratch = sizes.hidden_states(run, expert).bytes + sizes.shard_sums(run, expert).bytes
    kept = sizes.activations(run, expert).bytes
    workers = min(machine.devices, ceil(expert.all_calls / settings.calls_per_shard))
    working = max(forward / machine.bf16 + hessians / machine.hessian, crossing)
    held = min(settings.calls_per_shard, expert.all_calls)
    return _cost(
        f"capture@{expert.name}",
        working / workers + _capture_disk(run, expert, machine, workers),
        _capture_device(run, expert, machine, held),
        machine,
        on_disk(run, kept),
        scratch,
        host=workers * held * hidden,
    )


def lowrank(run: Workload, expert: ExpertRun, machine: Machine) -> Cost:
    """Candidates of smoothing and rotation on the search tokens.

    Each exponent, and the smoothing refined by gradients, takes a truncated SVD.
    """
    smooth, rank = run.parameter("smooth", expert.name), run.parameter("lowrank", expert.name).rank
    exponents = len(smooth.candidates) if smooth.alpha == "search" else 1
    # One for the reference, one per exponent, one per other rotation.
    products: float = exponents + len(run.parameter("rotate", expert.name).hadamard_sizes)
    if smooth.gradient_steps:
        exponents, products = exponents + 1, products + 1.5  # scored on half of the tokens: reference, before, after

    def seconds(site: SiteShape) -> float:
        flops = products * 2 * search_rows(run, expert, site) * site.weights
        flops += exponents * sketch_flops(rank, site.weights)
        # A candidate has a third of the elementwise work of a pass of GPTQ.
        return flops / machine.fp32 + (products - 1) * site.weights * machine.per_weight / 3

    total = expert.blocks * sum(map(seconds, expert.sites))
    device = _worst(expert, LOWRANK, lambda site: search_rows(run, expert, site))
    return _factors(run, expert, machine, "lowrank", total, device, sizes.lowrank(run, expert).bytes)


def gptq(run: Workload, expert: ExpertRun, machine: Machine) -> Cost:
    """Per site and damping that it tries, a factorization and a noise-aware target.

    Per refit, a pass over the columns and a weighted fit of the low-rank branch.
    """
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
        if settings.noise:  # two products with a triangle, in panels; the initial branch
            flops += 2 * (site.weights + tried * scored_rows * site.K) * (site.K + TRIANGLE) + tried * thin_fit + fit
        trials = tried * one_pass(site, scored_rows) if scored_rows else 0
        return flops / machine.fp32 + passes * one_pass(site, site.N) + trials

    device = _worst(expert, GPTQ, lambda site: 0)
    total = expert.blocks * sum(map(seconds, expert.sites))
    return _factors(run, expert, machine, "gptq", total, device, sizes.residual(run, expert).bytes)


def clip(run: Workload, expert: ExpertRun, machine: Machine) -> Cost:
    """The reference and every candidate on the search tokens."""
    settings = run.parameter("clip", expert.name)
    offsets = len(settings.exponent_offsets) if run.parameter("format").activation == "mxfp4" else 1
    candidates = len(settings.ratios) * offsets
    flops = sum((1 + candidates) * 2 * search_rows(run, expert, site) * site.weights for site in expert.sites)

    def rows(site: SiteShape) -> float:
        return search_rows(run, expert, site) / (len(expert.steps) if site.per_bin else 1)

    seconds, out = expert.blocks * flops / machine.fp32, sizes.clip(run, expert).bytes
    return _factors(run, expert, machine, "clip", seconds, _worst(expert, CLIP, rows), out)


def sensitivity(run: Workload, expert: ExpertRun, machine: Machine) -> Cost:
    """Per measured call and block: two forwards, and per probe the way back and what its gradients are multiplied with.

    The products have the size of the linears: the gradient with the quantized weight, the input with it, and those of
    the low-rank branch in float32. Rounding the input to two formats is about the elementwise work of a pass of GPTQ on
    as many weights.
    """
    settings, rank = run.parameter("sensitivity"), run.parameter("lowrank", expert.name).rank
    units, branches = measured_steps(run, expert), expert.branches
    inputs = sum(site.tokens * site.K for site in expert.sites)
    products = sum(2 * 2 * site.tokens * site.weights for site in expert.sites)
    branch = sum(2 * site.tokens * rank * (site.K + site.N) for site in expert.sites)
    probe = (backward_flops(run, expert) + products) / machine.bf16 + branch / machine.fp32
    call = 2 * forward_flops(run, expert) / machine.bf16 + settings.probes * (probe + inputs * machine.per_weight)
    workers = min(machine.devices, units)
    kept = branches * expert.blocks * sizes.hidden_state(run, expert)  # inputs of all blocks, for the way back
    return _cost(
        f"sensitivity@{expert.name}",
        units * branches * expert.blocks * call / workers + _sensitivity_disk(run, expert, machine, units * kept),
        _sensitivity_device(run, expert),
        machine,
        sizes.sensitivity(run, expert).bytes,
        workers * kept,
    )


def on_disk(run: Workload, size: float) -> float:
    """Bytes of trajectories or statistics on this machine's disk: none if they are in an object store."""
    return size if run.parameter("storage").url is None else 0


def _capture_disk(run: Workload, expert: ExpertRun, machine: Machine, workers: int) -> float:
    """Seconds for hidden states and sums, which the worker that makes a shard hashes, and for the statistics."""
    kept, calls_per_shard = sizes.activations(run, expert).bytes, run.parameter("capture").calls_per_shard
    shards = ceil(expert.calls("calibration") / calls_per_shard)
    moved: float = (block_ranges(run, expert) - 1) * expert.all_calls * sizes.hidden_state(run, expert)
    moved += expert.blocks * shards * sum(4 * site.K**2 for site in expert.sites)
    return (2 * moved + kept) / machine.disk + moved / machine.hash / workers + kept / machine.hash


def _capture_device(run: Workload, expert: ExpertRun, machine: Machine, calls: int) -> float:
    """Bytes that capture holds where it computes, for a shard of some calls."""
    chunk: int = run.parameter("capture").calls_per_chunk
    block: float = expert.weights / expert.blocks * run.itemsize + expert.rest_bytes(run.itemsize)
    statistics = sum(4 * site.K**2 for site in expert.sites) + 12 * SLAB * max(site.K for site in expert.sites)
    copies = 0 if machine.device_bytes is None else COPIES * chunk * sizes.hidden_state(run, expert)
    inputs = block_input_bytes(run, expert, calls)
    return block + statistics + DIFFUSERS_BYTES + forward_bytes(run, expert, chunk) + inputs + copies


def _sensitivity_disk(run: Workload, expert: ExpertRun, machine: Machine, moved: float) -> float:
    """Seconds for the inputs of blocks, which are written and read once, and for the weights.

    Each unit reads the weights forwards and backwards, and the factors. If the expert fits the host's memory, all but
    the first reading find it there.
    """
    weights: float = expert.weights * run.model.stored_itemsize(expert.name)
    factors = sizes.residual(run, expert).bytes + sizes.lowrank(run, expert).bytes
    fits = weights + factors + PROCESS_BYTES + STAGING_BYTES < machine.host_bytes
    read = weights + factors if fits else measured_steps(run, expert) * (2 * weights + factors)
    return (2 * moved + read) / machine.disk


def _sensitivity_device(run: Workload, expert: ExpertRun) -> float:
    """Bytes that sensitivity holds where it computes: a block with the graph of one call, and its quantized layers.

    Of one site the weight is dequantized, in float32 and in the dtype of the block. Beside them are the inputs and
    gradients of every branch.
    """
    block: float = expert.weights / expert.blocks * run.itemsize + expert.rest_bytes(run.itemsize)
    layers = (sizes.residual(run, expert).bytes + sizes.lowrank(run, expert).bytes) / expert.blocks
    weight = (4 + run.itemsize) * max(site.weights for site in expert.sites)
    hidden: float = (2 + run.parameter("sensitivity").probes) * expert.branches * sizes.hidden_state(run, expert)
    inputs = block_input_bytes(run, expert, expert.branches)
    graph = gradient_bytes(run, expert)
    return block + layers + weight + DIFFUSERS_BYTES + graph + inputs + hidden


def _worst(expert: ExpertRun, copies: tuple[int, int, int, int], rows: Callable[[SiteShape], float]) -> float:
    """Peak bytes over the sites, from the multiples of weights, Hessians, tokens and outputs that exist at a time."""
    weights, hessians, tokens, outputs = copies
    return max(
        4 * (weights * site.weights + hessians * site.K**2 + rows(site) * (tokens * site.K + outputs * site.N))
        for site in expert.sites
    )


def _factors(
    run: Workload, expert: ExpertRun, machine: Machine, stage: str, seconds: float, device: float, out: float
) -> Cost:
    """A stage over independent blocks that reads weights and statistics from disk."""
    read = (2 * expert.weights + sizes.activations(run, expert).bytes) / machine.disk
    return _cost(f"{stage}@{expert.name}", seconds / machine.devices + read, device, machine, out)


def _cost(
    stage: str, seconds: float, working: float, machine: Machine, out: float, scratch: float = 0.0, host: float = 0.0
) -> Cost:
    """working: bytes where the stage computes, which is the host if there is no device. host: bytes always there."""
    if machine.device_bytes is None:
        return Cost(stage, seconds, PROCESS_BYTES + working + host, 0, out, scratch)
    return Cost(stage, seconds, PROCESS_BYTES + STAGING_BYTES + host, CONTEXT_BYTES + working, out, scratch)
