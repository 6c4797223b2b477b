"""Temporary memory of the quantized linear, and of a whole denoiser block, at the shapes of Wan2.2-I2V-A14B.

    python benchmarks/linear_memory.py

Runs on the meta device, which computes nothing and allocates nothing, so the counts are exact and take seconds. The
peak is the largest number of bytes of tensors that operators created and that exist at the same time. Memory inside an
operator, such as the workspace of a GEMM, is not counted.
"""

import weakref
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepquant.formats import eight_bit_partner, get_format
from stepquant.models.families import find_denoiser
from stepquant.runtime.layout import QuantizationSettings
from stepquant.runtime.linear import W4A4Linear

FORMATS = ("int4", "mxfp4", "nvfp4")
# (T, K, N): two small layers; then attention, ffn.up and ffn.down at 832x480 and 81 frames.
SHAPES = ((8192, 3456, 1280), (32760, 1728, 640), (32760, 5120, 5120), (32760, 5120, 13824), (32760, 13824, 5120))
RANK, ROTATION = 32, 64
LATENT = (21, 60, 104)  # frames, height and width of the latents of that video
TEXT_TOKENS = 512


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators create inside this context: `live` now, `peak` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        existing = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in existing and id(storage) not in self._known:
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), id(storage)
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class FlashAttention(TorchFunctionMode):
    """Replaces attention by an empty result: kernels for GPUs do not store the score matrix, the meta device would."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0] if args else kwargs["query"])
        return func(*args, **(kwargs or {}))


def peak_bytes(call: Callable[[], Tensor]) -> tuple[int, int]:
    """Peak of the tensors alive during a call, its result excluded; and the bytes of the result."""
    with torch.no_grad(), LiveBytes() as counter:
        size = call().nbytes
    return counter.peak - size, size


def settings(fmt: str, eight_bit_bins: tuple[int, ...] = ()) -> QuantizationSettings:
    """A denoiser as the default recipe makes it: low-rank branch, mean subtraction, quantized activations."""
    partner = eight_bit_partner(get_format(fmt)).name if eight_bit_bins else None
    listed = {"a": eight_bit_bins} if eight_bit_bins else {}
    edges = (1000.0, 950.0, 900.0)
    return QuantizationSettings(fmt, fmt, "ceil", "absmax", RANK, True, {}, edges, ("a",), partner, listed)


def make_linear(fmt: str, K: int, N: int, device: str, eight_bit_bins: tuple[int, ...] = ()) -> W4A4Linear:
    """A quantized linear; all codes, scales and biases are ones."""
    linear = W4A4Linear(K, N, True, settings(fmt, eight_bit_bins), device, ROTATION, eight_bit_bins).to(device)
    linear.bin.set(torch.zeros(1, dtype=torch.int64, device=device))
    linear.bias.fill_(1)
    if device != "meta":
        for buffer in linear.buffers():
            buffer.copy_(torch.ones_like(buffer, dtype=torch.float32))
    return linear


def linear_peak(
    fmt: str, T: int, K: int, N: int, device: str = "meta", eight_bit_bins: tuple[int, ...] = ()
) -> tuple[int, int]:
    """Bytes of the temporaries of one forward of a bfloat16 input [T, K]; and of the input."""
    linear = make_linear(fmt, K, N, device, eight_bit_bins)
    x = torch.ones(T, K, dtype=torch.bfloat16, device=device)
    return peak_bytes(lambda: linear(x))[0], x.nbytes


def a14b_block(fmt: str | None) -> nn.Module:
    """One block of an expert on the meta device: quantized, or in bfloat16 if fmt is None."""
    with torch.device("meta"):
        block = WanTransformer3DModel(num_layers=1, in_channels=36, num_attention_heads=40, ffn_dim=13824).blocks[0]
    sites = find_denoiser("WanTransformer3DModel").sites({})
    for path, linear in [(path, block.get_submodule(path)) for site in sites for path in site.linears]:
        if fmt is not None:
            owner, _, name = path.rpartition(".")
            rotation = ROTATION if path == "ffn.net.2" else 0
            new = W4A4Linear(linear.in_features, linear.out_features, True, settings(fmt), "meta", rotation=rotation)
            setattr(block.get_submodule(owner), name, new.to("meta"))
    for name, parameter in block.named_parameters():  # norms and modulation stay float32, as diffusers keeps them
        if not any(part in name.split(".") for part in WanTransformer3DModel._keep_in_fp32_modules):
            parameter.data = parameter.data.bfloat16()
    return block.eval()


def block_peak(fmt: str | None) -> int:
    """Bytes alive during the forward of one block, without its weights; its input counts."""
    tokens = LATENT[0] * (LATENT[1] // 2) * (LATENT[2] // 2)
    block = a14b_block(fmt)
    hidden = torch.empty(1, tokens, 5120, dtype=torch.bfloat16, device="meta")
    text = torch.empty(1, TEXT_TOKENS, 5120, dtype=torch.bfloat16, device="meta")
    modulation = torch.empty(1, 6, 5120, device="meta")
    rotary = tuple(torch.empty(1, tokens, 1, 128, device="meta") for _ in range(2))
    with FlashAttention():
        temporaries, size = peak_bytes(lambda: block(hidden, text, modulation, rotary))
    return temporaries + size + hidden.nbytes + text.nbytes + sum(part.nbytes for part in rotary)


def main() -> None:
    """Print the temporaries of each linear, and the memory of one block."""
    print("| format | input [T, K] -> N | input, GB | temporaries, GB | temporaries / input |\n|---|---|---|---|---|")
    for (T, K, N), fmt in product(SHAPES, FORMATS):
        temporaries, size = linear_peak(fmt, T, K, N)
        print(f"| {fmt} | {T} x {K} -> {N} | {size / 1e9:.3f} | {temporaries / 1e9:.3f} | {temporaries / size:.2f} |")
    print("\nThe last input with 8-bit activations in one of two bins, and in both: temporaries")
    for fmt in FORMATS:
        mixed, all_eight = (linear_peak(fmt, *SHAPES[-1], eight_bit_bins=bins)[0] for bins in ((1,), (0, 1)))
        print(f"{fmt}: {mixed / 1e9:.3f} GB, {all_eight / 1e9:.3f} GB")
    print("\nOne block at 832x480, 81 frames: bytes alive in its forward, weights excluded")
    for fmt in (None, *FORMATS):
        print(f"{fmt or 'bfloat16'}: {block_peak(fmt) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
