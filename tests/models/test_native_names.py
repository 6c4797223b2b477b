"""Wan-Video's names of a denoiser's tensors against diffusers' own converter."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from stepquant.models.native_names import diffusers_key, module_spellings, native_key
from tests.native_wan import FAMILIES, native_name, tiny_denoiser

# diffusers 0.42.1 converts neither the one nor the other to a name of its own.
NOT_CONVERTED = {"img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_has_the_name_that_diffusers_gives_it(family):
    keys = list(tiny_denoiser(family).state_dict())
    natives = [native_name(key) for key in keys]
    assert len(set(natives)) == len(keys)
    for native, key in zip(natives, keys):
        converted = NOT_CONVERTED.get(native) or next(
            iter(convert_wan_transformer_to_diffusers({native: torch.ones(1)}))
        )
        assert diffusers_key(native) == converted == key
        assert native_key(key) == native


@pytest.mark.parametrize(
    "key",
    [
        "blocks.0.self_attn.z.weight",
        "blocks.x.self_attn.q.weight",
        "blocks.0",
        "head.weight",
        "blocks.0.self_attn.q.scale_weight",
    ],
)
def test_a_name_that_wan_does_not_have(key):
    assert diffusers_key(key) is None


@pytest.mark.parametrize(
    "key", ["blocks.0.attn3.to_q.weight", "blocks.x.attn1.to_q.bias", "blocks.0", "head.head.bias"]
)
def test_a_name_that_diffusers_does_not_have(key):
    assert native_key(key) is None


def test_spellings_of_a_module():
    model = tiny_denoiser("i2v-2.2")
    assert isinstance(model, WanTransformer3DModel)
    spellings = module_spellings(model.state_dict())
    names = ("blocks.1.attn2.to_out.0", "blocks.1.cross_attn.o", "blocks_1_attn2_to_out_0", "blocks_1_cross_attn_o")
    assert {spellings[name] for name in names} == {"blocks.1.attn2.to_out.0"}
    # norm3 of Wan-Video is norm2 of diffusers, and the only norm of a block with weights
    assert spellings["blocks.0.norm3"] == "blocks.0.norm2" and "blocks.2.attn1.to_q" not in spellings
    assert "img_emb.proj.1" not in spellings and "blocks.0.cross_attn.k_img" not in spellings
