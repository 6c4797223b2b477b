"""How many operations GPTQ dispatches per column: on a GPU each is a kernel launch, which bounds its speed.

    python benchmarks/gptq_launches.py                     1,024 columns, a column block of 128, all formats
    python benchmarks/gptq_launches.py --columns 5120

Columns of the table, per column of the weight:
    column block   launches of `round_column_block`, the part that could be replayed as a CUDA graph
    all            launches of `gptq`: also loading the blocks, encoding, and updating the remaining columns
    views          operations of `gptq` that only make a view: time of the host, no launch
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from stepquant.formats import Format, get_format, weight_scales
from stepquant.quantize.gptq import ColumnBlock, InverseFactor, gptq, round_column_block

FORMATS = ("int4", "mxfp4", "nvfp4")
ALLOCATIONS = ("empty", "empty_strided", "empty_like", "new_empty")


class OperationLog(TorchDispatchMode):
    """Records the operations that reach a device while it is active.

    Attributes:
        names: Overload of every operation, in order, such as "mul.out".
        shapes: Shapes of the tensors among its arguments.
        views: Names of the operations that only make a view.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.shapes: list[tuple[tuple[int, ...], ...]] = []
        self.views: list[str] = []

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if func.is_view:
            self.views.append(name)
        elif name.partition(".")[0] not in ALLOCATIONS:
            self.names.append(name)
            self.shapes.append(tuple(tuple(a.shape) for a in args if isinstance(a, Tensor)))
        return func(*args, **(kwargs or {}))


def operations(work: Callable[[], object]) -> OperationLog:
    """What some work dispatches."""
    with OperationLog() as log:
        work()
    return log


def seeded_block(B: int, N: int, fmt: Format, seed: int = 0) -> ColumnBlock:
    """Buffers of a column block with seeded values: B columns of N rows, scales as of a weight."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(N, B, generator=generator)
    scale, reciprocal = (
        each.T.contiguous() for each in fmt.scale_and_reciprocal(weight_scales(fmt, W, rounding="ceil"))
    )
    U = (0.1 * torch.randn(B, B, generator=generator)).triu_(1) + torch.eye(B)
    block = ColumnBlock.allocate(B, N, W.device)
    block.load(W.T, U, scale, reciprocal, torch.arange(B) // fmt.group)
    return block


def identity_factor(K: int) -> InverseFactor:
    """A factor of K columns in stored order."""
    return InverseFactor(torch.eye(K), torch.arange(K), damping=0.0, ridge=0.0, retries=0, dead=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--column-block", type=int, default=128)
    options = parser.parse_args()
    K, N, B = options.columns, options.rows, options.column_block
    print("| format | column block | all | views |\n|---|---|---|---|")
    for name in FORMATS:
        fmt, W = get_format(name), torch.randn(N, K, generator=torch.Generator().manual_seed(0))
        block, scales = seeded_block(B, N, fmt), weight_scales(fmt, W, rounding="ceil")
        inner = operations(lambda: round_column_block(block, fmt))
        whole = operations(lambda: gptq(W, identity_factor(K), scales, fmt, column_block=B))
        counts = len(inner.names) / B, len(whole.names) / K, len(whole.views) / K
        print(f"| {name} | {' | '.join(f'{count:.2f}' for count in counts)} |")


if __name__ == "__main__":
    main()
