"""The command line: one function per verb; parsing and printing only."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onnxsnp._version import __version__
from onnxsnp.arguments import checked_numbers, checked_threads, input_shapes, numbers, output_path, page_path
from onnxsnp.console import guarded, print_json, progress_bar, status, stdout
from onnxsnp.errors import DataError, PlanError, one_line

if TYPE_CHECKING:
    pass

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

_MAPS = 3  # samples whose attention maps a report shows
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
def inspect(
    model: ModelArgument,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Write the dependency graph as a page: search a tensor, see what it is tied to and why.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    input_shape: InputShape = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show attention sites, groups of neurons, cost, and what is left alone and why."""

    def work() -> None:
        from onnxsnp.analysis import analyse_model
        from onnxsnp.analysis import inspect as inspect_model
        from onnxsnp.report import terminal

        if html is not None:
            page_path(html, [model])
        with status("analysing"):
            analysis = analyse_model(model, input_shapes(input_shape, model))
            data = inspect_model(analysis).to_dict()
            if html is not None:
                from onnxsnp.report.dependencies import write_page

                write_page(analysis, html)
        print_json(data) if as_json else terminal.inspection(stdout(), data)

    guarded(work, debug)


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
            help="Folder or zip of images, .npz/.npy of inputs, or a folder with one .npy per input, like those the "
            "model will see; no labels needed. Default: generated inputs.",
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
            "on this machine, or on --host).",
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
    host: Annotated[
        str | None,
        typer.Option(
            metavar="USER@DEVICE",
            help="With --of latency and --target: measure the layers on this device, by ssh and with its own TensorRT.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            help="What may be cut: qk, v, ffn, head (whole heads), residual, channel, separated by commas. Default "
            "qk,v,ffn (with a ratios file: all it names).",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    criterion: Annotated[
        str,
        typer.Option(
            help="Who goes, wherever selection decides (none and refit: everywhere): snp, l2, gm, random, reverse, "
            "multihead (arXiv 2405.20867 without training: change of the attention, or of the output, without the "
            "neuron, times its dissimilarity to others of its head).",
            rich_help_panel=_METHOD,
        ),
    ] = "snp",
    compensation: Annotated[
        str,
        typer.Option(
            help="none: the paper's cut. refit: what reads the cut neurons is refitted by least squares. full: "
            "attention is rotated (or weighted) before it is cut, and so is the residual stream; FFN neurons and heads "
            "go by optimal brain surgeon; then all branches are fitted in order, as far as that helps on unseen "
            "samples.",
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
        int | None,
        typer.Option(
            help="Keep sizes that are multiples of N. Default: what --target wants, else 1.",
            min=1,
            rich_help_panel=_METHOD,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE.toml",
            help="Where the model will run (onnxsnp engine --list-targets): widths suit its hardware, and the sizes of "
            "query, key and value stay one where it fuses attention.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="With --target: what the model will run in there, fp32 or fp16. Default: fp16 where the target has "
            "it, since widths that suit it suit fp32 too.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="Apply a plan, or the plan of a run record, instead of making one.", rich_help_panel=_METHOD),
    ] = None,
    recover: Annotated[
        str | None,
        typer.Option(
            metavar="10m",
            help="Then distil the original into the pruned model on the --calibration data, for this long (90s, 10m, "
            "1h); no labels are needed. See onnxsnp recover.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan; write no model.", rich_help_panel=_OUTPUT)
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Also write a page about the run: what was cut, what it cost, attention before and after.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
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
        read = [plan, *ratios, Path(preprocess or ""), latency_table, Path(target or "")]
        file = output_path(model, output, dry_run, read)
        if latency_table is not None and file is not None:
            written = [file.resolve(), file.with_suffix(".json").resolve()]
            if latency_table.resolve() in written:  # it may not exist yet
                raise PlanError(f"{latency_table} cannot be both the latency table and an output", hint="rename one")
        if report is not None:
            page_path(report, [model, file, None if file is None else file.with_suffix(".json"), *read])
        if eval_data is not None and not eval_data.exists():  # it is read last, after all the work
            raise DataError(f"data {eval_data} does not exist", hint="give --eval-data a folder or zip of images")
        if plan is not None and ratio is not None:
            print("onnxsnp: --ratio does nothing with --plan, which says what to keep", file=sys.stderr)
        bar = progress_bar()
        with bar as progress:
            result = prune_model(
                model,
                ratio,
                output=None if dry_run else file,
                dry_run=dry_run,
                progress=progress,
                say=bar.say,
                recover=recover,
                allocation=allocation,
                of=of,
                latency_table=latency_table,
                host=host,
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
                target=target,
                precision=precision,
                plan=plan,
                threads=threads,
                provider=provider,
                seed=seed,
                input_shapes=input_shapes(input_shape, model),
                attention_maps=_MAPS if report is not None else 0,
            )
        if report is not None:
            from onnxsnp.report.html import write_page

            write_page([result.record], report)
        if dry_run and file is not None:
            write_record(result.plan.to_json(), file)
        if as_json:
            print_json(result.record)
        else:
            terminal.pruning(stdout(), result.record)
            if dry_run:
                terminal.dry_run(stdout(), file)

    guarded(work, debug)


@app.command()
def recover(
    pruned: Annotated[Path, typer.Argument(metavar="PRUNED", help="A pruned .onnx file.")],
    teacher: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            help="The model before pruning. Default: the one in the run record.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Folder or zip of images, .npz/.npy of inputs, or a folder with one .npy per input, like those the "
            "model will see; no labels needed. All of it is used, as it is needed.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    minutes: Annotated[
        str | None,
        typer.Option(help="How long to train: minutes, or 90s, 10m, 1h. Default 10.", rich_help_panel=_METHOD),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Make exactly so many steps instead; the same seed, machine and threads then give the same file.",
            min=1,
            rich_help_panel=_METHOD,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Where to write; default PRUNED.recovered.onnx. The run record goes beside it as .json.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="How many to use, evenly spread; all by default.", min=1, rich_help_panel=_INPUT)
    ] = None,
    preprocess: PreprocessOption = None,
    eval_data: Annotated[
        Path | None,
        typer.Option(
            help="Images in class folders (or a zip of them): report top-1 before and after.", rich_help_panel=_INPUT
        ),
    ] = None,
    input_shape: InputShape = None,
    learning_rate: Annotated[float, typer.Option(help="Highest rate of the cycle.", rich_help_panel=_METHOD)] = 1.5e-4,
    batch: Annotated[int, typer.Option(help="Samples of a step.", min=1, rich_help_panel=_METHOD)] = 16,
    no_augment: Annotated[
        bool,
        typer.Option("--no-augment", help="Take images as they are: no crops, flips, colour.", rich_help_panel=_METHOD),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from what an interrupted run left beside the output.", rich_help_panel=_METHOD
        ),
    ] = False,
    threads: Threads = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Win back accuracy: the original is distilled into the pruned model; no labels, no training framework."""

    def work() -> None:
        from onnxsnp.arguments import recovered_path
        from onnxsnp.recovery.options import minutes as in_minutes
        from onnxsnp.recovery.recover import recover as recover_model
        from onnxsnp.report import terminal

        if minutes is not None and steps is not None:
            raise PlanError("--minutes and --steps both say when to stop", hint="give one of them")
        file = recovered_path(pruned, output, [teacher, Path(preprocess or "")])
        if eval_data is not None and not eval_data.exists():  # it is read last, after all the work
            raise DataError(f"data {eval_data} does not exist", hint="give --eval-data a folder or zip of images")
        bar = progress_bar()
        with bar as progress:
            result = recover_model(
                pruned,
                teacher,
                output=file,
                progress=progress,
                say=bar.say,
                calibration=calibration,
                minutes=in_minutes(minutes or 10),
                steps=steps,
                samples=samples,
                preprocess=preprocess,
                eval_data=eval_data,
                learning_rate=learning_rate,
                batch=batch,
                augment=not no_augment,
                resume=resume,
                threads=threads,
                seed=seed,
                input_shapes=input_shapes(input_shape, pruned),
            )
        print_json(result.record) if as_json else terminal.recovery(stdout(), result.record)

    guarded(work, debug)


@app.command()
def sweep(
    model: ModelArgument,
    ratios: Annotated[
        str,
        typer.Option(
            metavar="FROM:TO:STEP|R,R,...",
            help="Shares to remove, as --ratio of prune: 0.1:0.8:0.1 or 0.2,0.35,0.5.",
            rich_help_panel=_METHOD,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Folder for the models, their records, sweep.csv and sweep.json; default MODEL-sweep. Finished runs "
            "in it are reused when nothing they depend on has changed.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    criterion: Annotated[
        str, typer.Option(help="One or several, as of prune, separated by commas.", rich_help_panel=_METHOD)
    ] = "snp",
    compensation: Annotated[
        str,
        typer.Option(help="none, refit, full, or several separated by commas.", rich_help_panel=_METHOD),
    ] = "full",
    max_drop: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS",
            help="Choose the cheapest plan that loses no more points of top-1 on --eval-data, and write it as "
            "MODEL.pruned.onnx. Without labels: percent of samples whose top-1 changes.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    target_latency: Annotated[
        float | None,
        typer.Option(
            metavar="MS",
            help="Choose the most accurate plan that takes no longer here (within --max-drop, if that is given too).",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="As of prune. Default: generated inputs.", rich_help_panel=_INPUT)
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Calibration samples to fit on, the same for all plans.", min=1, rich_help_panel=_INPUT),
    ] = None,
    preprocess: PreprocessOption = None,
    eval_data: Annotated[
        Path | None,
        typer.Option(help="Images in class folders (or a zip of them), .npz with labels.", rich_help_panel=_INPUT),
    ] = None,
    input_shape: InputShape = None,
    allocation: Annotated[str, typer.Option(help="auto or uniform, as of prune.", rich_help_panel=_METHOD)] = "auto",
    of: Annotated[
        str, typer.Option(help="What ratios are shares of: macs, params or latency.", rich_help_panel=_METHOD)
    ] = "macs",
    scope: Annotated[
        str | None, typer.Option(help="What may be cut, as of prune; default qk,v,ffn.", rich_help_panel=_METHOD)
    ] = None,
    multiple_of: Annotated[
        int | None, typer.Option(help="Keep sizes that are multiples of N.", min=1, rich_help_panel=_METHOD)
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE.toml", help="Where the model will run.", rich_help_panel=_METHOD),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            "--report", metavar="FILE.html", help="Also write a page about all plans.", rich_help_panel=_OUTPUT
        ),
    ] = None,
    threads: Threads = None,
    provider: Provider = "cpu",
    no_latency: Annotated[
        bool, typer.Option("--no-latency", help="Do not time the models.", rich_help_panel=_MACHINE)
    ] = False,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Try many ratios from one pass over the data, and choose the one that meets a limit."""

    def work() -> None:
        from onnxsnp.report import sweeps as report
        from onnxsnp.sweeps.run import sweep as sweep_model

        if eval_data is not None and not eval_data.exists():
            raise DataError(f"data {eval_data} does not exist", hint="give --eval-data a folder or zip of images")
        if page is not None:
            page_path(page, [model, Path(preprocess or ""), Path(target or "")])
        bar = progress_bar(keep=False)
        with bar as progress:
            result = sweep_model(
                model,
                ratios,
                output or model.with_name(f"{model.stem}-sweep"),
                criterion=criterion,
                compensation=compensation,
                max_drop=max_drop,
                target_latency=target_latency,
                progress=progress,
                say=bar.say,
                calibration=calibration,
                samples=samples,
                preprocess=preprocess,
                eval_data=eval_data,
                input_shapes=input_shapes(input_shape, model),
                allocation=allocation,
                of=of,
                scope=scope,
                multiple_of=multiple_of,
                target=target,
                threads=threads,
                provider=provider,
                latency=not no_latency,
                seed=seed,
            )
        if page is not None:
            from onnxsnp.report.html import write_page

            write_page(list(result.records.values()), page)
        print_json(result.summary) if as_json else report.sweep(stdout(), result.summary)
        if result.chosen is None and result.verdict:
            raise PlanError(result.verdict, hint="allow more, or sweep over other ratios; no model was chosen")

    guarded(work, debug)


@app.command()
def evaluate(
    models: ModelsArgument,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="A folder or zip of images in class folders gives top-1 and top-5; so does an .npz with one array "
            "per input, by its name, and class numbers as 'labels'. Data without labels gives agreement with the first "
            "model. Default: generated images.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Which class a folder (or a file) is: JSON {name: number}, {number: name} or [name, ...], or text "
            "with a name and a number, or a name, per line.",
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
        from onnxsnp.calibration.labels import read_label_map
        from onnxsnp.evaluation.accuracy import evaluate_models
        from onnxsnp.report import side_by_side
        from onnxsnp.verbs import known_names, open_for

        named = None if labels is None else read_label_map(labels)
        with progress_bar() as progress:
            opened = open_for(
                models, data, samples=samples, preprocess=preprocess, seed=seed, evaluation=True, labels=named
            )
            results = [
                item.to_dict()
                for item in evaluate_models(
                    list(models),
                    opened,
                    threads=threads,
                    provider=provider,
                    progress=lambda done, total: progress("evaluate", done, total),
                    names=known_names(models[0], named),
                )
            ]
        if as_json:
            print_json({"data": opened.description, "skipped": opened.skipped_count, "models": results})
        else:
            side_by_side.evaluations(stdout(), results, opened.description)

    guarded(work, debug)


@app.command()
def bench(
    models: ModelsArgument,
    batch: Annotated[
        str,
        typer.Option(
            metavar="N,N,...",
            help="Samples per run; several are measured one after the other.",
            callback=checked_numbers,
        ),
    ] = "1",
    runs: Annotated[int, typer.Option(help="Timed rounds; every round runs each model once.", min=1)] = 50,
    warmup: Annotated[int, typer.Option(help="Rounds before the clock starts.", min=0)] = 10,
    per_op: Annotated[
        bool,
        typer.Option("--per-op", help="Break the time down by operator, and say what the cut of MACs did not buy."),
    ] = False,
    no_memory: Annotated[bool, typer.Option("--no-memory", help="Do not measure peak memory.")] = False,
    input_shape: InputShape = None,
    threads: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Threads inside one operator; several are measured one after the other. All cores by default.",
            callback=checked_threads,
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    provider: Provider = "cpu",
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure latency and memory in onnxruntime, models side by side in interleaved rounds."""

    def work() -> None:
        from onnxsnp.report import side_by_side
        from onnxsnp.verbs import bench as bench_paths
        from onnxsnp.verbs import bench_per_op

        sizes = numbers(batch)
        counts = None if threads is None else numbers(threads)
        if per_op and provider != "cpu":
            raise PlanError("the breakdown by operator is for the cpu provider", hint="leave --per-op out")
        shapes = input_shapes(input_shape, models[0])
        with progress_bar() as progress:
            results = [
                item.to_dict()
                for item in bench_paths(
                    models,
                    batch=sizes,
                    runs=runs,
                    warmup=warmup,
                    threads=counts,
                    provider=provider,
                    input_shapes=shapes,
                    seed=seed,
                    memory=not no_memory,
                    progress=lambda done, total: progress("bench", done, total),
                )
            ]
            profiled = []
            if per_op:
                profiled = bench_per_op(
                    models,
                    batch=sizes,
                    runs=runs,
                    warmup=warmup,
                    threads=counts,
                    input_shapes=shapes,
                    seed=seed,
                    progress=lambda done, total: progress("profile", done, total),
                )
        if as_json:
            print_json({"models": results} | ({"per_op": profiled} if per_op else {}))
            return
        side_by_side.latencies(stdout(), results)
        for one in profiled:
            side_by_side.per_op(stdout(), one)

    guarded(work, debug)


@app.command()
def engine(
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL", help="An .onnx file, pruned or not.", show_default=False)
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE.toml",
            help="The device: a profile by name (see --list-targets), or a TOML file with one.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Folder to write; default MODEL-TARGET. The record goes beside it as FOLDER.engine.json.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help="bundle: a folder that the device builds from. local: the TensorRT and GPU of this machine. rtx: "
            "TensorRT for RTX, no GPU needed. ssh: the bundle, built and timed on --host. Default: ssh with --host, "
            "rtx for that target, local if this machine is the target, else bundle.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(metavar="USER@DEVICE", help="Build and time on a device, by ssh.", rich_help_panel=_METHOD),
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32 or fp16.", rich_help_panel=_METHOD)] = "fp32",
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            metavar="8.9",
            help="Of the GPUs an RTX engine is for; may be given several times. Default: any from 8.0 on.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    original: Annotated[
        Path | None,
        typer.Option(
            help="The model before pruning, for numbers before and after. Default: the one in the run record.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Data for the inputs on which outputs are compared, as for prune. Default: generated inputs.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    preprocess: PreprocessOption = None,
    input_shape: InputShape = None,
    list_targets: Annotated[
        bool, typer.Option("--list-targets", help="Show the targets there are.", rich_help_panel=_OUTPUT)
    ] = False,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make an engine for a device, or the folder to build it from there: TensorRT 8.2 to 11, Jetson, RTX."""

    def work() -> None:
        from onnxsnp.report import deployment as report

        if list_targets:
            from onnxsnp.deploy.targets import BUILT_IN

            profiles = [one.to_dict() for one in BUILT_IN.values()]
            print_json({"targets": profiles}) if as_json else report.targets(stdout(), profiles)
            return
        if model is None or target is None:
            what = "model" if model is None else "target"
            raise PlanError(f"no {what} was given", hint="onnxsnp engine MODEL --target NAME; see --list-targets")
        from onnxsnp.deploy.engine import build_engine
        from onnxsnp.deploy.prepare import NotTaken

        try:
            with progress_bar() as progress:
                result = build_engine(
                    model,
                    target=target,
                    output=output or model.with_name(f"{model.stem}-{Path(target).stem}"),
                    backend=backend,
                    host=host,
                    precision=precision,
                    original=original,
                    input_shapes=input_shapes(input_shape, model),
                    calibration=calibration,
                    preprocess=preprocess,
                    compute_capabilities=compute_capability or (),
                    seed=seed,
                    progress=progress,
                    say=lambda line: print(line, file=sys.stderr),
                )
        except NotTaken as error:
            for finding in error.findings:
                print(f"onnxsnp: {one_line(str(finding))}", file=sys.stderr)
            raise
        print_json(result.record) if as_json else report.engine(stdout(), result.record)

    guarded(work, debug)


@app.command()
def report(
    records: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN.json...", help="Run records that prune wrote; records of engine are shown beside them."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE.html", help="The page to write.", rich_help_panel=_OUTPUT),
    ] = Path("report.html"),
    debug: Debug = False,
) -> None:
    """Make one self-contained page of one or more runs; several are compared."""

    def work() -> None:
        from onnxsnp.report.html import read_records, write_page

        page_path(output, list(records))
        write_page(read_records(records), output)
        stdout().print(f"wrote {output}", soft_wrap=True)

    guarded(work, debug)


def main() -> None:
    """Entry point of the `onnxsnp` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a pipe or an old terminal may know no × or →
    app()
