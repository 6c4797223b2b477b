"""The pipeline's stages: one file per DVC stage, each a Typer command."""

import sys

from stepquant.compute.process import die_with_parent

# `python -m stages.NAME` imports this package first, and torch, which takes seconds, only after it: DVC may die meanwhile.
if sys.argv[0] == "-m":
    die_with_parent()
