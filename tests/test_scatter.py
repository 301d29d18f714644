"""Time against average precision: which points there are, which are efficient, where labels go."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import pytest
from test_report import accuracy_of, make_results
from test_results import records

import report
from results import scatter
from results.scatter import Label, frontier, place_labels, points, reference_ap


def evaluated(*accuracies: Optional[Dict[str, Any]]) -> Dict[str, Any]:
    """A document with these of its runs; the third was not timed."""
    document = make_results()
    for run, accuracy in zip(document["groups"][0]["runs"], accuracies):
        run["accuracy"] = accuracy
    return document


def reference(ap: float) -> Dict[str, Any]:
    accuracy = accuracy_of(ap, 0.0, "keeps")
    accuracy["tasks"]["bbox"]["difference"] = None
    return accuracy


def test_a_point_is_what_the_tables_have():
    lost = accuracy_of(39.0, -1.0, "loses")
    groups = records(evaluated(reference(40.0), lost, lost)).groups
    torch, vino = points(groups, "bbox")
    assert (torch.name, torch.ap, torch.interval) == ("Torch fp32", 40.0, None)
    assert torch.ms == groups[0].runs[0].statistics.median_ms
    assert torch.is_reference
    # The interval of the difference, around the reference's AP.
    assert vino.interval == pytest.approx((40 - 1.5, 40 - 0.75))
    assert not vino.is_reference
    assert reference_ap(groups, "bbox") == pytest.approx(40)
    assert points(groups, "segm") == []
    assert reference_ap(groups, "segm") is None


def test_torch_fp32_has_one_point_and_the_precision_is_the_real_one():
    document = evaluated(reference(40.0), accuracy_of(39.0, -1.0, "loses"))
    (group,) = document["groups"]
    again = {**group, "precision": "int8", "runs": [dict(run) for run in group["runs"]]}
    again["runs"][1].update(requested_precision="int8", effective_precision="bf16")
    document["groups"].append(again)
    names = [point.name for point in points(records(document).groups, "bbox")]
    assert names == ["Torch fp32", "Openvino fp32", "Openvino bf16"]


def test_the_reference_need_not_have_a_point():
    document = evaluated(None, accuracy_of(39.0, -1.0, "loses"))
    groups = records(document).groups
    assert [point.label for point in points(groups, "bbox")] == ["Openvino"]
    assert reference_ap(groups, "bbox") == pytest.approx(40)


def test_what_was_not_judged_or_not_timed_is_no_point():
    nothing = reference(40.0)
    nothing["tasks"]["bbox"]["ap"] = None
    document = evaluated(nothing, accuracy_of(39.0, -1.0, "loses"), reference(3.0))
    assert [point.label for point in points(records(document).groups, "bbox")] == ["Openvino"]
    text = report.page(records(document), {}, {})
    assert "Time against box AP" not in text  # One point is no comparison.


# Efficiency ------------------------------------------------------------------------------------


def document_of(places: List[Tuple[float, float]], wrong: Tuple[int, ...] = ()) -> Dict[str, Any]:
    """A document of runs with these medians in ms, and AP."""
    document = make_results()
    group = document["groups"][0]
    baseline, run = group["runs"][:2]
    group["runs"] = []
    for number, (ms, ap) in enumerate(places):
        own = {**(run if number else baseline), "label": f"Engine {number}"}
        own["statistics"] = {**own["statistics"], "median_ms": ms}
        own["accuracy"] = accuracy_of(ap, ap - 40, "keeps") if number else reference(ap)
        own["status"] = "mismatch" if number in wrong else "ok"
        group["runs"].append(own)
    return document


@pytest.mark.parametrize("seed", range(5))
def test_efficient_runs_are_those_that_none_beats(seed):
    generator = np.random.default_rng(seed)
    # Coarse, so that there are ties.
    places = [(float(a), float(b)) for a, b in generator.integers(1, 6, (12, 2))]
    found = points(records(document_of(places)).groups, "bbox")
    assert len(found) == 12
    for point in found:
        beaten = any(
            other.ms <= point.ms
            and other.ap >= point.ap
            and (other.ms < point.ms or other.ap > point.ap)
            for other in found
        )
        assert point.is_efficient is not beaten
    corners = frontier(found)
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in zip(corners, corners[1:]))
    assert all(a[0] == b[0] or a[1] == b[1] for a, b in zip(corners, corners[1:]))
    assert {(x.ms, x.ap) for x in found if x.is_efficient} <= set(corners)


def test_a_mismatch_is_not_efficient_and_beats_nobody():
    places = [(20.0, 40.0), (5.0, 41.0), (10.0, 39.0)]
    document = document_of(places, wrong=(1,))
    found = points(records(document).groups, "bbox")
    assert [x.is_right for x in found] == [True, False, True]
    assert [x.is_efficient for x in found] == [True, False, True]
    assert frontier(found) == [(10.0, 39.0), (20.0, 39.0), (20.0, 40.0)]
    text = report.page(records(document), {}, {})
    assert "Engine 1 fp32, MISMATCH" in text
    assert "Engine 1 fp32: 5 ms, AP 41.00 (40.50 to 41.25), mismatch;" in text
    only = points(records(document_of(places[:2], wrong=(0, 1))).groups, "bbox")
    assert frontier(only) == []


def test_the_drawing():
    document = document_of([(30.0, 40.0), (20.0, 39.0), (10.0, 39.5)])
    document["settings"]["min_ap_ratio"] = 0.95
    groups = records(document).groups
    plot = report.accuracy_plot(groups, "a", "bbox", 0.95)
    assert plot.title == "Time against box AP"
    assert ">0.95 of it<" in plot.svg
    assert ">Torch fp32<" in plot.svg
    assert all(f">Engine {number} fp32<" in plot.svg for number in range(3))
    assert "down to 0.95 of it" in plot.caption
    # A color for each backend, the baseline's apart.
    assert all(f"var(--{name})" in plot.svg for name in ("accent", "points", "green"))
    assert "#0" not in plot.svg  # No placeholder is left.
    # Linear, and logarithmic where the slowest takes more than eight times as long.
    assert "15" in _ticks(groups)
    wide = records(document_of([(90.0, 40.0), (20.0, 39.0), (10.0, 39.5)])).groups
    assert [x for x in _ticks(wide) if x in ("10", "20", "50")] == ["10", "20", "50"]


def _ticks(groups: Any) -> List[str]:
    plot = report.accuracy_plot(groups, "a", "bbox", 0.99)
    return [x.split("<")[0] for x in plot.svg.split(">") if x.split("<")[0].isdigit()]


def test_more_backends_than_colours_and_signs_in_labels():
    places = [(10.0 + number, 40 - number / 10) for number in range(12)]
    document = document_of(places)
    document["groups"][0]["runs"][3]["label"] = "$\\bad{$"
    plot = report.accuracy_plot(records(document).groups, "a", "bbox", 0.99)
    assert "$\\bad{$ fp32" in plot.svg
    assert "Engine 11 fp32" in plot.svg


# Labels ----------------------------------------------------------------------------------------


def area(label: Label, text: str, size: float) -> scatter.Area:
    width, height = scatter.LETTER * size * len(text), scatter.LEADING * size
    start = label.x - width if label.is_left else label.x
    return start, label.y - height / 2, start + width, label.y + height / 2


def overlap(one: scatter.Area, other: scatter.Area) -> bool:
    return all(min(one[at + 2], other[at + 2]) - max(one[at], other[at]) > 1e-6 for at in (0, 1))


@pytest.mark.parametrize("seed", range(4))
def test_labels_lie_on_nothing(seed):
    generator = np.random.default_rng(seed)
    places = [tuple(x) for x in generator.uniform((20, 20), (400, 220), (14, 2)).tolist()]
    texts = [f"Engine {number} bf16" for number in range(14)]
    taken = [scatter.around([place], 3) for place in places]
    taken.append(scatter.around([(0, 120), (420, 120)], 1))
    within = (0.0, 0.0, 420.0, 240.0)
    labels = place_labels(texts, places, taken, within, 9)
    areas = [area(*item, 9) for item in zip(labels, texts)]
    for number, own in enumerate(areas):
        assert within[0] <= own[0] < own[2] <= within[2]
        assert within[1] <= own[1] < own[3] <= within[3]
        assert not any(overlap(own, other) for other in taken)
        assert not any(overlap(own, other) for other in areas[:number])
    for label, (x, y) in zip(labels, places):
        assert label.is_far is (abs(label.y - y) > 1.5 * scatter.LEADING * 9)
        assert abs(label.x - x) <= 2 * scatter.GAP


def test_a_label_stands_beside_its_point_where_there_is_room():
    (label,) = place_labels(["Torch fp32"], [(50, 50)], [], (0, 0, 400, 100), 9)
    assert label == Label(50 + scatter.GAP, 50)
    (label,) = place_labels(["Torch fp32"], [(390, 50)], [], (0, 0, 400, 100), 9)
    assert label == Label(390 - scatter.GAP, 50, is_left=True)


def test_where_there_is_no_room_labels_are_still_there():
    labels = place_labels(["Torch fp32"] * 30, [(20, 20)] * 30, [], (0, 0, 40, 40), 9)
    assert len(labels) == 30
