"""Updates the code files that each stage of dvc.yaml declares to what it imports: python ci/declare_code.py"""

import re
from pathlib import Path

from stepquant.storage.code_version import source_files

DVC_YAML = Path("dvc.yaml")
PACKAGES = {"stepquant": Path("lib/stepquant"), "stages": Path("stages")}
# A stage's command, the lines up to its dependencies on Python files, and these dependencies.
STAGE = re.compile(
    r"(?P<before>exec python -m stages\.(?P<name>\w+).*?\n)(?P<files>(?: *- (?:stages|lib/stepquant)/\S+\.py\n)+)",
    re.DOTALL,
)


def declared(match: re.Match[str]) -> str:
    """The matched part of a stage with the files that it imports."""
    indent = match["files"][: match["files"].index("-")]
    files = source_files(Path("stages") / f"{match['name']}.py", PACKAGES)
    return match["before"] + "".join(f"{indent}- {file}\n" for file in files)


if __name__ == "__main__":
    DVC_YAML.write_text(STAGE.sub(declared, DVC_YAML.read_text()))
