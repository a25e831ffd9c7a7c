"""How many neurons each group keeps: a uniform ratio, ratios from a file, or the ratio that meets a cost."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from onnxsnp.errors import PlanError
from onnxsnp.evaluation.cost import CostModel
from onnxsnp.graph.groups import Group
from onnxsnp.planning.ties import Tie, step_of, tied

SCOPES = ("qk", "v", "ffn", "head", "channel", "residual")
DEFAULT_SCOPE = ("qk", "v", "ffn")
_FILE_KINDS = {"query_key": "qk", "value": "v", "ffn": "ffn", "head": "head", "residual": "residual"}
TOLERANCE = 0.01  # of the asked share


def parse_scope(text: str | Sequence[str]) -> tuple[str, ...]:
    """Kinds of groups from a comma-separated list.

    Raises:
        PlanError: an unknown kind (the nearest known one is suggested).
    """
    names = [part.strip() for part in text.split(",")] if isinstance(text, str) else list(text)
    for name in names:
        if name not in SCOPES:
            raise unknown("scope", name, SCOPES)
    if not names:
        raise PlanError("the scope is empty", hint=f"choose from {', '.join(SCOPES)}")
    return tuple(dict.fromkeys(names))


def unknown(what: str, name: str, known: Iterable[str]) -> PlanError:
    """The error for a name that does not exist, with the nearest that does."""
    near = get_close_matches(name.lower(), list(known), 1, cutoff=0.5)
    choices = f"choose from {', '.join(known)}"
    return PlanError(f"unknown {what} '{name}'", hint=f"did you mean '{near[0]}'? {choices}" if near else choices)


def check_ratio(ratio: float) -> float:
    """A ratio in [0, 1).

    Raises:
        PlanError: anything else, nan included.
    """
    if not 0 <= ratio < 1:
        raise PlanError(f"ratio must be at least 0 and below 1, got {ratio}", hint="0.3 removes 30 %")
    return float(ratio)


def keep_count(size: int, removed: float, multiple: int = 1) -> int:
    """Neurons that stay when `removed` (a real number) of `size` go: rounded to `multiple`, at least one multiple."""
    if removed <= 0:
        return size
    kept = size - removed
    rounded = round(kept / multiple) * multiple
    return min(size, max(rounded, min(multiple, size)))


def uniform(groups: Sequence[Group], ratio: float, multiple: int = 1, ties: Sequence[Tie] = ()) -> dict[str, int]:
    """The literature's local pruning: the same share of every group's neurons.

    Returns:
        Kept neurons by group id; those of tied groups as near to it as the tie has.
    """
    kept = {group.id: keep_count(group.size, ratio * group.size, step_of(group, multiple)) for group in groups}
    for tie in tied(groups, multiple, ties):
        if len(tie.groups) > 1:
            wanted = tie.groups[0].size * (1 - ratio)
            kept.update(tie.at(int(np.argmin(np.abs(tie.widths[:, 0] - wanted)))))
    return kept


def to_cost(
    groups: Sequence[Group],
    cost: CostModel,
    share: float,
    what: str = "macs",
    multiple: int = 1,
    ties: Sequence[Tie] = (),
) -> dict[str, int]:
    """The one ratio, for every group alike, that removes the asked share of the model's cost.

    A ratio moves groups of equal size by a neuron all at once, which is coarse; so the ratio is taken just below the
    target and single neurons then go from the groups that rounding favoured most, until the target is met.

    Args:
        share: part of the whole model's cost to remove, in [0, 1).
        what: "macs", "params" or "latency".
        ties: groups that get their widths together.

    Raises:
        PlanError: the groups cannot give that much. (Where single steps are coarser than 1 % of the share, the nearest
            plan is returned; `off_target` says by how much it misses.)
    """
    total = cost.total(what)
    target = total * (1 - share)
    atoms = {group.id: group.atom for group in groups}
    sizes = {group.id: group.size for group in groups}
    choices = tied(groups, multiple, ties)

    def rows(ratio: float) -> list[int]:  # the narrowest that keep at least this share
        return [int(np.searchsorted(one.widths[:, 0], one.widths[-1, 0] * (1 - ratio) - 1e-9)) for one in choices]

    def price(picked: Sequence[int]) -> float:
        kept = _widths(choices, picked)
        return cost.total(what, {atoms[name]: width for name, width in kept.items() if width < sizes[name]})

    least = price(rows(1.0))
    if least > target * (1 + 1e-9) and total > 0:
        raise too_much(what, 1 - least / total, share)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if price(rows(middle)) > target else (low, middle)
    picked = rows(low)
    _trim(choices, picked, low, price, target)
    return _widths(choices, picked)


def _widths(choices: Sequence[Tie], picked: Sequence[int]) -> dict[str, int]:
    return {name: width for one, row in zip(choices, picked, strict=True) for name, width in one.at(row).items()}


def too_much(what: str, most: float, share: float) -> PlanError:
    """The error for a share of the cost that the groups cannot give."""
    quiet = "; on a busy machine times say little, above all with several --threads" if what == "latency" else ""
    return PlanError(
        f"this scope can remove at most {most:.1%} of the {what}, {share:.1%} were asked",
        hint=f"lower --ratio or widen --scope{quiet}",
    )


def off_target(counts: Mapping[str, int], groups: Mapping[str, Group], cost: CostModel, share: float, what: str) -> str:
    """One line if a plan misses the asked share by more than 1 % of it, else nothing."""
    sizes = {groups[name].atom: kept for name, kept in counts.items() if kept < groups[name].size}
    got = 1 - cost.total(what, sizes) / cost.total(what)
    if abs(got - share) <= TOLERANCE * share:
        return ""
    return f"{got:.1%} of the {what} are removed, not {share:.1%}: the steps that widths come in are coarser than that"


def _trim(
    choices: Sequence[Tie], picked: list[int], ratio: float, price: Callable[[Sequence[int]], float], target: float
) -> None:
    """Take single steps from the groups that rounding left furthest above their share, until the target is met."""
    above = [one.widths[row, 0] - one.widths[-1, 0] * (1 - ratio) for one, row in zip(choices, picked, strict=True)]
    now = price(picked)
    for index in sorted(range(len(choices)), key=lambda index: above[index], reverse=True):
        if now <= target or picked[index] == 0:
            continue
        picked[index] -= 1
        after = price(picked)
        if after >= now or target - after > now - target:  # saves nothing, or misses by more than staying does
            picked[index] += 1
            continue
        now = after


def from_file(reference: str, groups: Sequence[Group], multiple: int = 1, scoped: bool = False) -> dict[str, int]:
    """Kept neurons from ratios per block and kind.

    Args:
        reference: `FILE` or `FILE:entry`. The file holds lists by kind (`query_key`, `value`, `ffn`, `head`, one number
            for `residual`), possibly several such sets under `models`; or names as in the authors' own files:
            `matmul_{2i}` for block i's query-key, `matmul_{2i+1}` for its value, `blocks_i_mlp_fc1`, `add_N` for the
            residual.
        scoped: ratios of kinds that are not among `groups` are passed over instead of refused.

    Raises:
        PlanError: the file cannot be read, does not fit the model, or holds a ratio outside [0, 1).
    """
    ratios = _read_ratios(reference)
    known = {group.id: group for group in groups}
    kept = {}
    for name, ratio in ratios.items():
        group = known.get(name) or next((g for g in groups if name == "residual" and g.kind == "residual"), None)
        if group is None and scoped and all(g.kind != name.split(".")[0] for g in groups):
            continue
        if group is None:
            raise PlanError(
                f"{reference} gives a ratio for '{name}', which this model does not have or cannot cut",
                hint="onnxsnp inspect lists the groups",
            )
        if not 0 <= ratio < 1:
            raise PlanError(f"{reference} gives '{name}' the ratio {ratio}", hint="ratios are at least 0 and below 1")
        kept[group.id] = keep_count(group.size, ratio * group.size, step_of(group, multiple))
    return kept


def _read_ratios(reference: str) -> dict[str, float]:
    """Ratios by group id."""
    path, entry = reference, ""
    if not Path(path).exists() and ":" in reference:
        path, _, entry = reference.rpartition(":")
    try:
        data = json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        near = get_close_matches(reference.lower(), ("auto", "uniform"), 1)
        guess = f"did you mean '{near[0]}'? " if near else ""
        raise PlanError(
            f"no such allocation: '{reference}'", hint=f"{guess}give auto, uniform or a ratios file"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"cannot read ratios from {path}: {error}") from error
    if isinstance(data, dict) and isinstance(data.get("models"), dict):
        models = data["models"]
        if not entry and len(models) == 1:
            entry = next(iter(models))
        if not entry and models:
            raise PlanError(f"{path} holds ratios of several models", hint=f"add one of :{', :'.join(models)}")
        if entry not in models:
            near = get_close_matches(entry, models, 1)
            raise PlanError(
                f"{path} has no entry '{entry}'",
                hint=f"did you mean '{near[0]}'?" if near else f"add one of :{', :'.join(models)}",
            )
        data = models[entry]
    if not isinstance(data, dict):
        raise PlanError(f"{path} does not hold ratios by kind")
    if not data:
        raise PlanError(f"{path} holds no ratios")
    try:
        return _by_kind(data, path) if any(key in data for key in _FILE_KINDS) else _by_module(data, path)
    except (TypeError, ValueError, OverflowError) as error:
        raise PlanError(f"{path} does not hold numbers where ratios are expected: {error}") from error


_NOTES = ("expected", "source", "comment")  # what a ratios file may say besides


def _by_kind(data: Mapping[str, Any], path: str) -> dict[str, float]:
    ratios: dict[str, float] = {}
    for key in data:
        if key not in _FILE_KINDS and key not in _NOTES:
            raise unknown(f"kind in {path}", key, _FILE_KINDS)
    for key, kind in _FILE_KINDS.items():
        value = data.get(key)
        if value is None:
            continue
        if isinstance(value, list):
            ratios.update({f"{kind}.{index}": float(ratio) for index, ratio in enumerate(value)})
        else:
            ratios[kind] = float(value)
    return ratios


def _by_module(data: Mapping[str, Any], path: str) -> dict[str, float]:
    ratios = {}
    for name, value in data.items():
        product = re.fullmatch(r"matmul(?:_(\d+))?", name)
        ffn = re.fullmatch(r"blocks_(\d+)_mlp_fc1", name)
        if product:
            number = int(product.group(1) or 0)
            ratios[f"{'v' if number % 2 else 'qk'}.{number // 2}"] = float(value)
        elif ffn:
            ratios[f"ffn.{ffn.group(1)}"] = float(value)
        elif re.fullmatch(r"add(?:_\d+)?", name):
            ratios["residual"] = float(value)
        else:
            raise PlanError(
                f"{path} names '{name}', which is not a known kind or module",
                hint="use query_key, value, ffn, head, residual, or matmul_N, blocks_N_mlp_fc1, add_N",
            )
    return ratios
