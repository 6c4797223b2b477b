"""The sampling parameters against the configs of VAE, denoiser and tokenizer: sizes, frames, text, guidance.

The pipelines round a size or a number of frames that does not fit, with a warning that stages do not show; what is
calibrated and measured would then be another video than params.yaml says.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from stepquant.errors import InvalidInput
from stepquant.models.manifest import Compression
from stepquant.params import Sampling

Config = Mapping[str, Any]
# Of AutoencoderKLWan; its config can name other factors, or none.
SPATIAL, TEMPORAL = 8, 4
# transformers writes a number beyond this for a tokenizer without a limit.
NO_LIMIT = 1_000_000


def check_sizes(sampling: Sampling, compression: Compression, patch_size: Sequence[int]) -> None:
    """Refuse a size or number of frames that the model cannot give.

    Args:
        sampling: the params section.
        compression: of the VAE.
        patch_size: of the denoiser, in latents: frames, rows, columns.

    Raises:
        InvalidInput: names the key, and the nearest values that are allowed.
    """
    for key, value, patch in zip(("height", "width"), (sampling.height, sampling.width), patch_size[1:]):
        multiple = compression.scale_factor_spatial * patch
        if value % multiple:
            below = value // multiple * multiple
            near = " or ".join(str(n) for n in (below, below + multiple) if n)
            raise InvalidInput(f"sampling.{key}: {value}; this model needs a multiple of {multiple}: use {near}")
    frames, temporal = sampling.num_frames, compression.scale_factor_temporal
    if frames % temporal != 1 or frames <= temporal:
        below = (frames - 1) // temporal * temporal + 1
        near = " or ".join(str(n) for n in (below, below + temporal) if n > 1)
        raise InvalidInput(
            f"sampling.num_frames: {frames}; this model makes 1 + a multiple of {temporal} frames, at least "
            f"{temporal + 1}: use {near}"
        )


def check_text(sampling: Sampling, tokenizer: Config) -> None:
    """Refuse more text tokens than the tokenizer is made for (its tokenizer_config.json)."""
    limit = tokenizer.get("model_max_length")
    if isinstance(limit, int | float) and limit < NO_LIMIT and sampling.max_sequence_length > limit:
        raise InvalidInput(
            f"sampling.max_sequence_length: {sampling.max_sequence_length}; allowed: at most {limit:g}, the "
            "tokenizer's model_max_length"
        )


def check_guidance(sampling: Sampling, experts: int) -> None:
    """Refuse a second guidance scale that has no effect: the first one alone decides whether there is guidance."""
    if experts > 1 and sampling.guidance_scale <= 1 < sampling.guidance_scale_2:
        raise InvalidInput(
            f"sampling.guidance_scale_2: {sampling.guidance_scale_2:g} has no effect with sampling.guidance_scale "
            f"{sampling.guidance_scale:g}, which turns guidance off for both experts; set both to 1, or both above"
        )


def check_vae(vae: Config, denoisers: Sequence[Config], conditions: bool) -> None:
    """Refuse a VAE whose factors contradict its layers, or whose latents the denoisers do not take.

    Args:
        vae: config.json of an AutoencoderKLWan.
        denoisers: config.json of each expert.
        conditions: whether the pipeline appends a mask and the latents of the pictures to the latents.

    Raises:
        InvalidInput: names both configs.
    """
    spatial = 2 ** (len(vae.get("dim_mult", (1, 2, 4, 4))) - 1) * (vae.get("patch_size") or 1)
    temporal = 2 ** sum(vae.get("temperal_downsample", (False, True, True)))
    for key, made, default in (
        ("scale_factor_spatial", spatial, SPATIAL),
        ("scale_factor_temporal", temporal, TEMPORAL),
    ):
        if vae.get(key, default) != made:
            raise InvalidInput(f"vae/config.json: {key} is {vae.get(key, default)}, but its layers make {made}")
    channels = vae.get("z_dim", 16)
    for config in denoisers:
        taken = 2 * channels + temporal if conditions else channels
        if (config["in_channels"], config["out_channels"]) != (taken, channels):
            raise InvalidInput(
                f"transformer/config.json: in_channels {config['in_channels']} and out_channels "
                f"{config['out_channels']}; with the VAE's {channels} latent channels (z_dim) this pipeline needs "
                f"{taken} and {channels}"
            )


def check_widths(denoisers: Sequence[Config], text_encoder: Config, image_encoder: Config | None) -> None:
    """Refuse encoders whose states are not as wide as the denoisers' inputs.

    Args:
        denoisers: config.json of each expert.
        text_encoder: config.json of a T5 encoder.
        image_encoder: config.json of a CLIP vision model, if there is one.

    Raises:
        InvalidInput: names both configs.
    """
    for config in denoisers:
        pairs = [("text_dim", "text_encoder", "d_model", text_encoder)]
        if image_encoder is not None:
            pairs.append(("image_dim", "image_encoder", "hidden_size", image_encoder))
        for key, component, width, encoder in pairs:
            if encoder.get(width) not in (None, config.get(key)):
                raise InvalidInput(
                    f"transformer/config.json: {key} is {config.get(key)}, but {component}/config.json has {width} "
                    f"{encoder[width]}"
                )
