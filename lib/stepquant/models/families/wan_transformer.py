"""WanTransformer3DModel, the denoiser of Wan 2.1 and 2.2.

Source: diffusers 0.42.1, models/transformers/transformer_wan.py.
"""

from stepquant.errors import InvalidInput
from stepquant.models.families.description import BlockStack, Config, DenoiserClass
from stepquant.models.sites import Site
from stepquant.params import Sampling

# WanAttnProcessor splits the tokens of cross-attention into image tokens and this number of text tokens.
TEXT_TOKENS_BESIDE_IMAGE_TOKENS = 512
# The pipelines build t per token for patches of 2 x 2 latents.
PATCH_OF_EXPANDED_TIMESTEPS = (1, 2, 2)


def _sites(config: Config) -> tuple[Site, ...]:
    """to_k and to_v of attn2 read the text tokens, add_k_proj and add_v_proj the image tokens, which models with image
    cross-attention have."""
    image = Site("attn2.add_kv", ("attn2.add_k_proj", "attn2.add_v_proj"), depends_on_timestep=False)
    return (
        Site("attn1.qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
        Site("attn1.out", ("attn1.to_out.0",)),
        Site("attn2.q", ("attn2.to_q",)),
        Site("attn2.kv", ("attn2.to_k", "attn2.to_v"), depends_on_timestep=False),
        *([image] if reads_image_tokens(config) else []),
        Site("attn2.out", ("attn2.to_out.0",)),
        Site("ffn.up", ("ffn.net.0.proj",)),
        Site("ffn.down", ("ffn.net.2",)),
    )


WAN_TRANSFORMER = DenoiserClass(
    name="WanTransformer3DModel",
    stack=BlockStack("blocks", "num_layers", carried="hidden_states"),
    latents="hidden_states",
    timestep="timestep",
    sites=_sites,
    float32=("rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"),
)


def reads_image_tokens(config: Config) -> bool:
    """Whether cross-attention has keys and values of its own for image tokens (Wan2.1-I2V, FLF2V)."""
    return config.get("added_kv_proj_dim") is not None


def reads_two_images(config: Config) -> bool:
    """Whether the image tokens are those of two stacked images, which have learned positions (FLF2V)."""
    return config.get("pos_embed_seq_len") is not None


def check_image_tokens(config: Config) -> None:
    """Refuse a config in which image tokens are embedded but not attended to, or the reverse."""
    if (config.get("image_dim") is not None) != reads_image_tokens(config):
        raise InvalidInput(
            f"transformer config: image_dim {config.get('image_dim')} with added_kv_proj_dim "
            f"{config.get('added_kv_proj_dim')}; allowed: both, or neither"
        )
    if reads_two_images(config) and not reads_image_tokens(config):
        raise InvalidInput(
            f"transformer config: pos_embed_seq_len {config['pos_embed_seq_len']} without image_dim; image positions "
            "need image tokens"
        )


def check_channels(config: Config, conditions: bool, pipeline: str) -> None:
    """Refuse a denoiser whose input has other channels than the pipeline passes.

    Args:
        config: of the denoiser.
        conditions: whether the pipeline appends condition channels to the latents.
        pipeline: what an error message names.
    """
    inputs, latents = config["in_channels"], config["out_channels"]
    if inputs <= latents if conditions else inputs != latents:
        raise InvalidInput(
            f"transformer config: in_channels {inputs} with out_channels {latents}; {pipeline} passes "
            f"{'latents and condition channels' if conditions else f'{latents} channels of latents alone'}"
        )


def check_expanded_timesteps(index: Config, config: Config) -> None:
    """Refuse t per token for another patch size than the pipelines build it for."""
    patch = tuple(config["patch_size"])
    if index.get("expand_timesteps") and patch != PATCH_OF_EXPANDED_TIMESTEPS:
        raise InvalidInput(
            f"model_index.json: expand_timesteps with patch_size {list(patch)}; "
            f"allowed: {list(PATCH_OF_EXPANDED_TIMESTEPS)}, for which the pipeline builds t per token"
        )


def check_text_length(sampling: Sampling, config: Config) -> None:
    """Refuse a text length at which WanAttnProcessor would take text tokens for image tokens, or the reverse."""
    if reads_image_tokens(config) and sampling.max_sequence_length != TEXT_TOKENS_BESIDE_IMAGE_TOKENS:
        raise InvalidInput(
            f"sampling.max_sequence_length: {sampling.max_sequence_length}; this model attends to image tokens, and "
            f"diffusers then takes the last {TEXT_TOKENS_BESIDE_IMAGE_TOKENS} tokens for text; "
            f"allowed: {TEXT_TOKENS_BESIDE_IMAGE_TOKENS}"
        )
