"""What the stages that sample videos take, under each mode of `compute.offload`.

Not counted are the seconds of text encoder and VAE, and those in which packed linears are dequantized.
"""

from dataclasses import dataclass

from stepquant.models.offload import OFFLOADS
from stepquant.plan import sizes
from stepquant.plan.cost import Cost
from stepquant.plan.counts import forward_bytes, forward_flops, linear_bytes
from stepquant.plan.rates import CONTEXT_BYTES, DIFFUSERS_BYTES, PROCESS_BYTES, Machine
from stepquant.plan.workload import ExpertRun, Workload
from stepquant.recipe.variants import REFERENCE

# Values that the VAE's decoder holds per pixel of a frame, counted once on the meta device; no command of this
# repository repeats it (docs/scale.md).
DECODED_VALUES = 5300


@dataclass(frozen=True)
class LoadedExpert:
    """An expert in memory.

    Attributes:
        run: Its recorded calls, which are spread as those of the evaluation.
        bytes: Its weights.
        block: The weights of one block.
        mapped: Bytes that are not in memory if its weights are mapped from files.
        converted: Bytes of the copy from which they are mapped; 0 if they are mapped as they are.
    """

    run: ExpertRun
    bytes: float
    block: float
    mapped: float
    converted: float


@dataclass(frozen=True)
class Job:
    """What is sampled.

    Attributes:
        stage: Name of the stage.
        prompts: Number of videos.
        experts: The experts.
        working: Bytes that a forward holds besides the weights.
        out: Bytes of the out.
    """

    stage: str
    prompts: int
    experts: list[LoadedExpert]
    working: float
    out: float


def trajectories(run: Workload, machine: Machine, offload: str | None = None) -> Cost:
    """The calibration prompts, sampled by the source model. offload: None for the mode of the parameters."""
    out = 0 if run.parameter("storage").url is not None else sizes.trajectories(run).bytes
    working = forward_bytes(run, run.experts[0], 1)
    job = Job("trajectories", run.recorded_prompts, source_experts(run), working, out)
    return _cost(run, machine, offload, job)


def generate(run: Workload, machine: Machine, variant: str, offload: str | None = None) -> Cost:
    """The evaluation prompts, sampled by a variant. offload: None for the mode of the parameters."""
    reference = variant == REFERENCE
    experts = source_experts(run) if reference else packed_experts(run, variant)
    working = forward_bytes(run, run.experts[0], 1) + (0 if reference else linear_bytes(run, run.experts[0]))
    out = sizes.videos(run).bytes
    return _cost(run, machine, offload, Job(f"generate@{variant}", run.prompts["evaluation"], experts, working, out))


def source_experts(run: Workload) -> list[LoadedExpert]:
    """The unquantized experts. Weights that are not stored in `compute.dtype` are converted to be mapped."""
    found = []
    for expert in run.experts:
        linears = expert.weights * run.itemsize
        converted = 0 if run.model.stored_itemsize(expert.name) == run.itemsize else linears
        found.append(
            LoadedExpert(expert, expert.loaded_bytes(run.itemsize), linears / expert.blocks, linears, converted)
        )
    return found


def packed_experts(run: Workload, variant: str) -> list[LoadedExpert]:
    """The experts of a packed variant, whose weights are not mapped."""
    found = []
    for expert in run.experts:
        size = sizes.packed_expert(run, expert, variant).bytes
        block = (size - expert.rest_bytes(run.itemsize)) / expert.blocks
        found.append(LoadedExpert(expert, size, block, mapped=0, converted=0))
    return found


def fitting_offload(run: Workload, machine: Machine, stage: str) -> str | None:
    """The first mode under which a stage that samples fits a machine with a GPU, or None."""
    name, _, variant = stage.partition("@")
    for offload in OFFLOADS:
        cost = generate(run, machine, variant, offload) if variant else trajectories(run, machine, offload)
        if cost.host <= machine.host_bytes and cost.device <= (machine.device_bytes or 0):
            return offload
    return None


def _cost(run: Workload, machine: Machine, offload: str | None, job: Job) -> Cost:
    everything = sum(expert.bytes for expert in job.experts) + run.model.others_loaded(run.itemsize)
    host = PROCESS_BYTES + DIFFUSERS_BYTES + everything
    if machine.device_bytes is None:
        seconds = _seconds(run, machine, "none", job)
        return Cost(job.stage, seconds, host + max(job.working, _decoding(run)), 0, job.out)
    offload = run.parameter("compute").offload if offload is None else offload
    scratch, staging = 0.0, 0.0
    if offload in ("group", "disk"):
        staging = 2 * max(expert.block for expert in job.experts)  # page-locked: a block and the next one
    if offload == "disk":
        host -= sum(expert.mapped for expert in job.experts)
        scratch = sum(expert.converted for expert in job.experts)
        # A block is converted at a time: its float32 values, and those of the computation.
        staging = max(staging, 3 * max(expert.converted / expert.run.blocks for expert in job.experts))
    seconds = _seconds(run, machine, offload, job) + 3 * scratch / machine.disk  # read in float32, written
    device = CONTEXT_BYTES + _device(run, offload, job, everything)
    return Cost(job.stage, seconds, host + staging, device, job.out, scratch)


def _device(run: Workload, offload: str, job: Job, everything: float) -> float:
    """Bytes on the device besides its context."""
    vae, decoding = run.model.loaded("vae", run.itemsize), _decoding(run)
    encoders = max((run.model.loaded(name, run.itemsize) for name in run.model.values if name != "vae"), default=0)
    if offload == "none":
        return everything + max(job.working, decoding)
    if offload == "model":
        return max(max(expert.bytes for expert in job.experts) + job.working, encoders, vae + decoding)
    block = max(expert.block for expert in job.experts)
    rest = max(expert.bytes - expert.run.blocks * expert.block for expert in job.experts)
    return vae + max(2 * block + rest + job.working, encoders, decoding)


def _decoding(run: Workload) -> float:
    """Bytes that the VAE holds, in float32."""
    sampling = run.parameter("sampling")
    return 4 * DECODED_VALUES * sampling.height * sampling.width if "vae" in run.model.values else 0


def _seconds(run: Workload, machine: Machine, offload: str, job: Job) -> float:
    """Of the calls. In groups, a block is copied to the device while the one before it is computed."""
    total = 0.0
    for loaded in job.experts:
        expert = loaded.run
        calls = job.prompts * sum(expert.steps) * expert.branches
        blocks, moved = loaded.block * expert.blocks, 0.0
        if offload in ("group", "disk"):
            moved = blocks / (machine.disk if offload == "disk" and loaded.mapped else machine.pcie)
        total += calls * max(expert.blocks * forward_flops(run, expert) / machine.bf16, moved)
        total += job.prompts * loaded.bytes / machine.pcie if offload == "model" else 0
    return total
