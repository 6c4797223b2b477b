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
# What a Python process with torch and diffusers holds before it has read a tensor, and a CUDA context on the device.
PROCESS_BYTES, CONTEXT_BYTES = int(0.45 * GB), int(0.6 * GB)


@dataclass(frozen=True)
class Machine:
    """flops: effective, per device, of bfloat16 products, of the second moments' products, and of float32 products.

    device_bytes: memory of one device, None where it is the host's. column_seconds + column_per_row * N: one column of GPTQ of
    a layer with N rows. disk, link: bytes a second of scratch disk, and from host to device. hash: bytes a second of SHA-256.
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
    disk: float = 3 * GB  # about half of what the makers of NVMe drives say
    hash: float = 1.8 * GB  # measured, one core with SHA instructions


def gpu(name: str, title: str, memory: float, bf16: float, tf32: float, fp32: float, host: float, disk: float) -> Machine:
    """A machine with one GPU, from its peaks in TFLOPS, and memory, host memory and disk in GB."""
    rates = {"bf16": bf16 * GEMM_SHARE * TERA, "moments": tf32 * GEMM_SHARE * TERA, "fp32": fp32 * GEMM_SHARE * TERA}
    return Machine(name, title, 1, memory * GB, host * GB, disk * GB, column_seconds=COLUMN_SECONDS, column_per_row=0.0, **rates)


_H100 = gpu("h100", "1 x 80 GB (H100 SXM)", 80, 989, 494, 67, host=256, disk=2000)
GPUS = {
    machine.name: machine
    for machine in (
        gpu("rtx4090", "1 x 24 GB (RTX 4090)", 24, 165, 82.6, 82.6, host=32, disk=1000),
        gpu("a100", "1 x 80 GB (A100 SXM)", 80, 312, 156, 19.5, host=256, disk=2000),
        _H100,
        replace(_H100, name="8xh100", title="8 x 80 GB (H100 SXM)", devices=8, host_bytes=1024 * GB, disk_bytes=8000 * GB),
    )
}
# Which machines a plan shows if there is no GPU here and none was named.
USUAL = ("rtx4090", "h100", "8xh100")


def cpu(threads: int, host: float, disk: float) -> Machine:
    """This kind of CPU with some threads, each as fast as the one measured; host memory and free disk in bytes."""
    rates = {"bf16": 170e9 * threads, "moments": 85e9 * threads, "fp32": 80e9 * threads}
    return Machine(
        "cpu", f"CPU, {threads} threads", 1, None, host, disk, column_seconds=60e-6, column_per_row=25e-9, disk=1 * GB, **rates
    )
