"""The explorer: pages on this machine over a run folder. It reads the folder only; no model, no torch."""
