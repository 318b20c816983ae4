"""The stand-in Hub and the small runs that other tests have."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("data", "export", "training"):
    sys.path.append(str(Path(__file__).parents[1] / "unit" / folder))
