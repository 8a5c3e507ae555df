"""The C++ kernels' sources, and a digest by which a library built from others is refused; setup.py runs this too."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Final

SOURCES: Final = Path(__file__).parents[1] / "kernels"


def digest(folder: Path) -> str | None:
    """A digest of the code in `folder`, without comments and layout; None where there is none."""
    files = sorted(path for path in folder.glob("*") if path.suffix in (".cpp", ".cu", ".h"))
    total = hashlib.sha256()
    for path in files:
        code = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
        total.update(f"{path.name} {' '.join(code.split())}\n".encode())
    return total.hexdigest()[:16] if files else None
