"""The pipeline's stages: one file per DVC stage, each a Typer command."""
