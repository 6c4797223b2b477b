"""Which stages run on the pretend device, and how much traffic each may cause per unit of work on the tiny workspace.

A unit is what the stage's progress counts: a prompt, a shard of calls or a block. The bounds are a few percent above
what was counted when they were set; `python benchmarks/device_traffic.py` prints what is counted now.
"""

from tests.device.runner import Call
from tests.device.traffic import Traffic

BOUNDS: dict[Call, Traffic] = {
    Call("trajectories", ""): Traffic(host_reads=345, copies=340, launches=2400),
    Call("capture", "high_noise"): Traffic(host_reads=74, copies=76, launches=1230),
    Call("lowrank", "high_noise"): Traffic(host_reads=138, copies=83, launches=11_500),
    Call("gptq", "high_noise"): Traffic(host_reads=248, copies=132, launches=107_000),
    Call("clip", "high_noise"): Traffic(host_reads=22, copies=105, launches=1440),
    Call("sensitivity", "high_noise"): Traffic(host_reads=60, copies=320, launches=5350),
    Call("pack", "rtn"): Traffic(host_reads=50, copies=21, launches=450),
    Call("pack", "svdquant"): Traffic(host_reads=107, copies=98, launches=565),
    Call("pack", "full"): Traffic(host_reads=0, copies=0, launches=0),
    Call("generate", "bf16"): Traffic(host_reads=315, copies=333, launches=2860),
    Call("generate", "full"): Traffic(host_reads=675, copies=692, launches=11_300),
    Call("evaluate", "full"): Traffic(host_reads=14, copies=140, launches=1310),
}
