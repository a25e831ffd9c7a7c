"""What a cut of multiply-accumulates did not buy: the time beyond their proportion, and which operators spend it.

If time followed the MACs, a model with the share r of them would take r T₀. What it takes more, T₁ − r T₀, is a sum
over the kinds of operators of t₁ − r t₀, and each of these again of two parts: the operator's own work (MACs where it
has some, else the bytes it moves) shrank by another share s than r, which is (s − r) t₀; and a unit of it takes another
time than before, which is t₁ − s t₀. Nothing is left over, and nothing is estimated.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from onnxsnp.evaluation.profile import OpTime, Profile

BETWEEN = "between operators"


@dataclass(frozen=True)
class Part:
    """One kind of operator before and after.

    Attributes:
        op: as in `OpTime`; `between operators` for what none accounts for.
        product: whether its work is multiply-accumulates.
        before_ms, after_ms: per run.
        work: share of its work that is left (MACs, else bytes); None where it is not known, or ran in one of both only.
        excess_ms: after_ms − r before_ms.
        uncut_ms: the part of it that is work which did not shrink like the MACs of the model.
        slower_ms: the part of it that is more time per unit of work (all of it where `work` is None).
    """

    op: str
    product: bool
    before_ms: float
    after_ms: float
    work: float | None
    excess_ms: float
    uncut_ms: float
    slower_ms: float


@dataclass(frozen=True)
class Unbought:
    """A model against the first one.

    Attributes:
        macs: share of the MACs that is left (r).
        time: share of the time that is left.
        excess_ms: time beyond r of the time before.
        parts: by kind of operator, most time beyond proportion first.
        rates: MACs per second (in G) of the products before and after.
        words: the sentence that says so.
    """

    macs: float
    time: float
    excess_ms: float
    parts: tuple[Part, ...]
    rates: tuple[float, float]
    words: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def unbought(before: Profile, after: Profile) -> Unbought | None:
    """Explain the time of a smaller model; None where the first has no MACs that can be counted."""
    if not before.macs:
        return None
    share = after.macs / before.macs
    first, second = ({op.op: op for op in one.ops} for one in (before, after))
    parts = [_part(first.get(name), second.get(name), share) for name in {**first, **second}]
    gap = after.outside - share * before.outside
    parts.append(Part(BETWEEN, False, before.outside, after.outside, None, gap, 0.0, gap))
    parts.sort(key=lambda part: -part.excess_ms)
    rates = (_rate(before), _rate(after))
    excess = after.ms - share * before.ms
    return Unbought(
        share, after.ms / before.ms, excess, tuple(parts), rates, _words(before, after, share, parts, rates)
    )


def _part(first: OpTime | None, second: OpTime | None, share: float) -> Part:
    known = first or second
    assert known is not None
    old, new = (0.0 if one is None else one.ms for one in (first, second))
    excess = new - share * old
    work = _work(first, second)
    uncut = 0.0 if work is None else (work - share) * old
    return Part(known.op, known.product, old, new, work, excess, uncut, excess - uncut)


def _work(first: OpTime | None, second: OpTime | None) -> float | None:
    if first is None or second is None:
        return None
    if first.product:
        return second.macs / first.macs if first.macs else None
    return second.bytes / first.bytes if first.bytes else None


def _rate(profile: Profile) -> float:
    ms = sum(op.ms for op in profile.ops if op.macs)
    return profile.macs / ms / 1e6 if ms else 0.0


def _words(before: Profile, after: Profile, share: float, parts: list[Part], rates: tuple[float, float]) -> str:
    excess = after.ms - share * before.ms
    head = f"MACs {share - 1:+.1%}, time {after.ms / before.ms - 1:+.1%}"
    if excess <= 0:
        return f"{head}: the time fell at least as far as the MACs"
    gap, others, products = _sorted_out(parts)
    known, single = ([part for part in others if (part.work is None) is unknown] for unknown in (False, True))
    shares = [sum(part.before_ms for part in others) / before.ms, sum(part.after_ms for part in others) / after.ms]
    reasons = [
        (
            sum(part.uncut_ms for part in known),
            f"operators without MACs ({shares[0]:.0%} of the time before, {shares[1]:.0%} now), whose data shrank less "
            f"than the MACs{_named(known)}",
        ),
        (sum(part.slower_ms for part in known), "operators without MACs taking more time per byte"),
        (sum(part.excess_ms for part in single), f"operators that one of the two models does not have{_named(single)}"),
        (
            sum(part.slower_ms for part in products),
            f"products doing fewer MACs per second ({rates[0]:.1f} → {rates[1]:.1f} G in all)",
        ),
        (sum(part.uncut_ms for part in products), f"MACs that stayed where they take longest{_named(products)}"),
        (gap, "what runs between operators"),
    ]
    listed = "; ".join(f"{ms:.2f} ms {what}" for ms, what in sorted(reasons, key=lambda one: -one[0]) if ms >= 0.005)
    saved = sum(ms for ms, _ in reasons if ms < 0)
    less = f"; less {-saved:.2f} ms where time fell further than that" if saved <= -0.005 else ""
    return (
        f"{head}: in proportion it would be {share * before.ms:.2f} ms, it is {after.ms:.2f}. The {excess:.2f} ms that "
        f"the cut did not buy: {listed}{less}"
    )


def _sorted_out(parts: list[Part]) -> tuple[float, list[Part], list[Part]]:
    """The time beyond proportion between operators, operators without MACs, and products."""
    gap = sum(part.excess_ms for part in parts if part.op == BETWEEN)
    others = [part for part in parts if not part.product and part.op != BETWEEN]
    return gap, others, [part for part in parts if part.product]


def _named(parts: list[Part]) -> str:
    """The three operators that add most, with their milliseconds."""
    times = {part.op: part.excess_ms if part.work is None else part.uncut_ms for part in parts}
    most = sorted((op for op, ms in times.items() if ms >= 0.005), key=lambda op: -times[op])[:3]
    return f" ({', '.join(f'{op} {times[op]:.2f}' for op in most)})" if most else ""
