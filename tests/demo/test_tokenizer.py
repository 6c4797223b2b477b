"""The tokenizer keeps captions whole and loads from a folder, offline."""

import pytest
from demo_model.settings import ClipSettings
from demo_model.sprites import Assets
from demo_model.tokenizer import draw_captions, train_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def tokenizer(assets: Assets, clip_settings: ClipSettings) -> PreTrainedTokenizerFast:
    captions = draw_captions(assets, clip_settings, count=300, seed=0)
    return train_tokenizer(captions, vocabulary=256, text_tokens=32)


@pytest.mark.parametrize("text", ["a ball moving left, camera zooms in", "an unseen zebra moving up, camera static"])
def test_text_survives_encoding(tokenizer: PreTrainedTokenizerFast, text: str):
    ids = tokenizer(text).input_ids
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_directions_are_tokens_of_their_own(tokenizer: PreTrainedTokenizerFast):
    tokens = tokenizer.tokenize("a ball moving left, camera pans right")
    assert "\u2581left" in tokens
    assert "\u2581right" in tokens


def test_padding_is_what_the_pipeline_asks_for(tokenizer: PreTrainedTokenizerFast):
    batch = tokenizer(["", "a ball moving up, camera static"], padding="max_length", max_length=32, truncation=True)
    assert [len(ids) for ids in batch.input_ids] == [32, 32]
    assert batch.input_ids[0] == [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * 31
    assert sum(batch.attention_mask[0]) == 1


def test_saved_tokenizer_loads_as_auto_tokenizer(tokenizer: PreTrainedTokenizerFast, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    text = "an orb moving down, camera tilts up"
    assert loaded(text).input_ids == tokenizer(text).input_ids
