"""A copy of this checkout in which the pipeline runs with other params, so that nothing here changes."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ci.reproduce import ROOT, copy_sources, pipeline_environment, run_dvc


@dataclass(frozen=True)
class Checkout:
    """root: the copy's folder."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        return pipeline_environment(self.root) | {"DVC_SITE_CACHE_DIR": str(self.root.parent / "site")}

    def start_from(self, recipe: str) -> None:
        """The params of this checkout (`default`), or a profile or KEY=VALUE,... laid over them."""
        shutil.copyfile(ROOT / "params.yaml", self.root / "params.yaml")
        if "=" in recipe:
            for change in recipe.split(","):
                key, value = change.split("=")
                self.set(key, yaml.safe_load(value))
        elif recipe != "default":
            command = [sys.executable, "-m", "stepquant.cli", "profile", recipe, "--force"]
            subprocess.run(command, cwd=self.root, env=self.environment, check=True)

    def set(self, key: str, value: Any) -> None:
        """Set section.key in the copy's params."""
        file = self.root / "params.yaml"
        params = yaml.safe_load(file.read_text())
        section, name = key.split(".")
        params[section][name] = value
        file.write_text(yaml.safe_dump(params, sort_keys=False))

    def repro(self, *targets: str) -> None:
        """`dvc repro` of some stages and of what they need; ends this program if it fails."""
        if run_dvc(self.root, self.environment, "repro", "--quiet", *targets).returncode:
            sys.exit("dvc repro failed")


@contextmanager
def temporary_checkout() -> Iterator[Checkout]:
    """A copy that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="stepquant-benchmark-") as folder:
        checkout = Checkout(Path(folder) / "checkout")
        copy_sources(ROOT, checkout.root)
        yield checkout
