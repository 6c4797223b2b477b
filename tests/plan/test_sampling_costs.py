"""What sampling takes under each mode of offload, by arithmetic on the published sizes of Wan2.2-I2V-A14B."""

from dataclasses import replace

import pytest

from stepquant.plan import rates
from stepquant.plan.counts import forward_bytes, forward_flops
from stepquant.plan.printing import make_workload
from stepquant.plan.rates import GPUS
from stepquant.plan.sampling_costs import fitting_offload, generate, trajectories
from stepquant.profiles import choose, read_profiles

SMALL = GPUS["rtx4090"]  # 24 GB, and 32 GB of host memory
LINEARS = 40 * (8 * 5120**2 + 2 * 5120 * 13824)
BLOCK = 2 * LINEARS / 40
TEXT, VAE = 2 * 5_680_910_336, 4 * 126_892_531
BASE = rates.PROCESS_BYTES + rates.DIFFUSERS_BYTES
DECODING = 4 * 5300 * 480 * 832


@pytest.fixture
def expert(real) -> float:
    """Bytes of an expert: bfloat16, but for the embedding of t, the tables of modulation and the norms."""
    float32 = 256 * 5120 + 5120 + 5120**2 + 5120 + 2 * 5120 + 40 * 8 * 5120
    return 2 * 14_288_901_184 + 2 * float32


def test_host_memory(real, expert):
    everything = BASE + 2 * expert + TEXT + VAE
    for offload, needed in (("none", everything), ("model", everything), ("group", everything + 2 * BLOCK)):
        assert trajectories(real, SMALL, offload).host == pytest.approx(needed)


def test_from_disk_the_host_holds_no_linear_of_an_expert(real, expert):
    """While the copy is written, one block in float32 and in bfloat16."""
    cost = trajectories(real, SMALL, "disk")
    assert cost.host == pytest.approx(BASE + 2 * (expert - 2 * LINEARS) + TEXT + VAE + 3 * BLOCK)
    assert cost.host < 16e9 and cost.device < 24e9
    assert cost.scratch == 2 * 2 * LINEARS  # both experts in bfloat16
    stored = {name: size / 2 for name, size in real.model.stored.items()}
    bfloat16 = replace(real, model=replace(real.model, stored=stored))
    assert trajectories(bfloat16, SMALL, "disk").scratch == 0  # mapped as they are


def test_device_memory(real, expert):
    working, rest = forward_bytes(real, real.experts[0], 1), expert - 2 * LINEARS
    expected = {
        "none": 2 * expert + TEXT + VAE + max(working, DECODING),
        "model": expert + working,
        "group": VAE + max(2 * BLOCK + rest + working, TEXT, DECODING),
    }
    for offload, needed in expected.items():
        assert trajectories(real, SMALL, offload).device == pytest.approx(rates.CONTEXT_BYTES + needed)
    assert trajectories(real, SMALL, "disk").device == trajectories(real, SMALL, "group").device


def test_weights_are_moved_while_blocks_are_computed(real):
    """80 calls a video move 28.1 GB each: 9.4 s at 3 GB/s. The RTX 4090 computes for 20 s, the H100 for 3.6."""
    calls, prompts = 40 * 2, 16
    for machine in (SMALL, GPUS["h100"]):
        compute = 40 * forward_flops(real, real.experts[0]) / machine.bf16
        disk, pcie = 2 * LINEARS / machine.disk, 2 * LINEARS / machine.pcie
        conversion = 3 * 2 * 2 * LINEARS / machine.disk
        found = {mode: generate(real, machine, "bf16", mode).seconds for mode in ("none", "group", "disk")}
        assert found["none"] == pytest.approx(prompts * calls * compute)
        assert found["group"] == pytest.approx(prompts * calls * max(compute, pcie))
        assert found["disk"] == pytest.approx(prompts * calls * max(compute, disk) + conversion)
    assert found["disk"] > 2 * found["none"]  # the H100 waits for the disk


def test_the_mode_that_fits_is_found(real):
    fits = {machine.name: fitting_offload(real, machine, "trajectories") for machine in GPUS.values()}
    assert fits == {"rtx4090": "disk", "a100": "none", "h100": "none", "8xh100": "none"}
    assert fitting_offload(real, replace(SMALL, host_bytes=128e9), "generate@bf16") == "group"
    assert fitting_offload(real, SMALL, "generate@full") == "model"
    assert fitting_offload(real, replace(SMALL, device_bytes=4e9), "trajectories") is None


PUBLISHED = [name for name in read_profiles() if name not in ("demo", "paper", "comfyui_w4a8")]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_model_can_be_sampled_with_24_gb_and_32_gb_of_memory(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(choose(read_profiles(), name))
    run = make_workload(tmp_path / "params.yaml")
    for stage in ("trajectories", "generate@bf16", "generate@full"):
        assert fitting_offload(run, SMALL, stage) is not None, stage
