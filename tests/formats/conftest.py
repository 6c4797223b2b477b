"""The independent implementations lie in a folder of their own: diffusers would import torchao wherever it finds it."""

import sys
from pathlib import Path

sys.path.append(str(Path(sys.prefix) / "peers"))
