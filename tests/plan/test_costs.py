from dataclasses import replace
from types import SimpleNamespace

import pytest

from stepquant.plan import costs, counts
from stepquant.plan.rates import GPUS

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
        assert getattr(costs, stage)(real, high, SLOW).seconds == pytest.approx(40 * expected)


def test_eight_devices_take_an_eighth_but_for_sampling_and_packing(real):
    """Capture too: 420 calls in shards of 48 are nine units."""
    one, eight = (costs.stage_costs(real, replace(SLOW, devices=devices)) for devices in (1, 8))
    for a, b in zip(one, eight):
        shared = a.stage.startswith(("capture", "lowrank", "gptq", "clip"))
        assert a.seconds == pytest.approx(8 * b.seconds if shared else b.seconds)


def test_more_devices_than_shards_stand_idle(real):
    """Nine do, and each holds a shard's hidden states on the host."""
    two, sixteen = (costs.capture(real, real.experts[0], replace(SLOW, devices=devices)) for devices in (2, 16))
    assert two.seconds == pytest.approx(4.5 * sixteen.seconds)
    assert sixteen.host - two.host == 7 * 48 * 32760 * 5120 * 2


def test_the_slower_of_computing_and_copying_counts(real):
    """Each of 420 calls crosses PCIe to and from each of 40 blocks: 0.335 GB each way, 27 ms at 25 GB/s."""
    high = real.experts[0]
    idle = replace(SLOW, bf16=float("inf"), hessian=float("inf"), pcie=25e9)
    assert costs.capture(real, high, idle).seconds == pytest.approx(420 * 40 * 2 * 32760 * 5120 * 2 / 25e9)
    computing = costs.capture(real, high, SLOW).seconds
    assert costs.capture(real, high, replace(SLOW, pcie=25e9)).seconds == computing  # hidden behind the arithmetic


def test_what_capture_keeps_on_the_device_for_every_call_of_a_shard(real):
    """512 text tokens of 5,120 channels in bfloat16 and six vectors in float32: 5.4 MB a call; one rotary table of
    cosines and sines for 128 channels, 34 MB. Beside them three chunks of hidden states are under way."""
    call = 512 * 5120 * 2 + 6 * 5120 * 4
    table = 2 * 32760 * 128 * 4
    assert counts.block_input_bytes(real, real.experts[0], 48) == 48 * call + table
    assert call == pytest.approx(5.4e6, rel=0.01) and table == pytest.approx(34e6, rel=0.02)
    on_host = replace(SLOW, device_bytes=None)
    device, host = (costs.capture(real, real.experts[0], machine) for machine in (SLOW, on_host))
    working = host.host - 48 * 32760 * 5120 * 2 - costs.PROCESS_BYTES
    assert device.device - costs.CONTEXT_BYTES == working + 3 * 32760 * 5120 * 2


def test_the_quantized_linear_is_counted_where_videos_are_sampled(real):
    """ffn.down: a weight of 5,120 x 13,824 in bfloat16, 0.14 GB, and six float32 tensors of 1,024 tokens, 0.34 GB."""
    largest = 2 * 5120 * 13824 + 6 * 4 * 1024 * 13824
    assert counts.linear_bytes(real, real.experts[0]) == largest
    full, bf16 = (cost for cost in reversed(costs.stage_costs(real, SLOW)) if cost.stage.startswith("generate"))
    packed = max(costs.sizes.packed_expert(real, expert).bytes for expert in real.experts)
    assert full.device - bf16.device == pytest.approx(packed + largest - real.experts[0].bf16_bytes)


def test_memory_does_not_grow_with_blocks(real):
    blocks = 36 * 2 * 351_272_960
    experts = {
        name: described.model_copy(update={"blocks": 4, "bf16_bytes": described.bf16_bytes - blocks})
        for name, described in real.manifest.experts.items()
    }
    few = replace(real, manifest=real.manifest.model_copy(update={"experts": experts}))
    for stage in (costs.capture, costs.lowrank, costs.gptq, costs.clip):
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
    on_device, on_host = (costs.gptq(real, real.experts[0], machine) for machine in (SLOW, cpu))
    assert on_host.device == 0
    assert on_host.host - costs.PROCESS_BYTES == on_device.device - costs.CONTEXT_BYTES
