"""Names of a Wan denoiser's modules in Wan-Video's own checkpoints, and what diffusers calls them.

Finetunes and LoRAs are mostly published with Wan-Video's names. Source: github.com/Wan-Video/Wan2.2,
wan/modules/model.py, and diffusers 0.42.1, loaders/single_file_utils.py, convert_wan_transformer_to_diffusers. The
table is here, not taken from diffusers, because importing its converter takes seconds in every process that reads a
weight, and because it replaces parts of names anywhere in a key; the tests compare the two.
"""

from collections.abc import Iterable

_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_IMAGE_ATTENTION = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}

# Inside a block. Wan-Video's norm3 is the only norm with weights; diffusers numbers the norms in order of use.
_BLOCK = (
    {f"self_attn.{native}": f"attn1.{name}" for native, name in _ATTENTION.items()}
    | {f"cross_attn.{native}": f"attn2.{name}" for native, name in (_ATTENTION | _IMAGE_ATTENTION).items()}
    | {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "norm3": "norm2", "modulation": "scale_shift_table"}
)
_OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
}


def diffusers_key(key: str) -> str | None:
    """The diffusers name of a tensor with a native name, such as blocks.0.self_attn.q.weight; None if there is none."""
    module, _, leaf = key.rpartition(".")
    if leaf in ("weight", "bias"):
        name = _diffusers_module(module)
        return None if name is None else f"{name}.{leaf}"
    return _diffusers_module(key)


def _diffusers_module(path: str) -> str | None:
    """The diffusers name of a module, or of a parameter that is no module's weight or bias; None if there is none."""
    if not path.startswith("blocks."):
        return _OUTSIDE.get(path)
    _, index, inner = (path.split(".", 2) + [""])[:3]
    return f"blocks.{index}.{_BLOCK[inner]}" if index.isdecimal() and inner in _BLOCK else None


def native_key(key: str) -> str | None:
    """The native name of a tensor with a diffusers name, the inverse of `diffusers_key`; None if there is none."""
    module, _, leaf = key.rpartition(".")
    if leaf in ("weight", "bias"):
        name = native_module(module)
        return None if name is None else f"{name}.{leaf}"
    return native_module(key)


def native_module(path: str) -> str | None:
    """The native name of a diffusers module, or of a parameter that is no module's weight or bias; None for others."""
    if not path.startswith("blocks."):
        return _inverse(_OUTSIDE).get(path)
    _, index, inner = (path.split(".", 2) + [""])[:3]
    natives = _inverse(_BLOCK)
    return f"blocks.{index}.{natives[inner]}" if index.isdecimal() and inner in natives else None


def _inverse(table: dict[str, str]) -> dict[str, str]:
    # diffusers' attn1 and attn2 have the same names inside, the native modules as well, so no name is there twice.
    return {name: native for native, name in table.items()}


def module_spellings(keys: Iterable[str]) -> dict[str, str]:
    """All spellings of a denoiser's modules that LoRA files use.

    Args:
        keys: names of the denoiser's tensors, as in diffusers.

    Returns:
        Spelling -> name of the module in diffusers (or of the parameter, such as blocks.0.scale_shift_table). Spellings
        are the diffusers name, the native name, and both with underscores for dots (kohya).
    """
    modules = {key.removesuffix(".weight").removesuffix(".bias") for key in keys}
    natives: dict[str, str] = {}
    for block in sorted({name.split(".")[1] for name in modules if name.startswith("blocks.")}):
        natives |= {f"blocks.{block}.{native}": f"blocks.{block}.{name}" for native, name in _BLOCK.items()}
    spellings = {name: name for name in modules}
    spellings |= {native: name for native, name in (natives | _OUTSIDE).items() if name in modules}
    return {spelling.replace(".", "_"): name for spelling, name in spellings.items()} | spellings
