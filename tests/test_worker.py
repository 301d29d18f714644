"""Real processes: what they answer, and what becomes of them when they are killed or hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import worker
from benchmark import RunFailed, WarmUp
from catalog import MODELS
from errors import InputError, sentence
from worker import Job, ModelRequest, Worker

ROOT = Path(worker.__file__).parent
ENDLESS = WarmUp.fixed(10**9)


@pytest.fixture(scope="module")
def prepared(exports, tmp_path_factory) -> Path:
    """Weights and inputs of a small RetinaNet, as `worker.prepare_model` leaves them."""
    export = exports("testRetinaNet")
    path = tmp_path_factory.mktemp("prepared") / "testRetinaNet.pt"
    state = export.eager.detector.state_dict()
    torch.save({"state": state, "name": "weights", "inputs": export.tuning_inputs}, path)
    return path


@pytest.fixture
def start(tmp_path):
    """Starts workers, and ends those that are left."""
    started = []

    def start() -> Worker:
        started.append(Worker(tmp_path / f"{len(started)}.log", threads=1))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def job(prepared: Path, model: str = "testRetinaNet", backend: str = "torch") -> Job:
    return Job(model, backend, "fp32", "cpu", "bundled", str(prepared), threads=1)


@pytest.fixture
def run(start, prepared) -> Worker:
    """A worker with Torch fp32 prepared in it."""
    process = start()
    worker.prepare(process, job(prepared))
    return process


def after(seconds: float, action) -> None:
    threading.Timer(seconds, action).start()


# What they answer ------------------------------------------------------------------------------


def test_a_run(run, exports):
    warm = run.ask("warm_up", WarmUp.fixed(2))
    assert len(warm) == 2
    start = time.perf_counter()
    seconds = run.ask("timed_call")
    assert 0 < seconds < time.perf_counter() - start
    assert run.ask("precision") == "fp32"
    assert 100 < run.ask("peak_memory")["peak_memory_mb"] < 100_000
    export = exports("testRetinaNet")
    for size, images in export.tuning_inputs.items():
        with torch.no_grad():
            wanted = export.eager(*images)
        answer = run.ask("detect", (size,))
        assert all(0 < seconds < 60 for seconds in answer["seconds"])
        found = answer["outputs"]
        assert len(found[0]) > 10
        for one, other in zip(wanted, found):
            assert isinstance(other, np.ndarray)
            np.testing.assert_allclose(other, one.numpy(), atol=1e-3)


def test_what_is_known_of_a_run(start, prepared):
    description = worker.prepare(start(), job(prepared, backend="torchscript"))
    assert description["provider"] == "cpu"
    assert description["threads"] == 1
    assert description["coverage"]["operators"] > 100
    assert set(description["versions"]) == {"torch", "torchvision"}
    prepare = description["prepare"]
    phases = [prepare[phase] for phase in ("build", "export", "compile")]
    assert all(seconds > 0 for seconds in phases)
    assert prepare["total"] >= sum(phases)
    assert description["cached"] is False


def test_a_model_is_prepared(start, tmp_path):
    file = tmp_path / "prepared.pt"
    request = ModelRequest(
        model="testMaskRCNNFPN_b2",
        source="bundled",
        weights="synthetic",
        images=(),
        image_size=(64, 96),
        detections=5,
        seed=0,
        threads=1,
        prepared=str(file),
    )
    answer = start().ask("prepare_model", request)
    assert answer["fields"] == MODELS["testMaskRCNNFPN_b2"].fields
    assert answer["note"] == "weights: synthetic, made to find 5 objects"
    assert answer["sizes"]["opt"] == [[64, 96], [64, 96]]
    assert set(answer["reference"]) == {"min", "opt", "max"}
    for name, outputs in answer["reference"].items():
        assert len(outputs) == 10
        assert outputs[4].tolist() == answer["sizes"][name][0]
    kept = torch.load(file, weights_only=True)
    assert [image.shape for image in kept["inputs"]["opt"]] == [(3, 64, 96)] * 2
    assert "proposal_generator.rpn_head.conv.weight" in kept["state"]


def test_it_prints_nothing_here(run, capfd):
    """Engines write to the file descriptors; the log has it."""
    with pytest.raises(RunFailed):
        run.ask("detect", ("huge",))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert "KeyError: 'huge'" in run.log.read_text()


def test_its_temporary_files_are_beside_its_log(tmp_path):
    """There they are removed even if it is killed; TorchInductor looks there for earlier code."""
    code = (
        "import os, subprocess, sys, tempfile, worker\n"
        "worker._isolate(sys.argv[1])\n"
        "tempfile.mkdtemp(prefix='python_')\n"
        "subprocess.run(['mktemp', '-d', '--tmpdir', 'child_XXXX'], check=True)\n"
    )
    log = tmp_path / "log"
    subprocess.run([sys.executable, "-c", code, str(log)], check=True, cwd=ROOT)
    made = sorted(path.name.split("_")[0] for path in tmp_path.iterdir())
    assert made == ["child", "log", "python"]


# What goes wrong there -------------------------------------------------------------------------


def test_an_exception_costs_one_request(run):
    with pytest.raises(RunFailed) as failure:
        run.ask("detect", ("huge",))
    assert str(failure.value) == "KeyError: 'huge'"
    assert run.ask("timed_call") > 0


def test_the_message_of_torchscript_is_that_of_its_operator():
    def add(x, y):
        return x + y

    module = torch.jit.trace(add, (torch.ones(2), torch.ones(2)))
    with pytest.raises(RuntimeError) as failure:
        module(torch.ones(2), torch.ones(3))
    message = sentence(failure.value)
    assert message.startswith("RuntimeError: The size of tensor a (2) must match")
    assert "\n" not in message


def test_a_users_error_comes_through(start, prepared):
    process = start()
    with pytest.raises(InputError, match="weights belongs to another architecture"):
        worker.prepare(process, job(prepared, model="testMaskRCNNFPN"))
    with pytest.raises(InputError, match="unknown backend 'tvm'"):
        worker.prepare(process, job(prepared, backend="tvm"))


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (signal.SIGKILL, "the process was killed by SIGKILL, perhaps by the system for want of"),
        (signal.SIGFPE, "the process was killed by SIGFPE"),
    ],
)
def test_killed_during_a_call(run, number, sentence):
    after(1, lambda: os.kill(run.process.pid, number))
    with pytest.raises(RunFailed) as failure:
        run.ask("warm_up", ENDLESS)
    assert str(failure.value).startswith(sentence)
    assert "\n" not in str(failure.value)


def test_killed_between_calls(run):
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.join()
    for _ in range(2):
        with pytest.raises(RunFailed, match="killed by SIGKILL"):
            run.ask("timed_call")


def test_a_process_that_hangs_is_ended(run):
    os.kill(run.process.pid, signal.SIGSTOP)
    with pytest.raises(RunFailed, match=r"^no answer within 0\.5 s$"):
        run.ask("timed_call", (), 0.5)
    assert not psutil.pid_exists(run.process.pid)


def test_a_call_that_takes_too_long_is_ended(run):
    with pytest.raises(RunFailed, match=r"^no answer within 1 s$"):
        run.ask("warm_up", ENDLESS, 1)
    assert not psutil.pid_exists(run.process.pid)


def test_stop_is_polite_and_kill_is_not(start):
    polite, killed = start(), start()
    with pytest.raises(RunFailed):
        polite.ask("timed_call")  # It is up, and nothing is prepared in it.
    polite.stop()
    assert polite.process.exitcode == 0
    killed.kill()
    assert killed.process.exitcode == -signal.SIGKILL
    killed.kill()  # A second time does no harm.


def test_ctrl_c_does_not_reach_them(run):
    os.kill(run.process.pid, signal.SIGINT)
    assert run.ask("timed_call") > 0


def test_an_interruption_waits_until_a_process_has_started():
    """Whichever thread the system hands it to."""
    started = []

    def start() -> None:
        with worker._interrupts_held():
            os.kill(os.getpid(), signal.SIGINT)
            # As another thread has it.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            time.sleep(0.1)
            started.append(True)

    with pytest.raises(KeyboardInterrupt):
        start()
    assert started
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def test_they_do_not_outlive_their_parent(tmp_path):
    """Not even when it had no time to say goodbye, and they are in the middle of something."""
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from worker import Worker\n"
        "if __name__ == '__main__':\n"
        f"    process = Worker(Path({str(tmp_path / 'log')!r}), 1)\n"
        "    print(process.process.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(program)
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs([child], timeout=30)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
