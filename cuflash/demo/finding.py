"""What one check of `cuflash doctor` found."""

from __future__ import annotations

from typing import NamedTuple


class Finding(NamedTuple):
    """One line of the doctor; an unhealthy one makes `cuflash doctor` fail."""

    text: str
    healthy: bool = True
