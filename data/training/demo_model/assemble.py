"""Puts the trained parts together as a diffusers folder that `WanImageToVideoPipeline.from_pretrained` loads."""

import json
import shutil
import tempfile
from pathlib import Path

import torch
import typer
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanTransformer3DModel
from transformers import PreTrainedTokenizerFast

from demo_model.denoiser import build_expert, build_scheduler, build_text_encoder
from demo_model.latents import load_statistics
from demo_model.settings import DenoiserSettings, VaeSettings, load_section
from demo_model.training import averaged_weights, under
from demo_model.vae_training import build_vae

PARTS = ("vae", "tokenizer", "text_encoder", "scheduler", "transformer", "transformer_2", "model_index.json")


def load_vae(settings: VaeSettings, checkpoint: Path, latents: Path) -> AutoencoderKLWan:
    """The trained autoencoder in float32, with the measured mean and deviation of its latents in the config."""
    vae = build_vae(settings)
    vae.load_state_dict(averaged_weights(checkpoint))
    mean, deviation = load_statistics(latents)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
    return vae


def build_pipeline(
    settings: DenoiserSettings,
    vae: AutoencoderKLWan,
    tokenizer: PreTrainedTokenizerFast,
    high_noise: dict[str, torch.Tensor],
    low_noise: dict[str, torch.Tensor],
) -> WanImageToVideoPipeline:
    """The whole pipeline. Each expert's state holds `expert/<name>` and `text_encoder/<name>`; the text encoder was
    frozen before the experts parted, so it is taken from the first."""
    text_encoder = build_text_encoder(settings, len(tokenizer))
    text_encoder.load_state_dict(under(high_noise, "text_encoder."))
    experts = []
    for state in (high_noise, low_noise):
        expert = build_expert(settings)
        expert.load_state_dict(under(state, "expert."))
        experts.append(halve_precision(expert))
    return WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.to(torch.bfloat16),
        vae=vae,
        scheduler=build_scheduler(settings),
        transformer=experts[0],
        transformer_2=experts[1],
        boundary_ratio=settings.boundary_ratio,
    )


def halve_precision(expert: WanTransformer3DModel) -> WanTransformer3DModel:
    """Casts an expert to bfloat16, except for the modules that diffusers keeps in float32 when it loads one."""
    for name, parameter in expert.named_parameters():
        if not any(kept in name.split(".") for kept in expert._keep_in_fp32_modules):
            parameter.data = parameter.data.to(torch.bfloat16)
    return expert


def replace_parts(pipeline: WanImageToVideoPipeline, folder: Path) -> None:
    """Saves next to `folder`, then swaps part by part, so a reader never meets a half-written file.

    The model card and its pictures, which are not parts, stay where they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".assemble") as temporary:
        fresh, old = Path(temporary) / "fresh", Path(temporary) / "old"
        old.mkdir()
        pipeline.save_pretrained(fresh, safe_serialization=True)
        name_tokenizer_class(fresh)
        for weights in fresh.rglob("*.safetensors"):
            weights.chmod(0o644)  # safetensors writes files that only their owner can read
        for part in PARTS:
            if (folder / part).exists():
                (folder / part).rename(old / part)
            shutil.move(fresh / part, folder / part)


def name_tokenizer_class(folder: Path) -> None:
    """Names the tokenizer's class by the name that transformers 4 and 5 both know."""
    for path, key, value in (
        (folder / "tokenizer" / "tokenizer_config.json", "tokenizer_class", "PreTrainedTokenizerFast"),
        (folder / "model_index.json", "tokenizer", ["transformers", "PreTrainedTokenizerFast"]),
    ):
        values = json.loads(path.read_text(encoding="utf-8"))
        values[key] = value
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def main(params: Path, vae: Path, latents: Path, tokenizer: Path, high_noise: Path, low_noise: Path, out: Path) -> None:
    """Assembles the pipeline folder from the checkpoints (sections `vae` and `denoiser`)."""
    settings = load_section(params, "denoiser", DenoiserSettings)
    pipeline = build_pipeline(
        settings,
        load_vae(load_section(params, "vae", VaeSettings), vae, latents),
        PreTrainedTokenizerFast.from_pretrained(tokenizer),
        averaged_weights(high_noise),
        averaged_weights(low_noise),
    )
    replace_parts(pipeline, out)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    typer.echo(f"{size / 1e6:.1f} MB in {out}")


if __name__ == "__main__":
    typer.run(main)
