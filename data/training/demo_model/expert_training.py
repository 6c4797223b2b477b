"""Flow-matching training of the denoiser: first one model with its text encoder, then each expert on its own range.

With z the clip's latents and e noise, the input is x = (1 - s) z + s e at s = t / 1000 and the target is e - z, as the
scheduler's `flow_prediction` expects. Text and image condition reach the model exactly as the pipeline gives them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import typer
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from demo_model.denoiser import build_expert, build_text_encoder, encode_text
from demo_model.latents import first_frame_mask
from demo_model.settings import DenoiserSettings, ExpertSettings, load_section
from demo_model.training import LossLog, Run, averaged_weights, learning_rate_at, steps_with_checkpoints


@dataclass(frozen=True)
class Pool:
    """Encoded clips (N, 16, T', H', W') float16, the grey part of the condition, the importance (16,) of each
    channel, and N captions."""

    clip: torch.Tensor
    grey: torch.Tensor
    importance: torch.Tensor
    captions: list[str]


class Denoiser(nn.Module):
    """An expert and the text encoder, so that both are in one checkpoint."""

    def __init__(self, expert: WanTransformer3DModel, text_encoder: UMT5EncoderModel):
        super().__init__()
        self.expert = expert
        self.text_encoder = text_encoder


def load_pool(path: Path) -> Pool:
    """Reads what `demo_model.latents` wrote."""
    with safe_open(path, framework="pt") as file:
        captions = json.loads(file.metadata()["captions"])
        return Pool(file.get_tensor("clip"), file.get_tensor("grey"), file.get_tensor("importance"), captions)


def draw_timesteps(random: np.random.Generator, count: int, shift: float, limits: tuple[float, float]) -> torch.Tensor:
    """(count,) float32 t inside `limits`, distributed as the sampler visits them.

    Over the whole range t = 1000 shift u / (1 + (shift - 1) u) with uniform u; inside a narrower range the same
    density, cut off. The draws are stratified: one u in each of `count` equal parts, for a steadier loss.
    """
    low, high = (limit / 1000 for limit in limits)
    ends = [value / (shift - (shift - 1) * value) for value in (low, high)]
    u = ends[0] + (ends[1] - ends[0]) * (random.permutation(count) + random.random(count)) / count
    return torch.from_numpy(1000 * shift * u / (1 + (shift - 1) * u)).float()


def model_input(noisy: torch.Tensor, clip: torch.Tensor, grey: torch.Tensor) -> torch.Tensor:
    """(N, 36, T', H', W'): noisy latents, mask, and the condition, in the pipeline's order."""
    behind = grey.unsqueeze(0).expand(len(clip), *grey.shape)
    condition = torch.cat([clip[:, :, :1], behind], dim=2)
    return torch.cat([noisy, first_frame_mask(clip.shape), condition], dim=1)


def flow_loss(
    model: Denoiser, tokenizer: PreTrainedTokenizerFast, pool: Pool, step: int, settings: ExpertSettings, tokens: int
) -> torch.Tensor:
    """Squared error of one batch, which depends on the seed and the step alone.

    Channels are weighted by their importance: the latents are whitened, and without weights most of the loss would be
    about detail that nobody sees. The best prediction is the same with any weights.
    """
    random = np.random.default_rng([settings.seed, step])
    chosen = random.integers(len(pool.captions), size=settings.batch)
    clip = pool.clip[torch.from_numpy(chosen)].float()
    dropped = random.random(settings.batch) < settings.prompt_dropout
    texts = ["" if drop else pool.captions[index] for drop, index in zip(dropped, chosen, strict=True)]
    t = draw_timesteps(random, settings.batch, settings.timestep_shift, settings.timestep_range)
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(int(random.integers(2**62))))
    sigma = (t / 1000).view(-1, 1, 1, 1, 1)
    noisy = (1 - sigma) * clip + sigma * noise
    states = encode_text(model.text_encoder, tokenizer, texts, tokens)
    velocity = model.expert(
        hidden_states=model_input(noisy, clip, pool.grey.float()),
        timestep=t,
        encoder_hidden_states=states,
        return_dict=False,
    )[0]
    weights = pool.importance.view(1, -1, 1, 1, 1)
    return ((velocity - (noise - clip)).square() * weights).mean()


def main(
    params: Path, section: str, latents: Path, tokenizer: Path, checkpoint: Path, start: Path | None = None
) -> None:
    """Trains by the settings of `section`, or goes on with its checkpoint; `start` gives the weights to begin with."""
    settings = load_section(params, section, ExpertSettings)
    shape = load_section(params, "denoiser", DenoiserSettings)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    words = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    model = Denoiser(build_expert(shape), build_text_encoder(shape, len(words)))
    if start is not None:
        model.load_state_dict(averaged_weights(start))
    model.text_encoder.requires_grad_(settings.train_text_encoder)
    run = Run(model, settings.average_decay)
    run.resume(checkpoint)
    pool = load_pool(latents)
    typer.echo(f"{section}: at step {run.step}, {sum(p.numel() for p in run.trained.values())} parameters")
    log = LossLog(every=20)
    for step in steps_with_checkpoints(run, settings.steps, checkpoint, settings.save_every_seconds):
        rate = learning_rate_at(
            step,
            settings.schedule_steps,
            settings.warmup_steps,
            settings.learning_rate,
            settings.final_learning_rate,
        )
        loss = flow_loss(model, words, pool, step, settings, shape.text_tokens)
        run.update(loss, rate)
        log.add(step, loss=loss.item())


if __name__ == "__main__":
    typer.run(main)
