import pytest

from stepquant.errors import UserError
from stepquant.models.captions import read_captions


def test_each_caption_once_in_file_order(tmp_path):
    file = tmp_path / "captions.txt"
    file.write_bytes("\ufeffa dog\r\n\n  a cat \na dog\nein Käfer\u2028fliegt".encode())
    assert read_captions(file) == ["a dog", "a cat", "ein Käfer\u2028fliegt"]


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "no such file"),
        (b" \n\n", "the file is empty"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"prompt": "a dog"}\n', "looks like JSON"),
    ],
)
def test_a_file_without_captions_is_refused(tmp_path, content, reason):
    file = tmp_path / "captions.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"trajectories.text_prompts: .*captions.txt: .*{reason}"):
        read_captions(file)
