"""The command line: what it prints where, its exit codes, bad input, and Ctrl-C."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import ClassVar, Iterator, List, NamedTuple, Optional

import numpy as np
import psutil
import pytest
import torch
from conftest import full_disk
from PIL import Image

import benchmark
import run_blade
from backends import base
from benchmark import Speedup
from detectors import inputs, zoo
from detectors.inputs import tuning_sizes
from errors import InputError
from measure import plan, session
from measure.worker import Command, Hosts
from models import MODELS
from results import file, record
from results.environment import usable_cores
from results.record import Group, Run, Weights

SCRIPT = Path(run_blade.__file__)
# What makes a run quick; weights are synthetic, so that no test asks the network.
QUICK = ["--weights", "synthetic", "--image-size", "96x128", "--threads", "1", "--warmup", "1"]
FINISHED = [
    *["--model", "testRetinaNet", "--device", "cpu", "--precision", "fp32", *QUICK],
    *["--iterations", "6", "--source", "bundled"],
]
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
def main(capsys, monkeypatch, hosts):
    """Runs the command line in this process; invocations share their hosts."""
    monkeypatch.setattr(sys, "argv", ["run_blade.py"])
    opened = session.opened

    @contextmanager
    def shared(commands):
        if commands:
            with opened(commands) as others:
                yield others
        else:
            yield hosts

    monkeypatch.setattr(session, "opened", shared)

    def run(*arguments: object) -> Outcome:
        try:
            code = run_blade.main([str(x) for x in arguments])
        except SystemExit as stop:
            code = stop.code
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def no_host(monkeypatch):
    """What is refused is refused at once: nothing has to be asked for it."""

    def of(self: Hosts, command: Command) -> None:
        pytest.fail("a host was started")

    monkeypatch.setattr(Hosts, "of", of)


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
    heavy |= {"msgspec", "jinja2", "matplotlib", "tqdm"}
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
        (["--all", "--time-budget", "0"], ["--time-budget", "'0' is not a number of seconds"]),
        (["--all", "--time-budget", "soon"], ["'soon' is not a number of seconds"]),
        (["--all", "--time-budget", "nan"], ["'nan' is not a number of seconds"]),
        (["--all", "--image-size", "big"], ["--image-size", "'big' is not HxW, like 480x640"]),
        (["--all", "--image-size", "480"], ["'480' is not HxW"]),
        (["--all", "--image-size", "480x640x3"], ["'480x640x3' is not HxW"]),
        (["--all", "--image-size", "480x31"], ["480x31", "at least 32 pixels"]),
        (["--all", "--backend", "tvm"], ["unknown backend 'tvm'", "openvino, torch, torch_blade"]),
        (["--all", "--fail-on", "faster"], ["'faster'", "slower"]),
        (["--all", "--colour"], ["--colour"]),
    ],
)
def test_wrong_usage(main, no_host, arguments, words):
    assert_refused(main(*arguments), *words)


ENVIRONMENT = "openvino@old"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--environment", f"tvm={sys.executable}"], ["unknown backend 'tvm'", "openvino"]),
        (["--environment", f"tvm@old={sys.executable}"], ["unknown backend 'tvm'", "openvino"]),
        (
            [
                x
                for name in "ab"
                for x in ("--environment", f"{ENVIRONMENT}={sys.executable} -{name}")
            ],
            [f"--environment {ENVIRONMENT} is given twice"],
        ),
        (
            ["--environment", f"{ENVIRONMENT}=/nowhere/bin/python"],
            [f"environment {ENVIRONMENT}", "/nowhere/bin/python does not exist"],
        ),
        (["--environment", "openvino="], ["environment openvino", "there is no command"]),
        (["--environment", "openvino='"], ["environment openvino", "is no command"]),
        (
            ["--environment", f"torch={sys.executable}"],
            ["--environment torch: the baseline", "torch@NAME=COMMAND"],
        ),
        (["--environment", "openvino"], ["--environment openvino", "BACKEND=COMMAND"]),
        (["--environment", sys.executable], [sys.executable, "BACKEND=COMMAND"]),
        (["--environment", f"={sys.executable}"], ["BACKEND=COMMAND"]),
        (["--environment", f"openvino@={sys.executable}"], ["BACKEND@NAME=COMMAND"]),
        (["--environment", f"openvino@../x={sys.executable}"], ["BACKEND@NAME=COMMAND"]),
        (["--environment"], ["--environment", "expected one argument"]),
        (
            ["--backend", ENVIRONMENT],
            [f"backend '{ENVIRONMENT}'", f"no --environment {ENVIRONMENT}=COMMAND"],
        ),
        (
            ["--backend", ENVIRONMENT, "--environment", f"openvino@new={sys.executable}"],
            [f"no --environment {ENVIRONMENT}=COMMAND"],
        ),
    ],
)
def test_an_environment_that_cannot_be(main, no_host, arguments, words):
    assert_refused(main("--all", *arguments), *words)


def test_environments_are_looked_at_where_things_are_listed(main, no_host):
    assert_refused(main("--list", "--environment", "openvino"), "BACKEND=COMMAND")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--all", "--precision", "fp16"], ["fp16", "cpu"]),
        (["--all", "--backend", "torchscript", "--precision", "int8"], ["int8", "cpu"]),
    ],
)
@NEEDS_NO_CUDA
def test_what_no_backend_computes_in(main, arguments, words):
    assert_refused(main(*arguments), *words)


def test_more_threads_than_cores(main, no_host):
    cores = usable_cores()
    outcome = main("--all", "--threads", cores + 1)
    assert_refused(outcome, f"--threads {cores + 1}", f"only {cores} cores")


def test_threads_are_physical_cores_unless_told(main, monkeypatch, no_host):
    """With as many as `--threads` says, or by default two, memory is looked at."""
    seen = []

    def look(sizes: object, models: object, threads: int, view: object) -> None:
        seen.append(threads)
        raise InputError("looked at")

    monkeypatch.setattr(plan, "check_room", look)
    monkeypatch.setattr(plan, "default_threads", lambda: 2)
    for more in ([], ["--threads", "1"]):
        assert_refused(main("--model", "testRetinaNet", *more), "looked at")
    assert seen == [2, 1]


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


def without(library: str, folder: Path) -> str:
    """A command that starts an interpreter which cannot import a library."""
    (folder / f"{library}.py").write_text("raise ImportError('no such library')")
    return f"env PYTHONPATH={folder} {sys.executable}"


def test_a_backend_whose_library_is_missing_in_its_environment(main, tmp_path):
    environment = f"{ENVIRONMENT}={without('openvino', tmp_path)}"
    outcome = main(*FINISHED, "--backend", "torch", "--environment", environment)
    assert_refused(
        outcome, f"backend '{ENVIRONMENT}' is unavailable in its environment", "pip install"
    )


def test_list_looks_into_environments(main, tmp_path):
    commands = {
        "torchscript@again": f"env {sys.executable}",
        ENVIRONMENT: without("openvino", tmp_path),
        "openvino@gone": "false",
    }
    given = [x for item in commands.items() for x in ("--environment", "=".join(item))]
    outcome = main("--list", *given)
    assert outcome.code == 0
    own, _, named = outcome.out.partition("Environments on ")
    lines = {line.split()[0]: line for line in named.splitlines()[1:]}
    assert list(lines) == list(commands)
    python = f"(Python {sys.version.split()[0]}, torch {torch.__version__}"
    assert f"fp32, bf16 {python}" in lines["torchscript@again"]
    assert "unavailable: " in lines[ENVIRONMENT]
    assert "pip install openvino" in lines[ENVIRONMENT]
    assert "it ended with exit code 1" in lines["openvino@gone"]
    # In the suite's own environment it is there all the same.
    assert next(x for x in own.splitlines() if x.split()[0] == "openvino").endswith("int8")


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
def test_a_bad_image(main, no_host, images, tmp_path, name, words):
    output = tmp_path / "output"
    outcome = main("--all", "--image", images[name], "--output", output)
    assert_refused(outcome, str(images[name]), words)
    assert not output.exists()


def test_a_photograph_that_takes_more_memory_than_there_is(main, no_host, tmp_path, monkeypatch):
    """As it leaves a camera. Nothing is begun, and there is a size that would do."""
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (4000, 3000)).save(path)
    monkeypatch.setattr(plan, "free_memory_mb", lambda: 8192)
    outcome = main("--all", "--image", path, "--output", tmp_path / "output")
    assert_refused(outcome, "at 3000x4000 engines are made for up to", "GiB of memory and", "min")
    assert "and 8.0 GiB are free: --image-size" in outcome.err
    assert not (tmp_path / "output").exists()
    height, width = map(int, re.search(r"--image-size (\d+)x(\d+)", outcome.err).groups())
    smaller, large = (tuning_sizes(size, 0) for size in ((height, width), (3000, 4000)))
    retinanet = [MODELS["testRetinaNet"]]
    assert plan.check_room(smaller, list(MODELS.values()), 2, inputs.View()) is None
    monkeypatch.setattr(plan, "free_memory_mb", lambda: 1024)
    with pytest.raises(InputError, match=r"1\.0 GiB of memory are free, and PyTorch takes 2\.0"):
        plan.check_room(smaller, retinanet, 2, inputs.View())
    # Where there is memory, the time is worth a word.
    monkeypatch.setattr(plan, "free_memory_mb", lambda: 1 << 20)
    assert "min: --image-size" in plan.check_room(large, retinanet, 2, inputs.View())
    assert plan.check_room(large, retinanet, 64, inputs.View()) is None


@pytest.mark.parametrize(
    ("view", "opt", "options"),
    [
        (inputs.View(), (3000, 4000), ["--image-size"]),
        # Where images are resized, a smaller one has the same range.
        (inputs.View(None, 2000, 6000), (2000, 2000), ["--max-size"]),
        (inputs.View(None, 0, 0, largest=(6000, 6000)), (800, 1067), ["--max-size"]),
        (
            inputs.View(None, 0, 0, largest=(6000, 6000)),
            (5000, 5000),
            ["--image-size", "--max-size"],
        ),
    ],
)
def test_the_way_out_of_too_little_memory_is_one(view, opt, options, monkeypatch):
    monkeypatch.setattr(plan, "free_memory_mb", lambda: 8192)
    retinanet = [MODELS["testRetinaNet"]]
    sizes = inputs.view_sizes([np.zeros((3, *opt), np.uint8)], view, 0)
    with pytest.raises(InputError) as refused:
        plan.check_room(sizes, retinanet, 64, view)
    named = dict(re.findall(r"(--[a-z]+-size) (\d+x\d+)", str(refused.value)))
    assert list(named) == options
    named = {name: run_blade.image_size(size) for name, size in named.items()}
    image = named.get("--image-size")
    view = replace(
        view,
        size=image,
        shortest=0 if image else view.shortest,
        largest=named.get("--max-size", view.largest),
    )
    sizes = inputs.view_sizes([np.zeros((3, *(image or opt)), np.uint8)], view, 0)
    assert plan.check_room(sizes, retinanet, 64, view) is None


def test_a_small_number_below_zero_is_a_value():
    options = ["--config-file", "x", "--opts", "MODEL.RPN.NMS_THRESH", "-1e-3", "--weights", "w"]
    assert run_blade.parser().parse_args(options).opts == ["MODEL.RPN.NMS_THRESH", "-1e-3"]


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


def test_debug_shows_the_traceback(main, no_host, images):
    outcome = main("--all", "--debug", "--image", images["text"])
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("run_blade.py: error: ")


# A real run ------------------------------------------------------------------------------------


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
    end = lines.index("", 6)
    notes, answer = lines[5:end], lines[end:]
    assert notes[0] == ""
    assert all(note.startswith("- ") for note in notes[1:])
    # Four lines say which run to ship.
    assert [line.split(":")[0] for line in answer] == [
        "",
        "Ship",
        "Costs",
        "Next",
        "To change that",
    ]
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
    results = file.load(output / "results.json")
    assert results.complete is True
    assert results.settings.model == ("testRetinaNet",)
    assert results.settings.threads == 1
    assert results.settings.output == "results"
    backends = ("torch", "torchscript", "openvino")
    assert results.settings.backend == backends
    assert results.settings.environment == ()
    assert results.settings.tf32 is results.settings.cudnn_benchmark is None  # It is a CPU.
    assert {"torch", "torchvision", "numpy", "openvino"} <= set(results.environment.versions)
    (group,) = results.groups
    assert group.model == "testRetinaNet"
    assert group.image_sizes["opt"] == ((96, 128),)
    assert (group.rounds, group.stopped) == (6, "fixed")
    assert group.flops > 1e9
    assert tuple(run.backend for run in group.runs) == backends
    for run in group.runs:
        assert run.status == "ok"
        assert run.requested_precision == run.effective_precision == "fp32"
        assert len(run.samples_s) == run.statistics.samples == 6
        assert len(run.warmup_s) == 1
        assert run.threads == 1
        assert run.peak_memory_mb > 100
        assert run.prepare.total > 0
        assert run.versions
        assert run.python == sys.version.split()[0]
        assert run.cached is False
        assert run.copies is None
        if not run.baseline:
            assert run.speedup.low <= run.speedup.ratio <= run.speedup.high
            known = (run.speedup.low, run.speedup.high, results.aa.resolution)
            assert run.speedup.verdict == benchmark.verdict(*known)
            assert {x.verdict for x in run.detections.values()} == {"match"}
            assert set(run.detections) == {"min", "opt", "max"}
            assert run.break_even is not None
            assert run.artifact_mb > 10
    assert [len(samples) for samples in results.aa.samples_s] == [6, 6]


# Record -> fields whose names, or whose types, say all.
OBVIOUS = {
    "Commit": {"revision", "dirty"},
    "Environment": {"cpu", "os", "kernel", "python", "commit"},
    "Run": {"requested_precision", "statistics", "coverage"},
    "Stages": {"backbone", "proposals", "head", "roi_heads", "nms"},
    "GpuState": {
        *("name", "driver", "memory_mb", "max_sm_clock_mhz", "sm_clock_mhz", "memory_clock_mhz"),
        "temperature_c",
    },
    "Group": {"images_per_call", "stopped", "stages", "machine"},
    "SameAgainstSame": {"model", "precision", "speedup"},
    "Results": {"environment", "settings", "tool", "schema"},
    # Those of `Drawn` are told there.
    "DrawnRun": {"boxes", "scores", "classes", "corners", "keypoints", "labels", "masks"},
}


def untold(of: type) -> set:
    """Fields of a record that its docstring does not name."""
    return {x.name for x in fields(of) if not re.search(rf"\b{x.name}\b", of.__doc__)}


def test_every_key_of_the_result_file_is_documented():
    records = [x for x in vars(record).values() if isinstance(x, type) and is_dataclass(x)]
    assert {Group, Run, benchmark.Statistics, Speedup, benchmark.BreakEven} <= set(records)
    found = {of.__name__: untold(of) for of in records if of is not record.Settings}
    assert {name: names for name, names in found.items() if names} == OBVIOUS
    # `--help` tells of those.
    options = {action.dest: action.help for action in run_blade.parser()._actions}
    assert all(options[name] for name in untold(record.Settings))


def test_costs_and_coverage_are_printed_below(finished):
    lines = finished[0].out.splitlines()
    (coverage,) = (n for n, line in enumerate(lines) if "FLOPs in engines" in line)
    (costs,) = (n for n, line in enumerate(lines) if "break-even (images)" in line)
    assert [lines[coverage + place].split()[3] for place in (2, 3, 4)] == [
        *("Torch", "TorchScript", "OpenVINO"),
    ]
    assert "100%" in lines[coverage + 4]
    warm, end = (float(cell) for cell in lines[coverage + 4].split("|")[10:12])
    assert min(warm, end) > 100  # MiB
    openvino = [cell.strip() for cell in lines[costs + 4].strip("|").split("|")]
    assert openvino[:3] == ["RetinaNet", "OpenVINO", "fp32"]
    assert all(float(seconds) > 0 for seconds in openvino[3:7])
    assert float(openvino[7]) > 100  # MiB of weights


def test_what_was_found_is_kept(finished):
    _, output = finished
    (model,) = file.load_found(output).values()
    (reference,) = model.reference
    assert len(reference.boxes) == len(reference.scores) == len(reference.classes) > 50
    assert set(model.runs["fp32"]) == {"TorchScript", "OpenVINO"}
    for (run,) in model.runs["fp32"].values():
        assert all(run.agrees)
        assert run.lost == ()
        assert run.boxes[0] == pytest.approx(reference.boxes[0], abs=0.2)


def test_the_page_shows_what_was_found(finished):
    _, output = finished
    text = (output / "report.html").read_text(encoding="utf-8")
    boxes = len(file.load_found(output)["testRetinaNet"].reference[0].boxes)
    assert text.count("var(--matched)") > 3 * boxes
    assert "data:image/png;base64," in text


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of what was measured, to be changed."""
    return Path(shutil.copytree(finished[1], tmp_path / "results"))


def change(output: Path, **changes: object) -> record.Results:
    """Changes fields of a result file; those of its settings by a record of them."""
    results = replace(file.load(output / "results.json"), **changes)
    file.save(results, output / "results.json")
    return results


def test_a_finished_run_is_not_measured_again(finished):
    outcome, output = finished
    before = file.load(output / "results.json")
    again = script(*FINISHED, "--output", output)
    assert again.code == 0
    assert "testRetinaNet: kept from before: fp32" in again.err
    assert "timing" not in again.err
    assert again.out.strip() == outcome.out.split("\n\n\n")[0].strip()
    after = file.load(output / "results.json")
    assert after.groups == before.groups
    assert after.complete is True


def test_what_was_interrupted_is_measured_again(main, copied):
    (group,) = file.load(copied / "results.json").groups
    group = replace(group, stopped="interrupted", rounds=2, generations=(2,))
    change(copied, groups=(group,), complete=False)
    again = main(*FINISHED, "--output", copied)
    assert again.code == 0, again.err
    (measured,) = file.load(copied / "results.json").groups
    assert (measured.stopped, measured.rounds) == ("fixed", 6)
    assert measured.runs[0].samples_s != group.runs[0].samples_s


def test_what_is_kept_has_its_own_environment(main, copied):
    """Its date, and what it was warned of."""
    environment = file.load(copied / "results.json").environment
    environment = replace(
        environment,
        time="2001-01-01T00:00:00+00:00",
        cpu=replace(environment.cpu, governor="powersave"),
    )
    change(copied, environment=environment)
    again = main(*FINISHED, "--output", copied)
    assert again.code == 0, again.err
    after = file.load(copied / "results.json")
    assert after.environment == environment
    assert "the CPU's frequency may change or be held low (governor powersave)" in after.warnings


def test_another_checkpoint_of_the_same_name_is_not_mixed(main, exports, copied, tmp_path):
    checkpoint = tmp_path / "model_final.pth"
    torch.save({"model": exports("testRetinaNet").eager.detector.state_dict()}, checkpoint)
    settings = file.load(copied / "results.json").settings
    assert settings.weights_digest is None
    settings = replace(settings, weights=checkpoint.name, weights_digest="0123456789abcdef")
    change(copied, settings=settings)
    arguments = [*FINISHED, "--weights", checkpoint, "--output", copied]
    assert_refused(main(*arguments), "another file of the same name", "--rerun")
    digest = zoo.checkpoint_digest(str(checkpoint))
    change(copied, settings=replace(settings, weights_digest=digest))
    assert main(*arguments).code == 0


def test_groups_of_other_weights_are_not_mixed(main, copied):
    """As where an earlier run had to do without the model zoo."""
    before = file.load(copied / "results.json")
    (group,) = before.groups
    assert group.weights == Weights("synthetic", objects=100, digest=group.weights.digest)
    group = replace(group, weights=replace(group.weights, digest="0123456789abcdef"))
    settings = replace(before.settings, precision=("fp32", "bf16"))
    before = change(copied, settings=settings, groups=(group,))
    outcome = main(*FINISHED, "--precision", "fp32", "bf16", "--output", copied)
    assert outcome.code == 2
    assert "was measured at fp32 with other weights" in outcome.err.splitlines()[-1]
    after = file.load(copied / "results.json")
    for name in ("groups", "aa", "environment", "left_out", "without", "warnings"):
        assert getattr(after, name) == getattr(before, name)


@pytest.mark.parametrize("weights", ["zoo", "mine.pth"])
def test_how_many_objects_trained_weights_find_is_not_ours_to_say(main, no_host, weights):
    outcome = main("--model", "testRetinaNet", "--weights", weights, "--detections", "5")
    assert_refused(outcome, "--detections", f"--weights {weights}")


def test_a_number_of_objects_asks_for_synthetic_weights():
    for arguments, weights in (([], "auto"), (["--detections", "0,100"], "synthetic")):
        options = run_blade.parser().parse_args(["--model", "testRetinaNet", *arguments])
        assert plan._weights(options) == weights


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--iterations", "7"], "--iterations: 6 before, 7 now"),
        (["--sizes", "10"], "--sizes: none before, 10 now"),
        (["--seed", "1"], "--seed: 0 before, 1 now"),
        (["--backend", "torchscript"], "--backend: torch torchscript openvino"),
        (["--precision", "bf16"], "--precision: fp32 before, bf16 now"),
    ],
)
def test_other_settings_are_not_mixed(main, finished, change, words):
    _, output = finished
    before = (output / "results.json").read_text()
    assert_refused(main(*FINISHED, *change, "--output", output), words, "--rerun")
    assert (output / "results.json").read_text() == before


@pytest.mark.parametrize("gpu", [None, "Some GPU"])
def test_another_machine_is_not_mixed(main, monkeypatch, copied, gpu):
    environment = file.load(copied / "results.json").environment
    if gpu is None:
        words = "cpu.flags: new only before"
        cpu = replace(environment.cpu, flags=(*environment.cpu.flags, "new"))
        change(copied, environment=replace(environment, cpu=cpu))
    else:
        words = "gpu: Some GPU before, Another now"
        change(copied, environment=replace(environment, gpu=gpu))
        survey_of = plan.survey_of
        monkeypatch.setattr(
            plan, "survey_of", lambda *args: replace(survey_of(*args), gpu="Another")
        )
    assert_refused(main(*FINISHED, "--output", copied), words, "--rerun")


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


def test_stages_roofline_and_trace(main, tmp_path):
    more = ["--backend", "torchscript", "--stages", "--roofline", "--trace", "--output", tmp_path]
    outcome = main(*FINISHED, *more)
    assert outcome.code == 0, outcome.err
    results = file.load(tmp_path / "results.json")
    assert results.peaks["fp32"] > 1e9
    (group,) = results.groups
    assert group.flops > 1e9
    assert sum(vars(group.stages).values()) > 0
    assert "% of peak" in outcome.out
    assert "ceiling" in outcome.out
    for run in group.runs:
        (name,) = run.artifacts
        assert name == f"testRetinaNet.{run.backend}.fp32.trace.json"
        events = json.loads((tmp_path / name).read_text())["traceEvents"]
        assert sum(event.get("cat") == "cpu_op" for event in events) > 100


def test_another_environment_is_a_row_of_its_own(main, tmp_path):
    more = ["--backend", "torch", "--trace", "--output", tmp_path]
    environment = ["--environment", f"torchscript@again=env {sys.executable}"]
    outcome = main(*FINISHED, *more, *environment)
    assert outcome.code == 0, outcome.err
    lines = [line for line in outcome.out.splitlines() if line.startswith("| RetinaNet")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[1] for row in cells] == ["Torch", "TorchScript@again"]
    results = file.load(tmp_path / "results.json")
    assert results.settings.backend == ("torch", "torchscript@again")
    assert results.settings.environment == ("torchscript@again",)
    # Where it lies is private.
    assert str(Path(sys.executable).parent) not in (tmp_path / "results.json").read_text()
    (group,) = results.groups
    names = [f"testRetinaNet.{run.name}.fp32.trace.json" for run in group.runs]
    assert [run.artifacts for run in group.runs] == [(name,) for name in names]
    assert set(file.load_found(tmp_path)["testRetinaNet"].runs["fp32"]) == {"TorchScript@again"}
    assert "TorchScript@again" in (tmp_path / "report.html").read_text(encoding="utf-8")
    # Without it, it is another measurement.
    refused = main(*FINISHED, *more)
    assert_refused(refused, "--backend: torch torchscript@again before, torch now", "--rerun")
    # And so it is where the name stands for something else now.
    runs = (group.runs[0], replace(group.runs[1], python="3.8.18"))
    change(tmp_path, groups=(replace(group, runs=runs),))
    refused = main(*FINISHED, *more, *environment)
    assert_refused(refused, "--environment torchscript@again: python 3.8.18, torch", "--rerun")


def test_several_counts_of_objects(main, tmp_path):
    counts = ["--backend", "torch", "--detections", "0,10", "--trace", "--output", tmp_path]
    outcome = main(*FINISHED, *counts)
    assert outcome.code == 0, outcome.err
    groups = file.load(tmp_path / "results.json").groups
    assert [(group.objects, group.found) for group in groups] == [(0, 0), (10, 10)]
    traces = [run.artifacts for group in groups for run in group.runs]
    assert traces == [(f"{n}-objects.testRetinaNet.torch.fp32.trace.json",) for n in (0, 10)]
    assert all((tmp_path / name).exists() for (name,) in traces)
    lines = [line for line in outcome.out.splitlines() if line.startswith("| RetinaNet | Torch")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [line[3:5] for line in cells if len(line) == 8] == [["0", "0"], ["10", "10"]]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "RetinaNet with 10 objects" in text
    again = main(*FINISHED, *counts)
    assert again.err.count("kept from before") == 2
    assert file.load(tmp_path / "results.json").groups == groups


@pytest.fixture
def two_images(tmp_path) -> List[Path]:
    """A lying and a standing part of a photograph, of the same file name."""
    paths = [tmp_path / "a" / "part.png", tmp_path / "b" / "part.png"]
    with Image.open(inputs.default_image()) as photograph:
        for path, box in zip(paths, ((100, 100, 228, 196), (250, 300, 346, 428))):
            path.parent.mkdir()
            photograph.crop(box).save(path)
    return paths


def test_several_images_are_reported_one_by_one_and_together(main, two_images, tmp_path):
    output = tmp_path / "output"
    more = ["--image", *two_images, "--detections", "20", "--backend", "torchscript"]
    arguments = [x for x in FINISHED if x not in ("--image-size", "96x128")]
    outcome = main(*arguments, *more, "--output", output)
    assert outcome.code == 0, outcome.err
    results = file.load(output / "results.json")
    assert results.settings.image == ("part.png", "part.png")
    groups = results.groups
    assert [group.image for group in groups] == [None, "part.png (1)", "part.png (2)"]
    assert [group.found for group in groups] == [40, 20, 20]
    assert [set(group.image_sizes) for group in groups] == [
        {"min", "opt", "max", "image 2", "blank"},
        {"min", "opt", "max"},
        {"image 2"},
    ]
    assert groups[2].image_sizes["image 2"] == ((128, 96),)
    for together, first, second in zip(*(group.runs for group in groups)):
        means = [(a + b) / 2 for a, b in zip(first.samples_s, second.samples_s)]
        assert together.samples_s == pytest.approx(means)
        assert len(means) == 6
        assert first.samples_s != second.samples_s
    torchscript = groups[2].runs[1]
    assert set(torchscript.detections) == {"image 2"}
    assert torchscript.detections["image 2"].text == "20/20 match"
    assert torchscript.speedup.ratio > 0
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
    again = main(*arguments, *more, "--output", output)
    assert "kept from before" in again.err
    assert file.load(output / "results.json").groups == groups


def test_an_image_that_engines_are_not_made_for(main, no_host, two_images, tmp_path):
    large = tmp_path / "large.png"
    Image.new("RGB", (128, 400)).save(large)
    outcome = main("--model", "testRetinaNet", "--image", two_images[0], large)
    assert_refused(outcome, "large.png has 400x128 pixels", "after the first image", "--image-size")


def test_another_image_of_the_same_name_is_not_mixed(main, two_images, tmp_path):
    output = tmp_path / "output"
    arguments = [x for x in FINISHED if x not in ("--image-size", "96x128")]
    arguments += ["--backend", "torch", "--output", output, "--image"]
    assert main(*arguments, two_images[0]).code == 0
    assert_refused(main(*arguments, two_images[1]), "another image of the same name", "--rerun")


def test_a_trace_needs_a_place(main, no_host):
    assert_refused(main("--all", "--trace"), "--trace needs --output")


# Exit codes ------------------------------------------------------------------------------------


def run_with(status: str = "ok", verdict: Optional[str] = None) -> Run:
    """A run, as far as the exit code looks at it."""
    return Run(
        backend="torch",
        label="Torch",
        baseline=verdict is None,
        requested_precision="fp32",
        status=status,
        speedup=verdict and Speedup(1.5, 1.4, 1.6, verdict),
    )


def group_of(*runs: Run) -> Group:
    return Group("testRetinaNet", "traced", "fp32", 1, {}, 6, "fixed", runs)


@pytest.mark.parametrize(
    ("status", "verdict", "fail_on", "code"),
    [
        ("ok", "faster", (), 0),
        ("ok", "faster", ("slower",), 0),
        ("ok", "slower", (), 0),
        ("ok", "slower", ("slower",), 1),
        ("ok", "inconclusive", ("slower",), 0),
        ("ok", "same", ("slower",), 0),
        ("mismatch", "faster", (), 1),
        ("failed", None, (), 1),
        ("unsupported", None, ("slower",), 0),
    ],
)
def test_exit_code(status, verdict, fail_on, code):
    good = group_of(run_with(), run_with("ok", "faster"))
    other = group_of(run_with(), run_with(status, verdict))
    assert session.exit_code([good, other], fail_on) == code


# Ctrl-C ----------------------------------------------------------------------------------------


# What goes on until it is ended.
ENDLESS = [
    *["--model", "testRetinaNet", "--backend", "torch", "--precision", "fp32", *QUICK],
    *["--iterations", "100000"],
]


class Interruptible:
    """A real invocation, in a process group of its own as a terminal would have it."""

    started: ClassVar[List[subprocess.Popen]] = []

    def __init__(self, *arguments: object, **variables: str) -> None:
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **variables},
        )
        self.said: List[str] = []
        self.started.append(self.process)

    def wait_for(self, words: str) -> None:
        """Reads standard error up to a line with these words."""
        for line in self.process.stderr:
            self.said.append(line)
            if words in line:
                return
        raise AssertionError(f"it never said '{words}': {self.said}")

    def interrupt(self, number: int = signal.SIGINT) -> Outcome:
        """Presses Ctrl-C, or sends another signal; checks that every process of it is gone soon."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        start = time.monotonic()
        os.killpg(self.process.pid, number)
        try:
            out, err = self.process.communicate(timeout=60)
        finally:
            if self.process.poll() is None:  # It would keep the machine busy for all that follows.
                os.killpg(self.process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive
        assert time.monotonic() - start < 20  # A second or two, on a machine that is not busy.
        return Outcome(self.process.returncode, out, err)


@pytest.fixture(autouse=True)
def none_is_left() -> Iterator[None]:
    """An invocation that a failing test has left would keep the machine busy."""
    yield
    while Interruptible.started:
        process = Interruptible.started.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def assert_interrupted(outcome: Outcome) -> None:
    assert outcome.code == 130
    assert outcome.err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in outcome.err


def test_interrupted_while_hosts_start(tmp_path):
    output = tmp_path / "output"
    running = Interruptible("--model", "testRetinaNet", *QUICK, "--output", output)
    process = psutil.Process(running.process.pid)
    while not process.children():
        assert process.status() != psutil.STATUS_ZOMBIE
        time.sleep(0.05)
    outcome = running.interrupt()
    assert_interrupted(outcome)
    assert (outcome.out, outcome.err) == ("", "interrupted\n")
    assert not output.exists()


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
    results = file.load(tmp_path / "results.json")
    assert results.complete is False
    (group,) = results.groups
    assert group.stopped == "interrupted"
    (run,) = group.runs
    # The round in which it was interrupted may lack a call.
    assert group.rounds > 0
    assert 0 <= len(run.samples_s) - group.rounds <= 1
    assert "until it was interrupted" in outcome.out
    assert "This run was interrupted" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("ending", [None, KeyboardInterrupt, InputError("a reason")])
def test_a_page_that_cannot_be_written_hides_nothing(main, monkeypatch, copied, ending):
    (copied / "report.html").unlink()
    (copied / "report.html").mkdir()
    if ending is not None:

        def end(*_: object) -> None:
            raise ending

        monkeypatch.setattr(session.Session, "_run_model", end)
    outcome = main(*FINISHED, "--costs", "--output", copied)
    assert "a page could not be kept: " in outcome.err
    assert outcome.code == (130 if ending is KeyboardInterrupt else 2)
    last = outcome.err.splitlines()[-1]
    if ending is None:
        assert "break-even (images)" in outcome.out
    else:
        assert last == "interrupted" or last.endswith("error: a reason")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_terminated_while_timing(tmp_path, number):
    """By `timeout`, a container's stop, a terminal that closes: it ends as by Ctrl-C."""
    scratch, output = tmp_path / "scratch", tmp_path / "output"
    scratch.mkdir()
    running = Interruptible(*ENDLESS, "--output", output, TMPDIR=str(scratch))
    running.wait_for("timing")
    time.sleep(2)
    assert list(scratch.glob("run_blade_*"))
    outcome = running.interrupt(number)
    assert outcome.code == 143
    assert outcome.err.splitlines()[-1] == "terminated"
    assert "Traceback" not in outcome.err
    assert not list(scratch.glob("run_blade_*"))
    (group,) = file.load(output / "results.json").groups
    assert group.stopped == "interrupted"
    assert group.rounds > 0
    assert "until it was interrupted" in outcome.out
    assert not list(output.glob(".*"))


def test_a_terminal_that_closes_ends_a_run(tmp_path):
    """What is printed after that has nowhere to go, and must not cost what was measured."""
    master, slave = pty.openpty()
    command = [sys.executable, str(SCRIPT), *ENDLESS, "--output", str(tmp_path)]
    process = subprocess.Popen(
        command,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    Interruptible.started.append(process)
    os.close(slave)
    said = b""
    while said.count(b"preparing Torch fp32") < 2:  # Once more, for A/A. A bar follows.
        said += os.read(master, 1000)
    time.sleep(8)
    os.close(master)
    assert process.wait(60) == 143
    (group,) = file.load(tmp_path / "results.json").groups
    assert group.stopped == "interrupted"
    assert group.rounds > 0


def test_what_was_killed_is_cleared_away_by_the_next(tmp_path):
    variables = {"TMPDIR": str(tmp_path / "scratch")}
    (tmp_path / "scratch").mkdir()
    killed = Interruptible(*ENDLESS, **variables)
    killed.wait_for("timing")
    left = set((tmp_path / "scratch").glob("run_blade_*"))
    other = Interruptible(*ENDLESS, **variables)
    other.wait_for("timing")
    killed.interrupt(signal.SIGKILL)
    others = set((tmp_path / "scratch").glob("run_blade_*")) - left
    assert left
    assert others
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--list"],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        check=True,
    )
    assert b"Test models" in done.stdout
    # The other one, which lives, has lost nothing.
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in others)
    assert_interrupted(other.interrupt())
    assert list((tmp_path / "scratch").glob("run_blade_*")) == []


def test_a_place_for_temporary_files_is_named_where_there_is_none(monkeypatch):
    def refuse() -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", refuse)
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(InputError, match="no room for temporary files"), session.opened(()):
        pass


def test_what_nohup_ignores_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with run_blade.ending_in_order():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert callable(signal.getsignal(signal.SIGTERM))
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_output_folder_belongs_to_one_at_a_time(main, tmp_path):
    running = Interruptible(*ENDLESS, "--output", tmp_path)
    running.wait_for("timing")
    time.sleep(3)
    outcome = main(*FINISHED, "--backend", "torch", "--output", tmp_path)
    assert_refused(outcome, str(tmp_path), f"is in use by process {running.process.pid}")
    assert_interrupted(running.interrupt())
    assert file.load(tmp_path / "results.json").groups
    # A lock that a killed process has left does not count.
    (tmp_path / ".run_blade.lock").write_text("1")
    outcome = main(*FINISHED, "--rerun", "--backend", "torch", "--output", tmp_path)
    assert outcome.code == 0, outcome.err
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("size", [0, 100])
def test_a_full_disk_costs_the_files_and_not_the_tables(main, tmp_path, size):
    with full_disk(size):
        outcome = main(*FINISHED, "--backend", "torch", "--costs", "--output", tmp_path)
    assert outcome.code == 2
    assert "| RetinaNet     | Torch" in outcome.out
    assert "break-even (images)" in outcome.out
    for words in ("results could not be kept: cannot write", "an image could not be kept"):
        assert words in outcome.err
    assert "Traceback" not in outcome.err
    assert not list(tmp_path.glob("*.json"))


def test_interrupted_while_checking(tmp_path):
    """All rounds are made; what is not checked is not complete."""
    running = Interruptible(
        *["--model", "testRetinaNet", "--backend", "torchscript", "--precision", "fp32"],
        *[*QUICK, "--iterations", "5", "--output", tmp_path],
    )
    running.wait_for("checking torch")
    outcome = running.interrupt()
    assert_interrupted(outcome)
    (group,) = file.load(tmp_path / "results.json").groups
    assert (group.rounds, group.stopped) == (5, "interrupted")
    assert group.runs[1].detections is None


def test_an_interruption_keeps_the_finished_groups(tmp_path):
    running = Interruptible(
        *["--model", "testRetinaNet", "--backend", "torchscript", "--precision", "fp32", "bf16"],
        *[*QUICK, "--iterations", "5", "--output", tmp_path],
    )
    running.wait_for("preparing Torch bf16")
    first = file.load(tmp_path / "results.json")
    assert first.complete is False
    outcome = running.interrupt()
    assert_interrupted(outcome)
    results = file.load(tmp_path / "results.json")
    assert results.complete is False
    assert results.groups == first.groups
    (group,) = results.groups
    assert (group.precision, group.rounds, group.stopped) == ("fp32", 5, "fixed")
    assert [run.status for run in group.runs] == ["ok", "ok"]
    assert "| RetinaNet     | TorchScript | fp32" in outcome.out
