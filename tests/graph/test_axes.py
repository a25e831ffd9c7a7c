"""Factors: unification, splitting that holds everywhere, and clashes."""

from __future__ import annotations

from onnxsnp.graph.axes import Factors, Tie, solve


def made(**sizes: int) -> tuple[Factors, dict[str, int]]:
    factors = Factors()
    for name, size in sizes.items():
        factors.axis((name, 0), size)
    return factors, {name: factors.atoms((name, 0))[0] for name in sizes if sizes[name] != 1}


def sizes_of(factors: Factors, name: str) -> list[int]:
    return [factors.size(atom) for atom in factors.atoms((name, 0))]


def test_an_axis_keeps_the_size_it_was_introduced_with() -> None:
    factors, _ = made(a=6)
    factors.axis(("a", 0), 99)
    assert sizes_of(factors, "a") == [6]


def test_equal_sizes_become_one_factor() -> None:
    factors, at = made(a=6, b=6)
    assert factors.unify([at["a"]], [at["b"]])
    assert factors.atoms(("a", 0)) == factors.atoms(("b", 0))


def test_a_longer_factor_splits_major_first() -> None:
    factors, at = made(a=24, b=2, c=3, d=4)
    assert factors.unify([at["a"]], [at["b"], at["c"], at["d"]])
    assert factors.atoms(("a", 0)) == factors.atoms([("b", 0), ("c", 0), ("d", 0)])
    assert sizes_of(factors, "a") == [2, 3, 4]


def test_a_split_holds_wherever_the_factor_occurs() -> None:
    factors, at = made(a=12, other=12, three=3, four=4)
    assert factors.unify([at["a"]], [at["other"]])
    assert factors.unify([at["a"]], [at["three"], at["four"]])
    assert sizes_of(factors, "other") == [3, 4]
    assert factors.atoms(("other", 0)) == factors.atoms([("three", 0), ("four", 0)])


def test_products_that_cross_are_refined_on_both_sides() -> None:
    factors, at = made(a=2, b=6, c=4, d=3)
    assert factors.unify([at["a"], at["b"]], [at["c"], at["d"]])
    assert factors.atoms([("a", 0), ("b", 0)]) == factors.atoms([("c", 0), ("d", 0)])
    assert sizes_of(factors, "b") == [2, 3] and sizes_of(factors, "c") == [2, 2]


def test_factors_of_size_one_fit_anywhere_and_are_left_out() -> None:
    factors = Factors()
    for name, size in (("a", 5), ("one", 1), ("b", 5)):
        factors.axis((name, 0), size)
    assert factors.atoms(("one", 0)) == ()
    assert factors.unify(factors.atoms([("one", 0), ("a", 0)]), factors.atoms(("b", 0)))
    assert factors.atoms(("a", 0)) == factors.atoms(("b", 0))


def test_sizes_that_do_not_factor_alike_are_refused() -> None:
    factors, at = made(a=2, b=3, c=3, d=2)
    assert not factors.unify([at["a"], at["b"]], [at["c"], at["d"]])
    factors, at = made(a=6, b=2)
    assert not factors.unify([at["a"]], [at["b"]])


def test_many_ties_do_not_nest() -> None:
    sizes = {(f"t{index}", 0): 12 for index in range(5000)}
    ties = [Tie(((f"t{index}", 0),), ((f"t{index + 1}", 0),), "n") for index in range(4999)]
    factors, clashes = solve([*ties, Tie((("t0", 0),), (("x", 0), ("y", 0)), "r")], {**sizes, ("x", 0): 3, ("y", 0): 4})
    assert clashes == []
    assert factors.atoms(("t4999", 0)) == factors.atoms([("x", 0), ("y", 0)])


def test_solve_reports_each_clash_with_sizes_and_node() -> None:
    sizes = {("a", 0): 2, ("a", 1): 3, ("b", 0): 3, ("b", 1): 2, ("c", 0): 2}
    ties = [Tie((("a", 0), ("a", 1)), (("b", 0), ("b", 1)), "bad"), Tie((("a", 0),), (("c", 0),), "good")]
    factors, clashes = solve(ties, sizes)
    assert [clash.tie.node for clash in clashes] == ["bad"]
    assert clashes[0].reason == "sizes 2×3 and 3×2 do not factor alike"
    assert factors.atoms(("a", 0)) == factors.atoms(("c", 0))


def test_what_does_not_factor_alike_leaves_the_rest_of_the_product_tied() -> None:
    """An image in windows of 7 that is merged in blocks of 2: 56 = 8·7 = 28·2, in both directions."""
    image = {("x", 0): 2, ("x", 1): 56, ("x", 2): 56, ("x", 3): 96}
    windows = {("w", axis): size for axis, size in enumerate([2, 8, 7, 8, 7, 96])}
    merged = {("m", axis): size for axis, size in enumerate([2, 28, 2, 28, 2, 96])}
    ties = [Tie(tuple(image), tuple(windows), "windows"), Tie(tuple(image), tuple(merged), "merge")]
    factors, clashes = solve(ties, {**image, **windows, **merged})
    assert [clash.reason for clash in clashes] == ["sizes 8×7 and 28×2 do not factor alike"] * 2
    assert factors.atoms(("m", 5)) == factors.atoms(("w", 5)) == factors.atoms(("x", 3))
    assert factors.atoms(("m", 0)) == factors.atoms(("w", 0))
    frozen = {atom for clash in clashes for atom in factors.current(clash.factors)}
    assert frozen == set(factors.atoms([("x", 1), ("x", 2), *list(merged)[1:5]]))


def test_stretches_end_where_both_products_have_the_same_size() -> None:
    factors = Factors()
    sizes = [2, 3, 4, 6, 4, 5, 20]
    for index, size in enumerate(sizes):
        factors.axis(("t", index), size)
    a = [factors.atoms(("t", index))[0] for index in range(len(sizes))]
    found = [(list(left), list(right)) for left, right in factors.stretches([a[0], a[1], a[2], a[5]], [a[3], a[6]])]
    assert found == [([a[0], a[1]], [a[3]]), ([a[2], a[5]], [a[6]])]
    assert list(factors.stretches([a[3]], [a[0], a[1]])) == [([a[3]], [a[0], a[1]])]
    assert list(factors.stretches([], [])) == []
