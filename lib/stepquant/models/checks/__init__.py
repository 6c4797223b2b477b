"""What configs, headers and parameters can tell before anything is sampled. Loads no weights; takes seconds.

| list             | known                        | asked by                                           |
|------------------|------------------------------|----------------------------------------------------|
| `check_source`   | once the folder is there     | check, doctor, plan, stage model, and when loading |
| `check_run`      | with `sampling` and `bins`   | check, doctor, plan, stages model and trajectories |
| `check_known`    | the part of it without files | plan, for a model that is not here                 |
| `check_pictures` | with the prompts             | check, doctor, plan, trajectories and generate     |

Each raises a UserError for the first thing that is wrong.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stepquant.errors import InvalidInput
from stepquant.models.checks.components import check_components
from stepquant.models.checks.reach import Specs, check_experts, check_reached
from stepquant.models.checks.scheduler import check_scheduler, sampler_timesteps
from stepquant.models.checks.sizes import check_guidance, check_sizes, check_text, check_vae, check_widths
from stepquant.models.checks.tensors import check_tensors
from stepquant.models.configs import SCHEDULER, located, read_config
from stepquant.models.families import find_family
from stepquant.models.manifest import ModelManifest
from stepquant.models.pictures import SMALLEST_AREA, read_picture, too_small
from stepquant.models.prompts import Prompt
from stepquant.params import Sampling


def check_source(folder: Path) -> None:
    """Check a source pipeline: its class, its components, their configs against each other, and every tensor.

    Args:
        folder: of the pipeline.

    Raises:
        UserError: what is missing, contradicts something else, or is not supported.
    """
    index = read_config(folder / "model_index.json", "_class_name")
    with located(folder):
        family = find_family(index["_class_name"])
        experts = family.experts(index)
    components = check_components(folder)
    denoisers = [read_config(folder / expert.subfolder / "config.json") for expert in experts]
    with located(folder):
        family.check(index, denoisers)
        vae, text_encoder = (read_config(folder / name / "config.json") for name in ("vae", "text_encoder"))
        images = family.images(index, denoisers[0]).required
        check_vae(vae, denoisers, conditions=bool(images) and not index.get("expand_timesteps"))
        clip = read_config(folder / "image_encoder" / "config.json") if "image_encoder" in components else None
        check_widths(denoisers, text_encoder, clip)
    for component in components.values():
        check_tensors(component)


def check_run(folder: Path, manifest: ModelManifest, sampling: Sampling, bins: Specs | None = None) -> None:
    """Check the parameters of a run against the model.

    Args:
        folder: of the source pipeline.
        manifest: the model.
        sampling: the params section.
        bins: the params section by expert; None for a stage that does not read it.

    Raises:
        UserError: names the parameter, and what would do.
    """
    family = find_family(manifest.pipeline)
    for expert in manifest.experts.values():
        family.check_sampling(sampling, read_config(folder / expert.subfolder / "config.json"))
    tokenizer = folder / "tokenizer" / "tokenizer_config.json"
    if tokenizer.is_file():
        check_text(sampling, read_config(tokenizer))
    check_known(manifest, read_config(folder / SCHEDULER), sampling, bins)


def check_known(manifest: ModelManifest, scheduler: Mapping[str, Any], sampling: Sampling, bins: Specs | None) -> None:
    """The part of `check_run` for which the manifest and the scheduler's config are enough."""
    experts = {name: described.t_range for name, described in manifest.experts.items()}
    if bins is not None:
        check_experts(list(bins), "bins", list(experts))
    check_guidance(sampling, len(experts))
    for described in manifest.experts.values():
        check_sizes(sampling, manifest.compression, described.inputs.patch_size)
    check_scheduler(scheduler, sampling.steps, sampling.flow_shift)
    t = sampler_timesteps(scheduler, sampling.steps, sampling.flow_shift)
    check_reached(t, experts, bins, sampling)


def check_pictures(prompts: Iterable[Prompt], sampling: Sampling, key: str) -> None:
    """Refuse pictures far smaller than the video, such as those of the demo with another model.

    Args:
        prompts: those that are sampled.
        sampling: the params section.
        key: the parameter that names the manifest.

    Raises:
        InvalidInput: names the prompt and the sizes.
    """
    pictures = [(prompt.id, path) for prompt in prompts for path in prompt.images.values()]
    for name, path in pictures:
        size = read_picture(path).size
        if too_small(size, sampling.height, sampling.width):
            raise InvalidInput(
                f"{key}: the picture of prompt {name} has {size[0]} x {size[1]} pixels, for videos of "
                f"{sampling.width} x {sampling.height}; its part of their shape must have at least "
                f"{SMALLEST_AREA:.0%} of their pixels; give prompts of your own in {key}"
            )
