"""The MNIST problems that the figures share: the ten-class model of figure 2, and ones against sevens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

import upweight as uw

HELD_OUT = 5_000  # the paper's split: the first 5,000 of the 60,000 training images are a validation set
L2 = 0.01
QUERY = 8  # the test image of figure 2, a misclassified 5


@dataclass(frozen=True)
class Split:
    """Pixels 0 … 1 in float64, and labels."""

    X: NDArray[np.float64]
    y: NDArray[np.int64]
    test_X: NDArray[np.float64]
    test_y: NDArray[np.int64]


def ten_classes() -> Split:
    """The 55,000 training and 10,000 test digits."""
    data = uw.datasets.mnist()
    return Split(
        data.images[HELD_OUT:] / 255, data.labels[HELD_OUT:].astype(int), data.test_images / 255,
        data.test_labels.astype(int),
    )  # fmt: skip


def ones_and_sevens() -> Split:
    """Ones (label 0) and sevens (label 1) of the same split: 11,894 training and 2,163 test images."""
    data = uw.datasets.mnist()

    def pick(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        rows = np.isin(labels, (1, 7))
        return images[rows] / 255, (labels[rows] == 7).astype(int)

    return Split(*pick(data.images[HELD_OUT:], data.labels[HELD_OUT:]), *pick(data.test_images, data.test_labels))


def logistic(X: NDArray[np.float64], y: NDArray[np.int64]) -> LogisticRegression:
    """Mean cross-entropy + (0.01/2)‖θ‖², no intercept, far beyond the paper's tolerance."""
    return LogisticRegression(C=1 / (len(X) * L2), fit_intercept=False, tol=1e-10, max_iter=5000).fit(X, y)
