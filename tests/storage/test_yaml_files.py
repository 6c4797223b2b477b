"""params.yaml is read as DVC reads it: the expected values come from DVC's own reader."""

import pytest
from dvc.utils.serialize import load_yaml

from stepquant.errors import DamagedFile, InvalidInput, MissingFile
from stepquant.storage.yaml_files import read_yaml

# Numbers and words on which YAML 1.1 (PyYAML) and YAML 1.2 disagree, and some on which they agree.
SCALARS = ["1e-2", "1E5", "1e3", "010", "0o10", "0x1F", "1_000", "1:30", "12:30:45", "on", "off", "yes", "no", "true"]
SCALARS += ["~", "null", ".5", "1.", "+1", ".inf", "0.5e-3", "'1'", "[1e-3, 2]", "{a: on}"]


@pytest.mark.parametrize("text", SCALARS)
def test_values_are_those_that_dvc_reads(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(f"section:\n  key: {text}\n")
    ours, theirs = read_yaml(path)["section"]["key"], load_yaml(str(path))["section"]["key"]
    assert (ours, type(ours)) == (theirs, type(theirs))


@pytest.mark.parametrize(("text", "value"), [("1e-2", 0.01), ("010", 10), ("on", "on"), ("yes", "yes")])
def test_the_values_by_hand(tmp_path, text, value):
    path = tmp_path / "params.yaml"
    path.write_text(f"key: {text}\n")
    assert read_yaml(path) == {"key": value} and type(read_yaml(path)["key"]) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("gptq: {a: 1}\nclip: {a: 1}\ngptq: {a: 2}\n", 3, "gptq"),
        ("gptq:\n  refits: 1\n  noise: 0\n  refits: 1\n", 4, "refits"),
        ("experts:\n  low: {clip: {}, clip: {}}\n", 2, "clip"),
    ],
)
def test_a_key_that_is_there_twice(tmp_path, text, line, key):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(InvalidInput) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path}: line {line}: '{key}' is there twice; keep one of the two")


@pytest.mark.parametrize("content", [b"a: [1", b"a: \xff", b"a: 2001-13-45", b"a: 1\n---\nb: 2\n", b"a: !tag 1"])
def test_what_is_not_yaml(tmp_path, content):
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match="params.yaml: not YAML: "):
        read_yaml(path)


def test_no_file(tmp_path):
    with pytest.raises(MissingFile):
        read_yaml(tmp_path / "absent.yaml")
