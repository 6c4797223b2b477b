"""Imports independent implementations from their own folder, and leaves the path as it was.

Otherwise diffusers, imported later, would pick up torchao.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

FOLDER = str(Path(sys.prefix) / "peers")


def import_peer(name: str) -> Any:
    """A module of a package in `.venv/peers`."""
    sys.path.append(FOLDER)
    try:
        return import_module(name)
    finally:
        sys.path.remove(FOLDER)
