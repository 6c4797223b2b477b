"""Machines: how fast one computes, and how much it holds. Every figure has its source.

The GPU peaks are the vendors' figures for dense matrix products. The fraction of them that a run reaches is an
assumption (`GEMM_SHARE`, `COLUMN_SECONDS`), because no GPU has run this yet. The rates of the CPU are measured, on one
thread, by benchmarks/real_layer.py and benchmarks/capture_cost.py on an AMD EPYC with AVX-512 (docs/scale.md).
"""

from dataclasses import dataclass, replace

GB = 1e9
TERA = 1e12

# Fraction of the peak that large products reach. With 0.5, one 81-frame video of 40 steps takes an H100 290 s; the
# README of Wan2.2 reports 328 s for the whole pipeline.
GEMM_SHARE = 0.5
# One column of GPTQ on a GPU is a dozen small kernels, each about 5 microseconds to launch.
COLUMN_SECONDS = 60e-6
# The elementwise work of a pass of GPTQ reads or writes the weight some 50 times in float32, at 70 % of the memory's
# bandwidth.
PASS_BYTES, BANDWIDTH_SHARE = 200, 0.7
# Copies between page-locked host memory and a GPU: PCIe 4.0 x16 carries 32 GB/s each way, and copies reach about 25.
PCIE = 25 * GB
STAGING_BYTES = int(2 * GB)  # host buffers for what is read onto a GPU
NETWORK = 0.1 * GB  # of a line of 1 Gbit/s
# A Python process with torch before it has read a tensor, the models of diffusers on top of it (both measured), and a
# CUDA context.
PROCESS_BYTES, DIFFUSERS_BYTES, CONTEXT_BYTES = int(0.25 * GB), int(0.2 * GB), int(0.6 * GB)


@dataclass(frozen=True)
class Machine:
    """A machine, and the rates of each of its devices.

    Attributes:
        name: What `--machine` takes.
        title: What the plan prints.
        devices: GPUs, or 1 for the CPU.
        device_bytes: Memory of one device; None if it is the host's.
        host_bytes: Memory of the host.
        disk_bytes: Free space.
        bf16: Operations per second in bfloat16 products.
        hessian: Operations per second in the products of a Hessian.
        fp32: Operations per second in float32 products.
        column_seconds: Seconds for one column of GPTQ of a layer with N rows: column_seconds + column_per_row * N.
        column_per_row: See above.
        per_weight: Seconds per weight for the elementwise work of a pass of GPTQ (residual, rotation, scales).
        pcie: Bytes per second between host and device.
        disk: Bytes per second of the scratch disk.
        hash: Bytes per second of SHA-256.
        network: Bytes per second of a download.
    """

    name: str
    title: str
    devices: int
    device_bytes: float | None
    host_bytes: float
    disk_bytes: float
    bf16: float
    hessian: float
    fp32: float
    column_seconds: float
    column_per_row: float
    per_weight: float
    pcie: float = float("inf")
    disk: float = 3 * GB  # about half of what vendors of NVMe drives state
    hash: float = 1.8 * GB  # measured, one core with SHA instructions
    network: float = NETWORK


def gpu(
    name: str, title: str, memory: float, tflops: tuple[float, float, float], bandwidth: float, host: float, disk: float
) -> Machine:
    """A machine with one GPU.

    Args:
        name: What `--machine` takes.
        title: What the plan prints.
        memory: Of the device, GB.
        tflops: Peaks in BF16, TF32 and FP32. Hessians of bfloat16 activations are products in TF32.
        bandwidth: Of the device's memory, GB/s.
        host: Memory of the host, GB.
        disk: Free space, GB.
    """
    bf16, tf32, fp32 = (peak * GEMM_SHARE * TERA for peak in tflops)
    per_weight = PASS_BYTES / (bandwidth * GB * BANDWIDTH_SHARE)
    sizes = memory * GB, host * GB, disk * GB
    return Machine(name, title, 1, *sizes, bf16, tf32, fp32, COLUMN_SECONDS, 0.0, per_weight, PCIE)


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
# The machines of a plan if there is no GPU here and none was named.
USUAL = ("rtx4090", "h100", "8xh100")


def cpu(threads: int, host: float, disk: float) -> Machine:
    """The measured kind of CPU with some threads; memory of the host and free disk space in bytes."""
    return Machine(
        name="cpu",
        title=f"CPU, {threads} threads",
        devices=1,
        device_bytes=None,
        host_bytes=host,
        disk_bytes=disk,
        bf16=145e9 * threads,
        hessian=95e9 * threads,
        fp32=80e9 * threads,
        column_seconds=20e-6,
        column_per_row=8e-9 / threads,
        per_weight=0.12e-6 / threads,
        disk=1 * GB,
    )
