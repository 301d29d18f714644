"""The command line: what it prints where, its exit codes, bad input, and Ctrl-C."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import List, NamedTuple

import psutil
import pytest
import torch
from PIL import Image

import models
import results
import run_blade
import session
import suite
from backends import base
from catalog import MODELS
from errors import InputError

SCRIPT = Path(run_blade.__file__)
# What makes a run quick; weights are synthetic, so that no test asks the network.
QUICK = ["--weights", "synthetic", "--image-size", "96x128", "--threads", "1", "--warmup", "1"]
NEEDS_NO_TORCH_BLADE = pytest.mark.skipif(
    base.load("torch_blade").unavailable("cuda") is None, reason="TorchBlade is available here"
)
NEEDS_NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


class Outcome(NamedTuple):
    """Of one invocation."""

    code: int
    out: str
    err: str


@pytest.fixture
def main(capsys, monkeypatch):
    """Runs the command line in this process: what the worker processes do not touch."""
    monkeypatch.setattr(sys, "argv", ["run_blade.py"])

    def run(*arguments: object) -> Outcome:
        try:
            code = run_blade.main([str(x) for x in arguments])
        except SystemExit as stop:
            code = stop.code
        return Outcome(code, *capsys.readouterr())

    return run


def script(*arguments: object) -> Outcome:
    """Runs the script in a process of its own, as a user would."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def assert_refused(outcome: Outcome, *words: str) -> None:
    """One clear sentence on standard error that has these words in it, and nothing else."""
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("run_blade.py: error: ")
    assert outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err


# Help and list ---------------------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{str(SCRIPT)!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code\n"
        "print(sorted(name for name in sys.modules if '.' not in name))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=SCRIPT.parent, check=True
    )
    assert "TorchBlade Detectron2 Benchmark" in done.stdout
    imported = set(eval(done.stdout.splitlines()[-1]))
    assert "argparse" in imported
    heavy = {"torch", "numpy", "scipy", "torchvision", "openvino", "PIL", "detectron2", "psutil"}
    assert not imported & heavy


def test_help_names_the_seven_test_models_in_order(main):
    outcome = main("--help")
    assert outcome.code == 0
    assert outcome.err == ""
    assert "TorchBlade Detectron2 Benchmark" in outcome.out
    assert (
        "{testCascadeRCNN,testMaskRCNNC4,testMaskRCNNFPN,testMaskRCNNFPN_b2,"
        "testMaskRCNNFPN_pproc,testRetinaNet,testRetinaNet_scripted}"
    ) in "".join(outcome.out.split())


def test_list_names_models_and_backends(main):
    outcome = main("--list")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert [line.split()[0] for line in lines[1:8]] == list(MODELS)
    assert [line.split()[0] for line in lines[9:]] == [x.name for x in base.load_all()]
    b2 = next(line for line in lines if "testMaskRCNNFPN_b2" in line)
    assert "mask_rcnn_R_50_FPN_3x, traced, 2 images per call" in b2


@NEEDS_NO_CUDA
def test_list_says_why_a_backend_is_unavailable(main):
    lines = main("--list").out.splitlines()
    torch_blade = next(line for line in lines if "torch_blade" in line)
    assert "unavailable: TorchBlade's TensorRT pipeline runs on a CUDA device" in torch_blade
    assert next(line for line in lines if line.split()[0] == "torch").endswith("fp32, bf16")


# Bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--model NAME", "--all"]),
        (["--model", "testRetinaNet", "--all"], ["--model NAME", "--all"]),
        (["--model", "RetinaNet"], ["'RetinaNet'", "testRetinaNet_scripted"]),
        (["--model"], ["--model"]),
        (["--all", "--precision", "fp8"], ["'fp8'", "bf16"]),
        (["--all", "--device", "tpu"], ["'tpu'", "cuda"]),
        (["--all", "--source", "mmdet"], ["'mmdet'", "bundled"]),
        (["--all", "--iterations", "0"], ["--iterations", "0 is not at least 1"]),
        (["--all", "--iterations", "many"], ["--iterations", "'many' is not a whole number"]),
        (["--all", "--warmup", "-1"], ["--warmup", "-1 is not at least 0"]),
        (["--all", "--threads", "0"], ["--threads", "0 is not at least 1"]),
        (["--all", "--detections", "101"], ["--detections", "101 is not", "at most 100"]),
        (["--all", "--time-budget", "0"], ["--time-budget", "'0' is no number of seconds"]),
        (["--all", "--time-budget", "soon"], ["'soon' is no number of seconds"]),
        (["--all", "--time-budget", "nan"], ["'nan' is no number of seconds"]),
        (["--all", "--image-size", "big"], ["--image-size", "'big' is not HxW, like 480x640"]),
        (["--all", "--image-size", "480"], ["'480' is not HxW"]),
        (["--all", "--image-size", "480x640x3"], ["'480x640x3' is not HxW"]),
        (["--all", "--image-size", "480x31"], ["480x31", "at least 32 pixels"]),
        (["--all", "--backend", "tvm"], ["unknown backend 'tvm'", "openvino, torch, torch_blade"]),
        (["--all", "--precision", "fp16"], ["fp16", "cpu"]),
        (["--all", "--backend", "torchscript", "--precision", "int8"], ["int8", "cpu"]),
        (["--all", "--fail-on", "faster"], ["'faster'", "slower"]),
        (["--all", "--colour"], ["--colour"]),
    ],
)
@NEEDS_NO_CUDA
def test_wrong_usage(main, arguments, words):
    assert_refused(main(*arguments), *words)


def test_more_threads_than_cores(main):
    cores = results.usable_cores()
    outcome = main("--all", "--threads", cores + 1)
    assert_refused(outcome, f"--threads {cores + 1}", f"only {cores} cores")


@NEEDS_NO_CUDA
@pytest.mark.parametrize("more", [[], ["--list"], ["--backend", "torch_blade"]])
def test_cuda_where_there_is_none(main, more):
    models = [] if more == ["--list"] else ["--all"]
    assert_refused(main(*models, "--device", "cuda", *more), "no CUDA device")


@NEEDS_NO_TORCH_BLADE
def test_a_backend_that_is_not_installed(main):
    outcome = main("--all", "--backend", "torchscript", "torch_blade")
    assert_refused(outcome, "backend 'torch_blade' is unavailable", "CUDA device")


def test_a_backend_whose_library_is_missing(tmp_path):
    """OpenVINO, found missing by a real import in a process that cannot see it."""
    (tmp_path / "openvino.py").write_text("raise ImportError('no such library')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), "--all", "--backend", "openvino"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    assert_refused(outcome, "backend 'openvino' is unavailable", "pip install openvino")


@pytest.fixture
def images(tmp_path, photograph):
    """Bad images by what is wrong with them."""
    paths = {name: tmp_path / f"{name}.jpg" for name in ("text", "truncated", "small", "empty")}
    paths["text"].write_text("this is not an image\n")
    paths["empty"].write_bytes(b"")
    paths["truncated"].write_bytes(photograph.read_bytes()[:-500])
    Image.new("RGB", (200, 31)).save(paths["small"])
    paths["missing"] = tmp_path / "missing.jpg"
    paths["folder"] = tmp_path
    return paths


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "does not exist"),
        ("text", "is not an image"),
        ("empty", "is not an image"),
        ("truncated", "cannot be read"),
        ("small", "200 x 31 pixels; both sides must have at least 32"),
        ("folder", "cannot be read"),
    ],
)
def test_a_bad_image(main, images, tmp_path, name, words):
    output = tmp_path / "output"
    outcome = main("--all", "--image", images[name], "--output", output)
    assert_refused(outcome, str(images[name]), words)
    assert not output.exists()


class Import:
    """Pickled, it asks whoever reads it to run a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def checkpoints(tmp_path):
    """Bad checkpoints by what is wrong with them."""
    paths = {name: tmp_path / f"{name}.pth" for name in ("truncated", "other", "evil", "text")}
    torch.save(torch.nn.Linear(300, 300).state_dict(), paths["other"])
    paths["truncated"].write_bytes(paths["other"].read_bytes()[:-5000])
    paths["text"].write_text("these are not weights\n")
    torch.save({"model": Import(tmp_path / "marker")}, paths["evil"])
    paths["evil_pickle"] = tmp_path / "evil.pkl"
    paths["evil_pickle"].write_bytes(pickle.dumps({"model": Import(tmp_path / "marker")}))
    paths["missing"] = tmp_path / "missing.pth"
    return paths


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "does not exist"),
        ("truncated", "is truncated or is not a checkpoint"),
        ("text", "is truncated or is not a checkpoint"),
        ("other", "belongs to another architecture"),
        ("evil", "tries to import"),
        ("evil_pickle", "tries to import"),
    ],
)
def test_a_bad_checkpoint(main, checkpoints, tmp_path, name, words):
    output = tmp_path / "output"
    outcome = main("--model", "testRetinaNet", "--weights", checkpoints[name], "--output", output)
    assert_refused(outcome, checkpoints[name].name, words)
    assert not (tmp_path / "marker").exists()
    assert not output.exists()


def test_the_pickle_would_have_run(checkpoints, tmp_path):
    """The test above can fail."""
    pickle.loads(checkpoints["evil_pickle"].read_bytes())
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("what", ["output", "cache"])
@pytest.mark.parametrize("below", ["", "folder", "folder/deeper"])
def test_a_directory_that_cannot_be_written(main, tmp_path, below, what):
    file = tmp_path / "file"
    file.write_text("precious")
    outcome = main("--all", "--weights", "synthetic", f"--{what}", file / below)
    assert_refused(outcome, f"{what} directory", str(file / below))
    assert file.read_text() == "precious"


def test_bad_input_overwrites_nothing(main, images, tmp_path):
    kept = tmp_path / "results.json"
    kept.write_text("precious")
    for bad in (["--image", images["text"]], ["--backend", "tvm"], ["--weights", "missing.pth"]):
        assert_refused(main("--model", "testRetinaNet", "--output", tmp_path, *bad))
        assert kept.read_text() == "precious"


def test_bad_input_as_the_user_sees_it(images):
    """The process itself: its exit code, and what imports may have printed."""
    outcome = script("--model", "testRetinaNet", "--image", images["truncated"])
    assert_refused(outcome, "truncated.jpg cannot be read")


def test_debug_shows_the_traceback(main, images):
    outcome = main("--all", "--debug", "--image", images["text"])
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("run_blade.py: error: ")


# A real run ------------------------------------------------------------------------------------


FINISHED = [
    *["--model", "testRetinaNet", "--device", "cpu", "--precision", "fp32", *QUICK],
    *["--iterations", "6", "--source", "bundled"],
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What `--model testRetinaNet` measures on a CPU at fp32, with few rounds."""
    output = tmp_path_factory.mktemp("finished") / "results"
    more = ["--compare-published", "--coverage", "--costs", "--output", output]
    return script(*FINISHED, *more), output


def test_a_run_prints_a_table_and_nothing_else(finished):
    outcome, _ = finished
    assert outcome.code == 0, outcome.err
    table = outcome.out.split("\n\n\n")[0]
    lines = table.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:5]]
    assert rows[0][:4] == ["Model(traced)", "Backend", "precision", "Median(FPS)"]
    assert rows[0][-2:] == ["Speedup", "Detections"]
    assert [row[:3] for row in rows[2:]] == [
        ["RetinaNet", "Torch", "fp32"],
        ["RetinaNet", "TorchScript", "fp32"],
        ["RetinaNet", "OpenVINO", "fp32"],
    ]
    assert rows[2][-2:] == ["1.00x", "-"]
    for row in rows[3:]:
        assert "x ±" in row[-2]
        assert row[-1].endswith(" match")
    notes = lines[5:]
    assert notes[0] == ""
    assert all(note.startswith("- ") for note in notes[1:])
    assert any("6 rounds, as asked for" in note for note in notes)
    assert any("A/A, Torch against itself in two processes" in note for note in notes)
    assert any("weights: synthetic, made to find 100 objects" in note for note in notes)
    assert "TorchBlade, published" in outcome.out


def test_progress_goes_to_standard_error(finished):
    outcome, _ = finished
    said = [line for line in outcome.err.splitlines() if line.startswith("[")]
    assert any("preparing OpenVINO" in line for line in said)
    assert any("timing" in line for line in said)
    # Plain lines where it is no terminal: no bar, no control characters.
    assert "\r" not in outcome.err
    assert "Warning" not in outcome.err


def test_published_speedups_are_printed_beside_ours(finished):
    rows = [line for line in finished[0].out.splitlines() if line.startswith("| RetinaNet | tr")]
    assert [row.split("|")[4].strip() for row in rows] == ["TorchScript", "OpenVINO"]
    assert all(row.strip(" |").endswith("x") for row in rows)


def test_the_result_file_is_complete(finished):
    _, output = finished
    files = ["detections.json", "image.png", "report.html", "results.json"]
    assert sorted(path.name for path in output.iterdir()) == files
    document = results.load(output / "results.json")
    assert document["complete"] is True
    assert document["settings"]["model"] == ["testRetinaNet"]
    assert document["settings"]["threads"] == 1
    assert document["settings"]["output"] == "results"
    assert {"torch", "torchvision", "numpy", "openvino"} <= set(document["environment"]["versions"])
    (group,) = document["groups"]
    assert group["model"] == "testRetinaNet"
    assert group["image_sizes"]["opt"] == [[96, 128]]
    assert (group["rounds"], group["stopped"]) == (6, "fixed")
    assert [run["backend"] for run in group["runs"]] == ["torch", "torchscript", "openvino"]
    for run in group["runs"]:
        assert run["status"] == "ok"
        assert run["requested_precision"] == run["effective_precision"] == "fp32"
        assert len(run["samples_s"]) == run["statistics"]["samples"] == 6
        assert len(run["warmup_s"]) == 1
        assert run["threads"] == 1
        assert run["peak_memory_mb"] > 100
        assert run["prepare"]["total"] > 0
        assert run["versions"]
        if not run["baseline"]:
            assert run["speedup"]["low"] <= run["speedup"]["ratio"] <= run["speedup"]["high"]
            assert {x["verdict"] for x in run["detections"].values()} == {"match"}
            assert set(run["detections"]) == {"min", "opt", "max"}
    assert [len(samples) for samples in document["aa"]["samples_s"]] == [6, 6]


def keys_of(value: object) -> set:
    """All keys of a result file, but for those of free tables: what was counted, read, or found."""
    if isinstance(value, list):
        return {key for item in value for key in keys_of(item)}
    if not isinstance(value, dict):
        return set()
    free = (
        "environment",
        "settings",
        "versions",
        "heavy_layers",
        "operators_by_provider",
        "stages",
        "peaks",
    )
    inner = (keys_of(item) for key, item in value.items() if key not in free)
    return set(value).union(*inner)


def test_every_key_of_the_result_file_is_documented(finished):
    _, output = finished
    text = (SCRIPT.parent / "docs" / "results.md").read_text(encoding="utf-8")
    keys = keys_of(results.load(output / "results.json"))
    assert {"flops", "break_even", "artifact_mb", "cached"} <= keys
    assert sorted(key for key in keys if f"`{key}`" not in text) == []


def test_costs_and_coverage_are_printed_below(finished):
    lines = finished[0].out.splitlines()
    (coverage,) = (n for n, line in enumerate(lines) if "FLOPs in engines" in line)
    (costs,) = (n for n, line in enumerate(lines) if "break-even (images)" in line)
    assert "OpenVINO" in lines[coverage + 3]
    assert "100%" in lines[coverage + 3]
    openvino = [cell.strip() for cell in lines[costs + 4].strip("|").split("|")]
    assert openvino[:3] == ["RetinaNet", "OpenVINO", "fp32"]
    assert all(float(seconds) > 0 for seconds in openvino[3:7])
    assert float(openvino[7]) > 100  # MiB of weights


def test_what_was_found_is_kept(finished):
    _, output = finished
    (model,) = results.read_found(output).values()
    (reference,) = model["reference"]
    assert len(reference["boxes"]) == len(reference["scores"]) == len(reference["classes"]) > 50
    assert set(model["runs"]["fp32"]) == {"TorchScript", "OpenVINO"}
    for (run,) in model["runs"]["fp32"].values():
        assert all(run["agrees"])
        assert run["lost"] == []
        assert run["boxes"][0] == pytest.approx(reference["boxes"][0], abs=0.2)


def test_the_page_shows_what_was_found(finished):
    _, output = finished
    text = (output / "report.html").read_text(encoding="utf-8")
    boxes = len(results.read_found(output)["testRetinaNet"]["reference"][0]["boxes"])
    assert text.count("var(--matched)") > 3 * boxes
    assert "data:image/png;base64," in text


def test_a_finished_run_is_not_measured_again(finished):
    outcome, output = finished
    before = results.load(output / "results.json")
    again = script(*FINISHED, "--output", output)
    assert again.code == 0
    assert "testRetinaNet: kept from before: fp32" in again.err
    assert "timing" not in again.err
    assert again.out.strip() == outcome.out.split("\n\n\n")[0].strip()
    after = results.load(output / "results.json")
    assert after["groups"] == before["groups"]
    assert after["complete"] is True


def test_what_was_interrupted_is_measured_again(finished, tmp_path):
    output = tmp_path / "results"
    shutil.copytree(finished[1], output)
    document = results.load(output / "results.json")
    (group,) = document["groups"]
    group.update(stopped="interrupted", rounds=2)
    results.save({**document, "complete": False}, output / "results.json")
    again = script(*FINISHED, "--output", output)
    assert again.code == 0, again.err
    (measured,) = results.load(output / "results.json")["groups"]
    assert (measured["stopped"], measured["rounds"]) == ("fixed", 6)
    assert measured["runs"][0]["samples_s"] != group["runs"][0]["samples_s"]


def test_what_is_kept_has_its_own_environment(finished, tmp_path):
    """Its date, and what it was warned of."""
    output = tmp_path / "results"
    shutil.copytree(finished[1], output)
    document = results.load(output / "results.json")
    document["environment"].update(time="2001-01-01T00:00:00+00:00")
    document["environment"]["cpu"]["governor"] = "powersave"
    results.save(document, output / "results.json")
    again = script(*FINISHED, "--output", output)
    assert again.code == 0, again.err
    after = results.load(output / "results.json")
    assert after["environment"] == document["environment"]
    assert "the CPU's frequency may change or be held low (governor powersave)" in after["warnings"]


def test_another_checkpoint_of_the_same_name_is_not_mixed(main, exports, finished, tmp_path):
    output, checkpoint = tmp_path / "results", tmp_path / "model_final.pth"
    shutil.copytree(finished[1], output)
    torch.save({"model": exports("testRetinaNet").eager.detector.state_dict()}, checkpoint)
    document = results.load(output / "results.json")
    assert document["settings"]["weights_digest"] is None
    document["settings"].update(weights="model_final.pth", weights_digest="0123456789abcdef")
    results.save(document, output / "results.json")
    arguments = [*FINISHED, "--weights", checkpoint, "--output", output]
    assert_refused(main(*arguments), "another file of the same name", "--rerun")
    document["settings"]["weights_digest"] = models.checkpoint_digest(str(checkpoint))
    results.save(document, output / "results.json")
    assert main(*arguments).code == 0


def test_groups_of_other_weights_are_not_mixed(finished, tmp_path):
    """As where an earlier run had to do without the model zoo."""
    output = tmp_path / "results"
    shutil.copytree(finished[1], output)
    document = results.load(output / "results.json")
    document["settings"]["precision"] = ["fp32", "bf16"]
    document["groups"][0]["weights_digest"] = "0123456789abcdef"
    results.save(document, output / "results.json")
    outcome = script(*FINISHED, "--precision", "fp32", "bf16", "--output", output)
    assert outcome.code == 2
    assert "was measured at fp32 with other weights" in outcome.err.splitlines()[-1]
    kept = results.load(output / "results.json")
    assert (kept["groups"], kept["notes"]) == (document["groups"], document["notes"])


@pytest.mark.parametrize("weights", ["zoo", "mine.pth"])
def test_how_many_objects_trained_weights_find_is_not_ours_to_say(main, weights):
    outcome = main("--model", "testRetinaNet", "--weights", weights, "--detections", "5")
    assert_refused(outcome, "--detections", f"--weights {weights}")


def test_a_number_of_objects_asks_for_synthetic_weights():
    for arguments, weights in (([], "auto"), (["--detections", "0,100"], "synthetic")):
        options = run_blade.parser().parse_args(["--model", "testRetinaNet", *arguments])
        assert session._weights(options) == weights


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--iterations", "7"], "--iterations: 6 before, 7 now"),
        (["--seed", "1"], "--seed: 0 before, 1 now"),
        (["--backend", "torchscript"], "--backend: torch torchscript openvino before, torch tor"),
        (["--precision", "bf16"], "--precision: fp32 before, bf16 now"),
    ],
)
def test_other_settings_are_not_mixed(main, finished, change, words):
    _, output = finished
    before = (output / "results.json").read_text()
    assert_refused(main(*FINISHED, *change, "--output", output), words, "--rerun")
    assert (output / "results.json").read_text() == before


@pytest.mark.parametrize("gpu", [None, "Some GPU"])
def test_another_machine_is_not_mixed(main, monkeypatch, finished, tmp_path, gpu):
    document = results.load(finished[1] / "results.json")
    if gpu is None:
        words = "cpu.flags: new only before"
        document["environment"]["cpu"]["flags"].append("new")
    else:
        words = "gpu: Some GPU before, Another now"
        document["environment"]["gpu"] = gpu
        monkeypatch.setattr(suite, "gpu_name", lambda plan: "Another")
    results.save(document, tmp_path / "results.json")
    assert_refused(main(*FINISHED, "--output", tmp_path), words, "--rerun")


def test_what_is_no_result_file_is_not_overwritten(main, tmp_path):
    kept = tmp_path / "results.json"
    kept.write_text("precious")
    assert_refused(main(*FINISHED, "--output", tmp_path), str(kept))
    assert kept.read_text() == "precious"


def test_the_result_file_has_no_paths(finished):
    _, output = finished
    text = (output / "results.json").read_text() + (output / "report.html").read_text()
    for private in (str(output.parent), str(SCRIPT.parent), str(Path.home()) + "/"):
        assert private not in text


def test_stages_roofline_and_trace(tmp_path):
    more = ["--backend", "torchscript", "--stages", "--roofline", "--trace", "--output", tmp_path]
    outcome = script(*FINISHED, *more)
    assert outcome.code == 0, outcome.err
    document = results.load(tmp_path / "results.json")
    assert document["peaks"]["fp32"] > 1e9
    (group,) = document["groups"]
    assert group["flops"] > 1e9
    assert sum(group["stages"].values()) > 0
    assert "% of peak" in outcome.out
    assert "ceiling" in outcome.out
    for run in group["runs"]:
        (name,) = run["artifacts"]
        assert name == f"testRetinaNet.{run['backend']}.fp32.trace.json"
        events = json.loads((tmp_path / name).read_text())["traceEvents"]
        assert sum(event.get("cat") == "cpu_op" for event in events) > 100


def test_several_counts_of_objects(tmp_path):
    counts = ["--backend", "torch", "--detections", "0,10", "--trace", "--output", tmp_path]
    outcome = script(*FINISHED, *counts)
    assert outcome.code == 0, outcome.err
    groups = results.load(tmp_path / "results.json")["groups"]
    assert [(group["objects"], group["found"]) for group in groups] == [(0, 0), (10, 10)]
    traces = [run["artifacts"] for group in groups for run in group["runs"]]
    assert traces == [[f"{n}-objects.testRetinaNet.torch.fp32.trace.json"] for n in (0, 10)]
    assert all((tmp_path / name).exists() for (name,) in traces)
    lines = [line for line in outcome.out.splitlines() if line.startswith("| RetinaNet | Torch")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [line[3:5] for line in cells if len(line) == 8] == [["0", "0"], ["10", "10"]]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "RetinaNet with 10 objects" in text
    again = script(*FINISHED, *counts)
    assert again.err.count("kept from before") == 2
    assert results.load(tmp_path / "results.json")["groups"] == groups


@pytest.fixture
def two_images(tmp_path) -> List[Path]:
    """A lying and a standing part of a photograph, of the same file name."""
    paths = [tmp_path / "a" / "part.png", tmp_path / "b" / "part.png"]
    with Image.open(models.default_image()) as photograph:
        for path, box in zip(paths, ((100, 100, 228, 196), (250, 300, 346, 428))):
            path.parent.mkdir()
            photograph.crop(box).save(path)
    return paths


def test_several_images_are_reported_one_by_one_and_together(two_images, tmp_path):
    output = tmp_path / "output"
    more = ["--image", *two_images, "--detections", "20", "--backend", "torchscript"]
    arguments = [x for x in FINISHED if x not in ("--image-size", "96x128")]
    outcome = script(*arguments, *more, "--output", output)
    assert outcome.code == 0, outcome.err
    document = results.load(output / "results.json")
    assert document["settings"]["image"] == ["part.png", "part.png"]
    groups = document["groups"]
    assert [group["image"] for group in groups] == [None, "part.png (1)", "part.png (2)"]
    assert [group["found"] for group in groups] == [40, 20, 20]
    assert [set(group["image_sizes"]) for group in groups] == [
        {"min", "opt", "max", "image 2"},
        {"min", "opt", "max"},
        {"image 2"},
    ]
    assert groups[2]["image_sizes"]["image 2"] == [[128, 96]]
    for together, first, second in zip(*(group["runs"] for group in groups)):
        means = [(a + b) / 2 for a, b in zip(first["samples_s"], second["samples_s"])]
        assert together["samples_s"] == pytest.approx(means)
        assert len(means) == 6
        assert first["samples_s"] != second["samples_s"]
    torchscript = groups[2]["runs"][1]
    assert set(torchscript["detections"]) == {"image 2"}
    assert torchscript["detections"]["image 2"]["text"] == "20/20 match"
    assert torchscript["speedup"]["ratio"] > 0
    # The table of the model is that of both; below, there is a line for each.
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in outcome.out.splitlines()
        if line.startswith("| RetinaNet")
    ]
    assert [len(row) for row in rows] == [11, 11] + [8] * 6
    assert [row[3:5] for row in rows[2:5]] == [
        ["part.png (1)", "20"],
        ["part.png (2)", "20"],
        ["together", "40"],
    ]
    assert outcome.out.index("| RetinaNet") < outcome.out.index("together")
    text = (output / "report.html").read_text(encoding="utf-8")
    assert "RetinaNet with 20 objects on part.png (2)" in text
    assert text.count("data:image/png;base64,") == 2
    again = script(*arguments, *more, "--output", output)
    assert "kept from before" in again.err
    assert results.load(output / "results.json")["groups"] == groups


def test_an_image_that_engines_are_not_made_for(main, two_images, tmp_path):
    large = tmp_path / "large.png"
    Image.new("RGB", (128, 400)).save(large)
    outcome = main("--model", "testRetinaNet", "--image", two_images[0], large)
    assert_refused(outcome, "large.png has 400x128 pixels", "after the first image", "--image-size")


def test_another_image_of_the_same_name_is_not_mixed(main, two_images, tmp_path):
    output = tmp_path / "output"
    arguments = [x for x in FINISHED if x not in ("--image-size", "96x128")]
    arguments += ["--backend", "torch", "--output", output, "--image"]
    assert script(*arguments, two_images[0]).code == 0
    assert_refused(main(*arguments, two_images[1]), "another image of the same name", "--rerun")


def test_a_trace_needs_a_place(main):
    assert_refused(main("--all", "--trace"), "--trace needs --output")


# Exit codes ------------------------------------------------------------------------------------


def group_with(**changes) -> dict:
    """The records of a Torch run and of a second one, as far as the exit code looks at them."""
    torch_run = {"status": "ok", "speedup": None}
    other = {"status": "ok", "speedup": {"verdict": "faster"}, **changes}
    return {"runs": [torch_run, other]}


@pytest.mark.parametrize(
    ("changes", "fail_on", "code"),
    [
        ({}, (), 0),
        ({}, ("slower",), 0),
        ({"speedup": {"verdict": "slower"}}, (), 0),
        ({"speedup": {"verdict": "slower"}}, ("slower",), 1),
        ({"speedup": {"verdict": "inconclusive"}}, ("slower",), 0),
        ({"speedup": {"verdict": "same"}}, ("slower",), 0),
        ({"status": "mismatch"}, (), 1),
        ({"status": "failed", "speedup": None}, (), 1),
        ({"status": "unsupported", "speedup": None}, ("slower",), 0),
    ],
)
def test_exit_code(changes, fail_on, code):
    assert session.exit_code([group_with(), group_with(**changes)], fail_on) == code


# Ctrl-C ----------------------------------------------------------------------------------------


class Interruptible:
    """A real invocation, in a process group of its own as a terminal would have it."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.said: List[str] = []

    def wait_for(self, words: str) -> None:
        """Reads standard error up to a line with these words."""
        for line in self.process.stderr:
            self.said.append(line)
            if words in line:
                return
        raise AssertionError(f"it never said '{words}': {self.said}")

    def interrupt(self) -> Outcome:
        """Presses Ctrl-C; checks that every process of it is gone soon."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        start = time.monotonic()
        os.killpg(self.process.pid, signal.SIGINT)
        try:
            out, err = self.process.communicate(timeout=60)
        finally:
            if self.process.poll() is None:  # It would keep the machine busy for all that follows.
                os.killpg(self.process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive
        assert time.monotonic() - start < 20  # A second or two, on a machine that is not busy.
        return Outcome(self.process.returncode, out, err)


def assert_interrupted(outcome: Outcome) -> None:
    assert outcome.code == 130
    assert outcome.err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("moment", ["weights, inputs", "preparing TorchScript"])
def test_interrupted_while_preparing(tmp_path, moment):
    output = tmp_path / "output"
    running = Interruptible(
        *["--model", "testRetinaNet", "--backend", "torchscript", *QUICK, "--output", output]
    )
    running.wait_for(moment)
    time.sleep(1)
    outcome = running.interrupt()
    assert_interrupted(outcome)
    assert outcome.out == ""
    assert list(output.iterdir()) == []


def test_interrupted_while_timing(tmp_path):
    running = Interruptible(
        *["--model", "testRetinaNet", "testRetinaNet_scripted", "--backend", "torch", *QUICK],
        *["--precision", "fp32", "--iterations", "100000", "--output", tmp_path],
    )
    running.wait_for("timing")
    time.sleep(3)
    outcome = running.interrupt()
    assert_interrupted(outcome)
    document = results.load(tmp_path / "results.json")
    assert document["complete"] is False
    (group,) = document["groups"]
    assert group["stopped"] == "interrupted"
    (run,) = group["runs"]
    # The round in which it was interrupted may lack a call.
    assert group["rounds"] > 0
    assert 0 <= len(run["samples_s"]) - group["rounds"] <= 1
    assert "until it was interrupted" in outcome.out
    assert "This run was interrupted" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("ending", [None, KeyboardInterrupt, InputError("a reason")])
def test_a_page_that_cannot_be_written_hides_nothing(main, monkeypatch, finished, tmp_path, ending):
    output = tmp_path / "results"
    shutil.copytree(finished[1], output)
    (output / "report.html").unlink()
    (output / "report.html").mkdir()
    if ending is not None:

        def end(*_: object) -> None:
            raise ending

        monkeypatch.setattr(session.Session, "_run_model", end)
    outcome = main(*FINISHED, "--costs", "--output", output)
    assert "no page is made: " in outcome.err
    assert outcome.code == (130 if ending is KeyboardInterrupt else 2)
    last = outcome.err.splitlines()[-1]
    if ending is None:
        assert "break-even (images)" in outcome.out
    else:
        assert last == "interrupted" or last.endswith("error: a reason")


def test_interrupted_while_checking(tmp_path):
    """All rounds are made; what is not checked is not complete."""
    running = Interruptible(
        *["--model", "testRetinaNet", "--backend", "torchscript", "--precision", "fp32"],
        *[*QUICK, "--iterations", "5", "--output", tmp_path],
    )
    running.wait_for("checking torch")
    outcome = running.interrupt()
    assert_interrupted(outcome)
    (group,) = results.load(tmp_path / "results.json")["groups"]
    assert (group["rounds"], group["stopped"]) == (5, "interrupted")
    assert group["runs"][1]["detections"] is None


def test_an_interruption_keeps_the_finished_groups(tmp_path):
    running = Interruptible(
        *["--model", "testRetinaNet", "--backend", "torchscript", "--precision", "fp32", "bf16"],
        *[*QUICK, "--iterations", "5", "--output", tmp_path],
    )
    running.wait_for("preparing Torch bf16")
    first = results.load(tmp_path / "results.json")
    assert first["complete"] is False
    outcome = running.interrupt()
    assert_interrupted(outcome)
    document = results.load(tmp_path / "results.json")
    assert document["complete"] is False
    assert document["groups"] == first["groups"]
    (group,) = document["groups"]
    assert (group["precision"], group["rounds"], group["stopped"]) == ("fp32", 5, "fixed")
    assert [run["status"] for run in group["runs"]] == ["ok", "ok"]
    assert "| RetinaNet     | TorchScript | fp32" in outcome.out
