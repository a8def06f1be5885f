"""Numbers that JSON has not. Imports nothing that takes time: commands that fail early need it, too."""

from __future__ import annotations

import math
from typing import Any


def without_infinity(value: Any) -> Any:
    """`value` with null for infinities and NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_infinity(each) for key, each in value.items()}
    return [without_infinity(each) for each in value] if isinstance(value, list | tuple) else value
