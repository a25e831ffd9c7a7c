"""Groups: sets of neurons that can be cut together, their kind, and whether the cut is legal.

The kind follows from structure alone. A factor that a score product contracts is a query-key size; the one the product
after the softmax keeps is a value size; the factor that goes with both in every tensor is the head count; a factor tied
by additions of two activations is the residual stream; one between two projections is an FFN width, and between
convolutions of more than single places a channel count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

from onnx import NodeProto

from onnxsnp.graph.attention import Site, Unrecognised, find_sites
from onnxsnp.graph.axes import Axis
from onnxsnp.graph.dependency import Dependencies, Place
from onnxsnp.graph.facts import Freeze
from onnxsnp.graph.ir import Graph
from onnxsnp.graph.quantised import said_once
from onnxsnp.graph.silence import divisor, is_silent
from onnxsnp.graph.spatial import is_pointwise
from onnxsnp.graph.stacks import above
from onnxsnp.graph.unpruned import Products

KINDS = ("qk", "v", "head", "ffn", "channel", "residual")

_SERVED = "its heads share keys and values with others, and are cut together with these"


@dataclass(frozen=True)
class Group:
    """Neurons that are cut together.

    Attributes:
        id: stable name, such as `qk.3` or `residual`.
        kind: one of `KINDS`.
        size: number of indices (per head, where there are heads).
        heads: number of heads the indices are counted in; 1 outside attention.
        atom: the factor, for `Dependencies`.
        head_atoms: factors over which indices may be chosen independently, major first.
        places: where the factor occurs in weights.
        producers: weight axes that emit the neurons; consumers: weight axes that contract them,
            alone or stacked with others.
        site: index of the attention site it belongs to.
        reasons: why it must not be cut; empty if it may be.
        further: indices of other sites with the same neurons, because they share weights or tables.
        together: neurons of a head that each index stands for (2 where rotary positions turn them in pairs).
    """

    id: str
    kind: str
    size: int
    heads: int
    atom: int
    head_atoms: tuple[int, ...]
    places: tuple[Place, ...]
    producers: tuple[Axis, ...]
    consumers: tuple[Axis, ...]
    site: int | None = None
    reasons: tuple[str, ...] = ()
    further: tuple[int, ...] = ()
    together: int = 1

    @property
    def sites(self) -> tuple[int, ...]:
        """Indices of all attention sites it belongs to."""
        return () if self.site is None else (self.site, *self.further)

    @property
    def prunable(self) -> bool:
        return not self.reasons


@dataclass
class Structure:
    """Everything the analysis found in one graph."""

    dependencies: Dependencies
    sites: list[Site]
    groups: list[Group]
    skipped: list[Unrecognised] = field(default_factory=list)

    def group(self, kind: str, site: int) -> Group | None:
        """The group of one kind at one attention site."""
        return next((group for group in self.groups if group.kind == kind and site in group.sites), None)


def find_groups(graph: Graph, dependencies: Dependencies) -> Structure:
    """Sort the factors of a graph into groups."""
    sites, unknown = find_sites(graph, dependencies)
    finder = _Finder(graph, dependencies, sites)
    groups = finder.run()
    skipped = said_once(list(unknown) + finder.skipped, graph, dependencies)
    return Structure(dependencies, sites, groups, skipped)


class _Finder:
    """Holds the lookups that the classification of every factor needs."""

    def __init__(self, graph: Graph, dependencies: Dependencies, sites: Sequence[Site]) -> None:
        self.graph, self.deps, self.sites = graph, dependencies, sites
        facts = dependencies.facts
        self._atoms: dict[str, frozenset[int]] = {}
        self.producers = self._by_atom([role.axis for role in facts.roles if role.kind == "producer"])
        self.consumers = self._by_atom([role.axis for role in facts.roles if role.kind == "consumer"])
        self.joined = self._joined()
        self.products = Products(dependencies, self.producers, self.joined)
        self.statistics: dict[int, str] = {}
        for role in facts.statistics:
            for atom in dependencies.atoms(*role.axis):
                self.statistics.setdefault(atom, role.node)
        convolutions = [node for node in graph.nodes if node.op_type == "Conv" and node.input[1] in graph.weights]
        shapes = {node.input[1]: graph.weights[node.input[1]].shape for node in convolutions}
        self.convolved = set(shapes)
        self.pointwise = {node.input[1] for node in convolutions if is_pointwise(node, shapes[node.input[1]])}
        self.skipped: list[Unrecognised] = []
        self.kinds: dict[int, str] = {}  # of the factors of attention sites
        self.further: dict[int, list[int]] = {}  # sites whose neurons are those of an earlier one

    def _by_atom(self, axes: Sequence[Axis]) -> dict[int, list[Axis]]:
        found: dict[int, list[Axis]] = {}
        for axis in axes:
            for atom in self.deps.atoms(*axis):
                if axis not in found.setdefault(atom, []):
                    found[atom].append(axis)
        return found

    def _joined(self) -> set[int]:
        """Factors of additions whose operands come from different layers (x + 0.04·x³ inside a GELU is no residual)."""
        made = self.graph.producers()
        joined: set[int] = set()
        for operands in self.deps.facts.joins:
            shared = self.producers.keys() & self._tensor_atoms(operands[0])
            for atom in shared.intersection(*map(self._tensor_atoms, operands[1:])):
                if len({self._sources(name, atom, made) for name in operands}) > 1:
                    joined.add(atom)
        return joined

    def _sources(self, tensor: str, atom: int, made: dict[str, NodeProto]) -> frozenset[str]:
        """The nodes where a factor first appears on the way to a tensor."""
        stack, seen, found = [tensor], set(), set()
        while stack:
            node = made.get(stack.pop())
            if node is None or node.name in seen:
                continue
            seen.add(node.name)
            emits = any(weight in node.input for weight, _ in self.producers.get(atom, []))
            carriers = [name for name in node.input if not emits and name in made and atom in self._tensor_atoms(name)]
            stack.extend(carriers)
            if not carriers:
                found.add(node.name)
        return frozenset(found)

    def run(self) -> list[Group]:
        """Groups of the attention sites first, then of every other width between two projections."""
        order = self._graph_order()
        groups: list[Group] = []
        taken: set[int] = set()
        for index, site in enumerate(self.sites):
            groups.extend(self._site_groups(index, site, taken))
        groups = self._with_further_sites(groups)
        for why, tied in self.products.others(self.sites, taken):
            self.skipped.append(why)
            taken |= tied
        counts: dict[str, int] = {}
        for atom in order:
            if atom in taken or atom not in self.producers or self.deps.size(atom) == 1 or self._made_up(atom):
                continue
            kind = self._kind(atom)
            if not self._readers(atom):
                self._report_lost(atom)
                continue
            index = counts.get(kind, 0)
            counts[kind] = index + 1
            groups.append(self._group(f"{kind}.{index}", kind, atom, None, ()))
        residuals = [group for group in groups if group.kind == "residual"]
        if len(residuals) == 1:
            only = residuals[0]
            groups[groups.index(only)] = replace(only, id="residual")
        return groups

    def _with_further_sites(self, groups: list[Group]) -> list[Group]:
        """Groups that know of all sites they belong to; a head group belongs to those whose neurons it counts."""
        found = []
        for group in groups:
            sites = set(self.further.get(group.atom, []))
            if group.kind == "head":
                mine = [other for other in groups if group.atom in other.head_atoms]
                sites = {site for other in mine for site in [*other.sites, *self.further.get(other.atom, [])]}
            found.append(replace(group, further=tuple(sorted(site for site in sites if site != group.site))))
        return found

    def _made_up(self, atom: int) -> bool:
        """Whether a factor is stacked from others that are groups of their own."""
        stack = self.deps.stacks.get(atom)
        return stack is not None and any(part in self.producers for part in stack.atoms)

    def _wholes(self, atom: int) -> list[int]:
        """A factor and those it is stacked into."""
        return [atom, *above(atom, self.deps.stacks)]

    def _readers(self, atom: int) -> list[Axis]:
        """The weight axes that contract a factor, alone or stacked with others."""
        return [axis for whole in self._wholes(atom) for axis in self.consumers.get(whole, [])]

    def _report_lost(self, atom: int) -> None:
        """A width that nothing contracts is an output such as the logits, or was lost on its way to a reader."""
        held = self.deps.frozen.get(atom, [])
        counted = any(atom in self.deps.atoms(*axis) for site in self.sites for axis in (site.query, site.value))
        if held and not counted and not any(freeze.node.startswith("output ") for freeze in held):
            weight = self.producers[atom][0][0]
            reason = f"the width {self.deps.size(atom)} of '{weight}': {held[0].reason}"
            self.skipped.append(Unrecognised(held[0].node, reason))

    def _graph_order(self) -> list[int]:
        """Factors in the order in which the graph first computes or contracts them."""
        seen: dict[int, None] = {}
        for node in self.graph.nodes:
            for name in node.input:
                if name in self.graph.weights and name in self.deps.facts.shapes:
                    for atom in self.deps.atoms(name):
                        seen.setdefault(atom)
        return list(seen)

    def _kind(self, atom: int) -> str:
        if self.joined.intersection(self._wholes(atom)):
            return "residual"
        made_by = {weight for weight, _ in self.producers[atom]}
        beside = made_by.union(weight for weight, _ in self._readers(atom))
        # a convolution of single places is a projection, so between such ones lies an ordinary feed-forward network
        spatial = beside & self.convolved - self.pointwise
        return "channel" if spatial and made_by <= self.convolved else "ffn"

    def _site_groups(self, index: int, site: Site, taken: set[int]) -> list[Group]:
        if self.products.over_channels(site):
            why, channels = self.products.channels(site)
            self.skipped.append(why)
            taken |= channels
            return []
        taken.update(self.products.emitted(site.query_tokens, site.key_tokens))  # of relative position tables, say
        groups: list[Group] = []
        for kind, axis in (("qk", site.query), ("v", site.value)):
            atoms = self._sizes(axis)
            if len(atoms) != 1:
                what = "contracted size" if kind == "qk" else "value size"
                taken.update(atoms)
                self.skipped.append(
                    Unrecognised(
                        site.score,
                        f"{site.name}: {what} is "
                        + (
                            "not produced by a projection (attention over channels or a computed operand)"
                            if not atoms
                            else f"several factors at once{self._frozen_by(atoms)}"
                        ),
                    )
                )
                continue
            atom = atoms[0]
            common = self._common(atom)
            if self.kinds.get(atom) == kind:
                self.further.setdefault(atom, []).append(index)
                continue
            if atom in taken:
                own = next((one for one in groups if one.atom == atom), None)
                whose = "its query-key size" if own else "another site's"
                if own and self._added(site, atom):
                    whose += f", to which it is added (at {self._added(site, atom)})"
                self.skipped.append(Unrecognised(site.score, f"{site.name}: its {kind} size is tied to {whose}"))
                continue
            taken.add(atom)
            self.kinds[atom] = kind
            whole = prod(map(self.deps.size, self.deps.atoms(*axis)))
            group = self._group(f"{kind}.{index}", kind, atom, index, common)
            groups.append(replace(group, together=whole // group.size))
        everywhere = [frozenset(self.deps.atoms(*axis)) for group in groups for axis in group.producers]
        beside = frozenset(site.mixed).union(*everywhere) - {group.atom for group in groups}
        beside -= {atom for axis in (site.query, site.value) for atom in self.deps.atoms(*axis)}
        shared = beside.intersection(*everywhere)
        # what counts blocks of one side alone (the part of a head that rotary positions leave) is no number of heads
        counts = {atom for axis in self.deps.facts.counts for atom in self.deps.atoms(*axis)} & beside - shared
        taken |= counts
        beside -= counts
        for number, atom in enumerate(sorted(beside, key=lambda atom: (atom not in shared, atom))):
            if atom in self.producers and atom not in taken:
                taken.add(atom)
                name = f"head.{index}" + (f"-{number + 1}" if number else "")
                head = self._group(name, "head", atom, index, ())
                served = shared and atom not in shared
                groups.append(replace(head, reasons=(*head.reasons, _SERVED)) if served else head)
        return groups

    def _added(self, site: Site, atom: int) -> str:
        """The addition of two activations that ties a site's value size to its query-key size; empty if none does."""
        query, value = (
            next((place for place in self.deps.places[atom] if place[:2] == axis), None)
            for axis in (site.query, site.value)
        )
        if query is None or value is None:
            return ""
        joins = {node.name for node in self.graph.nodes if tuple(node.input) in self.deps.facts.joins}
        return next((node for node in self.deps.why(query, value) if node in joins), "")

    def _sizes(self, axis: Axis) -> list[int]:
        """The factors of a contracted or kept axis that may be its size: those that can be cut, where some can."""
        atoms = [atom for atom in self.deps.atoms(*axis) if atom in self.producers]
        return [atom for atom in atoms if atom not in self.deps.frozen] or atoms

    def _frozen_by(self, atoms: Sequence[int]) -> str:
        """What keeps the first of some factors that is frozen as it is; empty if none is."""
        found = [freeze for atom in atoms for freeze in self.deps.frozen.get(atom, [])]
        return f", none of which can be cut: {found[0].reason} (at {found[0].node})" if found else ""

    def _common(self, atom: int) -> tuple[int, ...]:
        """Factors present in every tensor that has `atom`, in the order of the first producing weight."""
        common: frozenset[int] | None = None
        for tensor in {place[0] for place in self.deps.places[atom]}:
            here = self._tensor_atoms(tensor)
            common = here if common is None else common & here
        for whole in above(atom, self.deps.stacks):
            runs: list[set[int]] = [set(run) for run in self.deps.stacks[whole].parts if atom in run] or [set()]
            for tensor in {place[0] for place in self.deps.places[whole]}:
                # a head may be in the stacked axis itself, or beside it, but must be the same for every part
                here = self._tensor_atoms(tensor).difference(*runs) | runs[0].intersection(*runs)
                common = here if common is None else common & here
        common = (common or frozenset()) - {atom}
        weight, axis = self.producers[atom][0]
        return tuple(other for other in self.deps.atoms(weight, axis) if other in common)

    def _tensor_atoms(self, tensor: str) -> frozenset[int]:
        if tensor not in self._atoms:
            self._atoms[tensor] = frozenset(
                self.deps.atoms(tensor)
                if tensor in self.deps.facts.shapes
                else [atom for axis in self.deps.facts.virtual if axis[0] == tensor for atom in self.deps.atoms(*axis)]
            )
        return self._atoms[tensor]

    def _group(self, name: str, kind: str, atom: int, site: int | None, heads: tuple[int, ...]) -> Group:
        count = 1
        for head in heads:
            count *= self.deps.size(head)
        weights = tuple(place for place in self.deps.places[atom] if place[0] in self.graph.weights)
        return Group(
            name,
            kind,
            self.deps.size(atom),
            count,
            atom,
            heads,
            weights,
            tuple(self.producers.get(atom, ())),
            tuple(self._readers(atom)),
            site,
            tuple(self._reasons(kind, atom)),
        )

    def _reasons(self, kind: str, atom: int) -> list[str]:
        held = [freeze for freeze in self.deps.frozen.get(atom, []) if not self._adds_nothing(freeze, atom)]
        reasons = list(dict.fromkeys(f"{freeze.reason} (at {freeze.node})" for freeze in held))
        if atom in self.deps.stacks:
            reasons.append(f"its parts are put together by Concat (at {self.deps.stacks[atom].node})")
        for whole in self._wholes(atom):
            if kind != "residual" and whole in self.statistics:
                where = f"(at {self.statistics[whole]}), whose mean and variance a cut would change"
                reasons.append(f"a normalisation runs over it {where}")
            reasons.extend(f"occurs twice in tensor '{tensor}'" for tensor in self._twice(whole))
            reasons.extend(f"what is cut would not be zero in a product (at {node})" for node in self._heard(whole))
            reasons.extend(f"what is cut would be divided by zero (at {node})" for node in self._divides(whole))
        return reasons

    def _divides(self, atom: int) -> list[str]:
        """Divisions by what is computed and zero for cut neurons, such as probabilities by their sum."""
        divisors = [(node.name, divisor(node, self.graph.weights)) for node in self.graph.nodes]
        return [
            node
            for node, name in divisors
            if name is not None and name not in self.graph.weights and atom in self._tensor_atoms(name)
            if is_silent(name, atom, self.graph, self.deps)
        ]

    def _heard(self, atom: int) -> list[str]:
        """Products of two activations that contract a factor and in neither of whose operands cut neurons are zero."""
        found = []
        for product in self.deps.facts.products:
            sides = [side[0].split("|")[-1] for side in (product.left, product.right)]
            contracted = atom in self.deps.factors.atoms(product.left)
            if contracted and not any(is_silent(side, atom, self.graph, self.deps) for side in sides):
                found.append(product.node)
        return found

    def _adds_nothing(self, freeze: Freeze, atom: int) -> bool:
        """Whether a freeze is because of a sum to which cut neurons, being zero, do not add."""
        if freeze not in self.deps.facts.sums or atom not in self.deps.atoms(*freeze.axis):
            return False
        return is_silent(freeze.axis[0], atom, self.graph, self.deps)

    def _twice(self, atom: int) -> list[str]:
        """Tensors in which a factor occurs more than once; a weight may have it on two axes."""
        found = []
        for tensor in {place[0] for place in self.deps.places[atom]}:
            spots = [place for place in self.deps.places[atom] if place[0] == tensor]
            if len(spots) > 1 and (tensor not in self.graph.weights or len({spot[1] for spot in spots}) < len(spots)):
                found.append(tensor)
        return found
