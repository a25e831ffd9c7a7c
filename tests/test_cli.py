"""The command as a user meets it: what it prints and writes, and one clear line for everything that goes wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest
from PIL import Image
from typer.testing import CliRunner

from onnxsnp import cli, pruning
from onnxsnp.errors import ModelError

EXPORT = "timm_deit_sdpa_ts17_dyn.onnx"  # input image [batch, 3, 16, 16], two blocks of three heads
SHORT = ("--samples", "8", "--threads", "1")
PLAIN = ("--compensation", "none", "--criterion", "l2")  # the quickest way to prune
COMMAND = (sys.executable, "-c", "import onnxsnp.cli; onnxsnp.cli.main()")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exports: Path) -> Path:
    """A working folder that holds only `net.onnx`."""
    shutil.copyfile(exports / EXPORT, tmp_path / "net.onnx")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders with 10 images each."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(20):
        (folder / "ab"[index % 2]).mkdir(exist_ok=True)
        pixels = rng.integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "ab"[index % 2] / f"{index}.png")
    return folder


def call(*arguments: object) -> Any:
    try:
        runner = CliRunner(mix_stderr=False)
    except TypeError:  # newer versions never mix them
        runner = CliRunner()
    return runner.invoke(cli.app, [str(one) for one in arguments])


def good(*arguments: object) -> str:
    """Standard output of a call that must succeed."""
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def prune(*arguments: object) -> str:
    return good("prune", "net.onnx", *PLAIN, *SHORT, *arguments)


def bad(*arguments: object, leaves: Sequence[str] | None = None) -> str:
    """The one line that a call which must fail puts on stderr; it writes nothing and leaves nothing."""
    before = sorted(os.listdir()) if leaves is None else sorted(leaves)
    result = call(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == "" and sorted(os.listdir()) == before
    (line,) = result.stderr.splitlines()
    assert line.startswith("onnxsnp: ") and "Traceback" not in line and "unexpected" not in line
    return line.removeprefix("onnxsnp: ")


def misused(*arguments: object) -> str:
    """What a usage error says."""
    result = call(*arguments)
    assert result.exit_code == 2 and result.stdout == "", result.output
    return " ".join(re.sub(r"[│╭╮╰╯─]|\x1b\[[0-9;]*m", " ", result.stderr).split())


# Verbs that work


def test_inspect_shows_sites_groups_and_cost(here: Path) -> None:
    text = good("inspect", "net.onnx")
    assert text.startswith(
        "10.87 k parameters, 190.03 k MACs per sample, 0.1 MB, opset 17, input image batch×3×16×16\n"
    )
    assert re.search(r"^blocks\.1\.attn +3 +8 +8 +Q–K, V, heads$", text, re.M)
    assert re.search(r"^ffn\.0 +FFN +40 .* yes$", text, re.M)


def test_inspect_json_has_the_promised_fields(here: Path) -> None:
    data = json.loads(good("inspect", "net.onnx", "--json"))
    assert {"params", "macs", "sites", "groups", "skipped"} <= data.keys()
    for site in data["sites"]:
        assert {"name", "heads", "qk_size", "v_size", "prunable", "reasons"} <= site.keys()
        assert site["prunable"].keys() == {"qk", "v", "head"}
    assert all({"id", "kind", "size", "heads", "params", "macs"} <= group.keys() for group in data["groups"])


def test_prune_writes_model_and_record_beside_the_model(here: Path) -> None:
    text = prune("-r", "0.3")
    assert sorted(os.listdir()) == ["net.onnx", "net.pruned.json", "net.pruned.onnx"]
    assert re.search(r"^wrote net\.pruned\.onnx in [0-9.]+ s$", text, re.M) and "proved: checker" in text
    record = json.loads(Path("net.pruned.json").read_text())
    assert record["output"] == "net.pruned.onnx" and record["after"]["bytes"] == Path("net.pruned.onnx").stat().st_size
    onnx.checker.check_model(onnx.load("net.pruned.onnx"), full_check=True)


def test_prune_json_is_the_record_and_nothing_else(here: Path) -> None:
    text = prune("-r", "0.3", "-o", "small.onnx", "--json")
    assert json.loads(text) == json.loads(Path("small.json").read_text())
    record = json.loads(text)
    for side in ("before", "after"):
        assert {"params", "macs", "bytes"} <= record[side].keys()
    assert record["verification"]["passed"] is True and record["verification"]["masked_equality"] < 1e-4
    assert {"agreement", "seconds", "output"} <= record.keys()
    assert all({"id", "kind", "before", "after"} <= group.keys() for group in record["groups"])


@pytest.mark.parametrize(
    "options",
    [
        ("--allocation", "uniform", "--scope", "qk,ffn", "--multiple-of", "4"),
        ("--of", "params", "--compensation", "refit", "--criterion", "gm"),
        ("--compensation", "full", "--rank", "2", "--seed", "5"),
        ("--scope", "residual", "--allocation", "uniform"),
        ("--input-shape", "image:1x3x16x16", "--preprocess", "half", "--provider", "cpu"),
    ],
)
def test_prune_options_are_kept_in_the_record(here: Path, options: tuple[str, ...]) -> None:
    record = json.loads(prune("-r", "0.25", "-o", "s.onnx", "--json", *options))
    asked = dict(zip(options[::2], options[1::2], strict=True))
    for name, value in asked.items():
        held = record["settings"].get(name.removeprefix("--").replace("-", "_"), value)
        assert str(held) == value
    assert record["after"]["macs"] < record["before"]["macs"]


def test_a_dry_run_writes_a_plan_at_most(here: Path) -> None:
    text = prune("-r", "0.3", "--dry-run")
    assert os.listdir() == ["net.onnx"] and "wrote" not in text and "no model was written" in text
    text = prune("-r", "0.3", "--dry-run", "-o", "plan.json")
    assert sorted(os.listdir()) == ["net.onnx", "plan.json"]
    assert "wrote the plan plan.json" in text and "proved" not in text


@pytest.mark.parametrize("compensation", ["none", "full"])
def test_a_saved_plan_gives_the_same_model(here: Path, compensation: str) -> None:
    how = ("--compensation", compensation)
    prune("-r", "0.3", *how, "--dry-run", "-o", "plan.json")
    prune("-r", "0.3", *how, "-o", "direct.onnx")
    prune("--plan", "plan.json", *how, "-o", "planned.onnx")
    prune("--plan", "direct.json", *how, "-o", "again.onnx")
    models = {Path(name).read_bytes() for name in ("direct.onnx", "planned.onnx", "again.onnx")}
    assert len(models) == 1


def test_a_ratio_beside_a_plan_is_said_to_do_nothing(here: Path) -> None:
    prune("-r", "0.3", "--dry-run", "-o", "plan.json")
    result = call("prune", "net.onnx", "-r", "0.9", "--plan", "plan.json", "-o", "s.onnx", "--json", *SHORT, *PLAIN)
    assert result.exit_code == 0 and "--ratio does nothing with --plan" in result.stderr
    assert json.loads(result.stdout)["output"] == "s.onnx"


def test_a_ratio_of_zero_gives_the_model_itself(here: Path) -> None:
    text = prune("-r", "0", "-o", "same.onnx")
    assert "nothing was cut" in text
    assert len(onnx.load("same.onnx").graph.node) == len(onnx.load("net.onnx").graph.node)


def test_ratios_from_a_file(here: Path) -> None:
    sets = {"small": {"query_key": [0.5, 0.25]}, "large": {"query_key": [0.75, 0.75], "residual": 0.25}}
    Path("ratios.json").write_text(json.dumps({"models": sets}))
    record = json.loads(prune("--allocation", "ratios.json:small", "-o", "s.onnx", "--json"))
    after = {group["id"]: group["after"] for group in record["groups"]}
    assert (after["qk.0"], after["qk.1"], after["residual"]) == (4, 6, 24)


def test_calibration_passes_over_broken_images_and_says_so(here: Path, images: Path) -> None:
    shutil.copytree(images, "mixed")
    Path("mixed/a/broken.png").write_text("no image")
    text = prune("-r", "0.3", "--calibration", "mixed", "-o", "s.onnx")
    assert "note: 1 unreadable calibration files were skipped" in text and "generated" not in text


def test_eval_data_gives_accuracy_before_and_after(here: Path, images: Path) -> None:
    record = json.loads(prune("-r", "0.3", "--eval-data", images, "-o", "s.onnx", "--json"))
    assert record["accuracy"]["before"]["count"] == record["accuracy"]["after"]["count"] == 20
    assert 0 <= record["accuracy"]["after"]["top1"] <= 100
    assert "top-1 (20 samples)" in prune("-r", "0.3", "--eval-data", images, "-o", "s.onnx")


def test_evaluate_with_and_without_labels(here: Path, images: Path) -> None:
    prune("-r", "0.3", "-o", "small.onnx")
    text = good("evaluate", "net.onnx", "small.onnx", "--data", images, "--threads", 1)
    assert text.startswith("20 images of ") and "top-1" in text and "agreement" in text and "\nsmall.onnx " in text
    text = good("evaluate", "net.onnx", "small.onnx", "--samples", 8, "--threads", 1)
    assert text.startswith("8 generated") and "top-1" not in text
    data = json.loads(good("evaluate", "net.onnx", "small.onnx", "--data", images, "--samples", 6, "--json"))
    assert [one["model"] for one in data["models"]] == ["net.onnx", "small.onnx"] and data["models"][1]["count"] == 6


def test_bench_prints_a_row_for_each_model(here: Path) -> None:
    shutil.copyfile("net.onnx", "[b] :smile: copy.onnx")
    text = good("bench", "net.onnx", "[b] :smile: copy.onnx", "--runs", 2, "--warmup", 0, "--threads", 1)
    assert re.search(r"^net\.onnx .* ms ", text, re.M) and "\n[b] :smile: copy.onnx " in text
    assert "batch 1, 2 interleaved rounds, 1 thread, cpu" in text
    assert len(json.loads(good("bench", "net.onnx", "--runs", 2, "--json"))["models"]) == 1


def test_recover_takes_up_what_prune_wrote(here: Path, images: Path) -> None:
    prune("--ratio", "0.4", "-o", "small.onnx")
    options = ("--calibration", images, "--threads", "1")
    lines = good("recover", "small.onnx", *options, "--eval-data", images, "--steps", "6")
    assert "loss on samples held back" in lines and "top-1 (20 samples)" in lines
    assert "wrote small.recovered.onnx" in lines
    record = json.loads((here / "small.recovered.json").read_text())
    assert record["recovery"]["steps"] == 6 and record["input"] == "net.onnx"
    assert record["after"]["bytes"] == (here / "small.recovered.onnx").stat().st_size
    printed = good("recover", "small.onnx", *options, "--steps", "2", "--json")
    assert json.loads(printed)["recovery"]["steps"] == 2
    assert not list(here.glob("*.npz"))


def test_prune_recovers_in_one_command(here: Path, images: Path) -> None:
    lines = prune("--ratio", "0.4", "--calibration", images, "--eval-data", images, "--recover", "1s", "--no-latency")
    assert "after compensation" in lines and "after recovery" in lines and "recovery: " in lines


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "learns from real data"),
        (("--calibration", "images", "--minutes", "soon"), "cannot read the duration 'soon'"),
        (("--calibration", "images", "--minutes", "1", "--steps", "2"), "both say when to stop"),
        (("--calibration", "missing", "--teacher", "net.onnx"), "data missing does not exist"),
        (("--calibration", "images", "--teacher", "none.onnx"), "no such model file: none.onnx"),
        (("--calibration", "images", "-o", "net.onnx"), "would overwrite the input"),
        (("--calibration", "images"), "the original is not known"),
    ],
)
def test_recover_says_what_is_wrong(here: Path, images: Path, arguments: tuple[str, ...], reason: str) -> None:
    (here / "images").symlink_to(images)
    assert reason in bad("recover", "net.onnx", *arguments, leaves=["images", "net.onnx"])


def test_a_model_without_attention(here: Path) -> None:
    onnx.save(graphs.mlp(8, 16, 5), "mlp.onnx")
    assert "no attention site found" in good("inspect", "mlp.onnx")
    text = good("prune", "mlp.onnx", "-r", "0.3", *SHORT)
    assert text.splitlines()[0].split() == ["block", "FFN"]


def test_targets_are_listed(here: Path) -> None:
    text = good("engine", "--list-targets")
    (nano,) = [line for line in text.splitlines() if line.startswith("jetson-nano")]
    assert nano.split()[-6:] == ["13", "5.3", "fp32,", "fp16", "any", "no"] and "JetPack 4.6.1" in nano
    listed = json.loads(good("engine", "--list-targets", "--json"))["targets"]
    assert {one["name"] for one in listed} >= {"jetson-nano", "jetson-xavier", "jetson-orin", "tensorrt-8.6", "rtx"}


def test_a_model_is_pruned_for_a_target_and_made_ready_for_it(here: Path) -> None:
    text = prune("-r", "0.3", "-o", "small.onnx", "--target", "jetson-nano")
    assert "jetson-nano in fp16: any width will do" in text and "has compute capability 5.3, and 7.5 is needed" in text
    text = good("engine", "small.onnx", "--target", "jetson-nano", "-o", "nano/")
    assert "no engine was built here: an engine for jetson-nano is built on the device" in text
    assert "same outputs as small.onnx" in text and "original, lowered: same outputs as net.onnx" in text
    steps = [line.strip() for line in text.splitlines() if line.startswith("  s")]
    assert steps == ["scp -r nano USER@DEVICE:", "ssh USER@DEVICE sh nano/build.sh"]
    assert sorted(os.listdir()) == ["nano", "nano.engine.json", "net.onnx", "small.json", "small.onnx"]
    assert os.access("nano/build.sh", os.X_OK) and Path("nano/check.py").is_file()


def test_engine_json_is_the_record_and_nothing_else(here: Path) -> None:
    record = json.loads(good("engine", "net.onnx", "--target", "jetson-nano", "--json"))
    assert record == json.loads(Path("net-jetson-nano.engine.json").read_text()) and record["built"] is False
    assert record["output"] == "net-jetson-nano" and record["target"]["name"] == "jetson-nano"


def test_a_target_of_ones_own(here: Path) -> None:
    Path("mine.toml").write_text('base = "jetson-orin"\nmultiple_of = {fp16 = 4}\n')
    data = json.loads(prune("-r", "0.3", "-o", "small.onnx", "--target", "mine.toml", "--json"))
    assert data["target"]["name"] == "mine" and data["target"]["multiple_of"] == 4
    assert data["settings"]["multiple_of"] == 4
    options = ("--target", "mine.toml", "--precision", "fp32", "--multiple-of", "2", "--json")
    fp32 = json.loads(prune("-r", "0.3", "-o", "b.onnx", *options))
    assert (fp32["target"]["precision"], fp32["settings"]["multiple_of"]) == ("fp32", 2)
    good("engine", "small.onnx", "--target", "mine.toml", "-o", "out")
    assert json.loads(Path("out.engine.json").read_text())["target"]["name"] == "mine"


# Help


@pytest.mark.parametrize("verb", ["inspect", "prune", "evaluate", "bench", "engine"])
def test_help_names_the_options_and_fits_the_terminal(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = good(verb, "--help")
    assert "--json" in text and "--debug" in text and max(map(len, text.splitlines())) <= 80
    assert verb in good("--help")


def test_latency_can_be_asked_for_and_its_table_kept(here: Path) -> None:
    """On a model this small noise decides what can be saved, so the times in the file are replaced by plain ones."""
    options = ("--of", "latency", "--latency-table", "t.json", "--json")
    prune("-r", "0", *options)
    table = json.loads(Path("t.json").read_text())
    for times in table["layers"].values():
        times["ms"] = [1 + width / times["widths"][-1] for width in times["widths"]]
    table["whole"] = [{**one, "ms": 20 - 3 * number} for number, one in enumerate(table["whole"])]
    Path("t.json").write_text(json.dumps(table))
    record = json.loads(prune("-r", "0.15", "-o", "s.onnx", *options))
    assert record["settings"]["of"] == "latency" and record["settings"]["latency_table"] == "t.json"
    assert record["latency"]["expected_speedup"] == pytest.approx(1 / 0.85, rel=0.05)
    halves = [group["after"] / group["before"] for group in record["groups"] if group["kind"] in ("qk", "v", "ffn")]
    assert np.mean(halves) == pytest.approx(0.75, abs=0.05)  # the second of the whole models takes 15 % less


def test_a_latency_table_that_cannot_be_used(here: Path, exports: Path) -> None:
    Path("t.json").write_text("{}")
    options = ("-r", "0.1", "--of", "latency", "--latency-table")
    assert bad("prune", "net.onnx", *SHORT, *options, "t.json").startswith("t.json is not a latency table: ")
    assert "cannot read latency table ." in bad("prune", "net.onnx", *SHORT, *options, ".")
    assert bad("prune", "net.onnx", *SHORT, "-r", "0.1", "--latency-table", "t.json").endswith("add --of latency")
    assert "overwrite the input" in bad("prune", "net.onnx", *SHORT, *options, "t.json", "--dry-run", "-o", "t.json")
    for name in ("s.json", "s.onnx"):  # the run record, and the model, which are not there yet
        says = f"{name} cannot be both the latency table and an output; rename one"
        assert bad("prune", "net.onnx", *SHORT, *options, name, "-o", "s.onnx") == says


def test_the_table_shows_latency_unless_it_is_left_out(here: Path) -> None:
    assert re.search(r"^latency at batch 1 +[0-9.]+ ms +[0-9.]+ ms +[+-][0-9.]+%$", prune("-r", "0.3"), re.M)
    assert "latency" not in prune("-r", "0.3", "--no-latency")
    assert "latency" not in json.loads(Path("net.pruned.json").read_text())


def test_prune_help_teaches_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = good("prune", "--help")
    for word in (
        "0 ≤ R < 1",
        "uniform",
        "FILE:ENTRY",
        "refit",
        "optimal brain surgeon",
        "Default: generated",
        "imagenet",
    ):
        assert word in text
    for option in (
        "no-latency",
        "latency-table",
        "ratio",
        "allocation",
        "of",
        "scope",
        "criterion",
        "compensation",
        "plan",
        "dry-run",
        "eval-data",
    ):
        assert f"--{option} " in text


def test_version_and_bare_call() -> None:
    assert re.fullmatch(r"onnxsnp \d+\.\d+\.\d+\S*\n", good("--version"))
    assert "inspect" in call().output


# Models that cannot be used


def no_model(kind: str, exports: Path) -> str:
    name = f"{kind}.onnx"
    if kind == "folder":
        Path(name).mkdir()
    elif kind != "absent":
        whole = (exports / EXPORT).read_bytes()
        Path(name).write_bytes({"empty": b"", "truncated": whole[:30_000], "text": b"hello world\n"}[kind])
    return name


@pytest.mark.parametrize("verb", [("inspect",), ("prune", "-r", "0.3"), ("evaluate", "net.onnx"), ("bench",)])
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("absent", "no such model file: absent.onnx; check the path"),
        ("empty", "empty.onnx is empty or is not an ONNX model; export it again or check the download"),
        ("truncated", "truncated.onnx is not an ONNX model, or is truncated; export it again or check the download"),
        ("text", "text.onnx is not an ONNX model, or is truncated; export it again or check the download"),
        ("folder", "folder.onnx is not a file; give the .onnx file itself"),
    ],
)
def test_what_is_no_model(here: Path, exports: Path, verb: tuple[str, ...], kind: str, says: str) -> None:
    assert bad(*verb, no_model(kind, exports)) == says


def test_nothing_to_cut(here: Path) -> None:
    onnx.save(graphs.mlp(8, 5), "line.onnx")
    assert "nothing to cut in scope qk,v,ffn; onnxsnp inspect" in bad("prune", "line.onnx", "-r", "0.3")


def test_models_that_cannot_be_compared(here: Path) -> None:
    onnx.save(graphs.mlp(8, 16, 5), "mlp.onnx")
    assert "take different inputs" in bad("evaluate", "net.onnx", "mlp.onnx", "--samples", 4)


# Values that cannot be used


@pytest.mark.parametrize("ratio", ["1.5", "-0.1", "nan", "inf", "1"])
def test_ratios_out_of_range(here: Path, ratio: str) -> None:
    line = bad("prune", "net.onnx", "-r", ratio)
    assert line == f"ratio must be at least 0 and below 1, got {float(ratio)}; 0.3 removes 30 %"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "no ratio was given; say how much to remove, for example --ratio 0.3"),
        (("-r", "0.3", "--scope", "ff"), "unknown scope 'ff'; did you mean 'ffn'?"),
        (("-r", "0.3", "--scope", ""), "scope"),
        (("-r", "0.3", "--scope", "heads"), "unknown scope 'heads'; did you mean 'head'?"),
        (("-r", "0.3", "--criterion", "smp"), "unknown criterion 'smp'"),
        (("-r", "0.3", "--compensation", "ful"), "unknown compensation 'ful'"),
        (("-r", "0.3", "--allocation", "unifrom"), "no such allocation: 'unifrom'"),
        (("-r", "0.3", "--of", "mac"), "unknown cost 'mac'; did you mean 'macs'"),
        (("-r", "0.3", "--preprocess", "imagnet"), "unknown preprocessing 'imagnet'; did you mean 'imagenet'?"),
        (("-r", "0.3", "--preprocess", "no.toml"), "cannot read preprocessing file no.toml"),
        (("-r", "0.3", "--provider", "cdua"), "unknown provider 'cdua'"),
        (("-r", "0.999"), "can remove at most"),
        (("-r", "0.3", "--multiple-of", "1000"), "can remove at most 0.0%"),
        (("-r", "0.3", "--target", "jetson-nanno"), "unknown target 'jetson-nanno'; did you mean jetson-nano?"),
        (("-r", "0.3", "--target", "mine.toml"), "cannot read the target mine.toml"),
        (("-r", "0.3", "--target", "jetson-nano", "--precision", "int8"), "unknown precision 'int8'"),
        (("-r", "0.3", "--precision", "fp16"), "a precision says nothing without a target; add --target"),
    ],
)
def test_options_that_cannot_be_met(here: Path, options: tuple[str, ...], says: str) -> None:
    assert says in bad("prune", "net.onnx", *SHORT, *options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("net.onnx",), "no target was given; onnxsnp engine MODEL --target NAME; see --list-targets"),
        (("--target", "rtx"), "no model was given"),
        (("absent.onnx", "--target", "jetson-nano"), "no such model file: absent.onnx"),
        (("net.onnx", "--target", "nano"), "unknown target 'nano'"),
        (("net.onnx", "--target", "tensorrt-10", "--backend", "local"), "TensorRT is not installed; on a GPU machine:"),
        (("net.onnx", "--target", "jetson-nano", "--backend", "ssh"), "add --host user@device"),
        (("net.onnx", "--target", "jetson-nano", "--host", "-oProxyCommand=x"), "is no host for ssh"),
        (("net.onnx", "--target", "jetson-nano", "--calibration", "absent"), "data absent does not exist"),
        (("net.onnx", "--target", "jetson-nano", "-o", "net.onnx"), "net.onnx exists and is not a folder"),
        (("net.onnx", "--target", "jetson-nano", "-o", "no/such"), "output folder does not exist: no"),
    ],
)
def test_engines_that_cannot_be_made(
    here: Path, options: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert says in bad("engine", *options)


def test_what_a_target_does_not_take_is_one_line_each(here: Path) -> None:
    net = graphs.Net(17)
    x = net.input("x", [2, 3, 3])
    net.output(net.op("Add", net.op("Det", x, name="one"), net.op("Det", x, name="two")), [2])
    onnx.save(net.proto(), "det.onnx")
    result = call("engine", "det.onnx", "--target", "jetson-nano")
    assert result.exit_code == 1 and result.stdout == "" and sorted(os.listdir()) == ["det.onnx", "net.onnx"]
    one, two, last = result.stderr.splitlines()
    assert one.startswith("onnxsnp: error: one (Det): ") and two.startswith("onnxsnp: error: two (Det): ")
    assert last == "onnxsnp: jetson-nano does not take 2 nodes of the model as they are"


@pytest.mark.parametrize("verb", [("prune", "-r", "0.3"), ("evaluate",), ("bench",)])
def test_an_unknown_provider(here: Path, verb: tuple[str, ...]) -> None:
    assert "unknown provider 'gpu'; " in bad(*verb, "net.onnx", "--provider", "gpu")


@pytest.mark.parametrize(
    "arguments",
    [
        "prune net.onnx -r text",
        "prune net.onnx -r 0.3 --samples 0",
        "prune net.onnx -r 0.3 --threads 0",
        "prune net.onnx -r 0.3 --threads 100000",
        "prune net.onnx -r 0.3 --multiple-of 0",
        "prune net.onnx -r 0.3 --seed -1",
        "prune net.onnx -r 0.3 --rank 0",
        "prune net.onnx --ratoi 0.3",
        "prune",
        "evaluate net.onnx --samples 0",
        "evaluate",
        "bench net.onnx --runs 0",
        "bench net.onnx --batch 0",
        "prnue net.onnx",
    ],
)
def test_usage_errors(here: Path, arguments: str) -> None:
    text = misused(*arguments.split())
    assert text.startswith("Usage: ") and "--help' for help" in text and os.listdir() == ["net.onnx"]
    option = re.search(r"(--\S+|-r) \S+$", arguments)
    if option:
        assert option[1] in text


@pytest.mark.parametrize("verb", [("inspect",), ("prune", "-r", "0.3"), ("bench",)])
@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ("a", "cannot read --input-shape 'a'; write it as NAME:1x3x224x224"),
        ("", "cannot read --input-shape ''"),
        ("0x3x16x16", "size below 1"),
        ("-1x3x16x16", "size below 1"),
        ("99999999999999999999x3x16x16", "size below 1 or beyond"),
        ("1x3", "'image'|input image"),
        ("1x4x16x16", "--input-shape '1x4x16x16' does not fit input 'image', which is batch×3×16×16"),
        ("pixels:1x3x16x16", "--input-shape names 'pixels', the model's inputs are image"),
    ],
)
def test_input_shapes_that_make_no_sense(here: Path, verb: tuple[str, ...], shape: str, says: str) -> None:
    assert re.search(says.replace("(", r"\("), bad(*verb, "net.onnx", "--input-shape", shape))


# Files that cannot be used


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such allocation: 'r.json'"),
        ("{bad", "cannot read ratios from r.json"),
        ("[1]", "r.json does not hold ratios by kind"),
        ('{"query_key": [1.2, 0.1]}', "1.2"),
        ('{"query_key": [NaN, 0.1]}', "nan"),
        ('{"query_key": ["x"]}', "r.json does not hold numbers"),
        ('{"query_key": [0.1, 0.1, 0.1]}', "r.json gives a ratio for 'qk.2', which this model does not have"),
        ('{"querykey": [0.1, 0.1]}', "r.json names 'querykey', which is not a known kind"),
    ],
)
def test_allocation_files(here: Path, content: str | None, says: str) -> None:
    if content is not None:
        Path("r.json").write_text(content)
    assert says in bad("prune", "net.onnx", "--allocation", "r.json", *SHORT)


def test_an_allocation_entry_that_is_not_there(here: Path) -> None:
    Path("r.json").write_text('{"models": {"deit_tiny": {"query_key": [0.1, 0.1]}, "other": {}}}')
    line = bad("prune", "net.onnx", "--allocation", "r.json:deit_tny", *SHORT)
    assert line == "r.json has no entry 'deit_tny'; did you mean 'deit_tiny'?"
    assert "deit_tiny, :other" in bad("prune", "net.onnx", "--allocation", "r.json", *SHORT)


def wrong_data(kind: str) -> str:
    rng = np.random.default_rng(0)
    if kind.endswith("folder"):
        Path(kind).mkdir()
        for name in {"no images folder": ["read.me"], "broken folder": ["a.png", "b.jpg"]}.get(kind, []):
            (Path(kind) / name).write_text("nothing")
    elif kind == "shape.npz":
        np.savez(kind, image=rng.random((8, 3, 8, 8), np.float32))
    elif kind == "type.npz":
        np.savez(kind, image=np.array(["a", "b"]))
    elif kind == "nan.npz":
        np.savez(kind, image=np.full((8, 3, 16, 16), np.nan, np.float32))
    elif kind != "absent":
        Path(kind).write_text("nothing")
    return kind


DATA = [
    ("absent", "data absent does not exist"),
    ("empty folder", "no images in empty folder; expected files like .bmp"),
    ("no images folder", "no images in no images folder"),
    ("broken folder", "can be read"),
    ("shape.npz", "shape.npz does not fit input 'image': expected image: (batch, 3, 16, 16) float32, got float32[8, 3"),
    ("type.npz", "type.npz does not fit input 'image'"),
    ("text.npz", "cannot read arrays from text.npz"),
    ("text.zip", "cannot read text.zip as a zip archive"),
    ("text.txt", "data text.txt is not a folder, .zip, .npz or .npy"),
]


@pytest.mark.parametrize(("kind", "says"), [*DATA, ("nan.npz", "not finite")])
def test_calibration_data(here: Path, kind: str, says: str) -> None:
    assert says in bad("prune", "net.onnx", "-r", "0.3", *SHORT, "--calibration", wrong_data(kind))


@pytest.mark.parametrize(("kind", "says"), DATA)
def test_evaluation_data(here: Path, kind: str, says: str) -> None:
    assert says in bad("evaluate", "net.onnx", "--threads", 1, "--data", wrong_data(kind))
    assert says in bad("prune", "net.onnx", "-r", "0.3", *SHORT, *PLAIN, "--eval-data", kind)


@pytest.mark.parametrize(
    "content", [None, "{bad", "[1]", "{}", '{"version": 1, "model": "x", "settings": {}, "groups": [1]}', "\xff\x00"]
)
def test_plans_that_are_none(here: Path, content: str | None) -> None:
    if content is not None:
        Path("plan.json").write_text(content, encoding="latin-1")
    line = bad("prune", "net.onnx", "--plan", "plan.json", *SHORT)
    assert "plan.json" in line and ("is not a plan" in line or "cannot read plan" in line)


def test_a_plan_for_another_model(here: Path, exports: Path) -> None:
    prune("-r", "0.3", "--dry-run", "-o", "plan.json")
    shutil.copyfile(exports / "own_gemm_ts17_dyn.onnx", "other.onnx")
    assert "made for another model" in bad("prune", "other.onnx", "--plan", "plan.json", *SHORT)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda group: group.update(id="qk.9"), "qk.9"),
        (lambda group: group["keep"][0].reverse(), "ascend"),
        (lambda group: group["keep"][0].pop(), "equally long"),
        (lambda group: group["keep"][0].__setitem__(-1, 999), "ascend, be distinct and lie in"),
        (lambda group: group["keep"][0].__setitem__(0, "x"), "is not an index"),
    ],
)
def test_a_plan_that_was_edited_wrongly(here: Path, change: Callable[[Any], None], says: str) -> None:
    prune("-r", "0.3", "--dry-run", "-o", "plan.json")
    plan = json.loads(Path("plan.json").read_text())
    change(plan["groups"][0])
    Path("plan.json").write_text(json.dumps(plan))
    assert says in bad("prune", "net.onnx", "--plan", "plan.json", *SHORT)


# Outputs that cannot be written


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("no/such/x.onnx", "output folder does not exist: no/such; create it first"),
        ("folder", "output folder is a folder; give a file name"),
        ("net.onnx", "would overwrite the input"),
        ("folder/../net.onnx", "would overwrite the input"),
        ("link.onnx", "would overwrite the input"),
        ("x.json", "would be overwritten by its own run record"),
        ("record.onnx", "output record.json is a folder"),
        ("ratios.onnx", "ratios.json would overwrite the input"),
        ("pipe", "output pipe is not a regular file"),
    ],
)
def test_outputs_are_refused_before_the_work(here: Path, output: str, says: str) -> None:
    Path("folder").mkdir()
    Path("record.json").mkdir()
    Path("link.onnx").symlink_to("net.onnx")
    Path("ratios.json").write_text('{"query_key": [0.5, 0.5]}')
    os.mkfifo("pipe")
    assert says in bad("prune", "net.onnx", "--allocation", "ratios.json", *SHORT, "-o", output)


def test_a_folder_without_the_right_to_write(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode, **options: mode != os.W_OK)
    assert "cannot write into ." in bad("prune", "net.onnx", "-r", "0.3", *SHORT)


def test_a_dry_run_does_not_write_its_plan_over_a_model(here: Path) -> None:
    prune("-r", "0.3", "-o", "small.onnx")
    before = Path("small.onnx").read_bytes()
    assert "a dry run writes a plan" in bad("prune", "net.onnx", "-r", "0.3", "--dry-run", "-o", "small.onnx")
    assert Path("small.onnx").read_bytes() == before


def test_an_older_output_survives_a_failed_run(here: Path) -> None:
    Path("net.pruned.onnx").write_text("precious")
    bad("prune", "net.onnx", "-r", "0.3", *SHORT, *PLAIN, "--eval-data", wrong_data("broken folder"),
        leaves=["net.onnx", "net.pruned.onnx", "broken folder"])  # fmt: skip
    assert Path("net.pruned.onnx").read_text() == "precious"


# Errors of every kind become one line


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (ModelError("it is odd", node="/a/b", hint="do this"), 1, "it is odd (at /a/b); do this"),
        (MemoryError(), 1, "out of memory"),
        (OSError(28, "No space left on device", "x.onnx"), 1, "No space left on device: x.onnx"),
        (ValueError("two\nlines"), 1, "unexpected ValueError: two lines; this is a bug, please report it"),
        (KeyboardInterrupt(), 130, "interrupted; nothing half-written was left"),
    ],
)
def test_errors(here: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, says: str) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(pruning, "prune", fail)
    result = call("prune", "net.onnx", "-r", "0.3")
    assert result.exit_code == status and result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("onnxsnp: ") and says in result.stderr
    traced = call("prune", "net.onnx", "-r", "0.3", "--debug").stderr
    assert traced.startswith("Traceback") and says in traced.splitlines()[-1]


def test_an_interrupt_that_an_import_turned_into_another_error(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(pruning, "prune", fail)
    result = call("prune", "net.onnx", "-r", "0.3")
    assert result.exit_code == 130 and "interrupted" in result.stderr
    assert signal.getsignal(signal.SIGINT) is before


# The real command in a process of its own


def shell(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, check=False, env={**os.environ, **(env or {})})


def test_end_to_end_in_a_pipe(here: Path) -> None:
    done = shell("prune", "net.onnx", "-r", "0.3", *SHORT, "--json")
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert json.loads(done.stdout)["output"] == "net.pruned.onnx"
    assert sorted(os.listdir()) == ["net.onnx", "net.pruned.json", "net.pruned.onnx"]


def test_a_terminal_that_knows_only_ascii(here: Path) -> None:
    done = shell("inspect", "net.onnx", env={"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout.isascii() and b"blocks.0.attn" in done.stdout, done.stderr


def test_a_reader_that_has_had_enough(here: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "inspect", "net.onnx", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.skipif(os.name != "posix", reason="limits of a process are set the POSIX way")
def test_a_disk_that_is_full_leaves_nothing(here: Path) -> None:
    import resource

    done = subprocess.run(
        [*COMMAND, "prune", "net.onnx", "-r", "0.3", *SHORT, *PLAIN],
        capture_output=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert done.returncode == 1 and done.stdout == b"" and os.listdir() == ["net.onnx"]
    assert done.stderr.startswith(b"onnxsnp: cannot write net.pruned.") and b"File too large" in done.stderr
    assert done.stderr.count(b"\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="interrupts are sent the POSIX way")
@pytest.mark.parametrize("seconds", [0.3, 2.5])
def test_ctrl_c_leaves_nothing(here: Path, seconds: float) -> None:
    onnx.save(graphs.transformer(blocks=6, heads=4, qk=32, v=32, width=128, ffn=512, tokens=65), "big.onnx")
    begin = "import onnxsnp.cli; print('ready', flush=True); onnxsnp.cli.main()"
    with subprocess.Popen(
        [sys.executable, "-c", begin, "prune", "big.onnx", "-r", "0.3", "--samples", "2000", "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stdout.readline().strip() == b"ready"
        time.sleep(seconds)  # in the middle of the imports, or of the measuring
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == b"" and b"Traceback" not in err, err
    assert sorted(os.listdir()) == ["big.onnx", "net.onnx"]


# Sweep


def test_sweep_shows_a_table_and_writes_the_plan_that_meets_the_limit(here: Path) -> None:
    asked = ("sweep", "net.onnx", "--ratios", "0.2:0.4:0.2", *PLAIN, *SHORT, "--no-latency", "-o", "out")
    result = call(*asked, "--max-drop", "100")
    assert result.exit_code == 0, result.output
    assert re.search(r"^l2-none-40 +→\*? +", result.stdout, re.M) and "wrote out/net.pruned.onnx" in result.stdout
    assert result.stderr.splitlines()[0].startswith("1/2 l2-none-20: ") and "left" in result.stderr
    assert {"net.pruned.onnx", "net.pruned.json", "sweep.csv", "sweep.json"} <= set(os.listdir("out"))
    summary = json.loads(good(*asked, "--max-drop", "100", "--json"))
    assert summary["chosen"] == "l2-none-40" and all(row["reused"] for row in summary["rows"])


def test_sweep_says_that_no_plan_meets_the_limit_and_fails(here: Path) -> None:
    asked = ("sweep", "net.onnx", "--ratios", "0.3", *PLAIN, *SHORT, "-o", "out", "--target-latency", "0")
    result = call(*asked)
    assert result.exit_code == 1 and re.search(r"^l2-none-30 ", result.stdout, re.M)
    last = result.stderr.splitlines()[-1]
    assert "no plan meets --target-latency 0; the closest: l2-none-30" in last
    assert not Path("out/net.pruned.onnx").exists()


def test_sweep_refuses_ratios_that_cannot_be_read(here: Path) -> None:
    assert "cannot read the ratios 'much'" in bad("sweep", "net.onnx", "--ratios", "much")


# Evaluate with labels


def test_evaluate_takes_a_label_map_and_tests_the_difference(here: Path, images: Path) -> None:
    prune("-r", "0.5", "-o", "small.onnx")
    Path("map.json").write_text('{"a": 4, "b": 1}')
    asked = ("evaluate", "net.onnx", "small.onnx", "--data", images, "--labels", "map.json")
    text = good(*asked)
    assert re.search(r"^model +top-1 +95 % CI +top-5 +agreement", text, re.M)
    assert re.search(r"^small\.onnx: [+-]\d\.\d\d points of top-1 \(95 % CI .* exact McNemar p = ", text, re.M)
    result = json.loads(good(*asked, "--json"))["models"][1]
    assert {one["label"]: one["name"] for one in result["classes"]} == {1: "b", 4: "a"}
    assert sum(one["count"] for one in result["classes"]) == 20
    assert result["paired"].keys() == {"lost", "gained", "difference", "difference_interval", "p"}
    Path("map.json").write_text('{"a": 4}')
    assert "no entry for image b/" in bad(*asked)


def test_evaluate_takes_arrays_with_labels(here: Path) -> None:
    np.savez("d.npz", image=np.random.default_rng(0).random((6, 3, 16, 16), np.float32), labels=np.arange(6) % 4)
    result = json.loads(good("evaluate", "net.onnx", "--data", "d.npz", "--json"))["models"][0]
    assert result["count"] == 6 and result["top1"] is not None


# Bench in several settings


def test_bench_says_what_the_cut_did_not_buy(here: Path) -> None:
    prune("-r", "0.5", "-o", "small.onnx")
    asked = ("bench", "net.onnx", "small.onnx", "--runs", "3", "--warmup", "1", "--threads", "1", "--batch", "1,2")
    text = good(*asked, "--per-op", "--no-memory")
    said = r"^small\.onnx \(batch [12], 1 thread, with onnxruntime's profiler on\): MACs -"
    assert len(re.findall(said, text, re.M)) == 2
    assert text.count("not bought") == 2 and "memory" not in text and re.search(r"^MatMul with weights ", text, re.M)
    data = json.loads(good(*asked, "--per-op", "--json", "--no-memory"))
    assert [one["batch"] for one in data["models"]] == [1, 1, 2, 2] and len(data["per_op"]) == 2
    one = data["per_op"][1]["unbought"][0]
    assert sum(part["excess_ms"] for part in one["parts"]) == pytest.approx(one["excess_ms"])


@pytest.mark.parametrize(("option", "value"), [("--batch", "1,x"), ("--batch", "0"), ("--threads", "5000")])
def test_bench_refuses_numbers_that_are_none(here: Path, option: str, value: str) -> None:
    assert option in misused("bench", "net.onnx", option, value)


def test_sweep_writes_a_page_of_all_plans(here: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    good("sweep", "net.onnx", "--ratios", "0.2,0.4", *PLAIN, *SHORT, "--no-latency", "-o", "out", "--report", "p.html")
    text = Path("p.html").read_text()
    assert "l2-none-20" in text and "l2-none-40" in text
