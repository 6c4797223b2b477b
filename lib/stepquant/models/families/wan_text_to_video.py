"""WanPipeline: a video from text alone (diffusers 0.42.1, pipelines/wan/pipeline_wan.py).

Wan2.2-T2V-A14B          two experts
Wan2.1-T2V 1.3B, 14B     one expert
Wan2.2-TI2V-5B           one expert with t per token, all of them equal
"""

from collections.abc import Sequence

from stepquant.errors import InvalidInput
from stepquant.models.families.description import Config, Family, PromptImages
from stepquant.models.families.wan_pipeline import wan_call, wan_experts, wan_text
from stepquant.models.families.wan_transformer import (
    WAN_TRANSFORMER,
    check_channels,
    check_expanded_timesteps,
    check_image_tokens,
    check_text_length,
    reads_image_tokens,
)


def _check(index: Config, configs: Sequence[Config]) -> None:
    for config in configs:
        check_image_tokens(config)
        if reads_image_tokens(config):
            raise InvalidInput(
                "transformer config: image_dim is set, but WanPipeline passes no image tokens; "
                "this denoiser belongs to WanImageToVideoPipeline (_class_name in model_index.json)"
            )
        check_channels(config, conditions=False, pipeline="WanPipeline")
        check_expanded_timesteps(index, config)


FAMILY = Family(
    pipeline="WanPipeline",
    denoiser=WAN_TRANSFORMER,
    experts=wan_experts,
    images=lambda index, config: PromptImages(),
    check=_check,
    check_sampling=check_text_length,
    call=wan_call,
    encode_text=wan_text,
)
