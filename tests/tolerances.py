"""The one table of tolerances. Loosening one is a line in the changelog."""

EXACT = 1e-10  # float64, same formula by another way: relative to the largest number
FLOAT32 = 1e-4  # float32 data or weights
ARGMIN_PARAMS = 1e-5  # eqs. 1 and 2 against the numerical derivative of the argmin
ARGMIN_INPUT = 1e-6  # eq. 5 against the same, x moved
SOLVERS_AGREE = 1e-7  # two solvers on one well conditioned system, CG(rtol=1e-10)
STANDARD_ERRORS = 6  # stochastic results against exact ones
SLOPE = (0.9, 1.1)  # against retraining, convex cases
PEARSON = 0.99
