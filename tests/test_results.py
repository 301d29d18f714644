"""The result file: round trip, atomic save, refusal of what is not one, environment."""

from __future__ import annotations

import copy
import getpass
import importlib.metadata
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import results
from benchmark import Rounds, StopRule, describe_stop
from errors import InputError
from schema import STOPPED


def make_document():
    run = {
        "backend": "torch",
        "label": "Torch",
        "baseline": True,
        "requested_precision": "fp32",
        "effective_precision": "fp32",
        "provider": "PyTorch",
        "threads": 2,
        "status": "ok",
        "reason": None,
        "samples_s": [0.1, 0.2, 0.30000000000000004],
        "warmup_s": [0.5],
        "prepare": {"build": 0.5, "export": 1.0, "total": 1.5},
        "peak_memory_mb": 512.5,
        "statistics": {
            "samples": 3,
            "median_ms": 200.0,
            "mean_ms": 200.0,
            "std_dev_ms": 81.6,
            "max_ms": 300.0,
            "p99_ms": None,
            "median_fps": 5.0,
            "mean_fps": 6.1,
            "relative_iqr": 0.5,
        },
        "speedup": {"ratio": 1.0, "low": 0.9, "high": 1.1, "verdict": "inconclusive"},
        "detections": None,
        "coverage": {},
        "versions": {"torch": "2.0.1"},
        "artifacts": [],
    }
    group = {
        "model": "testRetinaNet",
        "export": "traced",
        "precision": "fp32",
        "images_per_call": 1,
        "image_sizes": {"min": [[240, 320]], "opt": [[480, 640]], "max": [[960, 1280]]},
        "rounds": 3,
        "stopped": "fixed",
        "runs": [run],
    }
    return {
        "schema": results.SCHEMA,
        "tool": "run_blade",
        "version": "0.1.0",
        "environment": {},
        "settings": {"seed": 0},
        "groups": [group],
        "aa": None,
        "notes": ["größer"],
        "complete": True,
    }


def test_round_trip(tmp_path):
    path = tmp_path / "results.json"
    results.save(make_document(), path)
    assert results.load(path) == make_document()
    assert os.listdir(tmp_path) == ["results.json"]


def test_environment_fits_into_the_document(tmp_path):
    document = {**make_document(), "environment": results.environment({})}
    results.save(document, tmp_path / "results.json")
    assert results.load(tmp_path / "results.json") == document


def test_numpy_values_become_numbers(tmp_path):
    document = make_document()
    run = document["groups"][0]["runs"][0]
    run["samples_s"] = np.array([0.5, 0.25])
    run["threads"] = np.int64(4)
    run["peak_memory_mb"] = np.float32(0.5)
    run["baseline"] = np.bool_(True)
    results.save(document, tmp_path / "results.json")
    loaded = results.load(tmp_path / "results.json")["groups"][0]["runs"][0]
    assert loaded["samples_s"] == [0.5, 0.25]
    assert loaded["threads"] == 4
    assert loaded["peak_memory_mb"] == 0.5
    assert loaded["baseline"] is True


@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, np.float32("nan"), np.array([-np.inf]), object(), Path("x")]
)
def test_value_that_does_not_fit_leaves_the_old_file(tmp_path, bad):
    path = tmp_path / "results.json"
    results.save(make_document(), path)
    old = path.read_bytes()
    document = make_document()
    document["notes"].append(bad)
    with pytest.raises((TypeError, ValueError)):
        results.save(document, path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["results.json"]


def test_save_that_cannot_replace_leaves_nothing_behind(tmp_path):
    path = tmp_path / "results.json"
    path.mkdir()
    (path / "kept").touch()
    with pytest.raises(InputError, match=r"cannot write .*results\.json"):
        results.save(make_document(), path)
    assert os.listdir(tmp_path) == ["results.json"]
    assert os.listdir(path) == ["kept"]


def test_save_into_a_missing_directory(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        results.save(make_document(), tmp_path / "missing" / "results.json")


def test_killed_while_saving_leaves_a_whole_file(tmp_path):
    """A process that saves without pause is killed: what is there is one of its documents."""
    path = tmp_path / "results.json"
    results.save(make_document(), path)
    program = (
        "import sys, results\n"
        "document = results.load(sys.argv[1])\n"
        "run = document['groups'][0]['runs'][0]\n"
        "print('saving', flush=True)\n"
        "while True:\n"
        "    run['samples_s'] = [0.5] * (len(run['samples_s']) % 10000 + 1000)\n"
        "    results.save(document, sys.argv[1])\n"
    )
    root = Path(results.__file__).parent
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(path)], cwd=root, stdout=subprocess.PIPE
        )
        assert process.stdout.readline() == b"saving\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)
        process.kill()
        process.communicate()
        assert results.load(path)["complete"] is True


def test_load_missing_file_and_directory(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*none\.json: No such file"):
        results.load(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot read"):
        results.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"median: 3\n", "is not JSON"),
        (b"\x89PNG\r\n\x1a\n\xff", "is not text"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is not a result file of run_blade"),
        (b"3", "is not a result file of run_blade"),
        (b'{"schema": 1, "benchmarks": []}', "is not a result file of run_blade"),
        (b'{"tool": "run_blade", "schema": "one"}', "schema is 'one'"),
        (b'{"tool": "run_blade", "schema": 0}', "schema is 0"),
        (b'{"tool": "run_blade", "schema": 1, "version": NaN}', "NaN is not a number"),
        (b'{"tool": "run_blade", "schema": 1, "version": 1e999}', "1e999... is too large a number"),
        (b'{"tool": "run_blade", "schema": 1}', "the document has no 'version'"),
    ],
)
def test_load_refuses_what_is_not_a_result_file(tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        results.load(path)
    assert message in str(caught.value)
    assert "results.json" in str(caught.value)


def test_load_refuses_every_truncation(tmp_path):
    path = tmp_path / "results.json"
    results.save(make_document(), path)
    whole = path.read_bytes().rstrip()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            results.load(path)


def test_load_refuses_a_newer_schema(tmp_path):
    path = tmp_path / "results.json"
    results.save({**make_document(), "schema": results.SCHEMA + 1}, path)
    with pytest.raises(InputError, match="has schema 2 and this version reads up to 1"):
        results.load(path)


def walk(value, path=()):
    """Every place in a document at which a key stands."""
    if isinstance(value, dict):
        for key in value:
            yield (*path, key)
            yield from walk(value[key], (*path, key))
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from walk(item, (*path, position))


REQUIRED = [
    ("groups",),
    ("complete",),
    ("groups", 0, "runs"),
    ("groups", 0, "stopped"),
    ("groups", 0, "runs", 0, "status"),
    ("groups", 0, "runs", 0, "samples_s"),
    ("groups", 0, "runs", 0, "statistics", "median_ms"),
    ("groups", 0, "runs", 0, "speedup", "ratio"),
]


@pytest.mark.parametrize("place", REQUIRED)
def test_load_names_the_key_that_is_missing_or_wrong(tmp_path, place):
    assert place in set(walk(make_document()))
    path = tmp_path / "results.json"
    for damage in ("missing", "wrong"):
        document = make_document()
        parent = document
        for step in place[:-1]:
            parent = parent[step]
        if damage == "missing":
            del parent[place[-1]]
        else:
            parent[place[-1]] = {"a": []} if place[-1] != "settings" else 1
        results.save(document, path)
        with pytest.raises(InputError, match=f"'{place[-1]}'"):
            results.load(path)


@pytest.mark.parametrize("sample", [0, -0.5, "0.5", None])
def test_load_refuses_samples_that_are_no_times(tmp_path, sample):
    document = make_document()
    document["groups"][0]["runs"][0]["samples_s"].append(sample)
    results.save(document, tmp_path / "results.json")
    with pytest.raises(InputError, match="not a positive number"):
        results.load(tmp_path / "results.json")


def test_load_refuses_an_unknown_status(tmp_path):
    document = make_document()
    document["groups"][0]["runs"][0]["status"] = "fine"
    results.save(document, tmp_path / "results.json")
    with pytest.raises(InputError, match=r"'status' of group 0, run 0 is none of ok, failed"):
        results.load(tmp_path / "results.json")


def change(*place, to):
    """A change of a document: something else at a place, or nothing, where that is `...`."""

    def make(document):
        for step in place[:-1]:
            document = document[step]
        if to is ...:
            del document[place[-1]]
        else:
            document[place[-1]] = to

    return make


GROUP = ("groups", 0)
RUN = (*GROUP, "runs", 0)
# What readers would stumble over, with the words that name it.
DAMAGES = [
    (change("aa", to={}), "'aa' of the document has no 'model'"),
    (change("peaks", to={"fp32": "x"}), "'fp32' of 'peaks' of the document is of the wrong"),
    (change("notes", to=[None]), "item 0 of 'notes' of the document is of the wrong type"),
    (change("warnings", to=5), "'warnings' of the document is of the wrong type"),
    (change("settings", "time_budget", to="x"), "'time_budget' of 'settings' of the document"),
    (change("environment", "cpu", to=[]), "'cpu' of 'environment' of the document is of the"),
    (change("environment", "versions", to=None), "'versions' of 'environment' of the document"),
    (change("environment", "variables", to=[]), "'variables' of 'environment' of the document"),
    (change("environment", "commit", to={"dirty": True}), "of the document has no 'revision'"),
    (change(*GROUP, "runs", to=[]), "'runs' of group 0 is empty"),
    (change(*RUN, "baseline", to=False), "no run of group 0 is the baseline"),
    (change(*GROUP, "image", to=["a"]), "'image' of group 0 is of the wrong type"),
    (change(*GROUP, "objects", to="x"), "'objects' of group 0 is of the wrong type"),
    (change(*GROUP, "image_digest", to=[]), "'image_digest' of group 0 is of the wrong type"),
    (change(*GROUP, "image_sizes", to={"opt": []}), "'opt' of 'image_sizes' of group 0 is empty"),
    (change(*GROUP, "image_sizes", to={"opt": [[9]]}), "has 1 values, not 2"),
    (change(*GROUP, "image_sizes", to={"min": [[9, 9]]}), "has none that is timed"),
    (change(*GROUP, "stopped", to="bored"), "'stopped' of group 0 is none of interval, max rounds"),
    (change(*GROUP, "half_width", to=None), "'half_width' of group 0 is of the wrong type"),
    (change(*GROUP, "gpu", to=None), "'gpu' of group 0 is of the wrong type"),
    (change(*GROUP, "gpu", to=[5]), "item 0 of 'gpu' of group 0 is not an object"),
    (change(*GROUP, "stages", to={}), "'stages' of group 0 has no 'backbone + FPN'"),
    (change(*GROUP, "machine", to={"steal_share": None}), "'steal_share' of 'machine' of group 0"),
    (change(*RUN, "coverage", to=...), "group 0, run 0 has no 'coverage'"),
    (change(*RUN, "coverage", to={"share_of_flops": "x"}), "'share_of_flops' of 'coverage' of"),
    (change(*RUN, "provider", to=...), "group 0, run 0 has no 'provider'"),
    (change(*RUN, "peak_memory_mb", to="x"), "'peak_memory_mb' of group 0, run 0 is of the wrong"),
    (change(*RUN, "prepare", to={"total": 1.0}), "'prepare' of group 0, run 0 has no 'build'"),
    (change(*RUN, "size_seconds", to={"opt": []}), "'opt' of 'size_seconds' of group 0, run 0 is"),
    (change(*RUN, "samples_s", to=[10**400]), "1000000000... is too large a number"),
    (change(*RUN, "statistics", "relative_iqr", to=...), "group 0, run 0 has no 'relative_iqr'"),
    (change(*RUN, "speedup_over_fp32", to={}), "'speedup_over_fp32' of group 0, run 0 has no"),
    (change(*RUN, "break_even", to={"images": 1}), "'break_even' of group 0, run 0 has no 'low'"),
    (change(*RUN, "detections", to={}), "'detections' of group 0, run 0 is empty"),
    (change(*RUN, "detections", to={"opt": {}}), "'opt' of 'detections' of group 0, run 0 has no"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_load_names_what_readers_would_stumble_over(tmp_path, damage, words):
    document = make_document()
    damage(document)
    results.save(document, tmp_path / "results.json")
    with pytest.raises(InputError) as caught:
        results.load(tmp_path / "results.json")
    assert words in str(caught.value)


def test_load_takes_a_group_that_never_came_to_run(tmp_path):
    document = make_document()
    group = document["groups"][0]
    group.update(image_sizes={}, rounds=0, stopped="all failed", stages=None, machine=None, gpu=[])
    run = group["runs"][0]
    run.update(status="failed", reason="no memory", samples_s=[])
    run.update(dict.fromkeys(("effective_precision", "provider", "peak_memory_mb", "detections")))
    run.update(dict.fromkeys(("statistics", "speedup", "speedup_over_fp32", "break_even")))
    run.update({key: {} for key in ("size_seconds", "prepare", "coverage")})
    results.save(document, tmp_path / "results.json")
    assert results.load(tmp_path / "results.json") == document


@pytest.mark.parametrize("stopped", STOPPED)
def test_whatever_ends_the_rounds_has_words(stopped):
    assert describe_stop(Rounds(rounds=3, stopped=stopped), StopRule()).startswith("3 rounds, ")


NAME, SPELLED = os.fsdecode(b"caf\xe9.jpg"), "caf\\udce9.jpg"


def test_names_that_are_no_utf8_are_spelled_out(tmp_path, monkeypatch):
    assert results.file_name(f"/somewhere/{NAME}") == SPELLED
    assert results.file_name("/somewhere/café.jpg") == "café.jpg"
    monkeypatch.setenv("OMP_PLACES", NAME)
    assert results.environment({})["variables"]["OMP_PLACES"] == SPELLED
    results.write_text(tmp_path / "page", f"größer: {NAME}")
    assert (tmp_path / "page").read_text(encoding="utf-8") == f"größer: {SPELLED}"


def test_what_is_loaded_can_be_printed(tmp_path):
    document = make_document()
    document["settings"]["image"] = NAME
    document["notes"].append(NAME)
    (tmp_path / results.FOUND).write_text(json.dumps({NAME: {"reference": [], "runs": {}}}))
    results.save(document, tmp_path / "results.json")
    loaded = results.load(tmp_path / "results.json")
    assert (loaded["settings"]["image"], loaded["notes"][-1]) == (SPELLED, SPELLED)
    assert list(results.read_found(tmp_path)) == [SPELLED]


def test_load_keeps_keys_it_does_not_know(tmp_path):
    document = copy.deepcopy(make_document())
    document["groups"][0]["runs"][0]["energy_j"] = 3.5
    results.save(document, tmp_path / "results.json")
    assert results.load(tmp_path / "results.json") == document


def test_every_key_is_documented():
    text = (Path(results.__file__).parent / "docs" / "results.md").read_text(encoding="utf-8")
    document = {**make_document(), "environment": results.environment({})}
    keys = {place[-1] for place in walk(document) if place[0] not in ("environment", "settings")}
    keys |= set(document["environment"]) - {"cpu"}
    keys |= {f"cpu.{key}" for key in document["environment"]["cpu"]}
    free = {"seed", "torch"}  # an option's name, a distribution's name
    assert sorted(key for key in keys - free if f"`{key}`" not in text) == []


def test_environment_describes_this_machine(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("TORCH_HOME", "/somewhere/private")
    monkeypatch.setenv("SOME_TOKEN", "secret")
    environment = results.environment({"openvino": "2026.4.1"})
    assert environment["versions"]["torch"] == importlib.metadata.version("torch")
    assert environment["versions"]["openvino"] == "2026.4.1"
    assert 1 <= environment["cpu"]["usable_cores"] <= environment["cpu"]["logical_cores"]
    assert environment["memory_mb"] > 100
    assert environment["variables"]["OMP_NUM_THREADS"] == "3"
    assert environment["variables"]["TORCH_HOME"] == "(path)"
    assert "SOME_TOKEN" not in environment["variables"]
    assert environment["time"].endswith("+00:00")
    assert set(environment["cpu"]["flags"]) <= set(results.RELEVANT_FLAGS)


def test_of_flags_only_those_that_differ_are_shown():
    before, after = make_document(), make_document()
    before["environment"] = {"cpu": {"flags": ["fma", "avx2", "avx512f", "avx512_vnni"]}}
    after["environment"] = {"cpu": {"flags": ["fma", "avx2", "avx_vnni"]}}
    line = "cpu.flags: avx512f avx512_vnni only before, avx_vnni only now"
    assert results.differences(before, after) == [line]
    after["environment"]["cpu"]["flags"].pop()
    assert results.differences(before, after) == ["cpu.flags: avx512f avx512_vnni only before"]
    del after["environment"]["cpu"]["flags"]
    assert results.differences(before, after) == []


def test_the_gpu_is_named_by_the_environment_or_else_by_nvml():
    document = make_document()
    assert results.facts(document)["gpu"] is None
    document["groups"][0]["gpu"] = [{"name": "A"}]
    assert results.facts(document)["gpu"] == "A"
    document["environment"] = results.environment({}, "B")
    assert results.facts(document)["gpu"] == "B"


def test_environment_is_not_private():
    text = json.dumps(results.environment({}))
    words = {word.strip('",:{}[]()') for word in text.split()}
    assert socket.gethostname() not in words
    assert getpass.getuser() not in words
    assert os.path.expanduser("~") not in text
    assert str(Path(results.__file__).parent) not in text
    assert sys.prefix not in text


def test_usable_cores_follow_the_affinity():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no CPU affinity")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert results.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("group", "files", "cores"),
    [
        ("0::/", {"cpu.max": "150000 100000\n"}, 1),
        ("0::/", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/", {"cpu.max": "max 100000\n"}, 64),
        ("0::/a/b", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        (
            "4:memory:/a\n3:cpu,cpuacct:/a\n0::/",
            {
                "cpu,cpuacct/a/cpu.cfs_quota_us": "250000\n",
                "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            "3:cpu:/",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            64,
        ),
    ],
)
def test_usable_cores_follow_a_container_quota(tmp_path, monkeypatch, group, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    read_text = results._read_text
    monkeypatch.setattr(results, "_CGROUPS", tmp_path)
    monkeypatch.setattr(
        results,
        "_read_text",
        lambda path: group if path == Path("/proc/self/cgroup") else read_text(path),
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64), raising=False)
    assert results.usable_cores() == cores


def test_commit(tmp_path, monkeypatch):
    """A copy of results.py in a checkout of its own: clean, changed, inside another one."""

    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        command = ["git", *identity, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ).stdout.decode()

    copied = tmp_path / "results.py"
    copied.write_text("pass\n")
    monkeypatch.setattr(results, "__file__", str(copied))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # a git hook sets them
        monkeypatch.delenv(name, raising=False)
    assert results.commit() is None
    git("init", "-q")
    assert results.commit() is None  # no commit yet
    git("add", ".")
    git("commit", "-q", "-m", "one")
    revision = git("rev-parse", "HEAD").strip()
    assert results.commit() == {"revision": revision, "dirty": False}
    (tmp_path / "untracked").touch()
    assert results.commit() == {"revision": revision, "dirty": False}
    copied.write_text("changed\n")
    assert results.commit() == {"revision": revision, "dirty": True}
    (tmp_path / "sub").mkdir()
    monkeypatch.setattr(results, "__file__", str(tmp_path / "sub" / "results.py"))
    assert results.commit() is None
    monkeypatch.setattr(results, "__file__", str(copied))
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert results.commit() is None


def test_native_bf16():
    assert results.has_native_bf16(["avx2", "avx512_bf16"])
    assert results.has_native_bf16(["amx_bf16"])
    assert results.has_native_bf16(["asimd", "bf16"])
    assert not results.has_native_bf16(["avx2", "fma", "avx512f", "avx512_vnni"])
    assert not results.has_native_bf16([])


def test_prepare_directory(tmp_path):
    path = results.prepare_directory(tmp_path / "a" / "b")
    assert path.is_dir()
    (path / "results.json").write_text("kept")
    assert results.prepare_directory(str(path)) == path
    assert os.listdir(path) == ["results.json"]


@pytest.mark.parametrize("below", ["", "sub", "sub/sub"])
def test_prepare_directory_that_is_a_file(tmp_path, below):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match=r"output directory .*file"):
        results.prepare_directory(tmp_path / "file" / below)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs Linux' /proc")
def test_prepare_directory_that_cannot_be_written():
    # Existing and new: not even root can create files in /proc.
    for path in ("/proc", "/proc/results"):
        with pytest.raises(InputError, match=f"output directory {path} cannot be written"):
            results.prepare_directory(path)


def test_importing_is_light():
    program = (
        "import sys, results; "
        "print([m for m in ('torch', 'numpy', 'openvino') if m in sys.modules])"
    )
    root = Path(results.__file__).parent
    completed = subprocess.run(
        [sys.executable, "-c", program], cwd=root, check=True, stdout=subprocess.PIPE
    )
    assert completed.stdout.strip() == b"[]"
