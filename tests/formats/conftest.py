"""The independent implementations are installed in their own folder: diffusers would import torchao if it found it."""

import sys
from pathlib import Path

sys.path.append(str(Path(sys.prefix) / "peers"))
