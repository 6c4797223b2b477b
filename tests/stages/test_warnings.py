"""What a stage says about too few tokens and too little memory."""

import torch

from stages import lowrank
from tests.stages.conftest import HIGH


def test_few_tokens_per_column_are_warned_of(folder):
    """One prompt, one call: 16 text tokens, and 2 x 4 x 4 patches, for 256 channels; for ffn.down 1,024."""
    folder.finish("lowrank", *HIGH)
    result = folder.run("gptq", *HIGH)
    assert result.exit_code == 0
    warnings = [line for line in result.output.splitlines() if "tokens per column" in line]
    found, remedy = "calibration tokens per column, fewer than 4;", "raise trajectories.calibration_prompts"
    captions = {"attn2.kv": "list captions in a file and name it in trajectories.text_prompts, or "}
    sites = {
        "attn1.qkv": 0.1,
        "attn1.out": 0.1,
        "attn2.q": 0.1,
        "attn2.kv": 0.1,
        "attn2.out": 0.1,
        "ffn.up": 0.1,
        "ffn.down": 0.0,
    }
    assert warnings == [
        f"warning: gptq@high_noise {site}: {tokens} {found} {captions.get(site, '')}{remedy}"
        for site, tokens in sites.items()
    ]


def test_a_stage_that_runs_out_of_memory_says_what_to_lower(folder, refused, monkeypatch):
    def shortage(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 is full. Some advice")

    monkeypatch.setattr(lowrank, "factor_site", shortage)
    assert refused("lowrank", *HIGH) == (
        "out of memory on compute.device: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 is full; "
        "stage lowrank: lower capture.search_tokens"
    )
