"""Real processes: what they answer, and what becomes of them when they are killed or hang."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from benchmark import RunFailed, WarmUp
from configuration import Input
from detectors.build import fields_of
from detectors.inputs import View
from detectors.zoo_configurations import zoo_configuration
from errors import InputError, first_cause
from measure import protocol, run, worker
from measure.group import load_outputs
from measure.run import SHORT_CALL_S
from measure.worker import Command, Host, Hosts, Worker
from models import MODELS, Detectron2Model, Model

ROOT = Path(__file__).resolve().parent.parent
ENDLESS = protocol.Warm.by(WarmUp.fixed(10**9))
OWN = Command.own()


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """The host of the suite's own environment."""
    host = Host(OWN, tmp_path_factory.mktemp("host") / "host.log")
    yield host
    host.close()


@pytest.fixture
def start(host, tmp_path):
    """Starts workers, and ends those that are left."""
    started = []

    def start() -> Worker:
        started.append(host.start(tmp_path / f"{len(started)}.log", threads=1))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def request(
    prepared: Path, model: str = "testRetinaNet", backend: str = "torch"
) -> protocol.PrepareRun:
    return protocol.PrepareRun(MODELS[model], backend, "fp32", "cpu", "bundled", str(prepared))


@pytest.fixture
def ready(start, prepared) -> Worker:
    """A worker with Torch fp32 prepared in it."""
    one = start()
    one.ask(request(prepared))
    return one


def after(seconds: float, action) -> None:
    threading.Timer(seconds, action).start()


# What they answer ------------------------------------------------------------------------------


def test_a_run(ready, exports, tmp_path):
    warm = ready.ask(protocol.Warm.by(WarmUp.fixed(2))).seconds
    assert len(warm) == 2
    start = time.perf_counter()
    (seconds,) = ready.ask(protocol.TimedCalls()).seconds
    assert 0 < seconds < time.perf_counter() - start
    assert ready.ask(protocol.ReadPrecision()).precision == "fp32"
    assert 100 < ready.ask(protocol.ReadMemory()).peak_memory_mb < 100_000
    export = exports("testRetinaNet")
    for size, images in export.tuning_inputs.items():
        with torch.no_grad():
            wanted = export.eager(*images)
        answer = ready.ask(protocol.Detect(size, str(tmp_path / "found.npz")))
        # A call that takes long, as on a busy machine, is not repeated.
        is_long = answer.seconds[0] >= SHORT_CALL_S
        assert len(answer.seconds) == 2 or is_long
        assert all(0 < seconds < 60 for seconds in answer.seconds)
        found = load_outputs(tmp_path / "found.npz")
        assert len(found[0]) > 10
        for one, other in zip(wanted, found, strict=True):
            assert isinstance(other, np.ndarray)
            np.testing.assert_allclose(other, one.numpy(), atol=1e-3)
    once = ready.ask(protocol.Detect("opt", str(tmp_path / "found.npz"), repeat=False))
    assert len(once.seconds) == 1


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="it asks glibc 2.33")
@pytest.mark.parametrize("is_raised", [True, False])
def test_large_blocks_do_not_come_from_the_system(is_raised):
    """In a process that has just imported PyTorch, they do: a page fault for each 4 KiB of each."""
    code = (
        "import ctypes, torch\n"
        "from measure import run\n"
        f"{'run._raise_mmap_threshold()' if is_raised else ''}\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.mallinfo2.restype = type('mallinfo2', (ctypes.Structure,),\n"
        "    {'_fields_': [(str(i), ctypes.c_size_t) for i in range(10)]})\n"
        "def of_the_system():\n"
        "    return getattr(libc.mallinfo2(), '3')\n"  # `hblks`: blocks that were mapped.
        "before = of_the_system()\n"
        "kept = torch.ones(30 << 20, dtype=torch.uint8)\n"
        "print(of_the_system() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert int(done.stdout) == (0 if is_raised else 1)


def test_autocast_lasts_as_long_as_the_worker(prepared):
    """In which weights are cast once: see `test_a_worker_casts_weights_once`."""
    code = (
        "import torch\n"
        "from measure import protocol, run\n"
        "from models import MODELS\n"
        "model = MODELS['testRetinaNet']\n"
        f"names = ('cpu', 'bundled', {str(prepared)!r})\n"
        "for precision in ('fp32', 'bf16'):\n"
        "    one = run.Run(protocol.PrepareRun(model, 'torch', precision, *names))\n"
        "    one.timed_calls()\n"
        "    print(torch.is_autocast_enabled('cpu'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split() == ["False", "True"]


needs_two_cores = pytest.mark.skipif(len(run.CORES) < 2, reason="there is but one usable core")


@needs_two_cores
@pytest.mark.parametrize("variable", ["OMP_PROC_BIND=close", "GOMP_CPU_AFFINITY=0-1"])
def test_engines_are_not_bound_to_the_core_that_openmp_binds_pytorch_to(
    tmp_path, prepared, variable
):
    command = Command("bound", ("env", variable, "OMP_PLACES=cores", sys.executable))
    with contextlib.closing(Host(command, tmp_path / "host.log")) as host:
        cores = {}
        for backend in ("torch", "onnxruntime"):
            with host.worker(tmp_path / "log", threads=2) as one:
                one.ask(request(prepared, backend=backend))
                cores[backend] = len(psutil.Process(one.pid).cpu_affinity())
    assert cores["torch"] == 1
    assert cores["onnxruntime"] == len(run.CORES)


def test_settling_waits_for_its_threads(start):
    """PyTorch's product keeps a thread busy; a worker that sleeps is still at once."""
    one = start()
    begin = time.monotonic()
    assert one.settle()
    assert time.monotonic() - begin < 0.5
    one.host.tell(one._number, protocol.MeasurePeak("fp32", "cpu"))  # It takes a second or more.
    time.sleep(0.3)
    assert not one.settle(limit_s=0.2)
    one.kill()
    assert one.settle()


def test_settling_waits_for_what_gets_no_core(start, monkeypatch):
    """On a busy machine a process that computes may use no CPU for a while."""
    one = start()
    monkeypatch.setattr(one, "_cpu_clock", lambda: worker._Moment(time.monotonic(), 1.0))
    assert one.settle()
    one.host.tell(one._number, protocol.MeasurePeak("fp32", "cpu"))
    time.sleep(0.3)
    assert not one.settle(limit_s=0.2)
    one.kill()


def test_settling_where_it_cannot_be_seen(start):
    one = start()
    one.host.is_visible, visible = False, one.host.is_visible
    try:
        assert one.settle()
    finally:
        one.host.is_visible = visible


def test_what_is_known_of_a_run(start, prepared):
    facts = start().ask(request(prepared, backend="torchscript"))
    assert facts.provider == "cpu"
    assert facts.threads == 1
    assert facts.coverage.operators > 100
    assert set(facts.versions) == {"torch", "torchvision"}
    assert facts.python == ".".join(map(str, sys.version_info[:3]))
    prepare = facts.prepare
    phases = [prepare.build, prepare.export, prepare.compile]
    assert all(seconds > 0 for seconds in phases)
    assert prepare.convert is None
    assert prepare.total >= sum(phases)
    assert facts.cached is False


def test_a_model_is_prepared(start, tmp_path):
    asked = protocol.PrepareModel(
        model=MODELS["testMaskRCNNFPN_b2"],
        source="bundled",
        weights="synthetic",
        images=(),
        view=View((64, 96)),
        detections=5,
        seed=0,
        folder=str(tmp_path),
    )
    facts = start().ask(asked)
    assert facts.fields == fields_of(MODELS["testMaskRCNNFPN_b2"])
    assert (facts.weights.source, facts.weights.objects) == ("synthetic", 5)
    assert facts.sizes["opt"] == ((64, 96), (64, 96))
    assert facts.timed == ("opt",)
    assert facts.flops["opt"] > 1e9
    for name in ("min", "opt", "max"):
        outputs = load_outputs(tmp_path / f"reference-{name}.npz")
        assert len(outputs) == 10
        assert tuple(outputs[4].tolist()) == facts.sizes[name][0]
    with np.load(tmp_path / "inputs.npz") as inputs:
        assert [inputs[f"opt/{place}"].shape for place in range(2)] == [(3, 64, 96)] * 2
    with np.load(tmp_path / "state.npz") as state:
        assert "proposal_generator.rpn_head.conv.weight" in state.files


def test_it_prints_nothing_here(ready, capfd, tmp_path):
    """Engines write to the file descriptors; the log has it."""
    with pytest.raises(RunFailed):
        ready.ask(protocol.Detect("huge", str(tmp_path / "found.npz")))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert "KeyError: 'huge'" in ready.log.read_text()


def test_its_temporary_files_are_beside_its_log(tmp_path):
    """There they are removed even if it is killed; TorchInductor looks there for earlier code."""
    code = (
        "import os, subprocess, sys, tempfile\n"
        "from measure import run\n"
        "run._isolate(sys.argv[1])\n"
        "tempfile.mkdtemp(prefix='python_')\n"
        "subprocess.run(['mktemp', '-d', '--tmpdir', 'child_XXXX'], check=True)\n"
    )
    log = tmp_path / "log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(log)], check=True, cwd=ROOT, env=environment)
    made = sorted(path.name.split("_")[0] for path in tmp_path.iterdir())
    assert made == ["child", "log", "python"]


def test_a_host_computes_nothing(host, start):
    """Workers are forked from it: a thread of its own would not come along."""
    start()
    process = psutil.Process(host.process.pid)
    assert {"torch", "torchvision", "numpy"} <= imported(host)
    assert not {"openvino", "onnxruntime", "nncf", "scipy"} & imported(host)
    libraries = [thread.id for thread in process.threads()]
    assert len(libraries) <= 1 + threads_of_numpy()


def imported(host: Host) -> set:
    """Packages whose libraries the host's process has open."""
    maps = [Path(entry.path) for entry in psutil.Process(host.process.pid).memory_maps()]
    return {part for path in maps for part in path.parts}


def threads_of_numpy() -> int:
    """OpenBLAS has its threads from the start, and starts them anew where it was forked."""
    code = "import os, numpy; print(len(os.listdir('/proc/self/task')) - 1)"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True).stdout)


# What goes wrong there -------------------------------------------------------------------------


def test_an_exception_costs_one_request(ready, tmp_path):
    with pytest.raises(RunFailed) as failure:
        ready.ask(protocol.Detect("huge", str(tmp_path / "found.npz")))
    assert str(failure.value) == "KeyError: 'huge'"
    assert ready.ask(protocol.TimedCalls()).seconds[0] > 0


def test_a_question_to_a_worker_without_a_run(start):
    with pytest.raises(RunFailed, match="TimedCalls"):
        start().ask(protocol.TimedCalls())


def test_the_message_of_torchscript_is_that_of_its_operator():
    def add(x, y):
        return x + y

    module = torch.jit.trace(add, (torch.ones(2), torch.ones(2)))
    with pytest.raises(RuntimeError) as failure:
        module(torch.ones(2), torch.ones(3))
    message = first_cause(failure.value)
    assert message.startswith("RuntimeError: The size of tensor a (2) must match")
    assert "\n" not in message


def test_a_message_that_announces_more_is_told_with_it():
    assert (
        first_cause(ValueError("These differ:\n  a: 1\n  b: 2")) == "ValueError: These differ: a: 1"
    )
    long = first_cause(ValueError("These differ:\n" + 1000 * "x"))
    assert (long[-4:], len(long)) == ("x...", 300 + len("ValueError: "))


def test_a_users_error_comes_through(start, prepared):
    one = start()
    with pytest.raises(InputError, match="belongs to another architecture"):
        one.ask(request(prepared, model="testMaskRCNNFPN"))
    with pytest.raises(InputError, match="unknown backend 'tvm'"):
        one.ask(request(prepared, backend="tvm"))


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (signal.SIGKILL, "the process was killed by SIGKILL, perhaps by the system for want of"),
        (signal.SIGFPE, "the process was killed by SIGFPE"),
    ],
)
def test_killed_during_a_call(ready, number, sentence):
    after(1, lambda: os.kill(ready.pid, number))
    with pytest.raises(RunFailed) as failure:
        ready.ask(ENDLESS)
    assert str(failure.value).startswith(sentence)
    assert "\n" not in str(failure.value)


def test_killed_between_calls(ready):
    os.kill(ready.pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(RunFailed, match="killed by SIGKILL"):
            ready.ask(protocol.TimedCalls())


def test_one_that_dies_leaves_the_others_alone(ready, start):
    other = start()
    os.kill(other.pid, signal.SIGKILL)
    assert ready.ask(protocol.TimedCalls()).seconds[0] > 0
    with pytest.raises(RunFailed, match="killed by SIGKILL"):
        other.ask(protocol.ReadCpuTime())


def test_a_process_that_hangs_is_ended(ready):
    os.kill(ready.pid, signal.SIGSTOP)
    with pytest.raises(RunFailed, match=r"^no answer within 0\.5 s$"):
        ready.ask(protocol.TimedCalls(), 0.5)
    assert not psutil.pid_exists(ready.pid)


def test_a_call_that_takes_too_long_is_ended(ready):
    with pytest.raises(RunFailed, match=r"^no answer within 1 s$"):
        ready.ask(ENDLESS, 1)
    assert not psutil.pid_exists(ready.pid)


def test_an_answer_that_nobody_waits_for_is_no_other_answer(ready):
    """Ctrl-C may come while one is awaited."""
    after(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        ready.ask(protocol.Warm.by(WarmUp.fixed(20)))
    assert ready.ask(protocol.ReadPrecision()).precision == "fp32"


def test_stop_is_polite_and_kill_is_not(start, host):
    polite, killed = start(), start()
    polite.ask(protocol.ReadCpuTime())
    polite.stop()
    assert host._deaths[polite._number] == 0
    killed.kill()
    assert host._deaths[killed._number] == -signal.SIGKILL
    assert not psutil.pid_exists(killed.pid)
    killed.kill()  # A second time does no harm.


@pytest.mark.parametrize("is_dead", [False, True])
def test_what_a_worker_has_started_ends_with_it(is_dead):
    """Compilers that an engine started, for example: they are in its process group."""
    command = ["sh", "-c", "sleep 600 & echo $!; wait"]
    leader = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0)
    started = psutil.Process(int(leader.stdout.readline()))
    if is_dead:
        leader.kill()
        leader.wait()
        run._kill_group(leader.pid)
    else:
        run._kill(leader.pid)
    leader.wait(10)
    _, alive = psutil.wait_procs([started], timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_a_worker_leads_a_process_group(start):
    one = start()
    one.ask(protocol.ReadCpuTime())
    assert os.getpgid(one.pid) == one.pid


def test_ctrl_c_does_not_reach_them(ready):
    """A terminal sends it to the process group of the parent."""
    assert os.getpgid(ready.host.process.pid) != os.getpgid(0) != os.getpgid(ready.pid)


def test_cpu_time_is_the_same_from_outside_and_from_within(ready):
    ready.ask(protocol.Warm.by(WarmUp.fixed(3)))
    outside = ready.cpu_seconds()
    within = ready.ask(protocol.ReadCpuTime()).seconds
    assert outside > 0.05
    assert within == pytest.approx(outside, abs=0.1)


def test_one_that_cannot_be_seen_tells_its_cpu_time(ready, monkeypatch):
    monkeypatch.setattr(ready.host, "is_visible", False)
    ready.pid = 2**22 + 1  # Of another namespace.
    assert ready.cpu_seconds() > 0
    ready.host.ask(protocol.HOST, protocol.Kill(ready._number), 10)
    assert ready.cpu_seconds() is None


PARENT = """
import sys, time
from pathlib import Path
from measure.worker import Command, Host
host = Host(Command.own(), Path(sys.argv[1]) / "host.log")
workers = [host.start(Path(sys.argv[1]) / f"{number}.log", 1) for number in range(2)]
print(host.process.pid, *(worker.pid for worker in workers), flush=True)
time.sleep(600)
"""


def test_they_do_not_outlive_their_parent(tmp_path):
    """Not even when it had no time to say goodbye, and one of them does not listen."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(children) == 3
    children[1].suspend()
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


# Environments ----------------------------------------------------------------------------------


def script_of(tmp_path: Path, text: str) -> Command:
    """A program that stands where an interpreter should."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return Command.of("openvino@odd", str(path))


def refusal(command: Command, tmp_path: Path) -> str:
    """Why a host cannot be had; nothing of it is left."""
    host = Host(command, tmp_path / "host.log")
    try:
        with pytest.raises(InputError) as refused:
            host.wait()
    finally:
        host.close()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_command_in_front_of_the_interpreter(tmp_path, prepared):
    """As a container's is; it cannot be seen then, if it does not become the interpreter."""
    command = script_of(tmp_path, f'"{sys.executable}" "$@"; exit $?')
    host = Host(command, tmp_path / "host.log")
    try:
        one = host.start(tmp_path / "log", 1)
        assert not host.is_visible
        assert one.ask(request(prepared)).provider == "cpu"
        assert one.cpu_seconds() > 0
        pid = one.pid
    finally:
        host.close()
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo hello", "is no Python that runs workers: it printed 'hello' in place of the"),
        ("echo '[]'", "it printed '[]' in place of the protocol"),
        ("echo '{}'", "in place of the protocol"),
        ('echo \'{"hello": {"protocol": "new"}}\'', "in place of the protocol"),
        ("echo no such library >&2; exit 3", "it ended with exit code 3: no such library"),
        ("kill -9 $$", "it was killed by SIGKILL"),
    ],
)
def test_what_is_no_worker(tmp_path, text, words):
    command = script_of(tmp_path, text)
    assert words in refusal(command, tmp_path)
    assert refusal(command, tmp_path).startswith("environment openvino@odd ")


def test_a_banner_before_the_protocol_is_passed_over(tmp_path):
    """Entry points of containers print one."""
    text = f'echo; echo "== A banner =="; echo 3; exec "{sys.executable}" "$@"'
    host = Host(script_of(tmp_path, text), tmp_path / "host.log")
    try:
        assert host.start(tmp_path / "log", 1).cpu_seconds() is not None
    finally:
        host.close()


def test_one_that_prints_without_end(tmp_path):
    words = "is no Python that runs workers: it printed 'y' in place of the protocol"
    assert words in refusal(script_of(tmp_path, "yes"), tmp_path)


def test_a_folder_that_is_not_there_in_a_container(host, tmp_path):
    words = f"there is no {tmp_path / 'none'} in there: mount it under the same name"
    with pytest.raises(InputError, match=words):
        host.start(tmp_path / "none" / "log", 1)
    assert host.start(tmp_path / "log", 1).cpu_seconds() is not None


def test_many_that_die_at_once(host, start):
    """Their pipes are closed while the host still has events of others at hand."""
    workers = [start() for _ in range(8)]
    for one in workers:
        one.ask(protocol.ReadCpuTime())
    for one in workers[:-1]:
        one.dismiss()
        os.kill(one.pid, signal.SIGKILL)
    assert workers[-1].ask(protocol.ReadCpuTime()).seconds >= 0
    for one in workers[:-1]:
        with pytest.raises(RunFailed):
            one.ask(protocol.ReadCpuTime())
    assert host.process.poll() is None


def test_another_protocol(tmp_path):
    hello = json.dumps({"hello": {"protocol": 99, "python": "3.11.7", "pid": 1}})
    command = script_of(tmp_path, f"echo '{hello}'; sleep 60")
    assert "speaks protocol 99" in refusal(command, tmp_path)


def test_one_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "HELLO_LIMIT_S", 0.5)
    assert "did not start within 0.5 s" in refusal(script_of(tmp_path, "sleep 60"), tmp_path)


def test_one_without_pytorch(tmp_path):
    """Found out before a worker is started."""
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so is missing')")
    text = f'PYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"'
    words = "environment openvino@odd cannot run workers: ImportError: libtorch.so is missing"
    assert refusal(script_of(tmp_path, text), tmp_path) == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/no/such/python", "/no/such/python does not exist"),
        ("/tmp", "/tmp is no program that can be run"),
        ("", "there is no command"),
        ("python 'x", "is no command"),
    ],
)
def test_commands_that_are_none(text, words):
    with pytest.raises(InputError, match=words):
        Command.of("openvino@odd", text)


def test_a_command_may_have_words_and_a_home():
    words = Command.of("openvino", f"env -u FOO {sys.executable}").words
    assert words == ("env", "-u", "FOO", sys.executable)
    home = Command.of("openvino", "sh ~/python").words
    assert home == ("sh", str(Path.home() / "python"))


def test_garbage_in_the_middle_costs_the_run(tmp_path, host):
    """The parent is told; the others of that host are gone with it, those of other hosts not."""
    hello = json.dumps({"hello": {"protocol": protocol.PROTOCOL, "python": "3", "pid": 1}})
    ready = json.dumps({"ready": {"problem": None}})
    started = json.dumps({"from": 0, "id": 1, "answer": {"pid": 2**22 + 1}})
    command = script_of(tmp_path, f"echo '{hello}'; echo '{ready}'; echo '{started}'; echo oh; cat")
    odd = Host(command, tmp_path / "odd.log")
    try:
        one = odd.start(tmp_path / "log", 1)
        with pytest.raises(RunFailed, match="is out of step: it printed 'oh'"):
            one.ask(protocol.TimedCalls())
    finally:
        odd.close()


def test_a_host_that_has_died_is_replaced(tmp_path):
    hosts = Hosts((OWN,), tmp_path)
    try:
        first = hosts.of(OWN)
        first.process.kill()
        first.process.wait()
        assert hosts.of(OWN) is not first
        assert hosts.of(OWN).start(tmp_path / "log", 1).cpu_seconds() is not None
    finally:
        hosts.close()


def test_hosts_that_cannot_be_started_any_more_are_told_of_later(tmp_path):
    (tmp_path / "bin").mkdir()
    command = script_of(tmp_path / "bin", "sleep 60")
    hosts = Hosts((command,), tmp_path)
    (tmp_path / "bin" / "python").unlink()
    hosts.start_next()
    hosts.renew()
    with pytest.raises(InputError, match="cannot be started"):
        hosts.of(command)
    hosts.close()


def test_hosts_are_renewed(tmp_path):
    hosts = Hosts((OWN,), tmp_path)
    try:
        first = hosts.of(OWN)
        assert hosts.of(OWN) is first
        hosts.start_next()
        assert hosts.of(OWN) is first
        hosts.renew()
        second = hosts.of(OWN)
        assert second is not first
        assert first.process.poll() is not None
        assert second.wait().pid == second.process.pid
    finally:
        hosts.close()
    assert second.process.poll() is not None


# The protocol ----------------------------------------------------------------------------------


def test_requests_survive_the_way():
    own = Model(
        "m", "c.yaml", configuration=zoo_configuration("Misc/cascade_mask_rcnn_R_50_FPN_3x")
    )
    settings = (("MODEL.MASK_ON", True), ("MODEL.RPN", None), ("MODEL.RPN.NMS_THRESH", 0.7))
    theirs = Detectron2Model("c.py", settings, "/c.py", Input(96, 160, "RGB"))
    for model in (own, Model("m", "c.py", detectron2=theirs), MODELS["testRetinaNet"]):
        asked = protocol.PrepareModel(model, "s", "w", ("a", "b"), View((1, 2)), 3, 4, "f")
        line = json.dumps({"ask": "PrepareModel", "with": dataclasses.asdict(asked)})
        assert protocol.request(json.loads(line)) == asked
    rule = WarmUp.on("cuda")
    assert protocol.Warm.by(rule).rule == rule


def test_requests_are_read_by_the_oldest_python(monkeypatch):
    """Which refuses a class that has a bare `ClassVar` among its annotations."""
    evaluated = protocol.get_type_hints

    def strict(record: Any) -> Any:
        assert "ClassVar" not in record.__annotations__.values()
        return evaluated(record)

    monkeypatch.setattr(protocol, "get_type_hints", strict)
    run = protocol.PrepareRun(MODELS["testRetinaNet"], "torch", "fp32", "cpu", "bundled", "f")
    for asked in (run, protocol.Detect("opt", "o"), protocol.Stop()):
        line = json.dumps({"ask": type(asked).__name__, "with": dataclasses.asdict(asked)})
        assert protocol.request(json.loads(line)) == asked


@pytest.mark.parametrize(
    "message", [{}, {"ask": "Nothing", "with": {}}, {"ask": "Detect", "with": {"size": 3}}]
)
def test_what_is_no_request(message):
    with pytest.raises(ValueError, match="no request of this protocol"):
        protocol.request(message)


def test_every_request_is_known_and_answered():
    kinds = {kind for kind in vars(protocol).values() if isinstance(kind, type)}
    kinds = {kind for kind in kinds if issubclass(kind, protocol.Request)} - {protocol.Request}
    assert set(protocol.REQUESTS.values()) == kinds
    assert all(isinstance(kind.answer, type) for kind in kinds)


def test_the_lines_of_a_buffer():
    buffer = bytearray(b"one\ntwo\nthr")
    assert protocol.lines(buffer) == [b"one", b"two"]
    assert buffer == b"thr"
    assert protocol.lines(buffer) == []
    buffer += b"ee\n"
    assert protocol.lines(buffer) == [b"three"]
    assert buffer == b""


def test_its_start_does_not_shadow_the_standard_library():
    """Python puts the folder of a script first, and there is a `profile.py` in this one."""
    folder = ROOT / "measure"
    code = (
        "import runpy, sys\n"
        f"sys.path[0] = {str(folder)!r}\n"
        f"runpy.run_path({str(folder / 'run.py')!r})\n"
        "import profile\n"
        "print(profile.__file__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not Path(done.stdout.strip()).is_relative_to(ROOT)
