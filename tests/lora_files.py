"""LoRA files in the formats that are published, with random values."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.native_wan import native_name

RANK, ALPHA = 4, 6.0
# Linears in and outside of blocks: attention, feed-forward, what embeds time and text, and the last layer.
BLOCK_MODULES = tuple(
    f"blocks.{i}.{path}" for i in range(2) for path in ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "ffn.net.0.proj")
)
MODULES = (
    *BLOCK_MODULES,
    "condition_embedder.time_embedder.linear_1",
    "condition_embedder.time_embedder.linear_2",
    "condition_embedder.text_embedder.linear_1",
    "condition_embedder.text_embedder.linear_2",
    "condition_embedder.time_proj",
    "proj_out",
)
ALL_IN_BLOCK = (
    *(f"attn{n}.to_{x}" for n in (1, 2) for x in ("q", "k", "v", "out.0")), "ffn.net.0.proj", "ffn.net.2"
)  # fmt: skip


def pairs(model: torch.nn.Module, modules: tuple[str, ...], seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Random (down [RANK, K], up [N, RANK]) of each module."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for module in modules:
        rows, columns = model.get_submodule(module).weight.shape
        down, up = (torch.randn(shape, generator=generator) for shape in ((RANK, columns), (rows, RANK)))
        found[module] = (down, up)
    return found


def diffusers_keys(made: dict[str, tuple[Tensor, Tensor]], prefix: str = "transformer.") -> dict[str, Tensor]:
    """As diffusers' save_lora_weights writes."""
    return {
        f"{prefix}{module}.lora_{letter}.weight": tensor
        for module, pair in made.items()
        for letter, tensor in zip("AB", pair)
    }


def native_keys(made: dict[str, tuple[Tensor, Tensor]], alpha: float | None) -> dict[str, Tensor]:
    """As LightX2V publishes Lightning: Wan-Video's names, lora_down and lora_up, perhaps an alpha of each module."""
    tensors = {}
    for module, pair in made.items():
        name = f"diffusion_model.{native_name(module)}"
        tensors |= {f"{name}.lora_{part}.weight": tensor for part, tensor in zip(("down", "up"), pair)}
        tensors |= {} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)}
    return tensors


def kohya_keys(made: dict[str, tuple[Tensor, Tensor]], alpha: float) -> dict[str, Tensor]:
    """As musubi-tuner writes."""
    tensors = {}
    for module, pair in made.items():
        name = "lora_unet_" + native_name(module).replace(".", "_")
        tensors |= {f"{name}.lora_{part}.weight": tensor for part, tensor in zip(("down", "up"), pair)}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def save_lora(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write the file, contiguous copies of the tensors."""
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, file, metadata=metadata)
    return file
