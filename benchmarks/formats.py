"""The ablation in every format: runs the pipeline once per 4-bit format in a copy of this checkout, and prints the tables.

    python benchmarks/formats.py [--profile paper] [--set generate.prompts=24] [--json formats.json]

Sampling and capture run once, since they know no format. Weights and activations get the same format.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ci.reproduce import ROOT, copy_sources, pipeline_environment, run_dvc
from stepquant.evaluate.records import read_records
from stepquant.report.tables import brief_table, rich_table

FORMATS = ("int4", "mxfp4", "nvfp4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--profile", help="a recipe to lay over params.yaml, such as paper")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other params, such as generate.prompts=24")
    parser.add_argument("--json", type=Path, help="where to keep all metrics")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stepquant-formats-") as folder:
        copy = Path(folder) / "checkout"
        copy_sources(ROOT, copy)
        environment = pipeline_environment(copy) | {"DVC_SITE_CACHE_DIR": f"{folder}/site"}
        if arguments.profile:
            command = [sys.executable, "-m", "stepquant.cli", "profile", arguments.profile, "--force"]
            subprocess.run(command, cwd=copy, env=environment, check=True)
        for setting in arguments.set:
            set_param(copy, *setting.split("=", 1))
        results = {}
        for name in arguments.formats:
            set_param(copy, "format.weight", name)
            set_param(copy, "format.activation", name)
            if run_dvc(copy, environment, "repro", "--quiet").returncode:
                sys.exit(f"dvc repro failed for {name}")
            records = read_records(copy / "artifacts" / "metrics")
            results[name] = [record.model_dump(mode="json") for record in records]
            Console().print(rich_table(brief_table(records)))
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1))


def set_param(copy: Path, key: str, value: str) -> None:
    """Set section.key in the copy's params.yaml."""
    file = copy / "params.yaml"
    params = yaml.safe_load(file.read_text())
    section, name = key.split(".")
    params[section][name] = yaml.safe_load(value)
    file.write_text(yaml.safe_dump(params, sort_keys=False))


if __name__ == "__main__":
    main()
