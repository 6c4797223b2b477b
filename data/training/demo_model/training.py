"""What both trainings share: learning-rate schedule, averaged weights, and checkpoints that survive a kill.

A checkpoint is one safetensors file: `model/<name>`, `average/<name>`, `optimizer/<index>/<key>`, and the number of
finished steps in its metadata (key `step`).
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import typer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn


def learning_rate_at(step: int, steps: int, warmup: int, peak: float, final: float) -> float:
    """Linear warm-up to `peak`, then half a cosine down to `final` at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * done))


class Run:
    """A model, its optimizer, its averaged weights and the number of finished steps.

    Args:
        model: the module to train; only parameters that require grad are optimised and averaged.
        decay: of the exponential average. Early on the effective decay is smaller, (1 + n) / (10 + n), so that the
            random initial weights are forgotten quickly.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.decay = decay
        self.step = 0
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.trained.items()}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.01)

    def update(self, loss: torch.Tensor, learning_rate: float, largest_norm: float = 1.0) -> None:
        """One optimizer step on `loss`, with clipped gradients, then one step of the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained.values(), largest_norm)
        self.optimizer.step()
        self.step += 1
        keep = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.trained.values()), 1 - keep)

    def save(self, path: Path) -> None:
        """Writes the checkpoint under a temporary name, then renames it: a kill leaves the old or the new one."""
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"average/{name}": value for name, value in self.average.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{key}": value for key, value in state.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        # Clones, because safetensors refuses tensors that share storage (a tied embedding does).
        save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, temporary, {"step": str(self.step)})
        temporary.replace(path)

    def resume(self, path: Path) -> bool:
        """Continues from the checkpoint at `path`; returns whether there was one."""
        if not path.is_file():
            return False
        tensors, self.step = read_checkpoint(path)
        self.model.load_state_dict(under(tensors, "model/"))
        for name, value in under(tensors, "average/").items():
            self.average[name].copy_(value)
        states: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in under(tensors, "optimizer/").items():
            index, _, name = key.partition("/")
            states.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})
        return True


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], int]:
    """All tensors of a checkpoint and its number of finished steps."""
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, int(file.metadata()["step"])


def under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose key starts with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def averaged_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict to ship: averaged weights where the run trained, plain ones elsewhere."""
    tensors, _ = read_checkpoint(path)
    return under(tensors, "model/") | under(tensors, "average/")


def steps_with_checkpoints(run: Run, steps: int, path: Path, save_every_seconds: int) -> Iterator[int]:
    """Yields the number of each step that remains, saves now and then, and saves once more at the end."""
    saved = time.monotonic()
    while run.step < steps:
        yield run.step
        if time.monotonic() - saved > save_every_seconds:
            run.save(path)
            saved = time.monotonic()
    run.save(path)


class LossLog:
    """Prints the mean of each loss over the last `every` steps, with the seconds that a step takes."""

    def __init__(self, every: int):
        self.every = every
        self.values: list[dict[str, float]] = []
        self.started = time.monotonic()

    def add(self, step: int, **losses: float) -> None:
        """Records the losses of one step."""
        self.values.append(losses)
        if len(self.values) < self.every:
            return
        names = {name: None for record in self.values for name in record}
        means = []
        for name in names:
            known = [record[name] for record in self.values if name in record]
            means.append(f"{name} {sum(known) / len(known):.4f}")
        seconds = (time.monotonic() - self.started) / len(self.values)
        typer.echo(f"step {step + 1} {' '.join(means)} ({seconds:.2f} s/step)")
        self.values, self.started = [], time.monotonic()
