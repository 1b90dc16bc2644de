"""How a benchmark of this folder hands in what it found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def hand_in(found: dict[str, Any], out: Path | None) -> None:
    """Print it as JSON, and keep it in `out` where one is given."""
    text = json.dumps(found, indent=2)
    print(text)
    if out:
        out.write_text(text + "\n", encoding="utf-8")
