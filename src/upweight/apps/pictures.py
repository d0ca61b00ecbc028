"""Pictures of what the apps find: each function draws on an Axes and returns it, and computes nothing."""

from __future__ import annotations
