"""The command line: one function per verb; parsing and printing only."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onnxsnp._version import __version__
from onnxsnp.errors import DataError, ModelError, OnnxSnpError, PlanError

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Structured neuron-level pruning of exported ONNX transformers: ONNX in, smaller ONNX out. "
    "No training framework, no account, no upload.",
    epilog="Start with [bold]onnxsnp inspect MODEL[/], then "
    "[bold]onnxsnp prune MODEL --ratio 0.3 --calibration IMAGES[/].",
)

_INPUT, _OUTPUT, _METHOD, _MACHINE = "Data", "Output", "Method", "Machine"

ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="An exported .onnx file.")]
ModelsArgument = Annotated[
    list[Path], typer.Argument(metavar="MODEL...", help="Models to compare; the first is the reference.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.", rich_help_panel=_OUTPUT)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=_OUTPUT)]
Threads = Annotated[
    int | None,
    typer.Option(help="Threads inside one operator; all cores by default.", min=1, max=1024, rich_help_panel=_MACHINE),
]
Provider = Annotated[str, typer.Option(help="cpu or cuda.", rich_help_panel=_MACHINE)]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", min=0, rich_help_panel=_MACHINE)]
PreprocessOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE.toml",
        rich_help_panel=_INPUT,
        help="imagenet, half, clip, raw, or a TOML file with mean, std, scale, resize, crop, interpolation, color. "
        "Default: mean and std from the model's metadata, else imagenet.",
    ),
]
InputShape = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        metavar="[NAME:]1x3x224x224",
        rich_help_panel=_INPUT,
        help="Full shape of an input whose symbolic sizes cannot be guessed; may be given several times.",
    ),
]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Options that stand before the verb."""
    if version:
        print(f"onnxsnp {__version__}")
        raise typer.Exit


@app.command()
def inspect(model: ModelArgument, input_shape: InputShape = None, as_json: Json = False, debug: Debug = False) -> None:
    """Show attention sites, groups of neurons, cost, and what is left alone and why."""

    def work() -> None:
        from onnxsnp.analysis import inspect as inspect_model
        from onnxsnp.report import terminal

        with _status("analysing"):
            data = inspect_model(model, _shapes(input_shape, model)).to_dict()
        _print_json(data) if as_json else terminal.inspection(_stdout(), data)

    _guarded(work, debug)


@app.command()
def prune(
    model: ModelArgument,
    ratio: Annotated[
        float | None,
        typer.Option(
            "--ratio",
            "-r",
            help="Share to remove, 0 ≤ R < 1: of the model's MACs, or what --of says (--allocation auto), or of each "
            "group's neurons (--allocation uniform).",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Where to write; default MODEL.pruned.onnx. The run record goes beside it as .json. With "
            "--dry-run: where to write the plan.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Folder or zip of images, or .npz/.npy of inputs, like those the model will see; no labels needed. "
            "Default: generated images.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Calibration samples to fit on; up to 48 more are held back to tune and judge. Default 256; 64 with "
            "--compensation none.",
            min=1,
            rich_help_panel=_INPUT,
        ),
    ] = None,
    preprocess: PreprocessOption = None,
    eval_data: Annotated[
        Path | None,
        typer.Option(
            help="Images in class folders (or a zip of them): report top-1 before and after.", rich_help_panel=_INPUT
        ),
    ] = None,
    input_shape: InputShape = None,
    allocation: Annotated[
        str,
        typer.Option(
            help="auto: the widths that lose least for the asked share of the cost (with full compensation; else one "
            "ratio that meets it). uniform: the same share of every group's neurons. FILE or FILE:ENTRY: ratios per "
            "block and kind.",
            rich_help_panel=_METHOD,
        ),
    ] = "auto",
    of: Annotated[
        str,
        typer.Option(
            help="What --ratio is a share of with --allocation auto: macs, params, or latency (of one sample, measured "
            "on this machine).",
            rich_help_panel=_METHOD,
        ),
    ] = "macs",
    latency_table: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --of latency: the times of the model's layers, from another run or device; where there is no "
            "such file yet they are measured and written there.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            help="What may be cut: qk, v, ffn, residual, channel, separated by commas. Default qk,v,ffn (with a ratios "
            "file: all it names).",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    criterion: Annotated[
        str,
        typer.Option(
            help="Who goes, wherever selection decides (none and refit: everywhere): snp, l2, gm, random, reverse.",
            rich_help_panel=_METHOD,
        ),
    ] = "snp",
    compensation: Annotated[
        str,
        typer.Option(
            help="none: the paper's cut. refit: what reads the cut neurons is refitted by least squares. full: "
            "attention is rotated (or weighted) before it is cut, and so is the residual stream; FFN neurons go by "
            "optimal brain surgeon, then refit.",
            rich_help_panel=_METHOD,
        ),
    ] = "full",
    rank: Annotated[
        int | None,
        typer.Option(
            help="Singular components of the attention scores that count; estimated per image and head by default.",
            min=1,
            rich_help_panel=_METHOD,
        ),
    ] = None,
    multiple_of: Annotated[
        int, typer.Option(help="Keep sizes that are multiples of N.", min=1, rich_help_panel=_METHOD)
    ] = 1,
    plan: Annotated[
        Path | None,
        typer.Option(help="Apply a plan, or the plan of a run record, instead of making one.", rich_help_panel=_METHOD),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan; write no model.", rich_help_panel=_OUTPUT)
    ] = False,
    threads: Threads = None,
    provider: Provider = "cpu",
    no_latency: Annotated[
        bool,
        typer.Option("--no-latency", help="Do not time the model before and after.", rich_help_panel=_MACHINE),
    ] = False,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a model smaller: the same inputs and outputs, ordinary dense operators, fewer neurons."""

    def work() -> None:
        from onnxsnp.pruning import prune as prune_model
        from onnxsnp.report import terminal
        from onnxsnp.writing import write_record

        ratios = [Path(allocation), Path(allocation.rpartition(":")[0])]
        target = _target(model, output, dry_run, [plan, *ratios, Path(preprocess or ""), latency_table])
        if latency_table is not None and target is not None:
            written = [target.resolve(), target.with_suffix(".json").resolve()]
            if latency_table.resolve() in written:  # it may not exist yet
                raise PlanError(f"{latency_table} cannot be both the latency table and an output", hint="rename one")
        if eval_data is not None and not eval_data.exists():  # it is read last, after all the work
            raise DataError(f"data {eval_data} does not exist", hint="give --eval-data a folder or zip of images")
        if plan is not None and ratio is not None:
            print("onnxsnp: --ratio does nothing with --plan, which says what to keep", file=sys.stderr)
        with _progress() as progress:
            result = prune_model(
                model,
                ratio,
                output=None if dry_run else target,
                dry_run=dry_run,
                progress=progress,
                allocation=allocation,
                of=of,
                latency_table=latency_table,
                latency=not no_latency,
                scope=scope,
                compensation=compensation,
                criterion=criterion,
                rank=rank,
                calibration=calibration,
                samples=samples,
                preprocess=preprocess,
                eval_data=eval_data,
                multiple_of=multiple_of,
                plan=plan,
                threads=threads,
                provider=provider,
                seed=seed,
                input_shapes=_shapes(input_shape, model),
            )
        if dry_run and target is not None:
            write_record(result.plan.to_json(), target)
        if as_json:
            _print_json(result.record)
        else:
            terminal.pruning(_stdout(), result.record)
            if dry_run:
                terminal.dry_run(_stdout(), target)

    _guarded(work, debug)


@app.command()
def evaluate(
    models: ModelsArgument,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="Images in class folders give top-1 and top-5; any images give agreement with the first "
            "model. Default: generated images.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="How many to use, evenly spread; all by default.", min=1, rich_help_panel=_INPUT)
    ] = None,
    preprocess: PreprocessOption = None,
    threads: Threads = None,
    provider: Provider = "cpu",
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare models on data: top-1 and top-5 with labels; agreement, cosine and KL without."""

    def work() -> None:
        from onnxsnp.evaluation.accuracy import evaluate_models
        from onnxsnp.report import terminal
        from onnxsnp.verbs import open_for

        with _progress() as progress:
            opened = open_for(models, data, samples=samples, preprocess=preprocess, seed=seed, evaluation=True)
            results = [
                item.to_dict()
                for item in evaluate_models(
                    list(models),
                    opened,
                    threads=threads,
                    provider=provider,
                    progress=lambda done, total: progress("evaluate", done, total),
                )
            ]
        if as_json:
            _print_json({"data": opened.description, "skipped": opened.skipped_count, "models": results})
        else:
            terminal.evaluations(_stdout(), results, opened.description)

    _guarded(work, debug)


@app.command()
def bench(
    models: ModelsArgument,
    batch: Annotated[int, typer.Option(help="Samples per run.", min=1)] = 1,
    runs: Annotated[int, typer.Option(help="Timed rounds; every round runs each model once.", min=1)] = 50,
    warmup: Annotated[int, typer.Option(help="Rounds before the clock starts.", min=0)] = 10,
    input_shape: InputShape = None,
    threads: Threads = None,
    provider: Provider = "cpu",
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure latency in onnxruntime, models side by side in interleaved rounds."""

    def work() -> None:
        from onnxsnp.report import terminal
        from onnxsnp.verbs import bench as bench_paths

        with _progress() as progress:
            results = [
                item.to_dict()
                for item in bench_paths(
                    models,
                    batch=batch,
                    runs=runs,
                    warmup=warmup,
                    threads=threads,
                    provider=provider,
                    input_shapes=_shapes(input_shape, models[0]),
                    seed=seed,
                    progress=lambda done, total: progress("bench", done, total),
                )
            ]
        _print_json({"models": results}) if as_json else terminal.latencies(_stdout(), results)

    _guarded(work, debug)


def main() -> None:
    """Entry point of the `onnxsnp` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a pipe or an old terminal may know no × or →
    app()


def _guarded(work: Callable[[], None], debug: bool) -> None:
    """Run a verb; an error becomes one line on stderr and exit status 1, an interrupt 130."""
    with _interrupts() as interrupts:
        try:
            work()
            return
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:  # whoever read the output has had enough
                raise
            if debug:
                traceback.print_exc()
            # Compiled modules turn an interrupt during their import into an error of their own.
            interrupted = bool(interrupts) or isinstance(error, KeyboardInterrupt)
            message = "interrupted; nothing half-written was left" if interrupted else _in_words(error)
    print(f"onnxsnp: {message}", file=sys.stderr)
    raise typer.Exit(130 if interrupted else 1)


def _in_words(error: BaseException) -> str:
    """One line for any error."""
    if isinstance(error, OnnxSnpError):
        return str(error)
    if isinstance(error, MemoryError):
        return "out of memory; use fewer --threads or a smaller --input-shape"
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{where}; check the disk and the paths"
    text = " ".join(str(error).split())
    return f"unexpected {type(error).__name__}: {text}; this is a bug, please report it with the output of --debug"


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that holds an entry once Ctrl-C was pressed."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread
        yield seen
        return
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def _target(model: Path, output: Path | None, dry_run: bool, read: list[Path | None]) -> Path | None:
    """Where to write, checked before any work is done.

    Args:
        read: files besides the model that the output must not replace.
    """
    if output is None:
        if dry_run:
            return None
        output = model.with_name(model.stem + ".pruned.onnx")
    elif not output.parent.is_dir():
        raise ModelError(f"output folder does not exist: {output.parent}", hint="create it first")
    if output.suffix == ".json" and not dry_run:
        raise ModelError(f"output {output} would be overwritten by its own run record", hint="name it .onnx")
    if output.suffix == ".onnx" and dry_run:
        raise ModelError(f"a dry run writes a plan, not the model {output}", hint="name it .json, or leave -o out")
    for path in (output,) if dry_run else (output, output.with_suffix(".json")):
        _check_writable(path, [model, *read])
    return output


def _check_writable(path: Path, read: list[Path | None]) -> None:
    if path.is_dir():
        raise ModelError(f"output {path} is a folder", hint="give a file name")
    if path.exists() and not path.is_file():
        raise ModelError(f"output {path} is not a regular file", hint="give a file name")
    if path.parent.is_dir() and not os.access(path.parent, os.W_OK):
        raise ModelError(f"cannot write into {path.parent}", hint="choose another output with -o")
    for source in read:
        if source is not None and source.is_file() and path.exists() and path.samefile(source):
            raise ModelError(f"the output {path} would overwrite the input", hint="give another name with -o")


def _shapes(texts: list[str] | None, model: Path) -> dict[str, tuple[int, ...]] | None:
    """`NAME:1x3x224x224` by input name; without a name, for the model's first input."""
    if not texts:
        return None
    from onnxsnp.model import load

    shapes = {}
    for text in texts:
        name, _, sizes = text.rpartition(":")
        try:
            shape = tuple(int(size) for size in sizes.replace("×", "x").split("x"))
        except ValueError:
            raise PlanError(f"cannot read --input-shape '{text}'", hint="write it as NAME:1x3x224x224") from None
        if min(shape) < 1 or max(shape) >= 2**31:
            raise PlanError(f"--input-shape '{text}' has a size below 1 or beyond 2³¹", hint="write it as 1x3x224x224")
        loaded = load(model)
        inputs = {one.name: one.type.tensor_type.shape.dim for one in loaded.proto.graph.input}
        inputs = {one: sizes for one, sizes in inputs.items() if one not in loaded.weights}
        if not inputs:
            raise PlanError("--input-shape was given, but the model has no inputs")
        name = name or next(iter(inputs))
        if name not in inputs:
            raise PlanError(f"--input-shape names '{name}', the model's inputs are {', '.join(inputs)}")
        fixed = [one.dim_value or None for one in inputs[name]]
        if any(want not in (None, got) for want, got in list(zip(fixed, shape, strict=False))[1:]):
            is_now = "×".join(str(one.dim_value or one.dim_param or "?") for one in inputs[name])
            raise PlanError(f"--input-shape '{text}' does not fit input '{name}', which is {is_now}")
        shapes[name] = shape
    return shapes


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=1, allow_nan=False))


def _stdout() -> Console:
    """The terminal at its own width; in a pipe lines are not broken. Texts are data, not markup."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else 10_000
    return Console(markup=False, emoji=False, highlight=False, width=width)


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _status(text: str) -> Any:
    return _stderr().status(text)


class _progress:
    """A bar on stderr, one line per stage, with the time left where the amount of work is known."""

    def __enter__(self) -> Callable[[str, int, int], None]:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        console = _stderr()
        self._bar = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._bar.start()
        self._tasks: dict[str, Any] = {}
        return self._update

    def _update(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            for task in self._bar.tasks:  # what went before is done, also where its size was not known
                self._bar.update(task.id, total=task.total or 1, completed=task.total or 1)
                self._bar.stop_task(task.id)
            self._tasks[stage] = self._bar.add_task(stage, total=total or None)
        self._bar.update(self._tasks[stage], completed=done, total=total or None)

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
