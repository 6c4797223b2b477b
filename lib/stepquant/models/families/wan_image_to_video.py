"""WanImageToVideoPipeline: a video from its first frame (diffusers 0.42.1, pipelines/wan/pipeline_wan_i2v.py).

Wan2.2-I2V-A14B         two experts; first frame as condition channels; a last frame too, if the prompt has one
Wan2.1-I2V 480P, 720P   one expert; condition channels, and image tokens in cross-attention
Wan2.1-FLF2V            as Wan2.1-I2V with the tokens of two images: first and last frame
Wan2.2-TI2V-5B          one expert; the first latent frame is the image, with t = 0 for its tokens
"""

from collections.abc import Sequence

from stepquant.errors import InvalidInput
from stepquant.models.families.description import Config, Family, PromptImages
from stepquant.models.families.wan_pipeline import check_equal_inputs, wan_call, wan_experts, wan_text
from stepquant.models.families.wan_transformer import (
    WAN_TRANSFORMER,
    check_channels,
    check_expanded_timesteps,
    check_image_tokens,
    check_text_length,
    reads_image_tokens,
    reads_two_images,
)


def _images(index: Config, config: Config) -> PromptImages:
    if reads_two_images(config):
        return PromptImages(required=("image", "last_image"))
    # The pipeline ignores a last frame with t per token, and fails on its tokens if it has no positions for two images.
    if index.get("expand_timesteps") or reads_image_tokens(config):
        return PromptImages(required=("image",))
    return PromptImages(required=("image",), optional=("last_image",))


def _check(index: Config, configs: Sequence[Config]) -> None:
    for config in configs:
        check_image_tokens(config)
        check_channels(config, conditions=not index.get("expand_timesteps"), pipeline="WanImageToVideoPipeline")
        check_expanded_timesteps(index, config)
    check_equal_inputs(configs)
    if not reads_image_tokens(configs[0]):
        return
    for component in ("image_encoder", "image_processor"):
        if index.get(component) in (None, [None, None]):
            raise InvalidInput(f"model_index.json: no {component}, but the transformer reads image tokens (image_dim)")


FAMILY = Family(
    pipeline="WanImageToVideoPipeline",
    denoiser=WAN_TRANSFORMER,
    experts=wan_experts,
    images=_images,
    check=_check,
    check_sampling=check_text_length,
    call=wan_call,
    encode_text=wan_text,
)
