"""model.loras: every stage reads the fused model, and nothing is stale when a LoRA changes."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepquant.models.expert import open_expert
from stepquant.models.manifest import read_manifest
from stepquant.models.sampling import source_pipeline
from stepquant.models.weights import open_weights
from stepquant.params import section
from tests.stages.conftest import HIGH, TINY_MODEL, WEIGHTS

# Linears of a block, and layers before and after the blocks, which are not quantized.
CHANGED = (
    "blocks.1.attn1.to_q.weight",
    "blocks.0.ffn.net.2.weight",
    "condition_embedder.time_proj.weight",
    "proj_out.weight",
)
MANIFEST = "artifacts/model/manifest.json"
LORA = "data/models/lora.safetensors"


@pytest.fixture
def lora(folder):
    """A LoRA of the high-noise expert in model.loras; what the expert's tensors then are, by arithmetic."""
    stored = load_file(folder.root / TINY_MODEL / "transformer" / WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key in CHANGED:
        rows, columns = stored[key].shape
        down, up = (torch.randn(shape, generator=generator) * 0.2 for shape in ((4, columns), (rows, 4)))
        stored[key] = (stored[key].float() + 0.5 * (up @ down)).to(stored[key].dtype)
        name = f"transformer.{key.removesuffix('.weight')}"
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(tensors, folder.root / LORA)
    folder.set("model.loras", [{"expert": "high_noise", "file": LORA, "weight": 0.5}])
    return stored


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_the_sampled_pipeline_and_the_replayed_blocks_have_the_fused_values(folder, lora, offload):
    folder.finish("model")
    manifest = read_manifest(folder.root / MANIFEST)
    compute, sampling = (section(folder.root / "params.yaml", name) for name in ("compute", "sampling"))
    (folder.root / "scratch").mkdir()
    expert = open_expert(manifest, "high_noise", compute)
    pipe = source_pipeline(manifest, compute.model_copy(update={"offload": offload}), sampling, folder.root / "scratch")
    state = pipe.transformer.state_dict()
    assert state.keys() == lora.keys()
    replayed = {key: tensor for key, tensor in expert.glue().model.state_dict().items() if "blocks." not in key}
    for i in range(2):
        replayed |= {f"blocks.{i}.{key}": tensor for key, tensor in expert.block(i).state_dict().items()}
    assert replayed.keys() == lora.keys()
    for key, tensor in lora.items():
        assert torch.equal(state[key], tensor.to(state[key].dtype))
        assert torch.equal(replayed[key], state[key])
    other = load_file(folder.root / TINY_MODEL / "transformer_2" / WEIGHTS)
    assert all(
        torch.equal(tensor, pipe.transformer_2.state_dict()[key].to(tensor.dtype)) for key, tensor in other.items()
    )


def test_calls_and_statistics_are_those_of_a_model_fused_on_disk(folder, lora):
    """To the bit."""

    def found():
        return {name: data for name, data in folder.artifacts().items() if not name.endswith(".json")}

    def run():
        shutil.rmtree(folder.root / "artifacts")
        folder.finish("model")
        folder.finish("trajectories")
        folder.finish("capture", *HIGH)
        return found()

    plain, fused = found(), run()
    folder.set("model.loras", [])
    (folder.root / TINY_MODEL / "transformer" / WEIGHTS).unlink()  # a hard link to that of other tests
    save_file(lora, folder.root / TINY_MODEL / "transformer" / WEIGHTS, metadata={"format": "pt"})
    assert fused == run()
    differ = [name for name, data in plain.items() if data != fused[name]]
    assert any("trajectories.zarr" in name for name in differ) and any("high_noise.zarr" in name for name in differ)


def test_the_unquantized_rest_of_a_checkpoint_has_the_fused_values(folder, lora):
    folder.finish("model")
    folder.finish("pack", "--variant", "rtn")
    packed = open_weights(folder.root / "artifacts/checkpoints/rtn/transformer")
    for key in CHANGED[2:]:
        assert torch.equal(packed.get(key), lora[key])


def test_digests_cover_content_and_weight_of_a_lora_and_its_own_expert_alone(folder, lora):
    def digests():
        folder.finish("model")
        manifest = read_manifest(folder.root / MANIFEST)
        return manifest.expert_digest("high_noise"), manifest.expert_digest("low_noise"), manifest.digest()

    first = digests()
    (folder.root / LORA).rename(folder.root / "data/models/moved.safetensors")
    entry = {"expert": "high_noise", "file": "data/models/moved.safetensors", "weight": 0.5}
    folder.set("model.loras", [entry])
    assert digests() == first
    for changed in ([entry | {"weight": 0.25}], [entry, entry], []):
        folder.set("model.loras", changed)
        high, low, whole = digests()
        assert (high != first[0], low == first[1], whole != first[2]) == (True, True, True)
    folder.set("model.loras", [entry | {"expert": "low_noise"}])
    assert digests()[1] != first[1]


@pytest.mark.parametrize(("stage", "arguments"), [("trajectories", ()), ("pack", ("--variant", "rtn"))])
def test_a_lora_that_changed_since_stage_model(folder, lora, refused, stage, arguments):
    folder.finish("model")
    file = folder.root / LORA
    save_file({key: tensor * 2 for key, tensor in load_file(file).items()}, file)
    changed = f"{LORA}: changed since stage model recorded it; run `dvc repro`, or stage model again"
    assert refused(stage, *arguments) == changed
    file.unlink()
    assert refused(stage, *arguments).startswith(f"{LORA}: no such file; stage model recorded it as a LoRA")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"expert": "denoiser"}, "model.loras.0.expert: found 'denoiser'; this model has high_noise, low_noise"),
        (
            {"file": "data/models/absent.safetensors"},
            "model.loras.0.file: no such file data/models/absent.safetensors; put the LoRA there",
        ),
        (
            {"file": "data/models/../lora.safetensors"},
            "params.yaml: model.loras.0.file: found 'data/models/../lora.safetensors'; Value error, allowed: a file in "
            "data/models/, whose changes DVC notices",
        ),
        ({"weigth": 1.0}, "params.yaml: model.loras.0.weigth: unknown parameter; allowed: expert, file, weight"),
        ({"weight": None}, "params.yaml: model.loras.0.weight: found None; Input should be a valid number"),
        ({"weight": float("inf")}, "params.yaml: model.loras.0.weight: found inf; Input should be a finite number"),
    ],
)
def test_a_wrong_entry(folder, lora, refused, entry, message):
    good = {"expert": "high_noise", "file": LORA, "weight": 0.5}
    folder.set("model.loras", [good | entry])
    assert refused("model") == message


@pytest.mark.parametrize("key", ["expert", "file", "weight"])
def test_an_entry_without_a_key(folder, lora, refused, key):
    good = {"expert": "high_noise", "file": LORA, "weight": 0.5}
    folder.set("model.loras", [{name: value for name, value in good.items() if name != key}])
    assert refused("model") == f"params.yaml: model.loras.0.{key}: missing; expected the keys expert, file, weight"


def test_a_lora_of_another_width(folder, refused):
    save_file(
        {"proj_out.lora_A.weight": torch.ones(4, 5120), "proj_out.lora_B.weight": torch.ones(64, 4)},
        folder.root / LORA,
    )
    folder.set("model.loras", [{"expert": "low_noise", "file": LORA, "weight": 1}])
    message = refused("model")
    assert message.startswith(f"{LORA}: proj_out.lora_A.weight has shape [4, 5120]; proj_out.weight of shape ")
