"""The main job: from a model and a ratio to a smaller, proven model and the record of how it came about."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.atomic import whole_file
from onnxsnp.batches import chain, first, proof_feeds, split
from onnxsnp.calibration.changes import IMAGES, AttentionChange, measure_changes
from onnxsnp.calibration.data import Batch, Dataset, Preprocess, open_dataset
from onnxsnp.calibration.lengths import settled
from onnxsnp.calibration.pooling import pool
from onnxsnp.calibration.statistics import Statistics, collect
from onnxsnp.deploy.device_timer import device_timer
from onnxsnp.errors import PlanError
from onnxsnp.evaluation.accuracy import agreement, evaluate_models
from onnxsnp.evaluation.latency import machine
from onnxsnp.evaluation.layers import local_timer
from onnxsnp.evaluation.verify import Verification, prove
from onnxsnp.graph.groups import Group
from onnxsnp.graph.inputs import graph_inputs
from onnxsnp.graph.ir import Graph
from onnxsnp.graph.probabilities import AttentionPath
from onnxsnp.graph.quantised import describe
from onnxsnp.measured import Measured, fitted, judging, tuning
from onnxsnp.model import Model, check_output, give_back
from onnxsnp.options import Options
from onnxsnp.planning import scope
from onnxsnp.planning.allocation import off_target
from onnxsnp.planning.automatic import allocate
from onnxsnp.planning.curves import Loss
from onnxsnp.planning.evidence import evidence
from onnxsnp.planning.latency import measure_table, table_for
from onnxsnp.planning.latency_table import LatencyTable
from onnxsnp.planning.plan import Plan, check_plan, fingerprint, read_plan
from onnxsnp.planning.selection import Requirements, Selector, requirements, union
from onnxsnp.reconstruction.full import Reconstruction
from onnxsnp.record import new_record, settings
from onnxsnp.recovery.distil import open_data, recovered
from onnxsnp.refinement import refine
from onnxsnp.runtime import InputSpec
from onnxsnp.scoring.criteria import CRITERIA
from onnxsnp.surgery.apply import Applied, apply
from onnxsnp.timing import time_both
from onnxsnp.verbs import choose_preprocess, class_names
from onnxsnp.writing import builder, write_model

_BATCH = 8

Progress = Callable[[str, int, int], None]


@dataclass
class PruneResult:
    """A pruned model and its record.

    Attributes:
        plan: which neurons stay.
        record: what is written as `*.pruned.json` (the JSON contract of `onnxsnp prune`).
    """

    plan: Plan
    record: dict[str, Any] = field(default_factory=dict)
    build: Callable[[], onnx.ModelProto] | None = None

    @cached_property
    def model(self) -> onnx.ModelProto | None:
        """The pruned model; the unchanged original if nothing was cut; None after a dry run."""
        return self.build() if self.build is not None else None


def prune(
    source: str | Path | onnx.ModelProto | Model | Analysis,
    ratio: float | None = None,
    *,
    output: str | Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> PruneResult:
    """Prune a model.

    Args:
        source: a path, a model in memory, or an analysis made before (`analyse_model`).
        ratio: share to remove, in [0, 1); what it is a share of depends on `allocation`.
        output: where to write the model, and its record beside it as `.json`; nothing is written if None.
        dry_run: stop once the plan is made.
        progress: called as (stage, done, total).
        say: called with a line now and then while the model is recovered.
        options: the fields of `Options`.

    Returns:
        The model, its plan and the record.

    Raises:
        OnnxSnpError: bad input, a plan that cannot be met, or a cut model that did not prove right. Nothing is written.
    """
    run = Run(Options(ratio=ratio, **options), progress or (lambda stage, done, total: None), say)
    return run.prune(source, output, dry_run)


@contextmanager
def _advised(analysis: Analysis) -> Iterator[None]:
    """What a quantised model cannot do, its floating-point version can."""
    try:
        yield
    except PlanError as error:
        advice = describe(analysis.graph)
        raise PlanError(error.message, hint=advice or error.hint) from error


class Run:
    """The stages of one pruning run, their timing and their notes."""

    def __init__(self, options: Options, progress: Progress, say: Callable[[str], None] | None = None) -> None:
        self.options = options
        self.progress = progress
        self.say = say
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self.allocation: dict[str, Any] | None = None
        self.details: dict[str, Any] = {}
        options.check()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.progress(name, 0, 0)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def prune(self, source: Any, output: str | Path | None, dry_run: bool) -> PruneResult:
        """All stages in order; what each needs is measured before anything is cut, and nothing is written unproved."""
        return self.cut(self.measure(source, output), output, dry_run)

    def measure(self, source: Any, output: str | Path | None, others: Sequence[Options] = ()) -> Measured:
        """The model, the data, and what one pass over it says.

        Args:
            others: options of further runs on the same measurement: other ratios, criteria, compensations.
        """
        with self.stage("analyse"):
            analysis = source if isinstance(source, Analysis) else analyse_model(source, self.options.input_shapes)
            if output is not None:
                check_output(analysis.model, output)
            mark = fingerprint(analysis.model)
        self._note_form(analysis)
        plan = self._given_plan(analysis, mark)
        if plan is None and self.options.allocation == "auto" and self.options.of == "latency":
            analysis = self._with_latency(analysis)
        with _advised(analysis):
            open_widths = plan is None and scope.automatic(self.options, analysis)
            counts = None if open_widths or plan is not None else scope.counts(self.options, analysis)
        if self.options.eval_data is not None:
            self._labelled(analysis)  # bad data should be known now, not after all the work
        runs = [self.options, *others]
        tuned, judged = max(map(tuning, runs)), max(map(judging, runs))
        data = self._data(analysis, tuned + judged)
        seen = fitted(data, self.options.fit_samples, tuned + judged)
        cut = scope.scoped(self.options, analysis) if others else scope.to_cut(self.options, analysis, plan, counts)
        needed = union(
            [requirements(analysis, cut, one.compensation, one.criterion, planned=plan is not None) for one in runs]
        )
        statistics, rest, sample = self._calibrate(analysis, data, needed, seen)
        third = len(rest) * tuned // (tuned + judged)
        return Measured(analysis, mark, plan, data, seen, statistics, sample, rest[:third], rest[third:])

    def cut(self, measured: Measured, output: str | Path | None, dry_run: bool, *, last: bool = True) -> PruneResult:
        """Plan, rebuild, cut and prove by what was measured.

        Args:
            last: no further run needs the statistics, so that their memory is free as soon as this one is done with it.
        """
        analysis, plan, data, mark = measured.analysis, measured.plan, measured.data, measured.mark
        statistics, sample = measured.statistics, measured.sample
        if last:
            measured.statistics = Statistics()
        reconstruction = Reconstruction(analysis, statistics, self.options.compensation)
        loss = self._loss(analysis, reconstruction, measured.unseen)
        if plan is None:
            with _advised(analysis):
                open_widths = scope.automatic(self.options, analysis)
                counts = None if open_widths else scope.counts(self.options, analysis)
                self._note_criterion(analysis, scope.to_cut(self.options, analysis, None, counts))
                plan = self._make_plan(analysis, counts, statistics, reconstruction, loss, mark)
        if not plan.settings:
            plan = replace(plan, settings=settings(self.options, data))
        record = new_record(analysis, plan, self.options, data)
        record |= {"allocation": self.allocation, "details": self.details, "notes": self.notes, "seconds": self.seconds}
        if dry_run:
            return PruneResult(plan, record)
        del statistics
        updates = self._weights(record, analysis, plan, reconstruction, measured, loss)
        del reconstruction, loss
        give_back()
        applied, proof = self._cut(analysis, plan, updates, sample)
        record["verification"] = vars(proof)
        compensated = applied.graph
        if self.options.recover is not None:
            applied = self._recover(record, analysis, applied, data, measured.held)
        self._compare(record, measured, applied.graph, compensated)
        self._map(record, analysis, applied.graph, sample, plan)
        compensated.close()
        del compensated
        if applied.cuts and self.options.latency:
            self._time(record, analysis, applied, sample)
        graph = applied.graph if applied.cuts else None
        del applied
        json.dumps(record, allow_nan=False)  # before anything is written: a record that cannot be is no result
        feeds = proof_feeds(analysis.graph, sample)[:1]
        if output is not None:
            return PruneResult(plan, record, self._write(record, analysis, graph, feeds, Path(output)))
        build = builder(analysis, graph)
        record["after"]["bytes"] = build().ByteSize()
        record["seconds"] = self._rounded()
        return PruneResult(plan, record, build)

    def _note_form(self, analysis: Analysis) -> None:
        """What the file's own form means for the result."""
        expanded = analysis.normalized.expanded
        if expanded:
            self.notes.append(
                f"fused operators ({', '.join(expanded)}) are written as the plain ones they stand for; "
                "onnxruntime fuses most of them again when it loads the file"
            )
        if analysis.graph.brain:
            self.notes.append(
                "onnxruntime runs no bfloat16 on a CPU: measured in single precision, written in bfloat16"
            )

    def _given_plan(self, analysis: Analysis, mark: str) -> Plan | None:
        given = self.options.plan
        if given is None:
            return None
        plan = given if isinstance(given, Plan) else read_plan(given)
        check_plan(plan, analysis.groups, mark)
        return plan

    def _with_latency(self, analysis: Analysis) -> Analysis:
        """The analysis with the measured latency of its layers in its cost model."""
        options, groups = self.options, scope.scoped(self.options, analysis)
        device = device_timer(options)

        def measure() -> LatencyTable:
            table = measure_table(
                analysis,
                groups,
                device or local_timer(options.threads, options.provider),
                machine(options.threads, options.provider),
                multiple=options.multiple,
                seed=options.seed,
                progress=lambda done, total: self.progress("measure layers", done, total),
            )
            return table if device is None else replace(table, machine=device.machine)

        with self.stage("measure layers"):
            latency = table_for(analysis, groups, options.latency_table, measure)
        if device is not None:
            device.forget()
        give_back()
        return replace(analysis, cost=replace(analysis.cost, latency=latency))

    def _make_plan(
        self,
        analysis: Analysis,
        counts: Mapping[str, int] | None,
        statistics: Statistics,
        reconstruction: Reconstruction,
        loss: Loss | None,
        mark: str,
    ) -> Plan:
        """Choose widths if they are not given, and neurons."""
        options = self.options
        surgeon = options.compensation == "full"
        selector = Selector(analysis, statistics, reconstruction, options.criterion, options.seed, surgeon=surgeon)
        if counts is None:
            with self.stage("allocate"):
                counts = self._allocate(analysis, selector, loss)
        if options.allocation == "auto":
            note = off_target(counts, analysis.groups, analysis.cost, options.ratio or 0.0, options.of)
            self.notes.extend([note] if note else [])
        with self.stage("score"):
            plan = Plan(mark, selector.entries(counts, lambda done, total: self.progress("score", done, total)))
            self.details = self._details(analysis, plan, selector)
        return plan

    def _details(self, analysis: Analysis, plan: Plan, selector: Selector) -> dict[str, Any]:
        """By group, why it is as wide as it is; for groups in the scope, of which the selector knows the curves."""
        entries = {entry.id: entry for entry in plan.groups}
        losses = (self.allocation or {}).get("sensitivity", {})
        curves = selector.curves([analysis.groups[name] for name in {**losses, **entries}])
        return {
            group.id: evidence(
                group, entries.get(group.id), curves.get(group.id), selector.scores(group), losses.get(group.id)
            )
            for group in analysis.structure.groups
        }

    def _allocate(self, analysis: Analysis, selector: Selector, loss: Loss | None) -> dict[str, int]:
        """Widths from error curves and measured sensitivities."""
        options = self.options
        scoped = scope.scoped(self.options, analysis)
        if loss is None:
            self.notes.append("too few samples to measure sensitivities: one ratio for all groups")
            return scope.counts(self.options, analysis)
        found = allocate(
            scoped,
            analysis.cost,
            options.ratio or 0.0,
            options.of,
            options.multiple,
            selector,
            loss,
            lambda done, total: self.progress("allocate", done, total),
            scope.ties(options, analysis),
        )
        self.allocation = {
            "loss": found.loss,
            "start": found.start,
            "sensitivity": found.sensitivity,
        }
        return found.counts

    def _data(self, analysis: Analysis, held: int) -> Dataset:
        options = self.options
        specs = graph_inputs(analysis.graph, options.input_shapes)
        if options.calibration is None:
            session = analysis.original.opened(options.threads, options.provider)
            specs = settled(specs, lambda feed: session.run(None, feed))
        data = open_dataset(
            options.calibration,
            specs,
            samples=options.fit_samples + held,
            batch_size=_BATCH,
            preprocess=self._preprocess(analysis, specs),
            seed=options.seed,
            classes=class_names(analysis.model.metadata),
        )
        if data.generated:
            self.notes.append("calibrated on generated inputs; real data of the model's domain does better")
        return data

    def _labelled(self, analysis: Analysis) -> Dataset:
        """The data accuracy is measured on."""
        options = self.options
        specs = graph_inputs(analysis.graph, options.input_shapes)
        return open_dataset(
            options.eval_data,
            specs,
            batch_size=_BATCH,
            pad_last=True,
            shuffle=False,
            preprocess=self._preprocess(analysis, specs),
            classes=class_names(analysis.model.metadata),
        )

    def _preprocess(self, analysis: Analysis, specs: Sequence[InputSpec]) -> Preprocess | None:
        given = self.options.preprocess
        return given if isinstance(given, Preprocess) else choose_preprocess(specs, analysis.model.metadata, given)

    def _calibrate(
        self, analysis: Analysis, data: Dataset, needed: Requirements, seen: int
    ) -> tuple[Statistics, list[Batch], Batch]:
        """Measure what plans need on all but the last samples, which are held back."""
        options = self.options
        with self.stage("calibrate"):
            fit, held = split(data, seen)
            sample = next(fit)
            batches: Iterable[Batch] = chain(sample, fit)
            if needed.nothing:
                statistics = Statistics()
                for _ in batches:  # the held-back part comes after what the fit would have seen
                    pass
            else:
                statistics = collect(
                    analysis.graph,
                    analysis.dependencies,
                    analysis.structure.sites,
                    needed.scored,
                    needed.tensors,
                    batches,
                    pair_groups=needed.rotated,
                    gain_sites=needed.gained,
                    rank=options.rank,
                    samples=seen,
                    threads=options.threads,
                    provider=options.provider,
                    progress=lambda done: self.progress("calibrate", done, seen),
                )
                pool(statistics.moments, analysis.shared_inputs)
        if needed.changed:
            with self.stage("drop channels"):
                statistics.changes = self._changes(analysis, data, needed.changed, seen)
        return statistics, held, sample

    def _note_criterion(self, analysis: Analysis, cut: Sequence[Group]) -> None:
        """Where a criterion cannot be had and another one stands in for it."""
        options = self.options
        if not CRITERIA[options.criterion].by_change:
            return
        needed = requirements(analysis, cut, options.compensation, options.criterion, planned=False)
        if needed.scored:
            names = ", ".join(group.id for group in needed.scored)
            self.notes.append(
                f"{names}: no softmax of its own to watch, so ranked by snp instead of {options.criterion}"
            )

    def _changes(
        self, analysis: Analysis, data: Dataset, paths: Mapping[str, AttentionPath], seen: int
    ) -> dict[str, AttentionChange]:
        """What the attention loses without each channel, on the first samples."""
        images = min(IMAGES, seen)
        return measure_changes(
            analysis.graph,
            analysis.dependencies,
            paths,
            analysis.groups,
            first(data, images),
            threads=self.options.threads,
            provider=self.options.provider,
            progress=lambda done: self.progress("drop channels", done, images),
        )

    def _loss(self, analysis: Analysis, reconstruction: Reconstruction, unseen: list[Batch]) -> Loss | None:
        """What measures plans on samples the fit has not seen; None without full compensation, or such samples."""
        if self.options.compensation != "full" or not unseen:
            return None
        return Loss(analysis, reconstruction, unseen, threads=self.options.threads, provider=self.options.provider)

    def _weights(
        self,
        record: dict[str, Any],
        analysis: Analysis,
        plan: Plan,
        reconstruction: Reconstruction,
        measured: Measured,
        loss: Loss | None,
    ) -> dict[str, np.ndarray]:
        """The weights that make up for the cut: one-shot, then refitted in the order of the graph."""
        updates: dict[str, np.ndarray] = {}
        if self.options.compensation != "none":
            with self.stage("refit"):
                updates = reconstruction.weights(plan)
        if loss is None or not any(entry.kept < entry.size for entry in plan.groups):
            return updates
        streams = reconstruction.streams(plan)
        reconstruction.forget()  # second moments of wide layers are larger than the model
        give_back()
        with self.stage("refit in order"):
            refined = refine(
                analysis,
                plan,
                updates,
                lambda: first(measured.data, measured.seen),
                loss,
                streams=streams,
                threads=self.options.threads,
                provider=self.options.provider,
                progress=lambda done, total: self.progress("refit in order", done, total),
            )
        record["steps"] = refined.report()
        self.notes.extend(refined.notes())
        return refined.updates

    def _cut(
        self, analysis: Analysis, plan: Plan, updates: Mapping[str, np.ndarray], sample: Batch
    ) -> tuple[Applied, Verification]:
        with self.stage("cut"):
            applied = apply(analysis, plan, updates)
        with self.stage("verify"):
            feeds = proof_feeds(analysis.graph, sample)
            proof = prove(analysis, applied, feeds, self.options.threads, self.options.provider)
        give_back()
        return applied, proof

    def _recover(
        self, record: dict[str, Any], analysis: Analysis, applied: Applied, data: Dataset, held: list[Batch]
    ) -> Applied:
        """Distil the original into the cut model; what judges the result is not learnt from."""
        if not applied.cuts:
            self.notes.append("nothing was cut, so there is nothing to recover")
            return applied
        options = self.options.recovery
        with self.stage("recover"):
            judging = data.tail(sum(batch.count for batch in held))
            rest = open_data(analysis, options).without(judging)
            graph, found = recovered(analysis, applied.graph, rest, options, self.progress, self.say)
        record["recovery"] = found.report
        self.notes.extend(found.report["notes"])
        give_back()
        return replace(applied, graph=graph)

    def _write(
        self,
        record: dict[str, Any],
        analysis: Analysis,
        graph: Graph | None,
        feeds: list[dict[str, np.ndarray]],
        output: Path,
    ) -> Callable[[], onnx.ModelProto]:
        """Write model and record; return how to get the model again.

        The record is on the disk before the model takes its place: what can fail has happened by then.
        """
        with self.stage("write"), whole_file(output.with_suffix(".json")) as part:
            start = time.perf_counter()

            def describe(size: int) -> None:
                record["after"]["bytes"] = size
                record["seconds"] = self._rounded() | {"write": round(time.perf_counter() - start, 3)}
                part.write_text(json.dumps(record, indent=1, allow_nan=False))

            record["output"] = str(output)
            opened = {"threads": self.options.threads, "provider": self.options.provider}
            write_model(analysis, graph, feeds, output, describe, **opened)
        return partial(onnx.load, str(output))

    def _rounded(self) -> dict[str, float]:
        return {name: round(value, 3) for name, value in self.seconds.items()}

    def _compare(self, record: dict[str, Any], measured: Measured, graph: Graph, compensated: Graph) -> None:
        """Run original and cut model side by side: on held-back samples, and on labelled data if there is any."""
        analysis, held = measured.analysis, measured.held
        if not held and self.options.eval_data is None:
            return
        options = self.options
        original = analysis.original.opened(options.threads, options.provider)
        sessions = [measured.remembered(original), graph.opened(options.threads, options.provider)]
        if held:
            with self.stage("compare"):
                record["agreement"] = agreement(sessions[0], sessions[1], held)
        if options.eval_data is not None:
            if compensated is not graph:
                sessions.insert(1, compensated.opened(options.threads, options.provider))
            record["accuracy"] = self._evaluate(analysis, sessions)

    def _map(self, record: dict[str, Any], analysis: Analysis, graph: Graph, sample: Batch, plan: Plan) -> None:
        """What both models attend to, where that was asked for."""
        options = self.options
        if options.attention_maps and analysis.structure.sites:
            from onnxsnp.evaluation.rollout import attention_maps

            with self.stage("attention maps"):
                record["attention"] = attention_maps(
                    analysis,
                    graph,
                    sample,
                    plan,
                    images=options.attention_maps,
                    threads=options.threads,
                    provider=options.provider,
                )

    def _time(self, record: dict[str, Any], analysis: Analysis, applied: Applied, sample: Batch) -> None:
        """Time original and cut model side by side, one sample a run where the model leaves that open."""
        with self.stage("time"):
            feed = proof_feeds(analysis.graph, sample)[0]
            record["latency"], note = time_both(
                analysis,
                applied,
                feed,
                asked=self.options.ratio or 0.0,
                threads=self.options.threads,
                provider=self.options.provider,
                progress=lambda done, total: self.progress("time", done, total),
            )
        self.notes.extend([note] if note else [])
        give_back()

    def _evaluate(self, analysis: Analysis, sessions: Sequence[Any]) -> dict[str, Any]:
        data = self._labelled(analysis)
        with self.stage("evaluate"):
            results = evaluate_models(
                sessions,
                data,
                progress=lambda done, total: self.progress("evaluate", done, total),
                names=class_names(analysis.model.metadata),
            )
        names = ("before", "after") if len(results) == 2 else ("before", "compensated", "after")
        return {name: one.to_dict() for name, one in zip(names, results, strict=True)}
