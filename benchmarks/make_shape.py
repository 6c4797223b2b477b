"""Makes a folder in which the stages run on a denoiser of any shape: random weights, recorded calls, params.

    python benchmarks/make_shape.py FOLDER --blocks 2                    a block of Wan2.2-I2V-A14B is 0.70 GB
    cd FOLDER
    for s in "model" "capture --expert denoiser" "lowrank --expert denoiser"; do
        PYTHONPATH=CHECKOUT python -m stages.$s
    done

    FOLDER/model/                       a dense diffusers pipeline, whose other components are tiny; expert: `denoiser`
    FOLDER/artifacts/trajectories.zarr  calls as stage trajectories records them
    FOLDER/params.yaml                  the profile of the real model, with what has to differ here

Weights follow Student's t with 4 degrees of freedom. As in trained models, some channels of every site are many times
larger than the others: by modulation and norms for the inputs behind AdaLN, by the rows of to_v and ffn.net.0 for the
inputs behind those. Blocks are made one at a time, so memory stays at one block.
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from stepquant.calibration.recorder import RecordedCall
from stepquant.calibration.trajectory_files import write_trajectory
from stepquant.models.checks.scheduler import sampler_timesteps
from stepquant.models.families import find_denoiser
from stepquant.plan.published import SCHEDULER
from stepquant.profiles import read_profiles
from stepquant.storage.digests import content_key, file_digests
from stepquant.storage.zarr_groups import group_metadata

EXPERT = "denoiser"
STEM = "diffusion_pytorch_model"
OUTLIERS, GAIN = 0.005, 20.0  # part of a site's channels, and their factor
TOKENIZER = Path(__file__).resolve().parent.parent / "data/models/wan22-mini/tokenizer"
SHIFT = 1.0  # of the timesteps: none
SLAB = 1024  # rows of a weight drawn at a time


@dataclass(frozen=True)
class Shape:
    """A WanTransformer3DModel; the defaults are those of Wan2.2-I2V-A14B (40 heads of size 128 are 5,120)."""

    blocks: int
    width: int = 5120
    ffn: int = 13824
    heads: int = 40
    in_channels: int = 36
    text_dim: int = 4096

    def config(self) -> dict[str, Any]:
        """config.json as diffusers writes it."""
        return {
            "_class_name": "WanTransformer3DModel",
            "added_kv_proj_dim": None,
            "attention_head_dim": self.width // self.heads,
            "cross_attn_norm": True,
            "eps": 1e-6,
            "ffn_dim": self.ffn,
            "freq_dim": 256,
            "image_dim": None,
            "in_channels": self.in_channels,
            "num_attention_heads": self.heads,
            "num_layers": self.blocks,
            "out_channels": 16,
            "patch_size": [1, 2, 2],
            "pos_embed_seq_len": None,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 1024,
            "text_dim": self.text_dim,
        }


@dataclass(frozen=True)
class Calls:
    """The recorded calls: prompts per split, steps over 0..1000, latent video [frames, height, width], text tokens.

    One 81-frame call at 480 x 832 has latents of 21 x 60 x 104, which are 32,760 tokens.
    """

    calibration: int = 2
    validation: int = 1
    heldout: int = 1
    steps: int = 3
    frames: int = 4
    height: int = 32
    width: int = 32
    text: int = 512

    def prompts(self) -> dict[str, int]:
        """How many per split, in their order."""
        return {"calibration": self.calibration, "validation": self.validation, "heldout": self.heldout}


def make_shape(folder: Path, shape: Shape, calls: Calls, params: dict[str, dict[str, Any]], seed: int = 0) -> None:
    """Write everything. params: by section, keys to set over the profile's."""
    write_model(folder / "model", shape, seed)
    write_trajectories(folder / "artifacts" / "trajectories.zarr", shape, calls, seed)
    values = yaml.safe_load(read_profiles()["wan2.2-i2v-a14b"])
    values["model"] = {"source": "model", "revision": None, "loras": []}
    values["compute"] |= {"device": "cpu", "offload": "none", "threads": 1}
    values["bins"] = {EXPERT: bin_edges(calls.steps)}
    values["experts"] = {EXPERT: values["experts"]["high_noise"]}
    values["sampling"] |= {
        "height": 8 * calls.height,
        "width": 8 * calls.width,
        "num_frames": 4 * calls.frames - 3,
        "steps": calls.steps,
    }
    values["sampling"] |= {"guidance_scale": 1.0, "max_sequence_length": calls.text, "flow_shift": SHIFT}
    values["trajectories"] |= {f"{split}_prompts": count for split, count in calls.prompts().items()}
    for name, keys in params.items():
        values[name] |= keys
    (folder / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def bin_edges(steps: int) -> list[float]:
    """Up to three bins with about equally many sampler steps each; edges are between steps."""
    t, bins = sampler_timesteps(SCHEDULER, steps, SHIFT), min(3, steps)
    inner = [k * steps // bins for k in range(1, bins)]
    return [1000.0, *((t[i - 1] + t[i]) / 2 for i in inner), 0.0]


# --- model ---


def write_model(folder: Path, shape: Shape, seed: int) -> None:
    """A pipeline folder of sharded bfloat16 safetensors: a shard per block, then one with all else."""
    transformer = folder / "transformer"
    transformer.mkdir(parents=True)
    parts = {
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    index = {"_class_name": "WanImageToVideoPipeline", "boundary_ratio": None, "expand_timesteps": False} | parts
    _write_json(folder / "model_index.json", index)
    write_surroundings(folder, shape.text_dim)
    _write_json(transformer / "config.json", shape.config())
    weight_map, total = {}, 0
    for i, tensors in enumerate(shards(shape, seed), start=1):
        name = f"{STEM}-{i:05d}-of-{shape.blocks + 1:05d}.safetensors"
        save_file(tensors, transformer / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        tensors.clear()  # before the next shard is made
    _write_json(
        transformer / f"{STEM}.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )


def write_surroundings(folder: Path, text_dim: int) -> None:
    """The other components, which no stage but model looks at: of the right classes and widths, and else tiny."""
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True).save_pretrained(
        folder / "scheduler"
    )
    text = UMT5Config(vocab_size=64, d_model=text_dim, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        UMT5EncoderModel(text).save_pretrained(folder / "text_encoder")
        AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1).save_pretrained(folder / "vae")
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    config = folder / "tokenizer" / "tokenizer_config.json"
    _write_json(config, json.loads(config.read_text()) | {"model_max_length": int(1e30)})


def shards(shape: Shape, seed: int) -> Iterator[dict[str, Tensor]]:
    """The tensors of each block, then the others."""
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(shape.config() | {"num_layers": 1})
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    block = {key.removeprefix("blocks.0."): size for key, size in shapes.items() if key.startswith("blocks.0.")}
    for i in range(shape.blocks):
        generator = torch.Generator().manual_seed(seed * 1000 + i)
        yield {f"blocks.{i}.{key}": tensor(key, size, generator) for key, size in block.items()}
    generator = torch.Generator().manual_seed(seed * 1000 + 999)
    yield {key: tensor(key, size, generator) for key, size in shapes.items() if not key.startswith("blocks.")}


def tensor(key: str, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A bfloat16 tensor by its role, which its name says."""
    if key.endswith("bias"):
        return (0.02 * torch.randn(size, generator=generator)).bfloat16()
    if key == "scale_shift_table":
        table = 0.3 * torch.randn(size, generator=generator) / math.sqrt(size[-1] if size[1] == 2 else 1)
        return (table * _sizes(size[-1], generator)).bfloat16() if size[1] == 6 else table.bfloat16()
    if len(size) == 1:  # the weight of a norm
        return _sizes(size[0], generator).bfloat16()
    weight = _heavy_tailed(size, generator)
    if key.endswith(("to_v.weight", "net.0.proj.weight", "text_embedder.linear_2.weight")):
        weight *= _sizes(size[0], generator)[:, None]
    return weight.bfloat16()


def _sizes(channels: int, generator: torch.Generator) -> Tensor:
    """Magnitude of each channel: lognormal, a few of them outliers."""
    sizes = (0.3 * torch.randn(channels, generator=generator)).exp()
    sizes[torch.randperm(channels, generator=generator)[: max(1, int(OUTLIERS * channels))]] *= GAIN
    return sizes


def _heavy_tailed(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Student's t with 4 degrees of freedom and variance 1 / inputs.

    A normal over the root of a chi-square, which for 4 degrees is distributed as -2 log(u v) with uniform u and v.
    """
    weight = torch.empty(size, dtype=torch.bfloat16)
    scale = math.sqrt(2 * math.prod(size[1:]))  # the variance of t with 4 degrees is 2
    for rows in weight.split(SLAB):
        normal, u, v = (
            torch.randn(rows.shape, generator=generator),
            *(torch.rand(rows.shape, generator=generator) for _ in range(2)),
        )
        rows.copy_(normal / ((u * v).clamp_(min=1e-30).log_() / -2).sqrt_() / scale)
    return weight


# --- calls ---


def write_trajectories(folder: Path, shape: Shape, calls: Calls, seed: int) -> None:
    """The recorded calls of every prompt, without guidance."""
    prompts, denoiser = {}, find_denoiser("WanTransformer3DModel")
    splits = [split for split, count in calls.prompts().items() for _ in range(count)]
    for i, split in enumerate(splits):
        name = f"{split}_{i:02d}"
        made = recorded(shape, calls, seed * 1000 + i)
        write_trajectory(folder / name, made, calls.steps, denoiser, 16, split, name)
        prompts[name] = content_key(files=file_digests(folder / name))
    (folder / "zarr.json").write_text(group_metadata({"prompts": prompts}))


def recorded(shape: Shape, calls: Calls, seed: int) -> list[RecordedCall]:
    """One prompt's calls, made up: no denoiser computes anything for them."""
    generator = torch.Generator().manual_seed(seed)
    video = (16, calls.frames, calls.height, calls.width)
    clean, noise = torch.randn(*video, generator=generator), torch.randn(*video, generator=generator)
    condition = torch.randn(shape.in_channels - 16, *video[1:], generator=generator)
    text = torch.randn(1, calls.text, shape.text_dim, generator=generator) * _sizes(shape.text_dim, generator)
    made = []
    for t in sampler_timesteps(SCHEDULER, calls.steps, SHIFT):
        latents = t / 1000 * noise + (1 - t / 1000) * clean
        hidden = torch.cat([latents, condition])[None].bfloat16()
        arguments = {
            "hidden_states": hidden,
            "timestep": torch.tensor([t]),
            "encoder_hidden_states": text.bfloat16(),
        }
        made.append(RecordedCall(EXPERT, arguments, None))
    return made


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def add_options(parser: argparse.ArgumentParser) -> None:
    """An option per field of Shape (but the blocks) and of Calls."""
    for kind, prefix in ((Shape, ""), (Calls, "calls-")):
        for name, field in kind.__dataclass_fields__.items():
            if name != "blocks":
                parser.add_argument(f"--{prefix}{name.replace('_', '-')}", type=int, default=field.default)


def from_options(options: argparse.Namespace, blocks: int) -> tuple[Shape, Calls]:
    values = vars(options)
    shape = {name: values[name] for name in Shape.__dataclass_fields__ if name != "blocks"}
    return Shape(blocks, **shape), Calls(**{name: values[f"calls_{name}"] for name in Calls.__dataclass_fields__})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the arithmetic (compute.dtype)"
    )
    parser.add_argument(
        "--sample", type=int, default=2048, help="tokens kept per site and bin (capture.search_tokens, .heldout_tokens)"
    )
    parser.add_argument("--seed", type=int, default=0)
    add_options(parser)
    options = parser.parse_args()
    shape, calls = from_options(options, options.blocks)
    capture = {"search_tokens": options.sample, "heldout_tokens": options.sample}
    make_shape(options.folder, shape, calls, {"compute": {"dtype": options.dtype}, "capture": capture}, options.seed)


if __name__ == "__main__":
    main()
