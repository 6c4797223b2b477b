import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from stepquant.errors import InvalidInput, UserError
from stepquant.models.families.description import PromptImages
from stepquant.models.prompts import check_images, evaluation_prompts, read_manifest, take
from stepquant.params import Generate

ROW = {
    "id": "a_1",
    "split": "calibration",
    "prompt": "a dog runs",
    "negative_prompt": "",
    "image": "images/a.png",
    "seed": 7,
}


@pytest.fixture
def manifest(tmp_path):
    """A function that writes rows (dicts, or lines as they are) and gives the manifest's path."""
    folder = tmp_path / "prompts"
    (folder / "images").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "images/a.png")
    Image.fromarray(pixels).save(tmp_path / "outside.png")

    def write(*rows):
        path = folder / "manifest.jsonl"
        path.write_text(
            "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows),
            encoding="utf-8",
        )
        return path

    return write


def refusal(path):
    with pytest.raises(UserError) as caught:
        read_manifest(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message.removeprefix(str(path))


def test_rows_are_read_in_order(manifest):
    path = manifest(
        ROW | {"license": "CC0", "extra": {"x": 1}},
        "",
        ROW | {"id": "b", "split": "heldout", "prompt": "línea\u2028two", "seed": 0},
    )
    first, second = read_manifest(path)
    assert (first.id, first.split, first.prompt, first.negative_prompt, first.seed) == (
        "a_1",
        "calibration",
        "a dog runs",
        "",
        7,
    )
    assert first.images == {"image": path.parent.resolve() / "images/a.png"}
    assert (second.id, second.split, second.prompt, second.seed) == ("b", "heldout", "línea\u2028two", 0)


def test_an_image_is_loaded_as_rgb(manifest):
    path = manifest(ROW | {"image": "images/grey.png"})
    Image.new("LA", (4, 6), (90, 255)).save(path.parent / "images/grey.png")
    image = read_manifest(path)[0].load_image()
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (4, 6), (90, 90, 90))


def test_a_digest_covers_everything_that_determines_the_sample(manifest):
    def digest(**changes):
        return read_manifest(manifest(ROW | changes))[0].digest()

    path = manifest(ROW)
    image = hashlib.sha256((path.parent / "images/a.png").read_bytes()).hexdigest()
    row = ["a_1", "calibration", "a dog runs", "", 7, {"image": image}]
    assert digest() == hashlib.sha256(json.dumps(row).encode()).hexdigest()
    assert len({digest(), digest(image=None), digest(last_image="images/a.png")}) == 3
    assert digest(license="other") == digest()
    others = [digest(prompt="x"), digest(negative_prompt="x"), digest(seed=8), digest(split="heldout"), digest(id="b")]
    before = digest()
    Image.new("RGB", (8, 12)).save(path.parent / "images/a.png")
    assert len({before, digest(), *others}) == 7


def test_images_are_those_that_the_row_has(manifest):
    path = manifest(ROW | {"id": "none", "image": None}, ROW | {"id": "two", "last_image": "images/a.png"})
    none, two = read_manifest(path)
    assert none.images == {} and none.load_images() == {}
    assert list(two.images) == list(two.load_images()) == ["image", "last_image"]


@pytest.mark.parametrize(
    ("images", "row", "what"),
    [
        (PromptImages(("image",)), {"image": None}, "has no 'image', which this model needs"),
        (PromptImages(("image", "last_image")), {}, "has no 'last_image', which this model needs"),
        (PromptImages(("image",)), {"last_image": "images/a.png"}, "has 'last_image', which this model would ignore"),
        (PromptImages(), {}, "has 'image', which this model would ignore; allowed: no images (text-to-video)"),
    ],
)
def test_images_that_do_not_fit_the_model(manifest, images, row, what):
    prompts = read_manifest(manifest(ROW | row))
    with pytest.raises(InvalidInput) as caught:
        check_images(prompts, images, "prompts.jsonl")
    assert str(caught.value).startswith(f"prompts.jsonl: prompt 'a_1' {what}")


def test_an_optional_image_may_be_there_or_not(manifest):
    prompts = read_manifest(manifest(ROW, ROW | {"id": "b", "last_image": "images/a.png"}))
    check_images(prompts, PromptImages(("image",), ("last_image",)), "prompts.jsonl")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_manifest(manifest, content):
    assert refusal(manifest(content)) == ": the manifest is empty; expected at least one prompt"


def test_a_missing_manifest(tmp_path):
    for path in (tmp_path / "absent.jsonl", tmp_path):
        message = refusal(path)
        assert message.startswith(
            ": no such manifest; put prompts of your own there, one JSON object per line with id, "
        )
        assert "none (text to video), image, or image and last_image" in message


def test_a_manifest_that_is_not_text(manifest):
    path = manifest(ROW)
    path.write_bytes(b"\xff\xfe")
    assert refusal(path) == ": not UTF-8 text (invalid start byte at byte 0); expected a JSONL file of prompts"


def test_a_duplicate_id_names_the_second_line(manifest):
    assert refusal(manifest(ROW, ROW | {"id": "b"}, ROW)) == ":3: id 'a_1' is used twice; ids must be unique"


@pytest.mark.parametrize(
    ("line", "what"), [("{'id': 1}", "not JSON: "), ("[1]", "found list; expected one JSON object per line")]
)
def test_a_line_that_is_not_a_row(manifest, line, what):
    assert refusal(manifest(ROW, line)).startswith(f":2: {what}")


@pytest.mark.parametrize("key", [name for name in ROW if name != "image"])
def test_a_missing_value_is_named(manifest, key):
    row = {name: value for name, value in ROW.items() if name != key}
    kind = "a whole number" if key == "seed" else "text"
    assert refusal(manifest(row)) == f":1: '{key}' is None; expected {kind}"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"prompt": 3}, "'prompt' is 3; expected text"),
        ({"seed": "7"}, "'seed' is '7'; expected a whole number"),
        ({"seed": True}, "'seed' is True; expected a whole number"),
        ({"seed": 7.5}, "'seed' is 7.5; expected a whole number"),
        ({"seed": -1}, "seed -1; allowed: 0 to 2^63 - 1"),
        ({"seed": 2**63}, f"seed {2**63}; allowed: 0 to 2^63 - 1"),
        ({"id": "a/b"}, "id 'a/b'; allowed: letters, digits and underscores"),
        ({"id": ""}, "id ''; allowed: letters, digits and underscores"),
        ({"id": "a\n"}, r"id 'a\n'; allowed: letters, digits and underscores"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_value_is_named(manifest, changes, what):
    assert refusal(manifest(ROW | changes)) == f":1: {what}"


@pytest.mark.parametrize("image", ["../outside.png", "images/../../outside.png", "{absolute}"])
def test_an_image_path_that_leaves_the_manifest_s_folder(manifest, tmp_path, image):
    image = image.format(absolute=tmp_path / "outside.png")
    path = manifest(ROW, ROW | {"id": "b", "image": image})
    assert refusal(path) == f":2: image '{image}' leaves the manifest's folder; allowed: paths inside {path.parent}"


def test_a_link_that_leaves_the_manifest_s_folder(manifest, tmp_path):
    path = manifest(ROW | {"image": "images/link.png"})
    (path.parent / "images/link.png").symlink_to(tmp_path / "outside.png")
    assert "leaves the manifest's folder" in refusal(path)


def test_a_missing_image(manifest):
    path = manifest(ROW | {"image": "images/none.png"})
    assert refusal(path) == f":1: image 'images/none.png' does not exist in {path.parent}"


def test_a_file_that_is_not_an_image(manifest):
    path = manifest(ROW)
    (path.parent / "images/a.png").write_text("no picture")
    assert refusal(path).startswith(":1: image 'images/a.png': no readable picture: ")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_image(manifest, suffix):
    path = manifest(ROW | {"image": f"images/cut.{suffix}"})
    file = path.parent / f"images/cut.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:-500])
    assert refusal(path).startswith(f":1: image 'images/cut.{suffix}': no readable picture: ")


def test_a_folder_is_not_an_image(manifest):
    assert refusal(manifest(ROW | {"image": "images"})).startswith(":1: image 'images': no readable picture: ")


def test_take_gives_the_first_of_a_split(manifest):
    rows = [ROW | {"id": f"p{i}", "split": "heldout" if i % 2 else "calibration"} for i in range(5)]
    prompts = read_manifest(manifest(*rows))
    assert [p.id for p in take(prompts, "calibration", None, "m")] == ["p0", "p2", "p4"]
    assert [p.id for p in take(prompts, "calibration", 2, "m")] == ["p0", "p2"]
    with pytest.raises(UserError, match="m: has 2 prompts with split 'heldout'; at least 3 are asked for"):
        take(prompts, "heldout", 3, "m")
    with pytest.raises(UserError, match="m: has 0 prompts with split 'evaluation'; at least 1 are asked for"):
        take(prompts, "evaluation", None, "m")


def test_evaluation_prompts_are_those_of_the_evaluation_split(manifest):
    path = manifest(ROW, ROW | {"id": "e", "split": "evaluation"}, ROW | {"id": "f", "split": "evaluation"})
    assert [p.id for p in evaluation_prompts(Generate(manifest=str(path), prompts=1, fps=8))] == ["e"]


def test_a_manifest_with_a_byte_order_mark(manifest):
    path = manifest(ROW)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [p.id for p in read_manifest(path)] == ["a_1"]


def test_a_key_that_is_there_twice(manifest):
    path = manifest('{"id": "a", "seed": 1, "seed": 2}')
    assert refusal(path) == ":1: 'seed' is there twice; keep one of the two"
