"""Where a recovery's batches come from: a part that is held back, and the rest, in a new order for every pass."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import count, islice

import numpy as np

from onnxsnp.calibration.data import Batch, Dataset
from onnxsnp.errors import DataError

_SHARE, _LEAST, _MOST = 0.1, 32, 128  # of the samples that are held back
Inputs = dict[str, np.ndarray]


def held_back(samples: int) -> int:
    """How many of some samples judge: a tenth, at least 32 and at most 128, and never more than a quarter.

    Raises:
        DataError: there are too few.
    """
    if samples < 4:
        raise DataError(f"recovery needs at least 4 samples, there are {samples}", hint="1000 are a good number")
    return min(max(round(_SHARE * samples), _LEAST), _MOST, samples // 4)


class Feed:
    """Batches of one size, without end.

    Args:
        data: all samples, in mixed order; with a fixed batch it must fill the last one (`pad_last`).
        size: samples of a batch.
        seed: of the order.

    Raises:
        DataError: too few samples.
    """

    def __init__(self, data: Dataset, size: int, seed: int) -> None:
        self.held_samples = held_back(data.samples)
        self.samples = data.samples - self.held_samples
        if self.samples < size:
            raise DataError(
                f"a batch takes {size} samples, and of {data.samples} only {self.samples} are left to learn from",
                hint="give more data, or a smaller --batch",
            )
        self.size, self._seed = size, seed
        self._held, self._rest = data.part(0, self.held_samples, size), data.part(self.held_samples, None, size)

    def held(self) -> Iterator[Batch]:
        """The part that is held back; the last batch repeats its last sample."""
        for batch in self._held:
            missing = self.size - len(next(iter(batch.inputs.values())))
            inputs = {name: np.concatenate([a, *[a[-1:]] * missing]) for name, a in batch.inputs.items()}
            yield Batch(inputs, None, batch.count)

    def batches(self, epoch: int = 0, taken: int = 0) -> Generator[tuple[tuple[int, int], Inputs]]:
        """From a place on: the place after each batch (pass, batches taken of it), and the batch.

        What does not fill a batch at the end of a pass is left out of it; the next pass has another order.
        """
        for number in count(epoch):
            rng = np.random.default_rng([self._seed, number])
            full = (one for one in self._rest.mixed(rng) if one.count == self.size)
            done = taken
            for batch in islice(full, taken, None):
                done += 1
                yield (number, done), batch.inputs
            if not done:
                raise DataError(f"the readable samples do not fill one batch of {self.size}", hint="give more data")
            taken = 0
