"""Parameters, model and prompts looked at together, before anything runs: for `check`, `doctor` and `plan`.

Nothing is downloaded. What is not here yet is looked at by the stage that fetches it (models/checks lists who asks
what).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stepquant import params as parameters
from stepquant.errors import MissingFile
from stepquant.params import Lora

DOWNLOADS = "is not a folder here; stage model will download it"


def look_at_model(file: Path) -> str:
    """Check the source model of a params file, and the parameters against it.

    Args:
        file: the params file.

    Returns:
        A line that says what was found.

    Raises:
        UserError: the model is not supported or damaged, or the parameters do not fit it.
    """
    from stepquant.models.checks import check_run, check_source
    from stepquant.models.checks.reach import check_experts
    from stepquant.models.loras import check_files, check_loras
    from stepquant.models.source import describe_experts
    from stepquant.recipe.shapes import check_eight_bits, check_shapes

    model = parameters.section(file, "model")
    check_files(model.loras)
    folder = _folder(model.source, model.revision)
    if folder is None:
        return f"model.source: {model.source} {DOWNLOADS}"
    check_source(folder)
    manifest = describe_experts(folder, model.source, model.revision)
    check_experts(parameters.expert_names(file), "experts", list(manifest.experts))
    check_loras(manifest, folder, model.loras)
    check_run(folder, manifest, parameters.section(file, "sampling"), parameters.section(file, "bins").by_expert)
    formats = parameters.section(file, "format")
    for name in manifest.experts:
        rank, rotate = (parameters.section(file, key, name) for key in ("lowrank", "rotate"))
        check_shapes(manifest, name, formats, rank.rank, rotate)
        check_eight_bits(manifest, name, formats)
    blocks = ", ".join(f"{name} with {found.blocks} blocks" for name, found in manifest.experts.items())
    return "; ".join(filter(None, (f"model.source: {model.source}: {blocks}", unwatched(folder, model.loras))))


def look_at_prompts(file: Path) -> str:
    """Check the prompts of a params file, as far as their manifests are here.

    Args:
        file: the params file.

    Returns:
        A line that says what was found.

    Raises:
        UserError: a manifest is wrong, has too few prompts (for stage sensitivity, too), or pictures that are too
            small or not those that the model takes.
    """
    from stepquant.models.captions import read_captions
    from stepquant.models.checks import check_pictures
    from stepquant.models.prompts import Prompt, check_images, check_measured, evaluation_prompts, recorded_prompts
    from stepquant.models.source import describe_experts

    model, sampling, found = parameters.section(file, "model"), parameters.section(file, "sampling"), []
    folder = _folder(model.source, model.revision) if is_here(file) else None
    images = folder and describe_experts(folder, model.source, model.revision).images
    takes: tuple[tuple[str, Callable[[Any], list[Prompt]]], ...] = (
        ("trajectories", recorded_prompts),
        ("generate", evaluation_prompts),
    )
    for section, take in takes:
        settings = parameters.section(file, section)
        if not Path(settings.manifest).is_file():
            found.append(f"{section}.manifest: {settings.manifest} is not here")
            continue
        prompts = take(settings)
        if section == "trajectories":
            calibrated = sum(prompt.split == "calibration" for prompt in prompts)
            check_measured(parameters.section(file, "sensitivity"), calibrated)
        if images:
            check_images(prompts, images, settings.manifest)
        check_pictures(prompts, sampling, f"{section}.manifest")
        found.append(f"{section}.manifest: {len(prompts)} prompts")
    text_prompts = parameters.section(file, "trajectories").text_prompts
    if text_prompts is not None and not Path(text_prompts).is_file():
        found.append(f"trajectories.text_prompts: {text_prompts} is not here")
    elif text_prompts is not None:
        found.append(f"trajectories.text_prompts: {len(read_captions(Path(text_prompts)))} captions")
    return ", ".join(found)


def unwatched(folder: Path, loras: Sequence[Lora]) -> str:
    """What to know about a source that DVC does not watch; "" if it watches all of it.

    Args:
        folder: of the source pipeline.
        loras: its LoRAs, which can lie behind a link to a folder.
    """
    watched = Path("data/models")
    places = [Path(lora.file).parent for lora in loras]
    if folder.parent.name != "snapshots":  # of the hub, whose commit is recorded
        places += [folder, *(child for child in sorted(folder.iterdir()) if child.is_dir())]
    for place in places:
        if not place.resolve().is_relative_to(watched.resolve()):
            return (
                f"DVC does not watch {place}, which lies outside {watched}; after a change there, run "
                "`dvc repro --force model`"
            )
    return ""


def is_here(file: Path) -> bool:
    """Whether the model of a params file is a folder here, or a hub model that was downloaded before."""
    model = parameters.section(file, "model")
    try:
        return _folder(model.source, model.revision) is not None
    except MissingFile:
        return False


def _folder(source: str, revision: str | None) -> Path | None:
    """The folder of a source; None for a hub id that is not here. Raises MissingFile for neither of them."""
    from stepquant.models.hub import cached_snapshot, is_hub_id
    from stepquant.models.source import resolve_source

    if is_hub_id(source):
        return cached_snapshot(source, revision)
    return resolve_source(source, revision)
