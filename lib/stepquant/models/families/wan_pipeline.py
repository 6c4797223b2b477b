"""What the Wan pipelines have in common: their experts, and the arguments of their call.

Source: diffusers 0.42.1, pipelines/wan. With a boundary_ratio, `transformer` denoises t >= boundary_ratio x
num_train_timesteps and `transformer_2` the rest; without one, `transformer` denoises every t.
"""

from collections.abc import Sequence
from typing import Any

from stepquant.errors import InvalidInput
from stepquant.models.families.description import Config, ExpertRange
from stepquant.models.families.wan_transformer import WAN_TRANSFORMER, reads_image_tokens, reads_two_images
from stepquant.params import Sampling


def wan_experts(index: Config) -> tuple[ExpertRange, ...]:
    """The experts of a Wan pipeline.

    Raises:
        InvalidInput: a component is not a WanTransformer3DModel, or boundary_ratio and transformer_2 disagree.
    """
    first, second = (_names_denoiser(index, name) for name in ("transformer", "transformer_2"))
    boundary = index.get("boundary_ratio")
    if not first:
        raise InvalidInput("model_index.json: no transformer; expected a diffusers WanTransformer3DModel")
    if boundary is None and second:
        raise InvalidInput(
            "model_index.json: a transformer_2 but no boundary_ratio, with which the pipeline would never call it; "
            "set boundary_ratio (0.9 in Wan2.2-I2V-A14B, 0.875 in Wan2.2-T2V-A14B), or remove transformer_2"
        )
    if boundary is None:
        return (ExpertRange("denoiser", "transformer", 0.0, 1.0),)
    if isinstance(boundary, bool) or not isinstance(boundary, int | float) or not 0 < boundary < 1:
        raise InvalidInput(f"model_index.json: boundary_ratio {boundary!r}; allowed: a number between 0 and 1, or null")
    if not second:
        raise InvalidInput(
            f"model_index.json: boundary_ratio {boundary} but no transformer_2, which the pipeline would call below "
            "it; add transformer_2, or set boundary_ratio to null"
        )
    return (
        ExpertRange("high_noise", "transformer", boundary, 1.0),
        ExpertRange("low_noise", "transformer_2", 0.0, boundary),
    )


def _names_denoiser(index: Config, component: str) -> bool:
    """Whether model_index.json names a denoiser of this component. Raises InvalidInput for another class."""
    value = index.get(component)
    if value is None or value == [None, None]:
        return False
    expected = ["diffusers", WAN_TRANSFORMER.name]
    if value != expected:
        found = value[-1] if isinstance(value, list) and value else value
        raise InvalidInput(f"model_index.json: {component} is a {found}; allowed: {WAN_TRANSFORMER.name} of diffusers")
    return True


def check_equal_inputs(configs: Sequence[Config]) -> None:
    """Refuse experts of which the pipeline would pass one what only another one takes."""
    for config in configs[1:]:
        for fact in (reads_image_tokens, reads_two_images):
            if fact(config) != fact(configs[0]):
                raise InvalidInput(
                    "transformer_2 config: image_dim, added_kv_proj_dim and pos_embed_seq_len must be set as in "
                    "transformer, because the pipeline passes both the same image tokens"
                )


def wan_call(sampling: Sampling, index: Config) -> dict[str, Any]:
    """Arguments of a Wan pipeline's call that the sampling parameters determine."""
    arguments = {
        "height": sampling.height,
        "width": sampling.width,
        "num_frames": sampling.num_frames,
        "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.guidance_scale,
        "max_sequence_length": sampling.max_sequence_length,
    }
    if index.get("boundary_ratio") is None:  # without one, the pipelines refuse a second scale
        return arguments
    return arguments | {"guidance_scale_2": sampling.guidance_scale_2}
