"""Writes captions for the demo, one per line, to try `trajectories.text_prompts` with:

    python benchmarks/captions.py 128 data/calibration/captions.txt
    python benchmarks/calibration.py trajectories.text_prompts null data/calibration/captions.txt \
        --with trajectories.calibration_prompts=1

They are drawn from the words of the demo model's training captions. What a validation, held-out or evaluation prompt
shows is left out, so that those prompts stay new to the calibration.
"""

import csv
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data" / "training"))

from demo_model.clips import CAMERAS, DIRECTIONS

from stepquant.models.prompts import read_manifest

ROOT = Path(__file__).resolve().parent.parent


def sprites() -> list[str]:
    """What a caption can be about, without what held-out prompts are about."""
    prompts = [
        row for name in ("calibration", "evaluation") for row in read_manifest(ROOT / f"data/{name}/manifest.jsonl")
    ]
    known = [row.prompt for row in prompts if row.split != "calibration"]
    with (ROOT / "data/training/sprites.tsv").open(encoding="utf-8", newline="") as file:
        names = [row["name"] for row in csv.DictReader(file, delimiter="\t")]
    return [name for name in names if not any(f" {name} moving" in prompt for prompt in known)]


def main() -> None:
    count, out = int(sys.argv[1]), Path(sys.argv[2])
    draw, names = random.Random(0), sprites()
    captions: dict[str, None] = {}
    while len(captions) < count:
        name, direction, camera = (draw.choice(list(words)) for words in (names, DIRECTIONS, CAMERAS))
        article = "an" if name[0] in "aeio" else "a"
        captions[f"{article} {name} moving {direction}, {camera}"] = None
    out.write_text("".join(f"{caption}\n" for caption in captions), encoding="utf-8")
    print(f"{count} captions about {len(names)} things in {out}")


if __name__ == "__main__":
    main()
