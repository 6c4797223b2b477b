"""Floating-point operations and bytes of single pieces of work, from shapes."""

from math import ceil

from stepquant.calibration.observer import PANEL
from stepquant.plan.workload import ExpertRun, SiteShape, Workload, summed_tokens
from stepquant.quantize.lowrank import OVERSAMPLING, POWER_ITERATIONS
from stepquant.runtime.linear import TOKENS_PER_SLAB

# Tensors that a block's forward holds at a time, per token: of the width and of the ffn's width, in float32 and in the
# dtype of the block. Checked against benchmarks/memory.py (docs/scale.md).
FORWARD_WIDTHS, FORWARD_FFN = (3, 7), (0, 2)
# The quantized linear works on a slab of tokens at a time (runtime/linear.py), with this many float32 tensors of it:
# the centered input, its smoothed and rotated forms, its quotient by the scales, the rounded and the scaled values.
SLAB_TENSORS = 6
# Tensors per token that a block's graph keeps for its gradients, counted as those of the forward, and an attention's
# products: scores and output; going back the scores again and the gradients of scores, queries, keys and values.
GRAPH_WIDTHS, GRAPH_FFN = (6, 15), (0, 2)
ATTENTION, ATTENTION_BACK = 2, 5
MODULATION = 6  # vectors of the width by which a timestep modulates a block, in float32
HEAD = 128  # channels of an attention head of every Wan model


def forward_flops(run: Workload, expert: ExpertRun) -> float:
    """One block's forward of one call: the linears, self-attention, cross-attention."""
    linears = sum(2 * site.weights * site.tokens for site in expert.sites)
    return linears + ATTENTION * attention_product(run, expert)


def backward_flops(run: Workload, expert: ExpertRun) -> float:
    """The gradients of one block's call by its hidden states: not by weights, and not by the text."""
    linears = sum(2 * site.weights * site.tokens for site in expert.sites if site.per_bin)
    return linears + ATTENTION_BACK * attention_product(run, expert)


def attention_product(run: Workload, expert: ExpertRun) -> float:
    """One product of queries and keys, in the self-attention and the cross-attention of a block."""
    context: int = run.parameter("sampling").max_sequence_length + run.model.image_tokens
    return 2 * run.tokens * (run.tokens + context) * expert.width


def forward_bytes(run: Workload, expert: ExpertRun, calls: int) -> float:
    """What one block's forward of some calls holds besides its weights."""
    ffn = max(site.K for site in expert.sites)
    widths = expert.width * (4 * FORWARD_WIDTHS[0] + run.itemsize * FORWARD_WIDTHS[1])
    if run.model.token_timesteps:  # modulation per token: as it was projected, in float32, and with the block's table
        widths += MODULATION * expert.width * (run.itemsize + 2 * 4)
    return calls * run.tokens * (widths + ffn * (4 * FORWARD_FFN[0] + run.itemsize * FORWARD_FFN[1]))


def gradient_bytes(run: Workload, expert: ExpertRun) -> float:
    """What stage sensitivity holds of one block's call besides its weights.

    The graph, the gradients by the outputs of all linears, and outputs and gradients of the widest site once more,
    stacked.
    """
    ffn = max(site.K for site in expert.sites)
    widths = expert.width * (4 * GRAPH_WIDTHS[0] + run.itemsize * GRAPH_WIDTHS[1])
    inner = ffn * (4 * GRAPH_FFN[0] + run.itemsize * GRAPH_FFN[1])
    stacked = 2 * max((site.N for site in expert.sites if len(site.linears) > 1), default=0)
    gradients = run.itemsize * (sum(site.N for site in expert.sites if site.per_bin) + stacked)
    return run.tokens * (widths + inner + gradients)


def linear_bytes(run: Workload, expert: ExpertRun) -> float:
    """What the largest quantized linear holds: its dequantized weight in the dtype of the block, and a slab's tensors.

    `forward_bytes` counts its input and output.
    """

    def held(rows: int, columns: int) -> float:
        return run.itemsize * rows * columns + SLAB_TENSORS * 4 * min(TOKENS_PER_SLAB, run.tokens) * columns

    return max(held(*shape) for site in expert.sites for shape in site.linears.values())


def block_input_bytes(run: Workload, expert: ExpertRun, calls: int) -> float:
    """What capture keeps on the device for some calls between blocks: text, image and modulation of each, one rotary
    table. Modulation per token repeats: the first frame has one t, all others another."""
    context: float = (run.parameter("sampling").max_sequence_length + run.model.image_tokens) * run.itemsize
    modulations = 2 if run.model.token_timesteps else 1
    return calls * expert.width * (context + modulations * MODULATION * 4) + 2 * run.tokens * HEAD * 4


def hessian_flops(run: Workload, expert: ExpertRun, site: SiteShape) -> float:
    """The Hessian of one site of one block; only the panels on and right of the diagonal are computed."""
    panels = ceil(site.K / PANEL)
    return summed_tokens(run, expert, site) * 2 * site.K**2 * (panels + 1) / (2 * panels)


def sketch_flops(rank: int, weights: float) -> float:
    """A truncated SVD by a random sketch: products of a matrix of so many weights with thin ones."""
    return 0.0 if rank == 0 else (2 + 2 * POWER_ITERATIONS) * 2 * weights * (rank + OVERSAMPLING)


def fit_flops(rank: int, rows: float, columns: float, iterations: int) -> float:
    """A low-rank branch in the norm of a K x K Hessian.

    Each iteration is two thin products with the weight and one with the Hessian.
    """
    if rank == 0:
        return 0.0
    return 2 * (rank + OVERSAMPLING) * ((2 * iterations + 2) * rows * columns + (iterations + 2) * columns**2)
