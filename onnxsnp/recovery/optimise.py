"""Adam with a one-cycle schedule, in place on the arrays that a session is fed."""

from __future__ import annotations

from collections.abc import Mapping
from math import cos, pi

import numpy as np

_BLOCK = 1 << 15  # entries that are updated together, so that they stay in the cache


def one_cycle(step: int, steps: int, peak: float, warm: float = 0.3, start: float = 25.0, end: float = 1e4) -> float:
    """Learning rate of a step: up to the peak and down again along half cosines (arXiv 1708.07120).

    Args:
        step: from 0 to `steps` − 1.
        warm: share of the steps in which it rises.
        start: the first rate is `peak` / `start`.
        end: the last rate is `peak` / (`start` · `end`).
    """
    rising = max(warm * steps - 1, 1e-9)
    first, last = peak / start, peak / (start * end)
    if step <= rising:
        return _bend(first, peak, step / rising)
    return _bend(peak, last, (step - rising) / max(steps - 1 - rising, 1e-9))


def _bend(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + cos(pi * min(share, 1.0)))


class Adam:
    """m and v of every parameter, and the update (arXiv 1412.6980, algorithm 1).

    Args:
        parameters: contiguous float32 arrays, which `step` changes in place.
    """

    def __init__(
        self, parameters: Mapping[str, np.ndarray], betas: tuple[float, float] = (0.9, 0.999), epsilon: float = 1e-8
    ) -> None:
        for name, array in parameters.items():
            if array.dtype != np.float32 or not array.flags.c_contiguous or not array.flags.writeable:
                raise ValueError(f"'{name}' is not a writeable float32 array in one piece")
        self.parameters, self.betas, self.epsilon = dict(parameters), betas, epsilon
        self.mean = {name: np.zeros_like(array) for name, array in parameters.items()}
        self.square = {name: np.zeros_like(array) for name, array in parameters.items()}
        self.count = 0

    def step(self, gradients: Mapping[str, np.ndarray], rate: float) -> None:
        """Move every parameter that has a gradient.

        Args:
            gradients: of the parameters' shapes.
            rate: learning rate of this step.
        """
        self.count += 1
        first, second = self.betas
        correction = 1 - second**self.count
        pace = rate / (1 - first**self.count)
        for name, gradient in gradients.items():
            flat = [array.reshape(-1) for array in (self.parameters[name], self.mean[name], self.square[name])]
            given = gradient.reshape(-1)
            for start in range(0, given.size, _BLOCK):
                value, m, v = (array[start : start + _BLOCK] for array in flat)
                g = given[start : start + _BLOCK]
                m *= first
                m += (1 - first) * g
                v *= second
                scratch = g * g
                scratch *= 1 - second
                v += scratch
                np.divide(v, correction, out=scratch)
                np.sqrt(scratch, out=scratch)
                scratch += self.epsilon
                np.divide(m, scratch, out=scratch)
                scratch *= pace
                value -= scratch
