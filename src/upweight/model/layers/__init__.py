"""Per-example gradients by the layers they pass: which parameters act where, found by watching one forward pass.

`watching` sees every use of a parameter, `pieces` holds a gradient as factors and their algebra, `per_example` joins
the two: gradients, their products and their squares, without writing out what factors can say.
"""

from upweight.model.layers.per_example import (
    Plan,
    capture,
    captured,
    dots,
    dots_and_sum,
    gradients,
    in_order,
    plan,
    rules,
    squares,
    structured,
    vectors,
    written_out,
)

__all__ = [
    "Plan",
    "capture",
    "captured",
    "dots",
    "dots_and_sum",
    "gradients",
    "in_order",
    "plan",
    "rules",
    "squares",
    "structured",
    "vectors",
    "written_out",
]
