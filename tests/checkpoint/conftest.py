"""A tiny two-expert Wan pipeline with heavy-tailed random weights, and a round-to-nearest quantization of it."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanTransformer3DModel

from stepquant.checkpoint.packed import pack_linear
from stepquant.checkpoint.writer import write_checkpoint
from stepquant.formats import eight_bit_partner, get_format, weight_scales
from stepquant.models.weights import open_weights
from stepquant.quantize.rotate import rotate
from stepquant.runtime.layout import QuantizationSettings
from tests.wan import SITES

# Two threads on tensors this small are slower than one, and many times slower when the machine is busy.
torch.set_num_threads(1)

TARGETS = tuple(f"blocks.{i}.{linear}" for i in range(2) for site in SITES for linear in site.linears)
EDGES = {"transformer": (1000.0, 950.0, 925.0, 900.0), "transformer_2": (900.0, 600.0, 300.0, 0.0)}
# Every bin, some, and one; a target that is not listed has 4 bits in every bin.
EIGHT_BIT_BINS = {"attn1.to_q": (2,), "ffn.net.0.proj": (1, 2), "attn2.to_out.0": (0, 1, 2)}
RATIOS = [1.0, 0.7, 0.4]


def make_transformer(seed):
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=1,
        attention_head_dim=128,
        in_channels=36,
        out_channels=16,
        text_dim=128,
        freq_dim=64,
        ffn_dim=256,
        num_layers=2,
        rope_max_seq_len=32,
    )
    for parameter in model.parameters():
        if parameter.ndim == 2:  # Student t with 4 degrees of freedom: tails that make clips and groups matter
            chi = torch.randn(4, *parameter.shape).square().mean(0).sqrt()
            parameter.data = 0.05 * torch.randn(parameter.shape) / chi
    return model.eval()


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """The folder of the unquantized pipeline. Text encoder and tokenizer are left out: prompts come as embeddings."""
    torch.manual_seed(0)
    dims = {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    vae = AutoencoderKLWan(**dims, temperal_downsample=[False, True, True])
    pipe = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=make_transformer(1),
        transformer_2=make_transformer(2),
        boundary_ratio=0.9,
    )
    folder = tmp_path_factory.mktemp("source") / "pipeline"
    pipe.save_pretrained(folder)
    return folder


def make_settings(subfolder, weight_format, activation_format, rank, mean_subtraction=True):
    rotations = {target: 16 for target in TARGETS if target.endswith("net.2")}
    eight_bits = {}
    if activation_format is not None:
        bins = {f"blocks.{i}.{linear}": bins for i in range(2) for linear, bins in EIGHT_BIT_BINS.items()}
        partner = eight_bit_partner(get_format(activation_format)).name
        eight_bits = {"eight_bit_format": partner, "eight_bit_bins": bins}
    return QuantizationSettings(
        weight_format,
        activation_format,
        "ceil",
        "absmax",
        rank,
        mean_subtraction,
        rotations,
        EDGES[subfolder],
        TARGETS,
        **eight_bits,
    )


def quantize(W, bias, settings, rotation, seed):
    """Random smoothing and mean, an SVD branch, round to nearest: crude, but every tensor of the layout is used."""
    fmt = get_format(settings.weight_format)
    generator = torch.Generator().manual_seed(seed)
    smooth = (0.5 + torch.rand(W.shape[1], generator=generator)).bfloat16()
    mean = (0.2 * torch.randn(W.shape[1], generator=generator)).bfloat16() if settings.mean_subtraction else None
    residual, down, up = W.float() * smooth.float(), None, None
    if settings.rank:
        U, S, Vh = torch.linalg.svd(residual, full_matrices=False)
        up = (U * S)[:, : settings.rank].bfloat16()
        down = (Vh[: settings.rank] / smooth.float()).T.bfloat16().contiguous()
        residual = residual - up.float() @ down.float().T * smooth.float()
    bias = None if mean is None else bias.float() + mean.float() @ (residual / smooth.float()).T
    residual = rotate(residual, rotation)
    scales = weight_scales(fmt, residual, rounding="ceil")
    clip = None if settings.activation_format is None else torch.tensor(RATIOS)
    offset = torch.tensor([0, -1, 1], dtype=torch.int8) if settings.activation_format == "mxfp4" else None
    codes = fmt.encode(residual, scales)
    return pack_linear(
        codes, scales, smooth, proj_down=down, proj_up=up, clip_ratio=clip, clip_exponent=offset, mean=mean, bias=bias
    )


def quantized_blocks(source, settings):
    """What write_expert takes: (block index, {target: PackedLinear}), one block at a time."""
    weights = open_weights(source)
    for i in range(2):
        mine = [target for target in settings.targets if target.startswith(f"blocks.{i}.")]
        yield i, {target: quantize_target(weights, settings, target) for target in mine}


def quantize_target(weights, settings, target):
    W, bias = weights.get(f"{target}.weight"), weights.get(f"{target}.bias")
    return quantize(W, bias, settings, settings.rotations.get(target, 0), seed=sum(target.encode()))


@pytest.fixture(scope="session")
def tools():
    """The functions above, for tests to call (conftest cannot be imported)."""
    return SimpleNamespace(settings=make_settings, blocks=quantized_blocks, edges=EDGES)


@pytest.fixture(scope="session")
def packed_pipeline(source, tmp_path_factory):
    """The folder of a packed pipeline, int4 with rank 8."""
    out = tmp_path_factory.mktemp("packed_pipeline") / "out"
    settings = {name: make_settings(name, "int4", "int4", rank=8) for name in EDGES}
    blocks = {name: (s, quantized_blocks(source / name, s)) for name, s in settings.items()}
    write_checkpoint(source, out, blocks, dtype=torch.float32, flow_shift=4.0)
    return out
