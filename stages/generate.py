"""generate@V: samples the evaluation prompts with one variant. All variants get equal images and initial noise."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from stages import _artifacts as artifacts
from stages._stage import ParamsFile, Stage, VariantName, described_model, open_stage
from stepquant.checkpoint.pipeline import load_pipeline
from stepquant.command_runner import command, main
from stepquant.compute.progress import track
from stepquant.compute.units import gather
from stepquant.errors import MissingFile
from stepquant.evaluate.video import write_video
from stepquant.models.checks import check_pictures, check_run
from stepquant.models.offload import place_pipeline
from stepquant.models.prompts import Prompt, check_images, evaluation_prompts
from stepquant.models.sampling import ready_to_sample, sample, source_pipeline
from stepquant.models.source import resolve_source
from stepquant.recipe.variants import REFERENCE
from stepquant.storage.digests import file_digests
from stepquant.storage.json_files import to_json
from stepquant.torch_setup import torch_dtype

READS = ("compute", "sampling", "generate")


@command
def generate(variant: VariantName, params: ParamsFile = Path("params.yaml")) -> None:
    """Sample the evaluation prompts with one variant, loaded from its packed folder (bf16: from the source).

    Reads the params sections compute, sampling and generate, artifacts/model, and artifacts/checkpoints/VARIANT/.
    Writes artifacts/videos/VARIANT/: one lossless MP4 per prompt.
    """
    with open_stage(__file__, READS, params, variant=variant) as stage:
        prompts = evaluation_prompts(stage["generate"])
        sampler = Sampler(stage, variant)
        check_images(prompts, sampler.manifest.images, stage["generate"].manifest)
        check_pictures(prompts, stage["sampling"], "generate.manifest")
        check_run(sampler.folder, sampler.manifest, stage["sampling"])
        units = {}
        for prompt in track(prompts, f"generate@{variant}"):
            key = stage.key(
                ("compute", "sampling"), weights=sampler.weights, prompt=prompt.digest(), fps=stage["generate"].fps
            )
            units[prompt.id] = stage.units.make(key, lambda folder: sampler.write(prompt, folder))
        gather(
            units,
            artifacts.videos(variant),
            {"manifest.json": to_json({"videos": {name: unit.digest for name, unit in units.items()}})},
        )


class Sampler:
    """The pipeline of one variant, loaded when the first prompt without a finished unit needs it."""

    def __init__(self, stage: Stage, variant: str):
        """Raises MissingFile if the variant has not been packed."""
        self.stage, self.variant = stage, variant
        self.manifest = described_model()
        if variant != REFERENCE and not artifacts.checkpoint(variant).is_dir():
            raise MissingFile(f"{artifacts.checkpoint(variant)}: not there; run `dvc repro pack@{variant}` first")
        self.weights = self.manifest.digest() if variant == REFERENCE else file_digests(artifacts.checkpoint(variant))

    @property
    def folder(self) -> Path:
        """The pipeline's folder, whose configs are those of the source for every variant."""
        if self.variant == REFERENCE:
            return resolve_source(self.manifest.source, self.manifest.revision)
        return artifacts.checkpoint(self.variant)

    def write(self, prompt: Prompt, folder: Path) -> None:
        """Sample one prompt and write its frames, converted to uint8, as `video.mp4`."""
        frames = sample(
            self.pipe,
            self.stage["sampling"],
            prompt.prompt,
            prompt.negative_prompt,
            prompt.load_images(),
            prompt.seed,
            "pt",
        )
        pixels = (frames.float().clamp(0, 1) * 255).round().to(torch.uint8)
        write_video(folder / "video.mp4", pixels.permute(0, 2, 3, 1).cpu().numpy(), self.stage["generate"].fps)

    @cached_property
    def pipe(self) -> Any:
        """The pipeline: the source's for the reference variant, else that of the packed folder."""
        compute, sampling = self.stage["compute"], self.stage["sampling"]
        if self.variant == REFERENCE:
            with self.stage.units.scratch() as folder:
                return source_pipeline(self.manifest, compute, sampling, folder)
        packed = artifacts.checkpoint(self.variant)
        dtype, place = torch_dtype(compute.dtype), (compute.device, compute.offload)
        return ready_to_sample(lambda: place_pipeline(load_pipeline(packed, dtype=dtype), *place), sampling)


if __name__ == "__main__":
    main(generate)
