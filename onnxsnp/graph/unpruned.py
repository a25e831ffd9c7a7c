"""Products of two activations that are recognised and whose sizes are left alone.

Attention over channels (cross-covariance attention) has scores of channels with channels; linear attention and
similarities multiply activations without a softmax between. What such products contract or keep is no width between two
projections, even where projections emit it, and neither are the heads beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from onnxsnp.graph.attention import Site, Unrecognised
from onnxsnp.graph.axes import Axis
from onnxsnp.graph.dependency import Dependencies


class Products:
    """Which factors of products are emitted by projections.

    Args:
        producers: weight axes that emit a factor, by factor.
        kept: factors that are not for these products to decide about, such as the residual stream.
    """

    def __init__(
        self, dependencies: Dependencies, producers: Mapping[int, Sequence[Axis]], kept: Collection[int]
    ) -> None:
        self._deps, self._producers, self._kept = dependencies, producers, kept

    def emitted(self, *axes: Axis) -> list[int]:
        """Those factors of some axes that projections emit."""
        return [atom for axis in axes for atom in self._deps.factors.atoms(axis) if atom in self._producers]

    def over_channels(self, site: Site) -> bool:
        """Whether queries and keys of a site are channels, and what is contracted are tokens."""
        return not self.emitted(site.query) and all(map(self.emitted, (site.query_tokens, site.key_tokens)))

    def channels(self, site: Site) -> tuple[Unrecognised, set[int]]:
        """Why the channels of such a site are left alone, and their factors."""
        sizes = " x ".join(str(self._deps.facts.size(axis)) for axis in (site.query_tokens, site.key_tokens))
        reason = f"attention over channels, {sizes} in each head: its channels and heads are left alone"
        return Unrecognised(site.score, f"{site.name}: {reason}"), self._tied(site.query_tokens, site.key_tokens)

    def others(self, sites: Sequence[Site], taken: Collection[int]) -> list[tuple[Unrecognised, set[int]]]:
        """Products outside of attention that projections feed, and the factors they claim.

        Those are the ones they contract, and what they keep for each of several heads; what they keep otherwise passes
        from one projection to the next as it would without them (a weighted mean over tokens, say).
        """
        known = {name for site in sites for name in (site.score, site.mix)}
        claimed: set[int] = set(taken)
        found = []
        for product in self._deps.facts.products:
            if product.node in known:
                continue
            mine = self._tied(product.left, product.right)
            for side in (product.rows, product.columns):
                kept = self._tied(side)
                mine |= kept if len(kept) > 1 else set()
            mine -= claimed
            if mine:
                claimed |= mine
                sizes = ", ".join(str(self._deps.size(atom)) for atom in sorted(mine))
                reason = "product of two activations outside softmax attention, as in linear attention or similarities"
                found.append((Unrecognised(product.node, f"{reason}: sizes it ties ({sizes}) are left alone"), mine))
        return found

    def _tied(self, *axes: Axis) -> set[int]:
        """What projections emit on some axes, and what they emit beside it."""
        found = {atom for axis in axes for atom in self._deps.factors.atoms(axis)}
        for whole in self._deps.stacks.keys() & found:
            found |= self._deps.stacks[whole].atoms
        atoms = {atom for atom in found if atom in self._producers}.difference(self._kept)
        beside = {atom for mine in atoms for axis in self._producers[mine] for atom in self._deps.atoms(*axis)}
        return beside.difference(self._kept)
