"""Every stage of `dvc repro`, in the order in which they run, and what it takes on a machine.

Sampling, packing and evaluating use one device, however many there are.
"""

from stepquant.plan import sizes
from stepquant.plan.cost import Cost
from stepquant.plan.quantize_costs import capture, clip, gptq, lowrank, sensitivity
from stepquant.plan.rates import CONTEXT_BYTES, DIFFUSERS_BYTES, PROCESS_BYTES, STAGING_BYTES, Machine
from stepquant.plan.sampling_costs import generate, trajectories
from stepquant.plan.workload import Workload, heldout_rows
from stepquant.recipe.variants import ORDER, REFERENCE, VARIANTS

# The smallest comparison: the source, and what its quantization makes of it.
FEW = (REFERENCE, "full")
# Pixels per second, measured at 480 x 832 on one thread of an AMD EPYC: all metrics of a video against BF16's (nearly
# all of it is SSIM), and those of a video alone.
PAIR_PIXELS, ALONE_PIXELS = 0.94e6, 27e6
SCHEDULER_SECONDS = 1.5e-3  # per step of UniPC on a number, measured as above
SHOWN = 6  # videos of each variant in the report
SHOWN_SECONDS = 0.06  # per frame, to reduce it and to encode it as GIF; measured as above


def stage_costs(run: Workload, machine: Machine, variants: tuple[str, ...] = ORDER) -> list[Cost]:
    """Every stage, with the last ones of some variants only."""
    costs = [model(run, machine), trajectories(run, machine)]
    scheduled = any(VARIANTS[variant].scheduled for variant in variants if variant != REFERENCE)
    for stage in (capture, lowrank, gptq, clip, *[sensitivity] * scheduled):
        costs += [stage(run, expert, machine) for expert in run.experts]
    costs += [schedule(run)] * scheduled
    costs += [pack(run, machine, variant) for variant in variants if variant != REFERENCE]
    costs += [generate(run, machine, variant) for variant in variants]
    costs += [evaluate(run, machine, variant) for variant in variants]
    return [*costs, report(run, machine, variants)]


def model(run: Workload, machine: Machine) -> Cost:
    """Download and hashing of the source model."""
    size, download = run.model.stored_bytes, run.model.download
    seconds = size / machine.hash + (size / machine.network if download else 0)
    return Cost("model", seconds, PROCESS_BYTES, 0, size if download else 0)


def schedule(run: Workload) -> Cost:
    """The sampler's steps for an output of one in each of them, and the products of every expert in memory, twice."""
    steps = run.parameter("sampling").steps
    products = sum(sizes.sensitivity(run, expert).bytes for expert in run.experts)
    host = PROCESS_BYTES + DIFFUSERS_BYTES + 3 * products
    return Cost("schedule", steps * (steps + 2) * SCHEDULER_SECONDS, host, 0, sizes.schedule(run).bytes)


def pack(run: Workload, machine: Machine, variant: str) -> Cost:
    """Codes and scales in the layout of the checkpoint, a block at a time; what is not quantized is copied.

    Without GPTQ, the codes are rounded on the device.
    """
    packed = sizes.checkpoint(run, variant).bytes
    weights = max(site.weights for expert in run.experts for site in expert.sites)
    block = max(sizes.packed_expert(run, e, variant).bytes / e.blocks for e in run.experts) + 8 * weights
    rest = max(expert.rest_bytes(4) for expert in run.experts)
    on_device = machine.device_bytes is not None and not VARIANTS[variant].gptq
    device = CONTEXT_BYTES + 4 * 4 * weights if on_device else 0  # the weight, its scaled form, residual and codes
    host = PROCESS_BYTES + 2 * max(block, rest) + (STAGING_BYTES if on_device else 0)
    read = sum(expert.weights * run.itemsize for expert in run.experts)
    return Cost(f"pack@{variant}", (2 * packed + read) / machine.disk, host, device, packed)


def evaluate(run: Workload, machine: Machine, variant: str) -> Cost:
    """Metrics of the videos on one thread, and errors of the packed layers on held-out tokens."""
    pixels = sizes.videos(run).bytes / 3
    one = 3 * pixels / max(1, run.prompts["evaluation"])
    if variant == REFERENCE:
        return Cost(f"evaluate@{variant}", pixels / ALONE_PIXELS, PROCESS_BYTES + 8 * one, 0, 0)
    flops = read = 0.0
    for expert in run.experts:
        rows = {site.name: heldout_rows(run, expert, site) for site in expert.sites}
        flops += expert.blocks * sum(2 * 2 * rows[site.name] * site.weights for site in expert.sites)
        read += expert.weights * run.itemsize + sizes.packed_expert(run, expert, variant).bytes
        read += sizes.activations(run, expert).bytes
    layer = max(4 * (3 * site.weights + site.K**2) for expert in run.experts for site in expert.sites)
    seconds = pixels / PAIR_PIXELS + pixels / ALONE_PIXELS + flops / machine.bf16 + read / machine.disk
    if machine.device_bytes is None:
        return Cost(f"evaluate@{variant}", seconds, PROCESS_BYTES + max(layer, 8 * one), 0, 0)
    host = PROCESS_BYTES + max(STAGING_BYTES, 8 * one)
    return Cost(f"evaluate@{variant}", seconds, host, CONTEXT_BYTES + layer, 0)


def report(run: Workload, machine: Machine, variants: tuple[str, ...]) -> Cost:
    """The page, with some videos of every variant in memory."""
    sampling = run.parameter("sampling")
    shown = len(variants) * min(SHOWN, run.prompts["evaluation"])
    pixels = sampling.num_frames * sampling.height * sampling.width
    return Cost("report", shown * sampling.num_frames * SHOWN_SECONDS, PROCESS_BYTES + shown * 3 * pixels, 0, 0)
