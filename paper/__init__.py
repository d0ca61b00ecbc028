"""The figures of Koh & Liang (2017), computed again: one file per figure, run as `python -m paper.NAME`."""
