"""The paper's four uses as commands, and the question of contrast."""

from __future__ import annotations
