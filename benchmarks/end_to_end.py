"""Recipes and formats against each other, end to end: runs the pipeline once for each in a copy of this checkout.

    python benchmarks/end_to_end.py                                                                  the ablation in every format
    python benchmarks/end_to_end.py --recipes default paper --variants full --prompts 24             against the paper's recipe

Sampling and capture run once, since they know neither. Weights and activations get the same format. Of several recipes each
is compared with the first, video by video: the difference of PSNR in dB with its bootstrap interval.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ci.reproduce import ROOT, copy_sources, pipeline_environment, run_dvc
from stepquant.evaluate.records import Record, read_records
from stepquant.evaluate.summary import Bootstrap, paired_difference
from stepquant.report.tables import brief_table, rich_table

FORMATS = ("int4", "mxfp4", "nvfp4")
VARIANTS = ("w4a16", "rtn", "svdquant", "svdquant_gptq", "one_clip", "full")


@dataclass(frozen=True)
class Checkout:
    """A copy of this checkout in which the pipeline runs."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        return pipeline_environment(self.root) | {"DVC_SITE_CACHE_DIR": str(self.root.parent / "site")}

    def set_up(self, recipe: str, fmt: str, prompts: int) -> None:
        """The params of this checkout (`default`) or a profile laid over them, in one format."""
        shutil.copyfile(ROOT / "params.yaml", self.root / "params.yaml")
        if recipe != "default":
            command = [sys.executable, "-m", "stepquant.cli", "profile", recipe, "--force"]
            subprocess.run(command, cwd=self.root, env=self.environment, check=True)
        file = self.root / "params.yaml"
        params = yaml.safe_load(file.read_text())
        params["format"] |= {"weight": fmt, "activation": fmt}
        params["generate"]["prompts"] = prompts
        file.write_text(yaml.safe_dump(params, sort_keys=False))

    def measure(self, variants: list[str]) -> list[Record]:
        """Run the pipeline as far as the metrics of some variants and of BF16."""
        shutil.rmtree(self.root / "artifacts" / "metrics", ignore_errors=True)
        if run_dvc(self.root, self.environment, "repro", "--quiet", *(f"evaluate@{v}" for v in ("bf16", *variants))).returncode:
            sys.exit("dvc repro failed")
        return read_records(self.root / "artifacts" / "metrics")


def differences(records: list[Record], first: list[Record]) -> dict[str, dict[str, float]]:
    """PSNR of each variant minus that of the same variant by the first recipe, over the same videos."""
    psnr = [{r.variant: {name: v.psnr for name, v in r.videos.per_video.items()} for r in rs if r.format} for rs in (records, first)]
    return {variant: paired_difference(values, psnr[1][variant], Bootstrap(2000, 0.95, 0)) for variant, values in psnr[0].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipes", nargs="+", default=["default"], help="default, or a profile to lay over params.yaml, such as paper")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--json", type=Path, help="where to keep all metrics")
    arguments = parser.parse_args()
    results: dict[str, list[Record]] = {}
    with tempfile.TemporaryDirectory(prefix="stepquant-end-to-end-") as folder:
        checkout = Checkout(Path(folder) / "checkout")
        copy_sources(ROOT, checkout.root)
        for fmt in arguments.formats:
            for recipe in arguments.recipes:
                checkout.set_up(recipe, fmt, arguments.prompts)
                records = results[f"{recipe} {fmt}"] = checkout.measure(arguments.variants)
                print(f"\n{recipe}, {fmt}, {arguments.prompts} prompts")
                Console().print(rich_table(brief_table(records)))
                if recipe != arguments.recipes[0]:
                    for variant, d in differences(records, results[f"{arguments.recipes[0]} {fmt}"]).items():
                        print(f"{variant}: {recipe} - {arguments.recipes[0]}: {d['mean']:+.2f} dB [{d['low']:+.2f}, {d['high']:+.2f}]")
                if arguments.json:
                    plain = {name: [r.model_dump(mode="json") for r in rs] for name, rs in results.items()}
                    arguments.json.write_text(json.dumps(plain, indent=1) + "\n")


if __name__ == "__main__":
    main()
