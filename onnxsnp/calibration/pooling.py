"""Layers that share a weight share what is known of its inputs, so that all of them refit it alike.

A weight that several layers read through should be the best for all of them together: the sum of their squared errors
is the squared error over the inputs of all, so their second moments are added. With the same moments and the same
weights every layer then finds the same new weight, and the file keeps one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from onnxsnp.calibration.statistics import Moments


def pool(moments: dict[str, Moments], together: Iterable[Collection[str]]) -> None:
    """Give tensors that belong together the moments of all of them, in place.

    Args:
        moments: by tensor name.
        together: sets of tensor names; sets that overlap are one. Names without moments are passed over.
    """
    classes: list[set[str]] = []
    for names in together:
        mine = {name for name in names if name in moments}
        for other in [one for one in classes if one & mine]:
            classes.remove(other)
            mine |= other
        classes.append(mine)
    for names in classes:
        if len(names) < 2:
            continue
        parts = [moments[name] for name in sorted(names)]
        second, total = sum(part.second for part in parts), sum(part.total for part in parts)
        whole = Moments(second, total, sum(part.count for part in parts))  # type: ignore[arg-type]
        moments.update(dict.fromkeys(names, whole))
