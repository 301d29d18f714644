"""A stream of new sizes: which they are, how they are called, and what is made of it."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, List, Tuple

import numpy as np
import pytest
import torch
from test_group import make_plan as make_plan_of_group

import run_blade
from backends import base
from benchmark import RunFailed, StopRule
from detectors import inputs
from detectors.inputs import View, mirrored, tuning_sizes
from errors import InputError
from measure import group as groups
from measure import protocol, worker
from measure import run as workers
from measure.group import Measured, PreparedModel
from measure.plan import Choice, Plan
from measure.progress import Progress
from measure.sizes import (
    LEAST_COUNT,
    PIXEL_MARGIN,
    Sizes,
    Stream,
    call_stream,
    draw,
    drawn_sizes,
    rounds_rule,
    stream_of,
    stream_sizes,
)
from measure.worker import Command, Hosts
from models import DRAWN, MODELS, Model, Module
from results import facts
from results.record import Group
from tools.check_settling import suite_with_stand_in

OPT = (96, 128)
RANGES = tuning_sizes(OPT, 0)
SECONDS = 0.01


# Which sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("opt", [(480, 640), (96, 128), (800, 1333), (333, 333)])
@pytest.mark.parametrize("seed", [0, 7])
def test_sizes_are_new_within_the_range_and_as_large_as_what_is_timed(opt, seed):
    ranges = tuning_sizes(opt, seed)
    smallest, largest = ranges["min"], ranges["max"]
    sizes = stream_sizes(20, opt, smallest, largest, set(ranges.values()), seed)
    assert len(set(sizes)) == 20
    assert not set(sizes) & set(ranges.values())
    for size in sizes:
        assert all(a <= b <= c for a, b, c in zip(smallest, size, largest))
        assert size[0] * size[1] == pytest.approx(opt[0] * opt[1], rel=PIXEL_MARGIN)
    # Both orientations take turns.
    assert [height > width for height, width in sizes] == [False, True] * 10
    # The same for every run, and for every invocation.
    assert sizes == stream_sizes(20, opt, smallest, largest, set(ranges.values()), seed)
    assert sizes != stream_sizes(20, opt, smallest, largest, set(ranges.values()), seed + 1)
    assert len({height % 32 for height, _ in sizes}) > 5


def test_where_only_one_orientation_is_taken_all_have_that():
    sizes = stream_sizes(15, (100, 200), (50, 150), (140, 400), set(), 0)
    assert len(set(sizes)) == 15
    assert all(height < width for height, width in sizes)


def test_what_was_seen_is_left_out():
    everything = stream_sizes(10_000, OPT, RANGES["min"], RANGES["max"], set(), 0)
    assert OPT in everything
    rest = stream_sizes(10_000, OPT, RANGES["min"], RANGES["max"], {OPT, everything[3]}, 0)
    assert set(everything) - set(rest) == {OPT, everything[3]}


def test_drawn_sizes_have_sides_of_their_own_in_both_orientations():
    ratios = set()
    for seed in range(20):
        ranges = tuning_sizes((480, 640), seed)
        first, second = drawn_sizes(2, ranges["min"], ranges["max"], set(ranges.values()), seed)
        assert first[0] <= first[1]
        assert second[0] > second[1]
        for size in (first, second):
            assert all(a <= b <= c for a, b, c in zip(ranges["min"], size, ranges["max"]))
        ratios |= {round(first[1] / first[0], 2), round(second[0] / second[1], 2)}
    assert len(ratios) > 20
    assert drawn_sizes(2, (50, 60), (50, 61), {(50, 60)}, 0) == ((50, 61),)


def test_a_plan_draws_twenty_and_one_or_two():
    drawn = draw(None, False, RANGES, (), 0)
    assert (len(drawn.stream), len(drawn.drawn), drawn.is_asked) == (20, 1, False)
    asked = draw(20, False, RANGES, (), 0)
    assert (len(asked.stream), len(asked.drawn), asked.is_asked) == (20, 2, True)
    assert asked.drawn[0] == drawn.drawn[0]
    assert not {*drawn.drawn, *RANGES.values()} & set(drawn.stream)
    others = drawn.stream[:3]
    assert not set(others) & set(draw(None, False, RANGES, others, 0).stream)


def test_a_fixed_protocol_has_none_unless_they_are_asked_for():
    assert draw(None, True, RANGES, (), 0) == draw(0, False, RANGES, (), 0) == Sizes()
    assert len(draw(12, True, RANGES, (), 0).stream) == 12


def test_a_file_of_one_size_has_none():
    one = dict.fromkeys(("min", "opt", "max"), OPT)
    assert draw(None, False, one, (), 0) == Sizes(
        reason="engines are made for images of 96x128 alone"
    )
    with pytest.raises(InputError, match="--sizes 3: engines are made for images of 96x128 alone"):
        draw(3, False, one, (), 0)


def test_sizes_run_out():
    narrow = {"min": (96, 128), "opt": (96, 128), "max": (98, 131)}
    with pytest.raises(InputError, match=r"--sizes 9: between 96x128 and 98x131 there are \d "):
        draw(9, False, narrow, (), 0)
    assert "and 8 would say something" in draw(None, False, narrow, (), 0).reason


@pytest.mark.parametrize(
    ("asked", "words"),
    [("-1", "-1 is not at least 0"), ("99999", "--sizes 99999: between "), ("x", "'x' is not a")],
)
def test_bad_numbers_are_refused_before_anything_is_measured(asked, words, capsys, monkeypatch):
    monkeypatch.setattr(Hosts, "start", lambda self: pytest.fail("a host was started"))
    arguments = ["--model", "testRetinaNet", "--image-size", "96x128", f"--sizes={asked}"]
    try:
        code = run_blade.main(arguments)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert words in captured.err
    assert captured.out == ""


# How many fit ----------------------------------------------------------------------------------

TWENTY = Sizes(tuple((100 + place, 200) for place in range(20)))


def test_what_fits_into_a_sixth_of_the_budget_is_made():
    assert stream_of(TWENTY, [0.3, 0.2], 60.0) == Stream(TWENTY.stream, 10.0, 10.0)
    fewer = stream_of(TWENTY, [0.7, 0.3], 60.0)
    assert (fewer.sizes, fewer.seconds) == (TWENTY.stream[:10], 10.0)
    none = stream_of(TWENTY, [2.0, 1.0], 60.0)
    assert (none.sizes, none.seconds) == ((), 0.0)
    assert none.reason == (
        "8 would take about 24 s, more than a sixth of the time budget of 60 s: --sizes 8 makes "
        "them"
    )


def test_what_was_asked_for_is_made_however_long_it_takes():
    asked = replace(TWENTY, is_asked=True)
    for budget_s in (60.0, None):
        assert stream_of(asked, [2.0, 1.0], budget_s) == Stream(TWENTY.stream, 60.0)
    assert stream_of(Sizes(reason="why"), [1.0], 60.0).reason == "why"


def test_the_rounds_have_what_is_left_of_the_budget():
    rule = StopRule(budget_s=60.0)
    assert rounds_rule(rule, Stream()) == rule
    assert rounds_rule(rule, Stream(TWENTY.stream, 7.52)).budget_s == 52.5
    assert rounds_rule(rule, Stream(TWENTY.stream, 500.0)).budget_s == 50.0
    assert rounds_rule(StopRule.fixed(5), Stream(TWENTY.stream, 9.0)).budget_s is None


# Turns -----------------------------------------------------------------------------------------


class Asked:
    """A run that takes note of what it is asked."""

    def __init__(self, key: str, log: List[Tuple[str, Any]], fails_at: int = -1) -> None:
        self.key, self.log, self.fails_at = key, log, fails_at
        self.worker: Any = SimpleNamespace()
        self.new_sizes: List[Any] = []
        self.status = "ok"
        self.reason = ""

    def ask(self, request: protocol.CallNewSize) -> protocol.CalledNewSize:
        if len(self.new_sizes) == self.fails_at:
            raise RunFailed("it died")
        self.log.append((self.key, request))
        time.sleep(SECONDS / 10)
        return protocol.CalledNewSize(SECONDS)

    def give_up(self, status: str, reason: str) -> None:
        self.status, self.reason, self.worker = status, reason, None


def test_every_run_is_called_once_for_each_size_in_random_order():
    log: List[Tuple[str, Any]] = []
    runs = [Asked(key, log) for key in "abc"]
    call_stream(Stream(TWENTY.stream), runs, "model", 0, Progress())
    turns = [log[place : place + 3] for place in range(0, 60, 3)]
    assert len(log) == 60
    for place, (size, turn) in enumerate(zip(TWENTY.stream, turns)):
        assert sorted(key for key, _ in turn) == ["a", "b", "c"]
        assert {request for _, request in turn} == {protocol.CallNewSize(size, place)}
    assert len({tuple(key for key, _ in turn) for turn in turns}) > 2
    again: List[Tuple[str, Any]] = []
    call_stream(Stream(TWENTY.stream), [Asked(x, again) for x in "abc"], "model", 0, Progress())
    assert again == log


def test_a_run_that_fails_costs_its_own_row():
    log: List[Tuple[str, Any]] = []
    runs = [Asked("a", log), Asked("b", log, fails_at=2)]
    call_stream(Stream(TWENTY.stream), runs, "model", 0, Progress())
    assert [(run.status, len(run.new_sizes)) for run in runs] == [("ok", 20), ("failed", 2)]
    assert runs[1].reason == "while it was called at 102x200, a new size: it died"


def test_calls_that_take_longer_than_expected_are_fewer_but_not_too_few():
    log: List[Tuple[str, Any]] = []
    call_stream(Stream(TWENTY.stream, limit_s=0.0), [Asked("a", log)], "model", 0, Progress())
    assert len(log) == LEAST_COUNT


# Images ----------------------------------------------------------------------------------------


def test_an_image_of_a_new_size_has_the_same_in_the_same_place():
    image = torch.arange(3 * 4 * 5, dtype=torch.float32).reshape(3, 4, 5)
    assert torch.equal(mirrored(image, (4, 5)), image)
    assert torch.equal(mirrored(image, (2, 3)), image[:, :2, :3])
    larger = mirrored(image, (11, 6))
    assert larger.shape == (3, 11, 6)
    assert torch.equal(larger[:, :4, :5], image)
    assert torch.equal(larger[:, 4:8, :5], image.flip(1))
    assert torch.equal(larger[:, 8:, :5], image[:, :3])
    assert torch.equal(larger[:, :4, 5], image[:, :, 4])
    assert larger.is_contiguous()


# In real processes -----------------------------------------------------------------------------

# An engine that keeps memory for each size that it has seen.
LEAKING = """
import dataclasses

import torch

from backends.torch import Torch


class StandIn(Torch):
    name, label, rank, default = "spinning", "Leaking", 9, False

    def optimize(self, *run):
        optimized = super().optimize(*run)
        kept = {}

        def call(*images):
            kept[images[0].shape] = torch.ones(LEAK_MB, 2**18)
            if len(kept) > MOST:
                raise RuntimeError("there is no room for another size")
            return optimized.call(*images)

        return dataclasses.replace(optimized, call=call)
"""
LEAK_MB = 16


@pytest.fixture
def leaking(tmp_path, monkeypatch):
    """Makes a backend that leaks, up to a number of sizes, and hosts that know it."""
    opened: List[Hosts] = []

    def make(most: int) -> Tuple[Choice, Hosts]:
        text = LEAKING.replace("LEAK_MB", str(LEAK_MB)).replace("MOST", str(most))
        run, backend = suite_with_stand_in(tmp_path / "suite", stand_in=text)
        monkeypatch.setattr(worker, "RUN", run)
        opened.append(Hosts((Command.own(),), tmp_path))
        return Choice(backend), opened[0]

    yield make
    for hosts in opened:
        hosts.close()


def make_plan(**changes: Any) -> Plan:
    plan = make_plan_of_group(choices=(Choice(base.load("torch")),), rule=StopRule.fixed(3))
    sizes = draw(12, True, inputs.view_sizes(plan.pictures, plan.view, 0), (), 0)
    return replace(plan, sizes=sizes, **changes)


@pytest.fixture(scope="module")
def model(hosts, tmp_path_factory) -> PreparedModel:
    folder = tmp_path_factory.mktemp("model")
    return groups.prepare_model(MODELS["testRetinaNet"], 30, make_plan(), hosts, folder, Progress())


def measure(model: PreparedModel, plan: Plan, hosts: Hosts) -> Tuple[Group, Measured]:
    measured = groups.measure_group(model, "fp32", plan, hosts, Progress())
    if measured.interruption is not None:
        raise measured.interruption
    (group,) = measured.groups
    return group, measured


def test_a_group_has_a_stream_and_is_checked_at_drawn_sizes(model, hosts):
    choices = tuple(Choice(base.load(x)) for x in ("torch", "torchscript", "openvino"))
    rule = StopRule(min_rounds=3, max_rounds=5, budget_s=3600.0)
    plan = make_plan(choices=choices, costs=True, rule=rule)
    group, _ = measure(model, plan, hosts)
    # What the stream was expected to take is not there for the rounds.
    expected_s = 12 * sum(run.warmup_s[-1] for run in group.runs)
    assert group.budget_s == pytest.approx(3600 - expected_s, abs=0.1)
    assert group.new_sizes == plan.sizes.stream
    assert group.no_new_sizes is None
    assert [group.image_sizes[name] for name in DRAWN] == [(size,) for size in plan.sizes.drawn]
    for run in group.runs:
        assert run.status == "ok"
        assert len(run.new_size_s) == len(run.new_size_resident_mb) == 12
        assert min(run.new_size_s) > 0
        assert min(run.new_size_resident_mb) > 100
        assert run.coverage.resident_warm_mb > 100
        assert run.coverage.resident_end_mb == pytest.approx(run.new_size_resident_mb[-1], rel=0.1)
        # Every input that is not timed, but the blank one, which has the size of `min`.
        assert set(run.first_call_s) == {"min", "max", *DRAWN}
        assert set(run.size_seconds) == set(run.first_call_s)
        assert facts.growth_mb(run.new_size_resident_mb) is None
    for run in group.runs[1:]:
        assert {run.detections[name].text for name in DRAWN} == {"30/30 match"}


def test_what_leaks_is_warned_of(model, leaking):
    choice, hosts = leaking(most=1000)
    plan = make_plan(choices=(*make_plan().choices, choice))
    sizes = draw(20, True, inputs.view_sizes(plan.pictures, plan.view, 0), (), 0)
    group, _ = measure(model, replace(plan, sizes=sizes), hosts)
    torch_run, leak = group.runs
    assert [len(run.new_size_s) for run in group.runs] == [20, 20]
    assert LEAK_MB - 4 < facts.growth_mb(leak.new_size_resident_mb) < LEAK_MB + 8
    assert leak.coverage.resident_end_mb - leak.coverage.resident_warm_mb > 19 * LEAK_MB
    warned = [x for x in facts.warnings(group, 3) if "keeps growing" in x]
    assert len(warned) == 1
    assert "fp32, Leaking: its memory keeps growing, by " in warned[0]
    assert facts.growth_mb(torch_run.new_size_resident_mb) is None


def test_an_engine_that_fails_at_a_new_size_costs_its_row(model, leaking):
    choice, hosts = leaking(most=4)
    plan = make_plan(choices=(*make_plan().choices, choice))
    group, _ = measure(model, plan, hosts)
    torch_run, failed = group.runs
    assert (torch_run.status, len(torch_run.new_size_s)) == ("ok", 12)
    assert (failed.status, len(failed.new_size_s)) == ("failed", 3)
    size = "x".join(map(str, plan.sizes.stream[3]))
    assert failed.reason.startswith(f"while it was called at {size}, a new size: ")
    assert failed.reason.endswith("there is no room for another size")
    assert len(failed.samples_s) == 3
    assert group.new_sizes == plan.sizes.stream


class OfSomeSizes(torch.nn.Module):
    """A detector that takes heights that are even."""

    def forward(self, image: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if image.shape[1] % 2 == 1:
            raise RuntimeError("odd heights are not taken")
        scores = torch.linspace(0.9, 0.1, 6)
        boxes = torch.arange(24).reshape(6, 4).float() + image.mean()
        return boxes, torch.zeros(6, dtype=torch.int64), scores


def test_a_file_that_does_not_take_drawn_sizes_has_no_stream(tmp_path):
    path = tmp_path / "model.ts"
    torch.jit.script(OfSomeSizes()).save(str(path))
    fields = ("pred_boxes", "pred_classes", "scores")
    module = Module(str(path), "torchscript", "0", fields)
    view = View(OPT, smallest=(60, 80), largest=(200, 200))
    request = protocol.PrepareModel(
        Model("m", "model.ts", kind="torchscript", module=module),
        *("bundled", "auto", (), view, 100, 0, str(tmp_path)),
        drawn=((111, 150), (150, 111)),
    )
    known = workers.prepare_model(request)
    assert "odd heights are not taken" in known.drawn_failure
    assert set(known.sizes) & set(DRAWN) == {"drawn 2"}
    prepared = PreparedModel(MODELS["testRetinaNet"], 30, tmp_path, known, {})
    measurement = groups.Measurement(prepared, "fp32", make_plan(), Progress(), False)
    assert measurement.stream_of(StopRule()) == Stream(reason=known.drawn_failure)


# First calls -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calls", "later"),
    [
        ([0.9, 0.2, 0.3], (0.2, 0.3)),
        ([5.0, 0.4], (0.4,)),  # Something was compiled: a timed call would take 1 s.
        ([1.5], (1.5,)),
    ],
)
def test_the_first_call_is_told_apart_from_later_ones(calls, later, tmp_path, monkeypatch):
    run = workers.Run.__new__(workers.Run)
    run.inputs = {"opt": (torch.zeros(3, 10, 10),), "max": (torch.zeros(3, 20, 20),)}
    run.given, run.timed, run.last_s = run.inputs, ["opt"], {}
    seconds = iter([0.25, *calls])
    timed = lambda images: workers.Timed(next(seconds), None)  # noqa: E731
    monkeypatch.setattr(run, "_timed", timed, raising=False)
    assert run.timed_calls().seconds == (0.25,)
    found = run.detect(protocol.Detect("max", str(tmp_path / "found.npz")))
    assert (found.first_s, found.seconds) == (calls[0], later)
    assert list(seconds) == []


# Memory ----------------------------------------------------------------------------------------


def growth(steps: List[float]) -> Any:
    return facts.growth_mb((1000.0 + np.cumsum([0.0, *steps])).tolist())


def test_memory_that_levels_off_is_not_warned_of():
    assert growth([0.0] * 19) is None
    assert growth([20.0] * 8 + [0.0] * 11) is None
    # As OpenVINO: half of the calls still add a little.
    assert growth([5.0] * 9 + [0.6, 0.5, 0.0, 0.0, 0.1, 1.9, 0.5, 0.6, 0.0, 0.0]) is None
    # As PyTorch at 480x640: it grows by 26 MiB in the mean, in blocks of any size.
    first = [-57.9, 132.9, 29.6, -6.3, 27.7, 10.5, 53.3, 11.6, -0.4]
    assert growth([*first, 28.4, 38.4, 6.6, 27.6, 57.0, 8.3, 57.0, -3.2, 42.4, 0.7]) is None
    # Blocks come and go.
    assert growth([30.0, -20.0, 0.5, 12.0, -14.0] * 4) is None
    assert facts.growth_mb([1000.0 + 5 * call for call in range(19)]) is None  # Too few to tell.
    # As OpenVINO, in 60 calls.
    assert growth([20.0] * 12 + [0.0, 0.1] * 24) is None


def test_memory_that_has_not_levelled_off_after_many_calls_is_warned_of():
    """As PyTorch at 480x640: by 800 MiB in 40 calls, though in blocks of any size."""
    blocks = [0.0, 65.0, -5.0, 20.0]
    assert growth(blocks * 10) == pytest.approx(20, abs=2)
    assert growth(blocks * 5) is None


def test_memory_that_grows_with_every_call_is_warned_of():
    assert growth([5.0] * 19) == pytest.approx(5.0)
    assert growth([0.0] * 9 + [1.0] * 10) == pytest.approx(1.0)
    noise = np.random.default_rng(0).normal(0, 2, 19)
    assert growth((8 + noise).tolist()) == pytest.approx(8, abs=2)


def test_memory_is_not_known_everywhere(monkeypatch):
    assert workers.resident_mb() > 50
    monkeypatch.setattr("builtins.open", no_such_file)
    assert workers.resident_mb() is None


def no_such_file(*_: Any) -> Any:
    raise FileNotFoundError("/proc/self/statm")
