"""Builds the text encoder, an expert and the scheduler, all untrained, in the shapes that the settings give."""

import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from demo_model.settings import DenoiserSettings

LATENT_CHANNELS = 16
# What the pipeline gives an image-to-video expert: noisy latents, four mask channels, the image's latents.
INPUT_CHANNELS = LATENT_CHANNELS + 4 + LATENT_CHANNELS


def build_text_encoder(settings: DenoiserSettings, vocabulary: int) -> UMT5EncoderModel:
    """A UMT5 encoder; `vocabulary` is the number of tokens."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=settings.text_dim,
            d_kv=settings.text_dim // settings.text_heads,
            d_ff=settings.text_ffn_dim,
            num_layers=settings.text_layers,
            num_heads=settings.text_heads,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
            is_encoder_decoder=False,
        )
    )


def build_expert(settings: DenoiserSettings) -> WanTransformer3DModel:
    """An expert with the structure of Wan2.2-I2V-A14B's."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=settings.heads,
        attention_head_dim=settings.head_dim,
        in_channels=INPUT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=settings.text_dim,
        freq_dim=256,
        ffn_dim=settings.ffn_dim,
        num_layers=settings.layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
        image_dim=None,
        added_kv_proj_dim=None,
        rope_max_seq_len=1024,
    )


def build_scheduler(settings: DenoiserSettings) -> UniPCMultistepScheduler:
    """UniPC for flow matching, with the shift that the demo samples with."""
    return UniPCMultistepScheduler(
        num_train_timesteps=1000,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=settings.flow_shift,
        solver_order=2,
    )


def encode_text(
    encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerFast, texts: list[str], text_tokens: int
) -> torch.Tensor:
    """(N, text_tokens, text_dim): the encoder's output, zero behind each text's end, as the pipeline makes it."""
    tokens = tokenizer(texts, padding="max_length", max_length=text_tokens, truncation=True, return_tensors="pt")
    states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return states * tokens.attention_mask.unsqueeze(-1).to(states.dtype)
