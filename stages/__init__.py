"""The pipeline's stages: one file per DVC stage, each a Typer command."""

import sys

from stepquant.compute.process import die_with_parent

# `python -m stages.NAME` imports this package first. Importing torch takes seconds, in which DVC may already die.
if sys.argv[0] == "-m":
    die_with_parent()
