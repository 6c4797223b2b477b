"""The demo model's own tokenizer: a small byte-pair model learnt from captions.

Like T5's: `<pad>` 0, `</s>` 1, `<unk>` 2, words begin with the mark U+2581, every text ends with `</s>`. All printable
ASCII characters are in the vocabulary, so a noun that training never saw is spelt in pieces, not lost.
"""

import string
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import typer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from demo_model.clips import draw_spec
from demo_model.settings import ClipSettings, TokenizerSettings, load_section
from demo_model.sprites import Assets, load_assets

SPECIAL_TOKENS = ["<pad>", "</s>", "<unk>"]
WORD_MARK = "\u2581"


def draw_captions(assets: Assets, clips: ClipSettings, count: int, seed: int) -> list[str]:
    """Captions of random training clips."""
    random = np.random.default_rng(seed)
    return [draw_spec(random, assets, "training", clips).caption for _ in range(count)]


def train_tokenizer(captions: Iterable[str], vocabulary: int, text_tokens: int) -> PreTrainedTokenizerFast:
    """Learns a lower-casing byte-pair tokenizer with at most `vocabulary` entries and `text_tokens` tokens per text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        # Punctuation apart, so that "left," and "left" share the token that says where to go.
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.decoder = decoders.Metaspace()
    alphabet = sorted(set(string.ascii_lowercase + string.digits + string.punctuation + WORD_MARK))
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", SPECIAL_TOKENS.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=text_tokens,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )


def main(params: Path, assets: Path, out: Path) -> None:
    """Learns the tokenizer from training captions (sections `tokenizer` and `clips`)."""
    settings = load_section(params, "tokenizer", TokenizerSettings)
    clips = load_section(params, "clips", ClipSettings)
    captions = draw_captions(load_assets(assets), clips, settings.captions, settings.seed)
    tokenizer = train_tokenizer(captions, settings.vocabulary, settings.text_tokens)
    tokenizer.save_pretrained(out)
    typer.echo(f"{len(tokenizer)} tokens in {out}; {captions[0]!r} is {tokenizer.tokenize(captions[0])}")


if __name__ == "__main__":
    typer.run(main)
