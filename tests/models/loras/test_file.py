"""Fused weights against diffusers and PEFT, and what is refused."""

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from peft import LoraConfig
from safetensors.torch import save_file

from stepquant.errors import InvalidInput, MissingFile, UnsupportedCheckpoint, UserError
from stepquant.models.loras.file import read_lora
from stepquant.models.loras.fused_weights import FusedWeights
from stepquant.models.weights import open_weights
from tests.lora_files import (
    ALL_IN_BLOCK,
    ALPHA,
    BLOCK_MODULES,
    MODULES,
    RANK,
    diffusers_keys,
    kohya_keys,
    native_keys,
    pairs,
    save_lora,
)
from tests.native_wan import tiny_denoiser

WEIGHTS = "diffusion_pytorch_model.safetensors"
FAMILY = "i2v-2.2"


@pytest.fixture(scope="module")
def model():
    return tiny_denoiser(FAMILY)


@pytest.fixture(scope="module")
def base(model, tmp_path_factory):
    """The denoiser's weights as a folder."""
    folder = tmp_path_factory.mktemp("base")
    save_file({key: tensor.clone() for key, tensor in model.state_dict().items()}, folder / WEIGHTS)
    return open_weights(folder)


def fused(base, *loras):
    """All tensors with the LoRAs, given as (file, weight)."""
    updates: dict[str, list] = {}
    for file, weight in loras:
        for key, update in read_lora(file, weight, base).items():
            updates.setdefault(key, []).append(update)
    weights = FusedWeights(base, updates)
    return {key: weights.get(key) for key in weights}


def peft_fused(*loras):
    """The same by diffusers' load_lora_weights and fuse_lora."""
    model = tiny_denoiser(FAMILY)
    pipe = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), transformer=model)
    names = [f"lora{i}" for i in range(len(loras))]
    for name, (file, _) in zip(names, loras):
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    pipe.set_adapters(names, [weight for _, weight in loras])
    pipe.fuse_lora(adapter_names=names)
    pipe.unload_lora_weights()
    return model.state_dict()


def changed(tensors, model):
    return {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, tensors[key])}


def assert_equal_models(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-6, atol=1e-5, msg=key)


@pytest.mark.parametrize(
    ("write", "modules"),
    [
        (lambda file, made: save_lora(file, diffusers_keys(made)), MODULES),
        (lambda file, made: save_lora(file, native_keys(made, None)), MODULES),
        (lambda file, made: save_lora(file, native_keys(made, ALPHA)), BLOCK_MODULES),
        (
            lambda file, made: save_lora(file, kohya_keys(made, ALPHA)),
            tuple(f"blocks.{i}.{path}" for i in range(2) for path in ALL_IN_BLOCK),
        ),
    ],
    ids=["diffusers", "native", "native with alpha", "kohya"],
)
def test_fused_weights_are_those_of_diffusers(tmp_path, model, base, write, modules):
    file = tmp_path / "lora.safetensors"
    write(file, pairs(model, modules))
    ours = fused(base, (file, 0.7))
    assert changed(ours, model) == {f"{module}.weight" for module in modules}
    assert_equal_models(ours, peft_fused((file, 0.7)))


def test_two_loras_add_up_in_order(tmp_path, model, base):
    first = save_lora(tmp_path / "a.safetensors", diffusers_keys(pairs(model, MODULES, 1)))
    second = save_lora(tmp_path / "b.safetensors", native_keys(pairs(model, BLOCK_MODULES[2:], 2), ALPHA))
    loras = (first, 1.0), (second, -0.5)
    assert_equal_models(fused(base, *loras), peft_fused(*loras))


def test_the_config_that_diffusers_writes_into_a_file(tmp_path, model, base):
    """alpha / sqrt(r) and an alpha of its own for one module, as PEFT reads them, and the bias of lora_B."""
    config = {"r": RANK, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 3}, "use_rslora": True, "lora_bias": True}
    config |= {"target_modules": list(BLOCK_MODULES), "bias": "none", "use_dora": False, "peft_type": "LORA"}
    tensors = diffusers_keys(pairs(model, BLOCK_MODULES))
    generator = torch.Generator().manual_seed(3)
    for module in BLOCK_MODULES:
        rows = model.get_submodule(module).weight.shape[0]
        tensors[f"transformer.{module}.lora_B.bias"] = torch.randn(rows, generator=generator)
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    file = save_lora(tmp_path / "lora.safetensors", tensors, metadata)
    ours = fused(base, (file, 0.5))
    assert len(changed(ours, model)) == 2 * len(BLOCK_MODULES)
    assert_equal_models(ours, peft_fused((file, 0.5)))


def test_an_adapter_that_peft_saved(tmp_path, model, base):
    """adapter_model.safetensors with adapter_config.json beside it, fused by PEFT alone."""
    from peft import get_peft_model

    theirs = tiny_denoiser(FAMILY)
    adapter = get_peft_model(theirs, LoraConfig(r=RANK, lora_alpha=10, target_modules=list(BLOCK_MODULES)))
    generator = torch.Generator().manual_seed(4)
    for name, parameter in adapter.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    adapter.save_pretrained(tmp_path)
    merged = adapter.merge_and_unload().state_dict()
    assert_equal_models(fused(base, (tmp_path / "adapter_model.safetensors", 1.0)), merged)


def test_an_adapter_name_in_the_keys(tmp_path, model, base):
    made = pairs(model, MODULES)
    plain = save_lora(tmp_path / "plain.safetensors", diffusers_keys(made))
    renamed = {
        key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): tensor
        for key, tensor in diffusers_keys(made, prefix="").items()
    }
    named = save_lora(tmp_path / "named.safetensors", renamed)
    ours, theirs = fused(base, (named, 1.0)), fused(base, (plain, 1.0))
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def test_differences_of_weights_and_biases(tmp_path, model, base):
    """What LightX2V's files hold beside pairs. diffusers drops those of norms; here they are added, as in ComfyUI."""
    state = model.state_dict()
    generator = torch.Generator().manual_seed(5)
    names = {
        "head.head.diff": "proj_out.weight",
        "head.head.diff_b": "proj_out.bias",
        "head.modulation.diff": "scale_shift_table",
        "patch_embedding.diff": "patch_embedding.weight",
        "patch_embedding.diff_b": "patch_embedding.bias",
        "blocks.0.norm3.diff": "blocks.0.norm2.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
        "blocks.1.self_attn.norm_q.diff": "blocks.1.attn1.norm_q.weight",
        "blocks.1.modulation.diff": "blocks.1.scale_shift_table",
        "blocks.0.ffn.2.diff_b": "blocks.0.ffn.net.2.bias",
    }
    differences = {native: torch.randn(state[key].shape, generator=generator) for native, key in names.items()}
    tensors = {f"diffusion_model.{native}": tensor for native, tensor in differences.items()}
    ours = fused(base, (save_lora(tmp_path / "lora.safetensors", tensors), 0.5))
    assert changed(ours, model) == set(names.values())
    for native, key in names.items():
        assert torch.equal(ours[key], state[key] + 0.5 * differences[native])


def test_the_bias_difference_of_a_pair_is_not_scaled_by_alpha(tmp_path, model, base):
    made = pairs(model, BLOCK_MODULES)
    tensors = native_keys(made, ALPHA)
    bias = torch.arange(48.0)
    tensors["diffusion_model.blocks.0.ffn.0.diff_b"] = bias
    file = save_lora(tmp_path / "lora.safetensors", tensors)
    ours = fused(base, (file, 0.5))
    assert torch.equal(ours["blocks.0.ffn.net.0.proj.bias"], model.blocks[0].ffn.net[0].proj.bias + 0.5 * bias)
    assert_equal_models(ours, peft_fused((file, 0.5)))


def test_a_pair_of_the_patch_embedding(tmp_path, model, base):
    """A convolution, as PEFT fuses it: the up matrix has a kernel of one."""
    down, up = torch.randn(RANK, 36, 1, 2, 2), torch.randn(32, RANK, 1, 1, 1)
    keys = {"transformer.patch_embedding.lora_A.weight": down, "transformer.patch_embedding.lora_B.weight": up}
    file = save_lora(tmp_path / "lora.safetensors", keys)
    assert_equal_models(fused(base, (file, 0.5)), peft_fused((file, 0.5)))


@pytest.mark.parametrize(
    ("stored", "expected"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.float64, torch.float64),
     (torch.float8_e4m3fn, torch.bfloat16), (torch.float8_e5m2, torch.bfloat16)],
)  # fmt: skip
def test_the_sum_is_rounded_once_to_the_stored_dtype(tmp_path, model, stored, expected):
    key = "blocks.0.attn1.to_q.weight"
    state = {name: tensor.to(stored) for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / WEIGHTS)
    base = open_weights(tmp_path)
    ((down, up),) = pairs(model, ("blocks.0.attn1.to_q",)).values()
    file = save_lora(tmp_path / "lora.safetensors", diffusers_keys({"blocks.0.attn1.to_q": (down, up)}))
    weights = FusedWeights(base, {name: [update] for name, update in read_lora(file, 1.0, base).items()})
    exact = state[key].double() + up.double() @ down.double()
    result = weights.get(key)
    assert result.dtype == weights.dtype(key) == expected and weights.info(key).nbytes == result.nbytes
    # to half a unit in the last place, and float32 arithmetic
    assert (result.double() - exact).abs().max() <= exact.abs().max() * (torch.finfo(expected).eps / 2 + 1e-6)
    untouched = "blocks.0.attn1.to_k.weight"
    assert weights.dtype(untouched) == stored and weights.get(untouched).dtype == stored


def test_infinite_values_are_refused(tmp_path, model, base):
    down, up = pairs(model, ("proj_out",))["proj_out"]
    file = save_lora(tmp_path / "lora.safetensors", diffusers_keys({"proj_out": (down * float("nan"), up)}))
    with pytest.raises(UserError, match=r"proj_out.weight with .*lora.safetensors: infinite or not a number"):
        fused(base, (file, 1.0))


def good(model):
    return native_keys(pairs(model, BLOCK_MODULES), ALPHA)


Q = "diffusion_model.blocks.0.self_attn.q"


def add(**tensors):
    """Tensors of q of the first block's self-attention; a name with a dot is given as it is, below diffusion_model."""
    names = {name: name if "." in name else f"blocks.0.self_attn.q.{name}" for name in tensors}
    return lambda lora: lora.update({f"diffusion_model.{names[name]}": tensor for name, tensor in tensors.items()})


def drop(*names):
    return lambda lora: [lora.pop(f"{Q}.{name}") for name in names]


DOWN, UP = "lora_down.weight", "lora_up.weight"
ONES = torch.ones(4, 32)
REFUSED = [
    (add(**{f"blocks.2.self_attn.q.{DOWN}": ONES}), "blocks.2.self_attn.q.lora_down.weight matches no module"),
    (add(**{f"text_model.{DOWN}": ONES}), "text_model.lora_down.weight matches no module"),
    (add(reshape_weight=ONES), "self_attn.q.reshape_weight matches no module"),
    (add(**{"blocks.0.cross_attn.k_img.diff": ONES}), "k_img.diff matches no module"),
    (lambda lora: lora.update({"transformer_2.proj_out.lora_A.weight": ONES}), "transformer_2.* matches no module"),
    (drop(UP), "self_attn.q.lora_down.weight comes without its lora_up"),
    (drop(DOWN), "self_attn.q.lora_up.weight comes without its lora_down"),
    (drop(DOWN, UP), "self_attn.q.alpha comes without its lora_down"),
    (add(**{f"blocks.0.self_attn.q.{DOWN}": torch.ones(4, 64)}), r"has shape \[4, 64\]; .* needs \[rank, 32\]"),
    (add(**{f"blocks.0.self_attn.q.{UP}": torch.ones(32, 8)}), r"has shape \[32, 8\]; .* needs \[32, 4\]"),
    (
        add(**{f"blocks.0.self_attn.q.{UP}": ONES, f"blocks.0.self_attn.q.{DOWN}": ONES.T}),  # exchanged
        r"lora_down.weight has shape \[32, 4\]; .* needs \[rank, 32\]",
    ),
    (
        add(**{f"blocks.0.self_attn.q.{UP}": ONES.T[:, :0], f"blocks.0.self_attn.q.{DOWN}": ONES[:0]}),
        r"has shape \[0, 32\]",
    ),
    (
        add(**{"head.head.diff": torch.ones(64, 33)}),
        r"diff has shape \[64, 33\]; proj_out.weight has \[64, 32\]: a LoRA of",
    ),
    (
        add(**{"blocks.0.self_attn.norm_q.diff_b": ONES[0]}),
        "diff_b changes blocks.0.attn1.norm_q.bias, which .* not have",
    ),
    (add(**{"blocks.0.modulation.diff_b": ONES[0]}), "modulation.diff_b changes a bias, which .* does not have"),
    (add(diff=torch.ones(32, 32)), f"{Q}.diff changes the same weight as {Q}.{DOWN}"),
    (
        lambda lora: lora.update({"transformer.blocks.0.attn1.to_q.lora_A.weight": ONES}),
        "is the same part of blocks.0.attn1.to_q as",
    ),
    (add(**{f"blocks.0.self_attn.q.{DOWN}": ONES.char()}), "has dtype torch.int8; expected floating point"),
    (add(alpha=torch.ones(2)), r"alpha has shape \[2\]; expected one number"),
    (dict.clear, "no tensor in it"),
]


@pytest.mark.parametrize(("damage", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_lora_that_does_not_fit_as_a_whole(tmp_path, model, base, damage, message):
    tensors = good(model)
    damage(tensors)
    file = save_lora(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(InvalidInput, match=message) as caught:
        read_lora(file, 1.0, base)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "method"),
    [("dora_scale", "DoRA"), ("lora_magnitude_vector.weight", "DoRA"), ("lokr_w1", "LoKr"), ("hada_w1_a", "LoHa"),
     ("oft_blocks", "OFT"), ("lora_mid.weight", "LoCon with a Tucker core")],
)  # fmt: skip
def test_other_methods_are_refused_by_name(tmp_path, model, base, name, method):
    file = save_lora(tmp_path / "lora.safetensors", good(model) | {f"{Q}.{name}": torch.ones(2)})
    with pytest.raises(UnsupportedCheckpoint, match=f"{name} belongs to {method}, which cannot be fused"):
        read_lora(file, 1.0, base)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "uses DoRA"),
        ({"peft_type": "LOKR"}, "of type LOKR"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base weights"),
        ({"layer_replication": [[0, 2]]}, r"uses layer_replication: \[\[0, 2\]\]"),
        ({"lora_alpha": None}, "no number lora_alpha"),
    ],
)
def test_a_config_of_another_method(tmp_path, model, base, config, message):
    config = {"r": RANK, "lora_alpha": 8, "peft_type": "LORA", "qalora_group_size": 16, "bias": "none"} | config
    file = save_lora(tmp_path / "adapter_model.safetensors", diffusers_keys(pairs(model, MODULES)))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        read_lora(file, 1.0, base)


def test_an_alpha_in_the_config_and_in_tensors(tmp_path, model, base):
    file = save_lora(tmp_path / "adapter_model.safetensors", good(model))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8}))
    with pytest.raises(InvalidInput, match="alpha is an alpha beside the alpha of the file's LoRA config"):
        read_lora(file, 1.0, base)


def test_files_that_are_no_safetensors(tmp_path, base):
    with pytest.raises(MissingFile, match="lora.safetensors: no such LoRA file"):
        read_lora(tmp_path / "lora.safetensors", 1.0, base)
    torch.save({}, tmp_path / "lora.pt")
    with pytest.raises(UnsupportedCheckpoint, match="lora.pt: not a safetensors file"):
        read_lora(tmp_path / "lora.pt", 1.0, base)
    (tmp_path / "lora.safetensors").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="not a safetensors file"):
        read_lora(tmp_path / "lora.safetensors", 1.0, base)
