from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock

from stepquant.plan import costs, counts, quantize_costs, sizes
from stepquant.plan.printing import make_workload
from stepquant.plan.rates import GPUS
from stepquant.profiles import read_profiles

ROOT = Path(__file__).resolve().parents[2]
# A machine that does one operation a second and moves bytes in no time: seconds are operations.
SLOW = replace(
    GPUS["h100"],
    bf16=1,
    hessian=1,
    fp32=1,
    column_seconds=0,
    per_weight=0,
    pcie=float("inf"),
    disk=float("inf"),
    hash=float("inf"),
    network=float("inf"),
)


def site(expert, name):
    return next(site for site in expert.sites if site.name == name)


def test_the_forward_of_a_block(real):
    """Every linear on 32,760 tokens but to_k and to_v of attn2, which have 512; two products in each attention."""
    T, L, D, F = 32760, 512, 5120, 13824
    expected = 2 * T * (6 * D * D + 2 * D * F) + 2 * L * 2 * D * D + 4 * T * T * D + 4 * T * L * D
    assert counts.forward_flops(real, real.experts[0]) == expected


def test_hessians_cost_little_more_than_half(real):
    """5 panels of 1,024 make 15 of 25 squares. Only calibration calls count: 8 prompts, 2 branches, 15 steps, every
    fourth token; text once, and all of it."""
    high = real.experts[0]
    assert counts.hessian_flops(real, high, site(high, "attn1.out")) == 240 * 2 * 5120**2 * 32760 / 4 * 15 / 25
    assert counts.hessian_flops(real, high, site(high, "attn2.kv")) == 16 * 2 * 5120**2 * 512 * 15 / 25


def test_operations_of_the_factor_stages(real):
    high = real.experts[0]
    lowrank = gptq = clip = 0
    for s in high.sites:
        rows = 512 if s.name == "attn2.kv" else 3 * 512
        thin = 10 * 2 * (32 + 10)  # ten products with 42 columns
        # The refined smoothing is scored on half of the tokens.
        lowrank += (5 + 1.5) * 2 * rows * s.weights + (3 + 1) * thin * s.weights
        refit = 2 * (32 + 10) * (4 * s.weights + 3 * s.K**2)
        part = 256 * s.K
        target = 2 / 3 * s.K**3 + 2 * part * (s.K + 1024)
        trial = (
            target + part * s.K + 2 * (32 + 10) * (4 * part + 3 * s.K**2) + 2 * 2 * (rows if s.per_bin else 512) * part
        )
        # The initial branch is a fit as well.
        gptq += 2.4 * trial + 2 * s.weights * (s.K + 1024) + 3 * s.weights * s.K + 4 * refit
        clip += 7 * 2 * rows * s.weights
    for stage, expected in (("lowrank", lowrank), ("gptq", gptq), ("clip", clip)):
        assert getattr(quantize_costs, stage)(real, high, SLOW).seconds == pytest.approx(40 * expected)


def test_operations_of_sensitivity(real):
    """4 prompts, a step in each of 3 bins, 2 branches, 40 blocks. Twice forward; back without the weights and without
    the text, with five products in each attention. Then two products of the size of each linear, and the branch."""
    T, L, D, F = 32760, 512, 5120, 13824
    forward = counts.forward_flops(real, real.experts[0])
    back = 2 * T * (6 * D * D + 2 * D * F) + 5 * 2 * T * (T + L) * D
    products = 2 * 2 * (T * (6 * D * D + 2 * D * F) + L * 2 * D * D)
    branch = 2 * 32 * (T * (4 * D + 3 * 2 * D + 2 * (D + F)) + L * 3 * D)
    expected = 4 * 3 * 2 * 40 * (2 * forward + back + products + branch)
    assert quantize_costs.sensitivity(real, real.experts[0], SLOW).seconds == pytest.approx(expected)


def test_sensitivity_keeps_the_inputs_of_all_blocks_on_the_disk(real):
    """Of the two calls of a step; written and read in each of 12 units. The weights, 56 GB in float32, are read once
    where they fit the host's memory, else forwards and backwards in every unit."""
    high, instant = real.experts[0], replace(SLOW, bf16=float("inf"), fp32=float("inf"), disk=1)
    found = quantize_costs.sensitivity(real, high, instant)
    assert found.scratch == 2 * 40 * 32760 * 5120 * 2
    factors = sizes.residual(real, high).bytes + sizes.lowrank(real, high).bytes
    assert found.seconds == pytest.approx(12 * 2 * found.scratch + 4 * high.weights + factors)
    small = quantize_costs.sensitivity(real, high, replace(instant, host_bytes=32e9))
    assert small.seconds - found.seconds == pytest.approx(23 * 4 * high.weights + 11 * factors)


@pytest.mark.parametrize("machine", ["rtx4090", "a100", "h100", "8xh100"])
def test_sensitivity_costs_less_than_capture(tmp_path, monkeypatch, machine):
    """With the parameters of the profile, on every machine of the plan."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(read_profiles()["wan2.2-i2v-a14b"])
    run = make_workload(Path("params.yaml"))
    for expert in run.experts:
        measured = quantize_costs.sensitivity(run, expert, GPUS[machine])
        assert measured.seconds < quantize_costs.capture(run, expert, GPUS[machine]).seconds


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_graph_of_a_block_is_what_torch_keeps(real, dtype):
    """A block of diffusers in small: every tensor that autograd saves, and what its linears read and gave."""
    T, D, F = 240, 256, 768
    block = WanTransformerBlock(D, F, 2, "rms_norm_across_heads", True, 1e-6, None).to(dtype).requires_grad_(False)
    for name, parameter in block.named_parameters():
        if any(part in WanTransformer3DModel._keep_in_fp32_modules for part in name.split(".")):
            parameter.data = parameter.data.float()
    kept = []
    for linear in (module for module in block.modules() if isinstance(module, torch.nn.Linear)):
        linear.register_forward_hook(lambda module, args, output: kept.extend((args[0], output)))
    hidden = torch.randn(1, T, D, dtype=dtype, requires_grad=True)
    rotary = WanRotaryPosEmbed(D // 2, (1, 1, 1), 1024)(torch.zeros(1, 1, 15, 4, 4))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        block(hidden, torch.zeros(1, 1, D, dtype=dtype), torch.zeros(1, 6, D), rotary)
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    found = sum(size for place, size in storages.items() if place not in weights)
    (wide, narrow), (_, inner) = counts.GRAPH_WIDTHS, counts.GRAPH_FFN
    expected = T * (D * (4 * wide + dtype.itemsize * narrow) + F * dtype.itemsize * inner)
    assert found == pytest.approx(expected, rel=0.1 if dtype == torch.bfloat16 else 0.2)  # float32 copies nothing


def test_every_stage_of_dvc_repro_has_a_row(real):
    """In an order in which each follows what it depends on."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    values = {name: dict(entry) for group in stages["vars"] for name, entry in group.items()}
    values["experts"] = dict.fromkeys(("high_noise", "low_noise"))
    expected = []
    for name, stage in stages["stages"].items():
        keys = values[stage["foreach"].strip("${}")] if "foreach" in stage else {}
        expected += [f"{name}@{key}" for key in keys] or [name]
    assert [cost.stage for cost in costs.stage_costs(real, SLOW)] == expected


def test_some_variants_leave_out_the_stages_of_the_others(real):
    every, few = (costs.stage_costs(real, SLOW, variants) for variants in (costs.ORDER, ("bf16", "full")))
    left = {cost.stage for cost in every} - {cost.stage for cost in few}
    assert left == {
        f"{stage}@{variant}"
        for variant in ("w4a16", "rtn", "svdquant", "svdquant_gptq", "one_clip", "scheduled")
        for stage in ("pack", "generate", "evaluate")
    } | {"sensitivity@high_noise", "sensitivity@low_noise", "schedule"}


def test_the_source_is_downloaded_and_hashed(real):
    """Two experts of 57.2 GB in float32, the text encoder of 11.4 GB in bfloat16, the VAE of 0.5 GB: 126.2 GB."""
    machine = replace(SLOW, network=100e6, hash=1.8e9)
    found = costs.model(real, machine)
    expected = 2 * 4 * 14_288_901_184 + 2 * 5_680_910_336 + 4 * 126_892_531
    assert found.out == expected == pytest.approx(126.2e9, rel=0.001)
    assert found.seconds == pytest.approx(expected / 100e6 + expected / 1.8e9)
    here = replace(real, model=replace(real.model, download=False))
    assert costs.model(here, machine).out == 0 and costs.model(here, machine).seconds == expected / 1.8e9


def test_what_is_not_quantized_is_packed_in_bfloat16(real):
    """But the embedding of t, the tables of modulation, the norms, and the biases of the quantized linears."""
    high, D, F = real.experts[0], 5120, 13824
    tensors = sizes.packed_expert(real, high).bytes - high.rest_bytes(2)
    kept = 256 * D + D + D * D + D + 2 * D + 40 * 8 * D
    assert high.rest_bytes(2) == high.bf16_bytes - 2 * high.weights + 2 * kept
    bias = replace(high, float32_values=0)
    assert tensors - (sizes.packed_expert(real, bias).bytes - bias.rest_bytes(2)) == 0
    assert sizes.packed_expert(real, high).bytes == pytest.approx(8.32e9, rel=0.01)
    biases = 40 * (9 * D + F)
    assert biases * 2 < 5e6  # bytes that float32 adds to them


def test_variants_without_a_branch_are_smaller(real):
    """rtn has no low-rank branch, no smoothing and no mean: 32 (K + N) values of two bytes per linear."""
    full, rtn = (sizes.packed_expert(real, real.experts[0], name).bytes for name in ("full", "rtn"))
    D, F = 5120, 13824
    branch = 2 * 32 * (8 * 2 * D + 2 * (D + F))
    assert full - rtn == pytest.approx(40 * branch, rel=0.05)


def test_evaluating_takes_the_time_of_ssim(real):
    """16 videos of 81 frames at 0.94 million pixels a second."""
    found = costs.evaluate(real, replace(SLOW, bf16=float("inf")), "full")
    assert found.seconds == pytest.approx(16 * 81 * 480 * 832 * (1 / 0.94e6 + 1 / 27e6))


def test_eight_devices_take_an_eighth_but_for_sampling_and_packing(real):
    """Capture too: 420 calls in shards of 48 are nine units."""
    one, eight = (costs.stage_costs(real, replace(SLOW, devices=devices)) for devices in (1, 8))
    for a, b in zip(one, eight):
        shared = a.stage.startswith(("capture", "lowrank", "gptq", "clip", "sensitivity"))
        assert a.seconds == pytest.approx(8 * b.seconds if shared else b.seconds)


def test_more_devices_than_shards_stand_idle(real):
    """Nine do, and each holds a shard's hidden states on the host."""
    two, sixteen = (
        quantize_costs.capture(real, real.experts[0], replace(SLOW, devices=devices)) for devices in (2, 16)
    )
    assert two.seconds == pytest.approx(4.5 * sixteen.seconds)
    assert sixteen.host - two.host == 7 * 48 * 32760 * 5120 * 2


def test_the_slower_of_computing_and_copying_counts(real):
    """Each of 420 calls crosses PCIe to and from each of 40 blocks: 0.335 GB each way, 27 ms at 25 GB/s."""
    high = real.experts[0]
    idle = replace(SLOW, bf16=float("inf"), hessian=float("inf"), pcie=25e9)
    assert quantize_costs.capture(real, high, idle).seconds == pytest.approx(420 * 40 * 2 * 32760 * 5120 * 2 / 25e9)
    computing = quantize_costs.capture(real, high, SLOW).seconds
    assert (
        quantize_costs.capture(real, high, replace(SLOW, pcie=25e9)).seconds == computing
    )  # hidden behind the arithmetic


def test_what_capture_keeps_on_the_device_for_every_call_of_a_shard(real):
    """512 text tokens of 5,120 channels in bfloat16 and six vectors in float32: 5.4 MB a call; one rotary table of
    cosines and sines for 128 channels, 34 MB. Beside them three chunks of hidden states are under way."""
    call = 512 * 5120 * 2 + 6 * 5120 * 4
    table = 2 * 32760 * 128 * 4
    assert counts.block_input_bytes(real, real.experts[0], 48) == 48 * call + table
    assert call == pytest.approx(5.4e6, rel=0.01) and table == pytest.approx(34e6, rel=0.02)
    on_host = replace(SLOW, device_bytes=None)
    device, host = (quantize_costs.capture(real, real.experts[0], machine) for machine in (SLOW, on_host))
    working = host.host - 48 * 32760 * 5120 * 2 - quantize_costs.PROCESS_BYTES
    assert device.device - quantize_costs.CONTEXT_BYTES == working + 3 * 32760 * 5120 * 2


def test_the_quantized_linear_is_counted_where_videos_are_sampled(real):
    """ffn.down: a weight of 5,120 x 13,824 in bfloat16, 0.14 GB, and six float32 tensors of 1,024 tokens, 0.34 GB."""
    largest = 2 * 5120 * 13824 + 6 * 4 * 1024 * 13824
    assert counts.linear_bytes(real, real.experts[0]) == largest
    found = {cost.stage: cost.device for cost in costs.stage_costs(real, SLOW)}
    packed = max(sizes.packed_expert(real, expert).bytes for expert in real.experts)
    kept = 2 * (256 * 5120 + 5120**2 + 4 * 5120 + 40 * 8 * 5120)  # two bytes more of each value that stays float32
    difference = packed + largest - (real.experts[0].bf16_bytes + kept)
    assert found["generate@full"] - found["generate@bf16"] == pytest.approx(difference)


def test_memory_does_not_grow_with_blocks(real):
    blocks = 36 * 2 * 351_272_960
    experts = {
        name: described.model_copy(update={"blocks": 4, "bf16_bytes": described.bf16_bytes - blocks})
        for name, described in real.manifest.experts.items()
    }
    few = replace(real, model=replace(real.model, manifest=real.manifest.model_copy(update={"experts": experts})))
    stages = ("capture", "lowrank", "gptq", "clip", "sensitivity")
    for stage in (getattr(quantize_costs, name) for name in stages):
        many = stage(real, real.experts[0], SLOW)
        assert stage(few, few.experts[0], SLOW).device == pytest.approx(many.device, rel=0.01)


def test_what_goes_to_an_object_store_is_not_on_disk(real):
    """Trajectories and activations, whose names are all that is left here."""
    storage = SimpleNamespace(url="s3://bucket/prefix")
    remote = replace(
        real, parameter=lambda section, *expert: storage if section == "storage" else real.parameter(section, *expert)
    )
    here, there = ({cost.stage: cost.out for cost in costs.stage_costs(run, SLOW)} for run in (real, remote))
    moved = {"trajectories", "capture@high_noise", "capture@low_noise"}
    assert all(here[stage] > 1e9 for stage in moved)
    assert there == here | dict.fromkeys(moved, 0)


def test_on_a_cpu_the_host_holds_it_all(real):
    cpu = replace(SLOW, device_bytes=None)
    on_device, on_host = (quantize_costs.gptq(real, real.experts[0], machine) for machine in (SLOW, cpu))
    assert on_host.device == 0
    assert on_host.host - quantize_costs.PROCESS_BYTES == on_device.device - quantize_costs.CONTEXT_BYTES
