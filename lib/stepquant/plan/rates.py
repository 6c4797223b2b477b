"""Machines: how fast one computes, and how much it holds. Every figure says where it comes from.

GPU peaks are the makers' public figures for dense matrix products; what a run gets of them is assumed (`GEMM_SHARE`,
`COLUMN_SECONDS`), since no GPU has run this yet. The CPU's rates are measured, one thread, by benchmarks/real_layer.py and
benchmarks/capture_cost.py on an AMD EPYC with AVX-512 (docs/scale.md).
"""

from dataclasses import dataclass, replace

GB = 1e9
TERA = 1e12

# Share of the peak that large products reach. With 0.5, one 81-frame video of 40 steps takes an H100 290 s; its makers
# measured 328 s for the whole pipeline (README of Wan2.2).
GEMM_SHARE = 0.5
# One column of GPTQ on a GPU is a dozen small kernels, each about 5 microseconds to launch.
COLUMN_SECONDS = 60e-6
# What a pass of GPTQ does value by value goes over the weight some 50 times in float32, at 70 % of the memory's bandwidth.
PASS_BYTES, BANDWIDTH_SHARE = 200, 0.7
# What a Python process with torch holds before it has read a tensor, diffusers' models on top of it (measured), and a CUDA context.
PROCESS_BYTES, DIFFUSERS_BYTES, CONTEXT_BYTES = int(0.25 * GB), int(0.2 * GB), int(0.6 * GB)


@dataclass(frozen=True)
class Machine:
    """bf16, moments, fp32: operations a second that a device reaches in bfloat16 products, in those of second moments, in float32 ones.

    device_bytes: memory of one device, None where it is the host's. disk_bytes: what is free. column_seconds + column_per_row * N:
    one column of GPTQ of a layer with N rows. per_weight: seconds, for each weight, of what a pass of GPTQ does value by value
    (residual, rotation, scales). disk, hash: bytes a second of the scratch disk, and of SHA-256.
    """

    name: str
    title: str
    devices: int
    device_bytes: float | None
    host_bytes: float
    disk_bytes: float
    bf16: float
    moments: float
    fp32: float
    column_seconds: float
    column_per_row: float
    per_weight: float
    disk: float = 3 * GB  # about half of what the makers of NVMe drives say
    hash: float = 1.8 * GB  # measured, one core with SHA instructions


def gpu(
    name: str, title: str, memory: float, tflops: tuple[float, float, float], bandwidth: float, host: float, disk: float
) -> Machine:
    """A machine with one GPU. memory, host and disk in GB, bandwidth of the device's memory in GB/s; peaks in BF16, TF32 and FP32."""
    bf16, tf32, fp32 = (peak * GEMM_SHARE * TERA for peak in tflops)
    per_weight = PASS_BYTES / (bandwidth * GB * BANDWIDTH_SHARE)
    return Machine(name, title, 1, memory * GB, host * GB, disk * GB, bf16, tf32, fp32, COLUMN_SECONDS, 0.0, per_weight)


_H100 = gpu("h100", "1 x 80 GB (H100 SXM)", 80, (989, 494, 67), 3350, host=256, disk=2000)
GPUS = {
    machine.name: machine
    for machine in (
        gpu("rtx4090", "1 x 24 GB (RTX 4090)", 24, (165, 82.6, 82.6), 1008, host=32, disk=1000),
        gpu("a100", "1 x 80 GB (A100 SXM)", 80, (312, 156, 19.5), 2039, host=256, disk=2000),
        _H100,
        replace(
            _H100, name="8xh100", title="8 x 80 GB (H100 SXM)", devices=8, host_bytes=1024 * GB, disk_bytes=8000 * GB
        ),
    )
}
# Which machines a plan shows if there is no GPU here and none was named.
USUAL = ("rtx4090", "h100", "8xh100")


def cpu(threads: int, host: float, disk: float) -> Machine:
    """This kind of CPU with some threads, each as fast as the one measured; host memory and free disk in bytes."""
    bf16, moments, fp32 = (rate * threads for rate in (145e9, 95e9, 80e9))
    return Machine(
        "cpu",
        f"CPU, {threads} threads",
        1,
        None,
        host,
        disk,
        bf16,
        moments,
        fp32,
        20e-6,
        8e-9 / threads,
        0.12e-6 / threads,
        disk=1 * GB,
    )
