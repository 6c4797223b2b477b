"""A complete image-to-video pipeline with random weights, small enough to copy for every test."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel

from stepquant.errors import UserError
from stepquant.models.checks import check_source
from tests.wan import TEXT_DIM, save_expert

TOKENIZER = Path(__file__).resolve().parents[3] / "data/models/wan22-mini/tokenizer"
INDEX = {
    "_class_name": "WanImageToVideoPipeline",
    "boundary_ratio": 0.9,
    "expand_timesteps": False,
    "image_encoder": [None, None],
    "image_processor": [None, None],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


class Source:
    """A pipeline folder that a test changes."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def configure(self, file: str, **values) -> None:
        """Set keys of a JSON file."""
        path = self.folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def weights(self, component: str) -> Path:
        return next((self.folder / component).glob("*.safetensors"))

    def retensor(self, component: str, change) -> None:
        """Write the tensors of a component anew: `change` gets the dict and changes it in place."""
        file = self.weights(component)
        tensors = load_file(file)
        change(tensors)
        file.unlink()  # a hardlink
        save_file(tensors, file, metadata={"format": "pt"})

    def refusal(self) -> str:
        with pytest.raises(UserError) as caught:
            check_source(self.folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)


@pytest.fixture(scope="session")
def whole_pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checks") / "pipeline"
    for seed, expert in enumerate(("transformer", "transformer_2")):
        save_expert(folder / expert, torch.bfloat16, seed=seed)
    config = UMT5Config(vocab_size=64, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    vae = AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, z_dim=16)
    vae.save_pretrained(folder / "vae")
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.save_pretrained(folder / "scheduler")
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    return folder


@pytest.fixture
def source(whole_pipeline, tmp_path) -> Source:
    return Source(shutil.copytree(whole_pipeline, tmp_path / "source"))
