"""The result file: round trip, atomic save, refusal of what is not one, environment."""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Callable, Dict, Set, get_args

import msgspec
import numpy as np
import pytest

from errors import InputError
from results import environment, facts
from results.environment import file_name
from results.file import (
    FOUND,
    load,
    load_found,
    prepare_directory,
    save,
    save_found,
    schema,
    write_text,
)
from results.record import SCHEMA, Commit, Picture, Results, Stages, Stopped, Weights
from results.tables import describe_stop

ROOT = Path(environment.__file__).parent.parent


def make_document() -> Dict[str, Any]:
    """A result file, as JSON has it."""
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
            "p99_ms": 298.0,
            "median_fps": 5.0,
            "mean_fps": 6.1,
            "relative_iqr": 0.5,
            "p90_bound_ms": None,
            "p95_bound_ms": None,
            "p99_bound_ms": None,
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
        "schema": SCHEMA,
        "tool": "run_blade",
        "version": "0.1.0",
        "environment": {},
        "settings": {"seed": 0},
        "groups": [group],
        "aa": None,
        "warnings": ["größer"],
        "complete": True,
    }


def records(document: Dict[str, Any]) -> Results:
    """What a document says."""
    return msgspec.convert(document, Results)


def write(document: Dict[str, Any], path: Path) -> None:
    """Writes a document as it is, whatever is wrong with it."""
    path.write_text(json.dumps(document), encoding="utf-8")


def with_run(results: Results, **changes: Any) -> Results:
    """The same with another first run."""
    (group, *others) = results.groups
    runs = (replace(group.runs[0], **changes), *group.runs[1:])
    return replace(results, groups=(replace(group, runs=runs), *others))


def test_round_trip(tmp_path):
    path = tmp_path / "results.json"
    save(records(make_document()), path)
    assert load(path) == records(make_document())
    assert os.listdir(tmp_path) == ["results.json"]


def test_what_is_saved_has_all_that_the_document_has(tmp_path):
    """And no more than defaults besides."""
    save(records(make_document()), tmp_path / "results.json")
    saved = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert {key: saved[key] for key in ("version", "warnings", "complete")} == {
        "version": "0.1.0",
        "warnings": ["größer"],
        "complete": True,
    }
    asked = make_document()["groups"][0]["runs"][0]
    run = saved["groups"][0]["runs"][0]
    assert {key: run[key] for key in asked if key not in ("prepare", "coverage")} == {
        key: value for key, value in asked.items() if key not in ("prepare", "coverage")
    }


def test_environment_fits_into_the_document(tmp_path):
    results = replace(records(make_document()), environment=environment.environment({}))
    save(results, tmp_path / "results.json")
    assert load(tmp_path / "results.json") == results


def test_numpy_values_become_numbers(tmp_path):
    results = with_run(
        records(make_document()),
        samples_s=np.array([0.5, 0.25]),
        threads=np.int64(4),
        peak_memory_mb=np.float32(0.5),
        baseline=np.bool_(True),
    )
    save(results, tmp_path / "results.json")
    loaded = load(tmp_path / "results.json").groups[0].runs[0]
    assert loaded.samples_s == (0.5, 0.25)
    assert loaded.threads == 4
    assert loaded.peak_memory_mb == 0.5
    assert loaded.baseline is True


@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, np.float32("nan"), np.array([-np.inf]), object(), Path("x")]
)
def test_value_that_does_not_fit_leaves_the_old_file(tmp_path, bad):
    path = tmp_path / "results.json"
    save(records(make_document()), path)
    old = path.read_bytes()
    with pytest.raises((TypeError, ValueError)):
        save(with_run(records(make_document()), samples_s=(0.1, bad)), path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["results.json"]


def test_save_that_cannot_replace_leaves_nothing_behind(tmp_path):
    path = tmp_path / "results.json"
    path.mkdir()
    (path / "kept").touch()
    with pytest.raises(InputError, match=r"cannot write .*results\.json"):
        save(records(make_document()), path)
    assert os.listdir(tmp_path) == ["results.json"]
    assert os.listdir(path) == ["kept"]


def test_save_into_a_missing_directory(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        save(records(make_document()), tmp_path / "missing" / "results.json")


def test_killed_while_saving_leaves_a_whole_file(tmp_path):
    """A process that saves without pause is killed: what is there is one of its documents."""
    path = tmp_path / "results.json"
    save(records(make_document()), path)
    program = (
        "import sys\n"
        "from dataclasses import replace\n"
        "from results.file import load, save\n"
        "results = load(sys.argv[1])\n"
        "(group,) = results.groups\n"
        "print('saving', flush=True)\n"
        "count = 0\n"
        "while True:\n"
        "    count = count % 10000 + 1000\n"
        "    run = replace(group.runs[0], samples_s=(0.5,) * count)\n"
        "    save(replace(results, groups=(replace(group, runs=(run,)),)), sys.argv[1])\n"
    )
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(path)], cwd=ROOT, stdout=subprocess.PIPE
        )
        assert process.stdout.readline() == b"saving\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)
        process.kill()
        process.communicate()
        assert load(path).complete is True


def test_a_file_is_not_touched_before_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    path.write_text("precious")

    def fail(*_):
        assert path.read_text() == "precious"
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match="no space left"):
        save(records(make_document()), path)
    assert path.read_text() == "precious"
    assert os.listdir(tmp_path) == ["results.json"]


def test_load_missing_file_and_directory(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*none\.json: No such file"):
        load(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot read"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"median: 3\n", "is not JSON"),
        (b"\x89PNG\r\n\x1a\n\xff", "is not text"),
        (b"[" * 100_000, "is not JSON"),
        *((b"[" * deep + b"]" * deep, "is not") for deep in (300, 600, 900, 5000, 100_000)),
        (b"[]", "is not a result file of run_blade"),
        (b"3", "is not a result file of run_blade"),
        (b'{"schema": 1, "benchmarks": []}', "is not a result file of run_blade"),
        (b'{"tool": "run_blade"}', "its schema is None"),
        (b'{"tool": "run_blade", "schema": "one"}', "its schema is 'one'"),
        (b'{"tool": "run_blade", "schema": 0}', "its schema is 0"),
        (b'{"tool": "run_blade", "schema": 2.5}', "its schema is 2.5"),
        (b'{"tool": "run_blade", "schema": 2, "version": NaN}', "JSON is malformed"),
        (b'{"tool": "run_blade", "schema": 2, "version": -Infinity}', "JSON is malformed"),
        (b'{"tool": "run_blade", "schema": 2, "version": 1e999}', "Number out of range"),
        (b'{"tool": "run_blade", "schema": 2, "x": 1e101}', "too large a number - at `$.x`"),
        (b'{"tool": "run_blade", "schema": 2, "x": "\\ud800"}', "is not JSON"),
        (b'{"tool": "run_blade", "schema": 2, "\\ud800 ": 1}', "is not JSON"),
        (b'{"tool": "run_blade", "schema": 2}', "missing required field `version`"),
        (
            b'{"tool": "run_blade", "schema": 1}',
            "has schema 1, of an older version, and this one reads 2: measure again",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_load_refuses_what_is_not_a_result_file(tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load(path)
    assert message in str(caught.value)
    assert "results.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load_refuses_every_truncation(tmp_path):
    path = tmp_path / "results.json"
    save(records(make_document()), path)
    whole = path.read_bytes().rstrip()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            load(path)


def test_load_refuses_a_newer_schema(tmp_path):
    path = tmp_path / "results.json"
    write({**make_document(), "schema": SCHEMA + 1}, path)
    with pytest.raises(InputError, match="has schema 3 and this version reads 2: update run_blade"):
        load(path)


def walk(value, path=()):
    """Every place in a document at which a key stands."""
    if isinstance(value, dict):
        for key in value:
            yield (*path, key)
            yield from walk(value[key], (*path, key))
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from walk(item, (*path, position))


def at(place) -> str:
    """The place, as a message names it."""
    return "$" + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)


def at_place(document, place):
    for step in place:
        document = document[step]
    return document


REQUIRED = [
    ("version",),
    ("environment",),
    ("settings",),
    ("groups", 0, "runs"),
    ("groups", 0, "stopped"),
    ("groups", 0, "image_sizes"),
    ("groups", 0, "runs", 0, "baseline"),
    ("groups", 0, "runs", 0, "status"),
    ("groups", 0, "runs", 0, "prepare", "total"),
    ("groups", 0, "runs", 0, "statistics", "median_ms"),
    ("groups", 0, "runs", 0, "speedup", "ratio"),
]
WITH_DEFAULT = [
    ("groups",),
    ("complete",),
    ("aa",),
    ("settings", "seed"),
    ("groups", 0, "runs", 0, "samples_s"),
    ("groups", 0, "runs", 0, "coverage"),
    ("groups", 0, "runs", 0, "detections"),
]


@pytest.mark.parametrize("place", REQUIRED)
def test_load_names_the_key_that_is_missing(tmp_path, place):
    document = make_document()
    del at_place(document, place[:-1])[place[-1]]
    write(document, tmp_path / "results.json")
    with pytest.raises(InputError) as caught:
        load(tmp_path / "results.json")
    assert f"missing required field `{place[-1]}`" in str(caught.value)
    assert len(place) == 1 or f"at `{at(place[:-1])}`" in str(caught.value)


WRONG = (5, "x", ["x"], {"x": []}, 0.5, True)


@pytest.mark.parametrize("place", [*REQUIRED, *WITH_DEFAULT])
def test_load_names_the_key_that_is_wrong(tmp_path, place):
    assert place in set(walk(make_document()))
    right = at_place(make_document(), place)
    # An integer is a number, too; and an object may lack what the last one has.
    fitting = {float: (int, float), type(None): (dict,)}.get(type(right), (type(right),))
    for wrong in (x for x in WRONG if type(x) not in fitting):
        document = make_document()
        at_place(document, place[:-1])[place[-1]] = wrong
        write(document, tmp_path / "results.json")
        with pytest.raises(InputError) as caught:
            load(tmp_path / "results.json")
        assert f"at `{at(place)}`" in str(caught.value)


@pytest.mark.parametrize("place", WITH_DEFAULT)
def test_load_fills_in_what_does_not_have_to_be_there(tmp_path, place):
    document = make_document()
    del at_place(document, place[:-1])[place[-1]]
    write(document, tmp_path / "results.json")
    loaded = load(tmp_path / "results.json")
    for step in place[:-1]:
        loaded = loaded[step] if isinstance(step, int) else getattr(loaded, step)
    fields = type(loaded).__dataclass_fields__
    default = fields[place[-1]].default
    made = fields[place[-1]].default_factory
    assert getattr(loaded, place[-1]) == (made() if callable(made) else default)


@pytest.mark.parametrize("sample", [0, -0.5, "0.5", None])
def test_load_refuses_samples_that_are_no_times(tmp_path, sample):
    document = make_document()
    document["groups"][0]["runs"][0]["samples_s"].append(sample)
    write(document, tmp_path / "results.json")
    with pytest.raises(InputError, match=r"took no time - at|Expected `float`"):
        load(tmp_path / "results.json")


def test_load_refuses_an_unknown_status(tmp_path):
    document = make_document()
    document["groups"][0]["runs"][0]["status"] = "fine"
    write(document, tmp_path / "results.json")
    with pytest.raises(InputError, match=r"'fine' - at `\$\.groups\[0\]\.runs\[0\]\.status`"):
        load(tmp_path / "results.json")


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
    (change("aa", to={}), "missing required field `model` - at `$.aa`"),
    (change("peaks", to={"fp32": "x"}), "Expected `float`, got `str` - at `$.peaks[...]`"),
    (change("warnings", to=[None]), "Expected `str`, got `null` - at `$.warnings[0]`"),
    (change("warnings", to=5), "Expected `array`, got `int` - at `$.warnings`"),
    (change("left_out", to=["a"]), "Expected `object`, got `array` - at `$.left_out`"),
    (change("without", to={"fp32": "a"}), "Expected `array`, got `str` - at `$.without[...]`"),
    (change("settings", "time_budget", to="x"), "got `str` - at `$.settings.time_budget`"),
    (change("environment", "cpu", to=[]), "got `array` - at `$.environment.cpu`"),
    (change("environment", "versions", to=None), "got `null` - at `$.environment.versions`"),
    (change("environment", "variables", to=[]), "got `array` - at `$.environment.variables`"),
    (
        change("environment", "commit", to={"dirty": True}),
        "missing required field `revision` - at `$.environment.commit`",
    ),
    (change(*GROUP, "runs", to=[]), "no run is the baseline - at `$.groups[0]`"),
    (change(*RUN, "baseline", to=False), "no run is the baseline - at `$.groups[0]`"),
    (change(*GROUP, "generations", to=[1, 1]), "`generations` have 2 rounds, and `rounds` is"),
    (change(*GROUP, "image", to=["a"]), "got `array` - at `$.groups[0].image`"),
    (change(*GROUP, "objects", to="x"), "got `str` - at `$.groups[0].objects`"),
    (change(*GROUP, "image_digest", to=[]), "got `array` - at `$.groups[0].image_digest`"),
    (change(*GROUP, "image_sizes", to={"opt": []}), "`image_sizes` has no images"),
    (change(*GROUP, "image_sizes", to={"opt": [[9, 0]]}), "or sides without pixels"),
    (change(*GROUP, "image_sizes", to={"opt": [[9]]}), "Expected `array` of length 2, got 1"),
    (change(*GROUP, "image_sizes", to={"min": [[9, 9]]}), "none of `image_sizes` is timed"),
    (change(*GROUP, "stopped", to="bored"), "enum value 'bored' - at `$.groups[0].stopped`"),
    (change(*GROUP, "half_width", to="x"), "got `str` - at `$.groups[0].half_width`"),
    (change(*GROUP, "weights", to="zoo"), "got `str` - at `$.groups[0].weights`"),
    (change(*GROUP, "gpu", to=None), "got `null` - at `$.groups[0].gpu`"),
    (change(*GROUP, "gpu", to=[5]), "Expected `object`, got `int` - at `$.groups[0].gpu[0]`"),
    (change(*GROUP, "stages", to={}), "`stages` has no rest - at `$.groups[0]`"),
    (
        change(*GROUP, "stages", to={"rest": 0.1, "nms": -0.1}),
        "`stages` has less than no time - at `$.groups[0]`",
    ),
    (
        change(*GROUP, "machine", to={"steal_share": None}),
        "got `null` - at `$.groups[0].machine.steal_share`",
    ),
    (change(*RUN, "label", to=...), "missing required field `label` - at `$.groups[0].runs[0]`"),
    (change(*RUN, "coverage", to=None), "got `null` - at `$.groups[0].runs[0].coverage`"),
    (
        change(*RUN, "coverage", to={"share_of_flops": "x"}),
        "got `str` - at `$.groups[0].runs[0].coverage.share_of_flops`",
    ),
    (change(*RUN, "provider", to=5), "got `int` - at `$.groups[0].runs[0].provider`"),
    (change(*RUN, "peak_memory_mb", to="x"), "got `str` - at `$.groups[0].runs[0].peak_memory_mb`"),
    (
        change(*RUN, "prepare", to={"total": 1.0}),
        "missing required field `build` - at `$.groups[0]",
    ),
    (change(*RUN, "size_seconds", to={"opt": []}), "`size_seconds` of torch has an input without"),
    (change(*RUN, "first_call_s", to={"opt": 0.0}), "a call of torch took no time"),
    (change(*RUN, "new_size_s", to=[0.1]), "more calls than there are `new_sizes`"),
    (change(*GROUP, "new_sizes", to=[[96, 0]]), "`new_sizes` has sides without pixels"),
    (
        change(*RUN, "samples_s", to=[10**400]),
        "too large a number - at `$.groups[0].runs[0].samples_s[0]`",
    ),
    (change(*RUN, "statistics", "relative_iqr", to=...), "missing required field `relative_iqr`"),
    (change(*RUN, "statistics", "median_ms", to=0), "the median of torch is not positive"),
    (change(*RUN, "speedup_over_fp32", to={}), "missing required field `ratio` - at `$.groups[0]"),
    (
        change(*RUN, "break_even", to={"images": 1}),
        "missing required field `low` - at `$.groups[0]",
    ),
    (change(*RUN, "detections", to={}), "`detections` of torch is empty - at `$.groups[0]`"),
    (change(*RUN, "detections", to={"opt": {}}), "missing required field `verdict` - at `$.groups"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_load_names_what_readers_would_stumble_over(tmp_path, damage, words):
    document = make_document()
    damage(document)
    write(document, tmp_path / "results.json")
    with pytest.raises(InputError) as caught:
        load(tmp_path / "results.json")
    assert words in str(caught.value)


def test_load_takes_a_group_that_never_came_to_run(tmp_path):
    document = make_document()
    group = document["groups"][0]
    group.update(image_sizes={}, rounds=0, stopped="all failed", stages=None, machine=None, gpu=[])
    run = group["runs"][0]
    run.update(status="failed", reason="no memory", samples_s=[])
    run.update(dict.fromkeys(("effective_precision", "provider", "peak_memory_mb", "detections")))
    run.update(dict.fromkeys(("statistics", "speedup", "speedup_over_fp32", "break_even")))
    run.update(prepare=None, size_seconds={}, coverage={})
    write(document, tmp_path / "results.json")
    assert load(tmp_path / "results.json") == records(document)


@pytest.mark.parametrize("stopped", get_args(Stopped))
def test_whatever_ends_the_rounds_has_words(stopped):
    assert describe_stop(3, stopped).startswith("3 rounds, ")


NAME, SPELLED = os.fsdecode(b"caf\xe9.jpg"), "caf\\udce9.jpg"


def test_names_that_are_no_utf8_are_spelled_out(tmp_path, monkeypatch):
    assert file_name(f"/somewhere/{NAME}") == SPELLED
    assert file_name("/somewhere/café.jpg") == "café.jpg"
    monkeypatch.setenv("OMP_PLACES", NAME)
    assert environment.environment({}).variables["OMP_PLACES"] == SPELLED
    write_text(tmp_path / "page", f"größer: {NAME}")
    assert (tmp_path / "page").read_text(encoding="utf-8") == f"größer: {SPELLED}"


def test_what_is_loaded_can_be_printed(tmp_path):
    document = make_document()
    document["settings"]["image"] = [NAME]
    document["warnings"].append(NAME)
    save(records(document), tmp_path / "results.json")
    save_found({NAME: Picture(NAME, ())}, tmp_path)
    loaded = load(tmp_path / "results.json")
    assert (loaded.settings.image, loaded.warnings[-1]) == ((SPELLED,), SPELLED)
    assert load_found(tmp_path) == {SPELLED: Picture(SPELLED, ())}


def test_half_a_character_is_refused(tmp_path):
    """Where somebody else has written a file: JSON can spell it, and nobody could print it."""
    document = make_document()
    document["settings"]["image"] = [NAME]
    write(document, tmp_path / "results.json")
    write({NAME: {"image": "image.png", "reference": []}}, tmp_path / FOUND)
    for read in (lambda: load(tmp_path / "results.json"), lambda: load_found(tmp_path)):
        with pytest.raises(InputError, match="is not JSON"):
            read()


def test_load_takes_percentiles_of_earlier_versions_from_the_samples(tmp_path):
    document = make_document()
    known = document["groups"][0]["runs"][0]["statistics"]
    for name in ("p90_bound_ms", "p95_bound_ms", "p99_bound_ms"):
        del known[name]
    known["p99_ms"] = None
    write(document, tmp_path / "results.json")
    (group,) = load(tmp_path / "results.json").groups
    # Of 100, 200 and 300 ms; 0.02 from the end of the last step.
    assert group.runs[0].statistics.p99_ms == pytest.approx(298)
    assert group.runs[0].statistics.p90_bound_ms is None


def test_load_leaves_statistics_without_samples_alone(tmp_path):
    document = make_document()
    document["groups"][0]["runs"][0]["samples_s"] = []
    document["groups"][0]["runs"][0]["statistics"]["p99_ms"] = None
    write(document, tmp_path / "results.json")
    assert load(tmp_path / "results.json") == records(document)


def test_load_ignores_keys_it_does_not_know(tmp_path):
    document = make_document()
    document["groups"][0]["runs"][0]["energy_j"] = 3.5
    document["groups"][0]["weather"] = {"rain": [1]}
    write(document, tmp_path / "results.json")
    assert load(tmp_path / "results.json") == records(make_document())


# What documents the format ---------------------------------------------------------------------


def test_the_schema_is_that_of_the_code():
    """tools/write_schema.py writes it."""
    written = json.loads((ROOT / "docs" / "results.schema.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(schema()))


def test_the_schema_has_every_key_and_says_what_it_is_about():
    described = schema()["$defs"]
    results = replace(records(make_document()), environment=environment.environment({}))
    for record in (results, results.environment, results.settings, results.groups[0]):
        assert set(described[type(record).__name__]["properties"]) == set(asdict(record))
    assert "SameAgainstSame" in described
    assert all(len(record["description"]) > 7 for record in described.values())
    assert not any(record["description"].startswith("Run(") for record in described.values())


def test_the_document_points_to_the_schema():
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for name in ("results.schema.json", "results/record.py", "detections.json"):
        assert name in text
    assert f"`schema` is {SCHEMA}" in text


# What was measured on --------------------------------------------------------------------------


def test_environment_describes_this_machine(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("TORCH_HOME", "/somewhere/private")
    monkeypatch.setenv("SOME_TOKEN", "secret")
    here = environment.environment({"openvino": "2026.4.1"})
    assert here.versions["torch"] == importlib.metadata.version("torch")
    assert here.versions["openvino"] == "2026.4.1"
    assert 1 <= here.cpu.usable_cores <= here.cpu.logical_cores
    assert here.memory_mb > 100
    assert here.variables["OMP_NUM_THREADS"] == "3"
    assert here.variables["TORCH_HOME"] == "(path)"
    assert "SOME_TOKEN" not in here.variables
    assert here.time.endswith("+00:00")
    assert set(here.cpu.flags) <= set(environment.RELEVANT_FLAGS)


def on_cpu(*flags: str) -> Results:
    return records({**make_document(), "environment": {"cpu": {"flags": flags}}})


def test_of_flags_only_those_that_differ_are_shown():
    before = on_cpu("fma", "avx2", "avx512f", "avx512_vnni")
    line = "cpu.flags: avx512f avx512_vnni only before, avx_vnni only now"
    assert facts.differences(before, on_cpu("fma", "avx2", "avx_vnni")) == [line]
    assert facts.differences(before, on_cpu("fma", "avx2")) == [
        "cpu.flags: avx512f avx512_vnni only before"
    ]
    assert facts.differences(before, records(make_document())) == []


def test_the_gpu_is_named_by_the_environment():
    results = records(make_document())
    assert facts.facts(results)["gpu"] is None
    named = replace(results, environment=environment.environment({}, "B"))
    assert facts.facts(named)["gpu"] == "B"
    assert (
        facts.differences(
            results, replace(results, environment=replace(results.environment, gpu="B"))
        )
        == []
    )


def test_tf32_that_is_forbidden_is_not_what_is_not_known():
    known = {}
    for tf32 in (None, True, False):
        results = records(make_document())
        known[tf32] = replace(results, settings=replace(results.settings, tf32=tf32))
    assert facts.differences(known[None], known[False]) == ["--tf32: none before, off now"]
    assert facts.differences(known[True], known[False]) == ["--tf32: on before, off now"]
    assert facts.differences(known[None], known[None]) == []
    settings = known[None].settings
    tried, off = (
        replace(known[None], settings=replace(settings, cudnn_benchmark=x)) for x in (True, False)
    )
    assert facts.differences(known[None], off) == []  # It was off before it was recorded.
    assert facts.differences(known[None], tried) == ["cudnn.benchmark: none before, True now"]


@pytest.mark.parametrize(
    ("weights", "note"),
    [
        (Weights("file", file="a.pth"), "weights: a.pth"),
        (Weights("zoo", file="a.pkl"), "weights: a.pkl of the model zoo"),
        (Weights("synthetic", objects=5), "weights: synthetic, made to find 5 objects"),
        (
            Weights("synthetic", objects=5, no_zoo="no network"),
            "weights: synthetic, made to find 5 objects (no network)",
        ),
    ],
)
def test_where_weights_come_from_is_said(weights, note):
    assert facts.weights_note(weights) == note


def test_the_ceiling_is_amdahls():
    stages = Stages(backbone=0.3, head=0.05, nms=0.01, postprocessing=0.02, rest=0.02)
    assert facts.ceiling(stages) == pytest.approx(4.0)
    assert facts.ceiling(stages, ("backbone", "head")) == pytest.approx(8.0)


def test_environment_is_not_private():
    text = json.dumps(asdict(environment.environment({})))
    words = {word.strip('",:{}[]()') for word in text.split()}
    assert socket.gethostname() not in words
    assert getpass.getuser() not in words
    assert os.path.expanduser("~") not in text
    assert str(ROOT) not in text
    assert sys.prefix not in text


def test_usable_cores_follow_the_affinity():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no CPU affinity")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert environment.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.fixture
def control_groups(tmp_path, monkeypatch) -> Callable[[str, Dict[str, str]], None]:
    """Puts this process into a control group, and files into the groups that there are."""

    def put(group: str, files: Dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        read_text = environment._read_text
        monkeypatch.setattr(environment, "_CGROUPS", tmp_path)
        monkeypatch.setattr(
            environment,
            "_read_text",
            lambda path: group if path == Path("/proc/self/cgroup") else read_text(path),
        )

    return put


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
def test_usable_cores_follow_a_container_quota(control_groups, monkeypatch, group, files, cores):
    control_groups(group, files)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64), raising=False)
    assert environment.usable_cores() == cores


# Of a machine with eight logical cores, the two on each physical one. Intel numbers them so.
PAIRS = [f"{core},{core + 4}\n" for core in (0, 1, 2, 3)] * 2


@pytest.mark.parametrize(
    ("pairs", "allowed", "quota", "threads"),
    [
        (PAIRS, range(8), "max 100000\n", 4),
        (PAIRS, {0, 4}, "max 100000\n", 1),
        (PAIRS, {0, 4, 1}, "max 100000\n", 2),
        (PAIRS, {0, 1, 2}, "max 100000\n", 3),
        (PAIRS, range(8), "300000 100000\n", 3),
        (PAIRS, range(8), "600000 100000\n", 4),
        (PAIRS, range(8), "50000 100000\n", 1),
        (["0-1\n", "0-1\n", "2-3\n", "2-3\n"], range(4), "max 100000\n", 2),
        # Linux does not tell.
        ([], range(8), "max 100000\n", 8),
    ],
)
@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
def test_threads_are_physical_cores(
    control_groups, tmp_path, monkeypatch, pairs, allowed, quota, threads, name
):
    control_groups("0::/", {"cpu.max": quota})
    for number, text in enumerate(pairs):
        folder = tmp_path / f"cpu{number}/topology"
        folder.mkdir(parents=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(environment, "_CPUS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(allowed), raising=False)
    assert environment.default_threads() == threads


def test_threads_of_this_machine():
    assert 1 <= environment.default_threads() <= environment.usable_cores()


def test_threads_where_there_is_no_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(environment, "_cgroup_settings", lambda *names: iter(()))
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 8 if logical else 4)
    assert environment.default_threads() == 4


@pytest.mark.parametrize(
    ("group", "files", "counts"),
    [
        ("0::/\n", {"cpu.stat": "usage_usec 5\nnr_periods 58\nnr_throttled 58\n"}, (58, 58)),
        (
            "0::/a/b\n",
            {
                "a/b/cpu.stat": "nr_periods 9\nnr_throttled 1\n",
                "a/cpu.stat": "nr_periods 20\nnr_throttled 7\n",
            },
            (20, 7),
        ),
        ("4:cpu,cpuacct:/\n", {"cpu,cpuacct/cpu.stat": "nr_periods 3\nnr_throttled 2\n"}, (3, 2)),
        ("0::/\n", {"cpu.stat": "nr_periods 5000\nnr_throttled 0\n"}, (5000, 0)),
        ("0::/\n", {"cpu.stat": "usage_usec 5\n"}, (0, 0)),
        ("0::/\n", {}, (0, 0)),
    ],
)
def test_a_quota_tells_how_often_it_stopped_us(control_groups, group, files, counts):
    control_groups(group, files)
    assert environment.quota_periods() == counts


def test_commit(tmp_path, monkeypatch):
    """A checkout of its own: clean, changed, inside another one."""

    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        command = ["git", *identity, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ).stdout.decode()

    tracked = tmp_path / "results.py"
    tracked.write_text("pass\n")
    monkeypatch.setattr(environment, "_HOME", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # a git hook sets them
        monkeypatch.delenv(name, raising=False)
    assert environment.commit() is None
    git("init", "-q")
    assert environment.commit() is None  # no commit yet
    git("add", ".")
    git("commit", "-q", "-m", "one")
    revision = git("rev-parse", "HEAD").strip()
    assert environment.commit() == Commit(revision, dirty=False)
    (tmp_path / "untracked").touch()
    assert environment.commit() == Commit(revision, dirty=False)
    tracked.write_text("changed\n")
    assert environment.commit() == Commit(revision, dirty=True)
    (tmp_path / "sub").mkdir()
    monkeypatch.setattr(environment, "_HOME", tmp_path / "sub")
    assert environment.commit() is None
    monkeypatch.setattr(environment, "_HOME", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert environment.commit() is None


def test_native_bf16():
    assert environment.has_native_bf16(["avx2", "avx512_bf16"])
    assert environment.has_native_bf16(["amx_bf16"])
    assert environment.has_native_bf16(["asimd", "bf16"])
    assert not environment.has_native_bf16(["avx2", "fma", "avx512f", "avx512_vnni"])
    assert not environment.has_native_bf16([])


def test_prepare_directory(tmp_path):
    path = prepare_directory(tmp_path / "a" / "b")
    assert path.is_dir()
    (path / "results.json").write_text("kept")
    assert prepare_directory(str(path)) == path
    assert os.listdir(path) == ["results.json"]


@pytest.mark.parametrize("below", ["", "sub", "sub/sub"])
def test_prepare_directory_that_is_a_file(tmp_path, below):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match=r"output directory .*file"):
        prepare_directory(tmp_path / "file" / below)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs Linux' /proc")
def test_prepare_directory_that_cannot_be_written():
    # Existing and new: not even root can create files in /proc.
    for path in ("/proc", "/proc/results"):
        with pytest.raises(InputError, match=f"output directory {path} cannot be written"):
            prepare_directory(path)


def imported(*modules: str) -> Set[str]:
    """The packages that importing some modules brings along, in a process of its own."""
    program = (
        f"import sys, {', '.join(modules)}; print(*{{name.split('.')[0] for name in sys.modules}})"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    return set(done.stdout.decode().split())


HEAVY = {"torch", "torchvision", "scipy", "openvino", "onnxruntime", "psutil", "PIL", "tqdm"}


@pytest.mark.parametrize(
    ("module", "more"),
    [
        ("results.record", {"msgspec", "tabulate"}),
        ("results.environment", {"msgspec", "tabulate"}),
        ("results.tables", {"msgspec", "jinja2", "matplotlib"}),
        ("results.file", {"tabulate", "jinja2", "matplotlib"}),
        ("compare", {"jinja2", "matplotlib"}),
        ("report", set()),
    ],
)
def test_importing_is_light(module, more):
    """Where there is no PyTorch, result files can be read; and workers need no more than NumPy."""
    brought = imported(module)
    assert "numpy" in brought
    # Matplotlib reads images with Pillow.
    assert brought & ((HEAVY - {"PIL"} if module == "report" else HEAVY) | more) == set()
