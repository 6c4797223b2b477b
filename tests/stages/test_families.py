"""Every published model goes from `model` to its metrics, on a tiny random pipeline of the real classes."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image

from benchmarks.tiny_pipelines import TINY_PIPELINES, save_pipeline
from stepquant.calibration.statistics_files import read_statistics, site_folder, tokens_per_column
from stepquant.checkpoint.pipeline import load_pipeline
from stepquant.recipe.precision import ERRORS
from stepquant.recipe.schedule_file import read_schedule
from tests.stages.conftest import MANIFEST, PARAMS, ROOT, Folder, in_process

PROMPT = "a red crab runs"
CAPTIONS = ("a blue whale sings", "two red crabs", "rain")
BUDGET = 0.3
SPLITS = ("calibration", "validation", "heldout", "evaluation")


def write_prompts(root, images):
    """One prompt per split, with the images that the model takes."""
    (root / MANIFEST).parent.mkdir(parents=True)
    rows = []
    for seed, split in enumerate(SPLITS):
        row = {"id": split, "split": split, "prompt": PROMPT, "negative_prompt": "", "seed": seed}
        for column in images:
            row[column] = f"{split}_{column}.png"
            pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save((root / MANIFEST).parent / row[column])
        rows.append(row)
    (root / MANIFEST).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_params(root, experts, text_tokens):
    params = yaml.safe_load((ROOT / "lib/stepquant/profiles/demo.yaml").read_text())
    for section, values in PARAMS.items():
        params[section] |= values
    params["model"]["source"] = "model"
    params["sampling"] |= {"guidance_scale": 2.0, "guidance_scale_2": 2.0, "max_sequence_length": text_tokens}
    (root / "captions.txt").write_text("".join(f"{caption}\n" for caption in CAPTIONS))
    params["trajectories"]["text_prompts"] = "captions.txt"
    params["bins"] = dict.fromkeys(experts, 1)
    params["experts"] = {expert: params["experts"]["high_noise"] for expert in experts}
    params["smooth"]["gradient_steps"] = 2
    params["gptq"] |= {"refits": 1, "dampings": [0.01]}
    params["precision"]["activation_budget"] = BUDGET
    params["evaluate"]["bootstrap_samples"] = 10
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


@torch.no_grad()
def check_text_statistics(root, expert):
    """The site of text tokens has the second moments of the prompt's two branches and of all captions, each once."""
    manifest = json.loads((root / "artifacts/model/manifest.json").read_text())
    pipe = DiffusionPipeline.from_pretrained(root / "model", dtype=torch.float32)
    denoiser = getattr(pipe, manifest["experts"][expert]["subfolder"])
    length = yaml.safe_load((root / "params.yaml").read_text())["sampling"]["max_sequence_length"]
    texts = [PROMPT, "", *CAPTIONS]
    embeddings = [pipe.encode_prompt(text, None, False, max_sequence_length=length)[0] for text in texts]
    tokens = denoiser.condition_embedder.text_embedder(torch.cat(embeddings)).flatten(0, 1)
    folder = site_folder(root / f"artifacts/activations/{expert}.zarr", 0, "attn2.kv")
    statistics = read_statistics(folder, "cpu")
    expected = tokens.double().T @ tokens.double() / len(tokens)
    assert tokens_per_column(folder) == len(tokens) / tokens.shape[1]
    assert (statistics.hessian_about(torch.zeros(tokens.shape[1])) - expected).norm() < 1e-5 * expected.norm()
    assert torch.allclose(statistics.mean[0], tokens.mean(0), atol=1e-5)


def check_schedule(root, experts, image_tokens):
    """Every slot has errors, of which eight bits leave a small part of the activations'; some have got them."""
    schedule = read_schedule(root / "artifacts/schedule.json")
    assert list(schedule.experts) == experts and 0 < schedule.share <= BUDGET
    for expert in schedule.experts.values():
        assert ("attn2.add_kv" in expert.sites) == bool(image_tokens)
        four, eight, weights = (torch.tensor(expert.errors[kind]) for kind in ERRORS)
        assert (four > 0).all() and (weights > 0).all() and eight.sum() < four.sum() / 20


@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_a_published_model_goes_from_model_to_metrics(name, tmp_path, monkeypatch):
    described = TINY_PIPELINES[name]
    save_pipeline(tmp_path / "model", described, blocks=2 if described.boundary_ratio is None else 1)
    write_prompts(tmp_path, described.images)
    experts = ["denoiser"] if described.boundary_ratio is None else ["high_noise", "low_noise"]
    write_params(tmp_path, experts, text_tokens=512 if described.image_tokens else 16)
    in_process(monkeypatch, tmp_path)
    folder = Folder(tmp_path)
    folder.finish("model")
    folder.finish("trajectories")
    for expert in experts:
        for stage in ("capture", "lowrank", "gptq", "clip", "sensitivity"):
            folder.finish(stage, "--expert", expert)
    check_text_statistics(tmp_path, experts[-1])
    folder.finish("schedule")
    check_schedule(tmp_path, experts, described.image_tokens)
    folder.finish("pack", "--variant", "scheduled")
    folder.finish("generate", "--variant", "bf16")
    folder.finish("generate", "--variant", "scheduled")
    folder.finish("evaluate", "--variant", "scheduled")
    if not described.images:
        folder.finish("report")

    manifest = json.loads((tmp_path / "artifacts/model/manifest.json").read_text())
    assert list(manifest["experts"]) == experts
    record = json.loads((tmp_path / "artifacts/metrics/scheduled.json").read_text())
    image_site = "attn2.add_kv" in record["layers"][experts[0]]["sites"]
    assert image_site == bool(described.image_tokens)
    # Every linear of every block computes in four bits, with an error of four bits and not of another model.
    assert all(error < 0.3 for layers in record["layers"].values() for error in layers["sites"].values())
    assert record["videos"]["psnr"]["mean"] > 15
    assert (record["videos"]["first_frame_psnr"] is None) == (not described.images)
    pipe = load_pipeline(tmp_path / "artifacts/checkpoints/scheduled", dtype=torch.float32)
    assert type(pipe).__name__ == described.pipeline
    linears = {type(m).__name__ for m in pipe.transformer.blocks.modules() if hasattr(m, "in_features")}
    assert linears == {"W4A4Linear"}
    shutil.rmtree(tmp_path)


def test_prompts_without_the_image_of_the_model_are_refused_before_sampling(refused, folder):
    rows = [json.loads(line) for line in (folder.root / MANIFEST).read_text().splitlines()]
    (folder.root / MANIFEST).write_text("".join(json.dumps(row | {"image": None}) + "\n" for row in rows))
    for stage, arguments in (("trajectories", ()), ("generate", ("--variant", "bf16"))):
        message = refused(stage, *arguments)
        assert f"{MANIFEST}: prompt '" in message and message.endswith("has no 'image', which this model needs")
