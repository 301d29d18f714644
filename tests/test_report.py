"""The page: what is on it, that it needs nothing else, and that it is written whole or not."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import msgspec
import numpy as np
import pytest
from PIL import Image
from test_compare import measured
from test_results import DAMAGES, NAME, SPELLED, records, write

import report
from results.file import FOUND, Found, load, save
from results.record import Stages

CHROMIUM = shutil.which("chromium")


class Page(HTMLParser):
    """The elements of a page, and its text."""

    VOID = ("meta", "link", "br", "img", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: List[Tuple[str, Dict[str, Optional[str]]]] = []
        self.open: List[str] = []
        self.text: List[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> List[Dict[str, Optional[str]]]:
        return [attributes for name, attributes in self.elements if name == tag]


def make_results() -> Dict[str, Any]:
    """A result file with all that a page shows, and something that is no markup, as JSON has it."""
    document = measured(0, {"torch": 0.4, "openvino": 0.2, "inductor": 0.3})
    document["left_out"] = {"ONNXRuntime": "<no> such & package"}
    document["warnings"] = ["testRetinaNet fp32: other processes took 20% of the cores"]
    group = document["groups"][0]
    group["weights"] = {"source": "file", "file": "<synthetic> & made up"}
    group["image_sizes"] = {"min": [[60, 80]], "opt": [[96, 128]], "max": [[200, 260]]}
    for run in group["runs"]:
        run["size_seconds"] = {"min": [0.1, 0.2], "opt": [0.3], "max": [1.0]}
        run["prepare"] = {"build": 1.0, "compile": 2.0, "total": 3.5}
        run.update(cached=False, artifact_mb=3.0, break_even=None, coverage={"segments": 3})
        if run["baseline"]:
            run["speedup"] = None
    group["runs"][1]["speedup"] = {"ratio": 2.0, "low": 1.9, "high": 2.1, "verdict": "faster"}
    group["runs"][2].update(status="failed", reason="out of <memory>", samples_s=[])
    group["runs"][2].update(statistics=None, speedup=None)
    return document


def make_found() -> Dict[str, Any]:
    reference = {
        "boxes": [[1.0, 2.0, 31.0, 42.0], [50.0, 20.0, 60.0, 30.0]],
        "scores": [0.9, 0.5],
        "classes": [3, 7],
    }
    boxes = [[1.0, 2.0, 31.0, 42.0], [70.0, 60.0, 90.0, 90.0]]
    run = {**reference, "boxes": boxes, "agrees": [True, False], "lost": [1]}
    runs = {"fp32": {"OpenVINO": [run]}}
    return {"testRetinaNet": {"image": "image.png", "reference": [reference], "runs": runs}}


def pictures(found: Dict[str, Any]) -> Found:
    return msgspec.convert(found, Found)


def stages() -> Dict[str, float]:
    return dict.fromkeys(Stages.__dataclass_fields__, 0.1)


def page_of(document: Dict[str, Any]) -> str:
    return " ".join("".join(Page(report.page(records(document), {}, {})).text).split())


def test_where_the_time_goes_is_shown_if_it_is_known():
    document = make_results()
    words = ("% of peak", "Where the time goes", "backbone + FPN (ms)")
    assert not any(word in page_of(document) for word in words)
    document["settings"]["roofline"] = True
    document["peaks"] = {"fp32": 1e12}
    document["groups"][0].update(flops=10**9, stages=stages())
    assert all(word in page_of(document) for word in words)


def test_each_image_is_below_its_own_boxes():
    document, found = make_results(), make_found()
    (group,) = document["groups"]
    one = {**group, "image": "a.jpg", "image_sizes": {"image 2": [[77, 55]]}}
    document["groups"] = [{**group, "image": "b.jpg"}, one]
    (drawn,) = found.values()
    found = {
        "testRetinaNet on b.jpg": {**drawn, "image": "image.png"},
        "testRetinaNet on a.jpg": {**drawn, "image": "image2.png"},
    }
    images = {"image.png": b"first", "image2.png": b"second"}
    page = Page(report.page(records(document), pictures(found), images))
    uses = [x["href"] for x in page.all("use") if "href" in x]
    assert uses == ["#image.png"] * 2 + ["#image2.png"] * 2
    sizes = {x["id"]: (x["height"], x["width"]) for x in page.all("image")}
    assert sizes == {"image.png": ("96", "128"), "image2.png": ("77", "55")}


def test_names_that_are_alike_have_ids_of_their_own():
    assert report._identifier("on a b.jpg") != report._identifier("on a-b.jpg")


def test_nothing_is_drawn_of_a_run_that_found_nothing_sensible():
    document, found = make_results(), make_found()
    found["testRetinaNet"]["runs"]["fp32"] = {}
    assert "Torch fp32, the reference" in report.page(records(document), pictures(found), {})
    document["groups"][0]["image_sizes"] = {}  # Preparing failed, when it was started again.
    assert "Torch fp32, the reference" not in report.page(records(document), pictures(found), {})


def test_several_images_have_a_section_each():
    document = make_results()
    (group,) = document["groups"]
    one = {**group, "image": "a.jpg", "image_sizes": {"image 2": [[96, 128]]}}
    document["groups"] = [group, one]
    text = page_of(document)
    assert text.startswith("run_blade: RetinaNet :root")
    assert "RetinaNet on a.jpg" in text
    assert "What is in the picture" in text


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder as `run_blade.py --output` leaves it."""
    write(make_results(), tmp_path / "results.json")
    write(make_found(), tmp_path / FOUND)
    image = np.arange(3 * 96 * 128).reshape(96, 128, 3) % 256
    Image.fromarray(image.astype(np.uint8)).save(tmp_path / "image.png")
    return tmp_path


@pytest.fixture
def page(folder) -> Page:
    assert report.main([str(folder / "results.json")]) == 0
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_it_needs_nothing_else(page, folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert page.all("script") == []
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:")), (tag, target)
    addresses = re.findall(r"https?://[^\s\"'<>]+", text)
    assert all("w3.org" in address for address in addresses), addresses
    assert "@import" not in text
    assert "url(" not in re.sub(r"url\(#", "", text)


def test_ids_are_unique_and_references_have_one(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for name in ("href", "xlink:href"):
            target = attributes.get(name) or ""
            if target.startswith("#"):
                assert target[1:] in ids


def test_drawings_have_words_for_those_who_cannot_see_them(page):
    drawings = [x for x in page.all("svg") if x.get("aria-hidden") != "true"]
    # Samples, speedups, sizes; the reference and one run.
    assert len(drawings) == 5
    assert all(x["role"] == "img" and len(x["aria-label"]) > 20 for x in drawings)
    samples = drawings[0]["aria-label"]
    assert re.search(r"Torch fp32: \d+\.?\d* ms \(20\)", samples)
    assert "Openvino fp32: 2.00x (TorchBlade, fp32: 1.48x)" in drawings[1]["aria-label"]


def test_sizes_are_plotted_with_the_median_of_the_table(page):
    """At `opt` there are timed calls; the one or two of the check may say something else."""
    drawing = page.all("svg")[-3]["aria-label"]
    assert drawing.startswith("Medians; at opt of all timed calls, at min and max of the few that")
    for run in make_results()["groups"][0]["runs"][:2]:
        median = f"{run['statistics']['median_ms']:.4g} ms"
        assert f"{run['label']} fp32: 150 ms, {median}, 1000 ms" in drawing
    assert "Inductor" not in drawing  # It was not timed.


def test_sizes_are_not_plotted_of_several_images_together():
    (group,) = records(make_results()).groups
    assert report.sizes_plot([group], "a") is not None
    drawn = replace(group, image_sizes={**group.image_sizes, "drawn 1": ((66, 99),)})
    assert report.sizes_plot([drawn], "a") is not None
    several = replace(group, image_sizes={**group.image_sizes, "image 2": ((77, 55),)})
    assert report.sizes_plot([several], "a") is None


def test_all_samples_are_plotted(page):
    group = make_results()["groups"][0]
    samples = sum(len(run["samples_s"]) for run in group["runs"])
    points = [x for x in page.all("use") if (x.get("xlink:href") or "").startswith("#samples-")]
    # Ticks are drawn with such references, too.
    assert len(points) >= samples == 40


def test_the_pictures_say_what_is_lost(page):
    kinds = [
        re.search(r"--(\w+)", x["stroke"])[1]
        for x in page.all("rect")
        if "var(--" in (x.get("stroke") or "")
    ]
    assert kinds == ["matched", "matched", "matched", "spurious", "lost"]
    (lost,) = [x for x in page.all("rect") if x.get("stroke") == "var(--lost)"]
    assert [float(lost[side]) for side in ("x", "y", "width", "height")] == [50, 20, 10, 10]
    text = "".join(page.text)
    assert "OpenVINO fp32: 1 agree, 1 lost, 1 spurious" in text
    assert [x["href"] for x in page.all("use") if "href" in x] == ["#image.png"] * 2


def test_its_words(page):
    text = " ".join("".join(page.text).split())
    for words in (
        "RetinaNet",
        "other processes took 20% of the cores",
        "weights: <synthetic> & made up",
        "ONNXRuntime left out: <no> such & package",
        "out of <memory>",
        "break-even (images)",
        "cpu.usable_cores",
    ):
        assert words in text, words
    assert "interrupted" not in text


def test_a_folder_is_as_good_as_the_file_in_it(folder):
    assert report.main([str(folder)]) == 0
    assert (folder / "report.html").exists()
    assert Page((folder / "report.html").read_text(encoding="utf-8")).all("svg")


def test_without_image_and_detections(folder):
    (folder / FOUND).unlink()
    (folder / "image.png").unlink()
    document = make_results()
    document["complete"] = False
    write(document, folder / "results.json")
    assert report.main([str(folder / "results.json"), "--output", str(folder / "x.html")]) == 0
    page = Page((folder / "x.html").read_text(encoding="utf-8"))
    assert len(page.all("svg")) == 3
    assert "This run was interrupted" in "".join(page.text)


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_a_result_file_of_the_wrong_shape(folder, capsys, damage, words):
    document = make_results()
    damage(document)
    write(document, folder / "results.json")
    assert report.main([str(folder / "results.json")]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert not (folder / "report.html").exists()


# The least that begins as a PNG file does.
PNG = "iVBORw0KGgo="


def test_what_else_was_found_is_drawn():
    found = make_found()
    picture = found["testRetinaNet"]
    run = picture["runs"]["fp32"]["OpenVINO"][0]
    poses = [[[3.0, 4.0], [5.5, 6.0]], [[7.0, 8.0], [9.0, 9.5]]]
    for each in (picture["reference"][0], run):
        each["keypoints"] = poses
        each["labels"] = PNG
    run["corners"] = [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.5], [0.0] * 8]
    text = report.page(records(make_results()), pictures(found), {})
    assert text.count(f'href="data:image/png;base64,{PNG}"') == 2
    # Those of the reference, of the run, and one that is lost.
    assert text.count('d="M3.0 4.0h0M5.5 6.0h0"') == 2
    assert text.count('d="M7.0 8.0h0M9.0 9.5h0"') == 3
    assert text.count('<polygon points="1.0 2.0 3.0 4.0 5.0 6.0 7.0 8.5"') == 1
    assert "The image with boxes, a map of labels and poses drawn on it." in text


def test_a_map_alone_is_drawn():
    found = make_found()
    nothing = {"boxes": [], "scores": [], "classes": [], "labels": PNG}
    picture = found["testRetinaNet"]
    picture["reference"] = [nothing]
    picture["runs"] = {"fp32": {"OpenVINO": [{**nothing, "agrees": [], "lost": []}]}}
    text = report.page(records(make_results()), pictures(found), {})
    assert "Torch fp32, the reference: a map of labels" in text
    assert "OpenVINO fp32: its map" in text
    assert "0 agree" not in text


def test_proposals_have_no_class():
    found = make_found()
    picture = found["testRetinaNet"]
    for each in (picture["reference"][0], picture["runs"]["fp32"]["OpenVINO"][0]):
        each.update({"classes": [-1, -1], "scores": [4.25, -3.0]})
    text = report.page(records(make_results()), pictures(found), {})
    assert "the reference: the best 2 proposals" in text
    assert "proposal, logit -3.00, lost" in text
    assert "class -1" not in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"boxes": [[1, 2, 3], [1, 2, 3, 4]]}, "Expected `array` of length 4, got 3"),
        ({"boxes": [[1, 2, 3, None], [1, 2, 3, 4]]}, "got `null` - at `$[...].runs[...][...][0]"),
        ({"scores": ["x", 0.5]}, "got `str` - at `$[...].runs[...][...][0].scores[0]`"),
        ({"scores": [0.5]}, "lists of one image differ in length - at `$['testRetinaNet']`"),
        ({"classes": [0.5, "x"]}, "got `float` - at `$[...].runs[...][...][0].classes[0]`"),
        ({"agrees": [True]}, "differ in length"),
        ({"lost": [2]}, "names a detection that the reference does not have"),
        ({"lost": [-1]}, "names a detection that the reference does not have"),
        ({"lost": ["x"]}, "got `str` - at `$[...].runs[...][...][0].lost[0]`"),
        ({"scores": [float("nan"), 0.5]}, "is not JSON"),
        ({"scores": [1e300, 0.5]}, "too large a number"),
        ({"corners": [[1.0] * 8]}, "differ in length"),
        ({"corners": [[1.0] * 8, [1.0] * 7]}, "a rotated box has not four corners"),
        ({"keypoints": [[[1.0, 2.0]]]}, "differ in length"),
        ({"keypoints": [[[1.0]], []]}, "Expected `array` of length 2, got 1"),
        ({"masks": [[[1.0, 2.0]]]}, "differ in length"),
        ({"masks": [[[1.0, 2.0, 3.0]], []]}, "an outline of a mask has half a corner"),
        ({"labels": "x"}, "`labels` is no PNG file"),
        ({"labels": "Ij48c2NyaXB0Pg=="}, "`labels` is no PNG file"),
        ({"labels": 'iVBORw0KGgo="/><script>'}, "`labels` is no PNG file"),
    ],
)
def test_detections_of_the_wrong_shape(folder, capsys, change, words):
    found = make_found()
    found["testRetinaNet"]["runs"]["fp32"]["OpenVINO"][0].update(change)
    write(found, folder / FOUND)
    assert report.main([str(folder / "results.json")]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("name", ["a\0b.png", SPELLED, "", "missing.png", "..", "/"])
def test_an_image_that_cannot_be_there(folder, name):
    found = make_found()
    found["testRetinaNet"]["image"] = name
    write(found, folder / FOUND)
    assert report.main([str(folder / "results.json")]) == 0


def test_an_image_whose_name_is_half_a_character(folder, capsys):
    found = make_found()
    found["testRetinaNet"]["image"] = NAME
    write(found, folder / FOUND)
    assert report.main([str(folder / "results.json")]) == 2
    assert "is not JSON" in capsys.readouterr().err


def test_keys_that_were_added_later_are_ignored():
    document, found = make_results(), make_found()
    document["aa"] = {"model": "testRetinaNet", "precision": "fp32", "resolution": 0.1}
    document["aa"]["speedup"] = {"ratio": 1.0, "low": 0.9, "high": 1.1, "verdict": "same"}
    document["aa"]["samples_s"] = [[0.1], [0.1]]
    group, (case,) = document["groups"][0], found.values()
    group.update(stages=stages(), gpu=[{"name": "A", "throttled": []}], objects=5)
    found = {"testRetinaNet with 5 objects": case}
    document["groups"].append({**group, "objects": 9})
    run = group["runs"][1]
    agreement = {"verdict": "match", "reason": "", "expected": 2, "matched": 2}
    run.update(detections={"opt": agreement}, speedup_over_fp32=dict(run["speedup"]))
    run["break_even"] = {"images": 3.0, "low": 1.0, "high": None}
    before = Page(report.page(records(document), pictures(found), {})).text
    added = [document, group, *group["gpu"], run, document["aa"], group["stages"], agreement, case]
    added += [run[key] for key in ("statistics", "speedup", "speedup_over_fp32", "break_even")]
    added += [run["prepare"], case["reference"][0], case["runs"]["fp32"]["OpenVINO"][0]]
    for part in added:
        part["added"] = {"x": [1]}
    assert Page(report.page(records(document), pictures(found), {})).text == before


def test_a_name_that_is_no_utf8_is_spelled_out(folder):
    document = make_results()
    document["settings"]["image"] = [NAME]
    save(records(document), folder / "results.json")
    assert report.main([str(folder / "results.json")]) == 0
    assert SPELLED in (folder / "report.html").read_text(encoding="utf-8")


def test_a_label_of_signs_is_a_label(folder):
    document = make_results()
    for run in document["groups"][0]["runs"]:
        run["label"] += " $\\bad{$ | a\n| b"
    text = page_of(document)
    assert "Openvino $\\bad{$ a b" in text


def test_an_older_result_file():
    """Written before there were pages: nothing that came later may be missed."""
    path = Path(report.__file__).parent / "docs" / "measured" / "cpu-2-cores" / "results.json"
    text = report.page(load(path), {}, {})
    assert len(Page(text).all("svg")) >= 14


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("results.json", "", "is empty"),
        ("results.json", '{"tool": "run_blade", "sch', "cut short"),
        ("results.json", '{"tool": "run_blade", "schema": 99}', "schema 99"),
        ("results.json", '{"tool": "run_blade", "schema": 1}', "schema 1, of an older version"),
        ("results.json", '{"tool": "other"}', "not a result file"),
        (FOUND, '{"testRetinaNet": ', "is not JSON, or it is cut short"),
        (FOUND, "[1, 2]", "Expected `object`, got `array`"),
        (FOUND, '{"a": {"runs": {}}}', "missing required field `image` - at `$[...]`"),
        (FOUND, '{"a": {"image": "a", "runs": {}}}', "missing required field `reference`"),
        (FOUND, '{"a": {"reference": [], "runs": {}, "image": 1}}', "at `$[...].image`"),
        (FOUND, '{"a": {"image": "a", "reference": [5]}}', "at `$[...].reference[0]`"),
        (
            FOUND,
            '{"a": {"image": "a", "reference": [], "runs": {"fp32": {"x": []}}}}',
            "a run has no images - at `$['a']`",
        ),
    ],
)
def test_a_bad_file_leaves_the_old_page(folder, capsys, name, content, words):
    (folder / name).write_text(content)
    (folder / "report.html").write_text("precious")
    assert report.main([str(folder / "results.json")]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert (folder / "report.html").read_text() == "precious"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["results.json", FOUND, "image.png", "report.html"]
    )


def test_a_page_that_cannot_be_written(folder, capsys):
    assert report.main([str(folder / "results.json"), "--output", str(folder / "no" / "x")]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(folder, page, width):
    """It loads from a file with no error on the console, and so with no request to anywhere.

    Its security policy forbids them, and a violation would be an error. (What Chromium itself asks
    for at every start is not the page's.)
    """
    assert page.all("meta")[2]["content"].startswith("default-src 'none'")
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--enable-logging=stderr", f"--window-size={width},900"),
        *(f"--user-data-dir={folder / 'profile'}", f"--screenshot={folder / 'page.png'}"),
        (folder / "report.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    assert (folder / "page.png").stat().st_size > 10_000


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_browser_would_tell(folder, page):
    """The test above can fail."""
    text = (folder / "report.html").read_text(encoding="utf-8")
    (folder / "bad.html").write_text(text.replace("<h1>", '<img src="https://a.example/x"><h1>'))
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--dump-dom"),
        (folder / "bad.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" in done.stderr


def accuracy_of(ap: float, value: float, verdict: str) -> Dict[str, Any]:
    difference = {
        "value": value,
        "low": value - 0.5,
        "high": value + 0.25,
        "ratio": 1 + value / 40,
        "ratio_low": 0.9,
        "ratio_high": 1.1,
        "verdict": verdict,
    }
    task = {"ap": ap, "ap50": 60.0, "ap75": None, "difference": difference}
    return {"images": 50, "detections": 420, "tasks": {"bbox": task}}


def test_average_precision_and_the_answer_are_on_the_page():
    document = make_results()
    group = document["groups"][0]
    group["evaluated"] = {
        "images": 50,
        "objects": 99,
        "left_out": {"unreadable": [4, ["a", "b", "c"]]},
    }
    document["settings"]["dataset"] = "val.json"
    group["runs"][0]["accuracy"] = accuracy_of(40.0, 0.0, "keeps")
    group["runs"][0]["accuracy"]["tasks"]["bbox"]["difference"] = None
    group["runs"][1]["accuracy"] = accuracy_of(39.9, -0.1, "keeps")
    text = page_of(document)
    assert text.index("Ship: Openvino fp32, 2.00x as fast as Torch fp32") < text.index("Backend")
    assert "box AP 39.90 (-0.10 ±0.50 keeps AP)" in text
    assert "AP was looked at on 50 images." in text
    # In the table of the model right after what matters most.
    assert "SpeedupDetectionsAPdAPMedian(FPS)" in text
    assert "-0.10 ±0.50 keeps AP" in text
    assert "left out: 4 unreadable (a, b, c, ...)" in text
    assert "Average precision" in text
    assert "60.00" in text


def test_a_file_of_an_earlier_version_has_its_answer_too():
    document = make_results()
    assert "recommendations" not in document
    assert "Ship: Openvino fp32" in page_of(document)


def with_worst(tmp_path: Path) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """A result file whose engine has a worst image, and what was found in that."""
    document, found = make_results(), make_found()
    worst = {
        "image": "<dog>.jpg",
        "picture": "testRetinaNet: image 7",
        "loss": 1.4,
        "lost": 1,
        "spurious": 1,
        "classes": 1,
        "score_difference": 0.25,
        "iou": 0.75,
    }
    document["groups"][0]["evaluated"] = {"images": 50, "objects": 99}
    document["groups"][0]["runs"][1]["label"] = "OpenVINO"
    accuracy = {**accuracy_of(30.0, -10.0, "loses"), "worst": [worst]}
    document["groups"][0]["runs"][1]["accuracy"] = accuracy
    picture = {**found["testRetinaNet"], "image": "dataset-7.png", "size": [96, 128]}
    found["testRetinaNet: image 7"] = picture
    return document, found


def test_the_worst_images_are_drawn_beside_the_reference(tmp_path):
    document, found = with_worst(tmp_path)
    images = {"dataset-7.png": b"a picture"}
    page = Page(report.page(records(document), pictures(found), images))
    text = " ".join("".join(page.text).split())
    assert "Where OpenVINO fp32 differs most" in text
    assert "<dog>.jpg: the reference" in text
    said = "1 lost, 1 spurious (1 of another class); the others: scores off by 0.250, IoU 0.750"
    assert f"<dog>.jpg: {said}" in text
    ids = [each["id"] for each in page.all("image") if "id" in each]
    assert "dataset-2d-7.png" in ids
    assert sum(each.get("href") == "#dataset-2d-7.png" for each in page.all("use")) == 2


def test_what_hardly_counts_is_faint():
    found = make_found()
    text = report.page(records(make_results()), pictures(found), {})
    # Of scores of 0.9 and 0.5: two of the reference, two of the run, one that is lost.
    faint = re.findall(r'<g opacity="([^"]+)"', text)
    assert faint == ["0.93", "0.62", "0.93", "0.62", "0.62"]
    found["testRetinaNet"]["reference"][0].update({"classes": [-1, -1], "scores": [4.25, -3.0]})
    text = report.page(records(make_results()), pictures(found), {})
    assert re.findall(r'<g opacity="([^"]+)"', text)[:2] == ["1.0", "1.0"]


def test_masks_and_poses_of_the_worst_images_are_drawn(tmp_path):
    document, found = with_worst(tmp_path)
    accuracy = document["groups"][0]["runs"][1]["accuracy"]
    accuracy["worst"][0].update(mask_iou=0.625, oks=0.875)
    picture = json.loads(json.dumps(found["testRetinaNet: image 7"]))
    found["testRetinaNet: image 7"] = picture
    run = picture["runs"]["fp32"]["OpenVINO"][0]
    for each in (picture["reference"][0], run):
        each["keypoints"] = [[[3.0, 4.0]], [[7.0, 8.0]]]
        # The first has a hole.
        each["masks"] = [[[1.0, 2.5, 9.0, 2.0, 9.0, 9.0], [4.0, 4.0, 5.0, 4.0, 5.0, 5.0]], []]
    run["masks"][1] = [[70.0, 60.0, 90.0, 60.0, 90.0, 90.0]]
    page = Page(report.page(records(document), pictures(found), {}))
    paths = [(each["d"], each.get("fill")) for each in page.all("path") if "fill-rule" in each]
    whole = "M1 2.5 9 2 9 9ZM4 4 5 4 5 5Z"
    assert paths == [
        (whole, "var(--matched)"),
        (whole, "var(--matched)"),
        ("M70 60 90 60 90 90Z", "var(--spurious)"),
    ]
    text = " ".join("".join(page.text).split())
    assert "scores off by 0.250, IoU 0.750, masks' IoU 0.625, OKS 0.875" in text
    labels = [each.get("aria-label") or "" for each in page.all("svg")]
    assert sum("boxes, masks and poses drawn on it" in each for each in labels) == 2


def test_a_worst_image_that_is_gone_is_left_out(tmp_path):
    document, found = with_worst(tmp_path)
    runs = found["testRetinaNet: image 7"]["runs"]
    runs["bf16"] = runs.pop("fp32")
    text = "".join(Page(report.page(records(document), pictures(found), {})).text)
    assert "differs most" not in text
    del found["testRetinaNet: image 7"]
    text = "".join(Page(report.page(records(document), pictures(found), {})).text)
    assert "differs most" not in text


def test_time_against_ap_is_a_plot(tmp_path):
    document, _ = with_worst(tmp_path)
    document["groups"][0]["runs"][0]["accuracy"] = accuracy_of(40.0, 0.0, "keeps")
    document["groups"][0]["runs"][0]["accuracy"]["tasks"]["bbox"]["difference"] = None
    page = Page(report.page(records(document), {}, {}))
    plot = page.all("svg")[0]["aria-label"]
    assert plot.startswith("Time against box AP. Filled: of the runs that match, no other is as")
    assert "; OpenVINO fp32: 205.1 ms, AP 30.00 (29.50 to 30.25), filled" in plot
    assert "Time against box AP" in "".join(page.text)


def test_ap_of_each_class_is_a_table():
    document = make_results()
    for run, shift in zip(document["groups"][0]["runs"], (0, -3)):
        run["accuracy"] = accuracy_of(40.0 + shift, shift, "loses")
        task = run["accuracy"]["tasks"]["bbox"]
        task["classes"] = {f"class {n}": 50.0 + shift * (n % 5) for n in range(30)}
        task["classes"]["none"] = None
        if not shift:
            task["difference"] = None
    text = page_of(document)
    assert "box AP by class" in text
    assert "the 20 classes that lose most, of 31" in text
    assert text.count("-12.00") == 6
    assert "class 5" not in text.split("by class")[1].split("the 20 classes")[0].replace(
        "class 5 ", ""
    )
