"""Calls of an expert and the inputs of one site, for the tests of statistics."""

import itertools
from pathlib import Path

import torch

from stepquant.calibration.merge import merge_shards
from stepquant.calibration.observer import SiteObserver
from stepquant.calibration.sampling_plan import SamplingPlan, plan_sampling
from stepquant.calibration.statistics_files import read_statistics
from stepquant.calibration.trajectories import Call
from stepquant.models.bins import Bins
from stepquant.recipe.site_statistics import SiteStatistics

TOKENS, CHANNELS = 10, 6
BINS = Bins((1000.0, 900.0, 500.0, 0.0))
# Four steps in bin 1 but one in bin 0 and one in bin 2, so that equal weights of calls and of bins differ.
TIMES = [950.0, 900.0, 800.0, 700.0, 600.0, 300.0]
SPLITS = {"dog": "calibration", "car": "calibration", "fox": "validation", "cat": "heldout"}
CALLS = [Call(p, SPLITS[p], step, branch, t) for p in SPLITS for step, t in enumerate(TIMES) for branch in (0, 1)]
BIN_OF = [0 if call.t > 900 else 1 if call.t > 500 else 2 for call in CALLS]
SAMPLES = {"calibration": 7, "validation": 4, "heldout": 5}


def site_inputs() -> torch.Tensor:
    """The site's input in every call, [calls, TOKENS, CHANNELS]; no two tokens are equal."""
    return torch.randn(len(CALLS), TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))


def text_inputs() -> torch.Tensor:
    """The input of a site that does not depend on t: for a prompt and branch the same at every step."""
    generator = torch.Generator().manual_seed(1)
    by_prompt = {key: torch.randn(TOKENS, CHANNELS, generator=generator) for key in itertools.product(SPLITS, (0, 1))}
    return torch.stack([by_prompt[call.prompt, call.branch] for call in CALLS])


def make_plan(
    bins: Bins | None = BINS, samples: dict[str, int] = SAMPLES, seed: int = 0, stride: int = 1
) -> SamplingPlan:
    return plan_sampling(CALLS, bins, TOKENS, samples, seed, stride=stride)


def collect(
    folder: Path,
    x: torch.Tensor,
    bins: Bins | None,
    chunk: int,
    samples: dict[str, int] = SAMPLES,
    shard: int = len(CALLS),
    stride: int = 1,
) -> SiteStatistics:
    """Observe the calls in shards of chunks, merge, write, and read back."""
    plan = make_plan(bins, samples, stride=stride)
    shards = []
    for first in range(0, len(CALLS), shard):
        site = SiteObserver(CHANNELS, plan, "cpu", "low_noise block 0 attn1.qkv")
        calls = range(len(CALLS))[first : first + shard]
        for start in range(calls.start, calls.stop, chunk):
            positions = range(start, min(start + chunk, calls.stop))
            site.observe(x[positions.start : positions.stop], [CALLS[i] for i in positions], positions)
        shards.append(site.tensors())
    merge_shards(folder, shards)
    return read_statistics(folder, "cpu")


def tokens_of(x: torch.Tensor, split: str, b: int) -> torch.Tensor:
    """All tokens of a split in a bin, float64."""
    return torch.cat([x[i] for i, call in enumerate(CALLS) if call.split == split and BIN_OF[i] == b]).double()


def rows_in(sample: torch.Tensor, tokens: torch.Tensor) -> list[int]:
    """Index among the tokens of each row of a sample; each row must occur exactly once."""
    equal = (sample.double()[:, None] == tokens[None]).all(-1)
    assert torch.equal(equal.sum(1), torch.ones(len(sample), dtype=torch.int64))
    return equal.int().argmax(1).tolist()


def same_samples(a: SiteStatistics, b: SiteStatistics) -> bool:
    pairs = zip(a.search + a.validation + a.heldout, b.search + b.validation + b.heldout, strict=True)
    return all(torch.equal(one, other) for one, other in pairs)
