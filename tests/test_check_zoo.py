"""`tools/check_zoo.py`: what it keeps, what it tries again, and what its page says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import check_zoo
from check_zoo import Cell

from backends import base
from results.record import Agreement

# Quickly built, and quickly computed.
QUICK = "COCO-Detection/rpn_R_50_C4_1x"
REFUSED = "COCO-Detection/fast_rcnn_R_50_FPN_1x"


@pytest.fixture(scope="module")
def subject():
    return check_zoo.Subject(QUICK)


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Calls the tool; gives its exit code, what it says, and its page."""

    def call(*arguments: str):
        page = tmp_path / "zoo.md"
        names = [str(tmp_path / "folder"), "--page", str(page), *arguments]
        monkeypatch.setattr(sys, "argv", ["check_zoo.py", *names])
        code = check_zoo.main()
        said = capsys.readouterr()
        return code, said.out + said.err, page.read_text() if page.exists() else ""

    return call


def cell_of(name, column, text="all", note="", **others):
    return Cell(name, column, check_zoo.code_of(column), text, note, **others)


def row_of(page, name):
    (line,) = (x for x in page.splitlines() if x.startswith(f"| {name} "))
    return [text.strip() for text in line.split("|")[2:-1]]


# What is tried ---------------------------------------------------------------------------------


def test_what_is_finished_is_not_tried_again(run, monkeypatch):
    code, said, page = run("--only", QUICK, "--engines", "torchscript")
    assert code == 0
    assert [line.split(" (")[0] for line in said.splitlines()] == [
        f"{QUICK} builds: yes",
        f"{QUICK} torchscript: all",
    ]
    tried = ["yes", "-", "all", "not tried yet", "not tried yet"]
    assert row_of(page, QUICK)[:5] == tried
    monkeypatch.setattr(check_zoo, "run_process", pytest.fail)
    assert run("--only", QUICK, "--engines", "torchscript")[:2] == (0, "")


def test_what_stands_on_other_code_is_tried_again(tmp_path, run, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    check_zoo.keep(folder, cell_of(QUICK, "builds", "yes"))
    check_zoo.keep(folder, Cell(QUICK, "torchscript", "other", "all"))
    _, _, page = run("--page-only")
    assert "Of the cells, 1 were tried with earlier code." in page
    tried = []

    def fake(folder, name, columns, python):
        tried.extend(columns)
        check_zoo.keep(folder, cell_of(name, "torchscript"))
        return ""

    monkeypatch.setattr(check_zoo, "run_process", fake)
    run("--only", QUICK, "--engines", "torchscript")
    assert tried == ["torchscript"]


def test_a_backend_is_code_of_its_own_cells_alone():
    codes = {column: check_zoo.code_of(column) for column in check_zoo.COLUMNS}
    assert codes["builds"] == codes["detectron2"]
    assert len(set(codes.values())) == len(codes) - 1


def test_a_process_that_dies_costs_one_cell(tmp_path, monkeypatch):
    tried = []

    def fake(folder, name, columns, python):
        tried.append(list(columns))
        if columns[0] == "builds":
            check_zoo.keep(folder, cell_of(name, "builds", "yes"))
            return "The process died: signal 9."
        check_zoo.keep(folder, cell_of(name, columns[0]))
        return ""

    monkeypatch.setattr(check_zoo, "run_process", fake)
    check_zoo.try_in_process(tmp_path, QUICK, ["builds", "torchscript", "openvino"], "python")
    assert tried == [["builds", "torchscript", "openvino"], ["openvino"]]
    cells = check_zoo.finished(tmp_path)
    assert [cell.text for cell in cells.values()] == ["yes", "", "all"]
    assert cells[QUICK, "torchscript"].note == "The process died: signal 9."


def test_a_process_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(check_zoo, "USUAL_LIMIT_S", 0.1)
    reason = check_zoo.run_process(tmp_path, QUICK, ["builds"], sys.executable)
    assert reason == "It took longer than 0.1 s."


def test_without_a_detector_nothing_else_is_tried(run, monkeypatch):
    monkeypatch.setattr(check_zoo, "check_detectron2", lambda python: None)
    code, said, page = run("--only", REFUSED, "--engines", "torchscript", "--detectron2", "none")
    assert code == 0
    assert said.startswith(f"{REFUSED} builds: failed")
    assert len(said.splitlines()) == 1
    assert row_of(page, REFUSED) == ["[1]", "-", "-", "-", "-", "-"]
    assert page.splitlines()[-1].startswith("1. MODEL.LOAD_PROPOSALS: Fast R-CNN takes proposals")


def test_a_pattern_that_fits_no_file_is_refused(run):
    code, said, _ = run("--only", "none")
    assert (code, said) == (2, "check_zoo.py: error: no file of the model zoo matches 'none'\n")


def test_an_interpreter_without_detectron2_is_refused(run, tmp_path):
    none = tmp_path / "none"
    code, said, _ = run("--only", QUICK, "--detectron2", str(none))
    assert (code, said.count("\n")) == (2, 1)
    assert f"{none} cannot be run: No such file or directory" in said
    none.write_text("#!/bin/sh\nexit 1\n")
    none.chmod(0o755)
    code, said, _ = run("--only", QUICK, "--detectron2", str(none))
    assert (code, said.count("\n")) == (2, 1)
    assert f"{none} has no Detectron2 that can be imported" in said


@pytest.mark.parametrize("line", ["nothing", '{"file": "a"}', '{"other": 1}'])
def test_another_folder_is_refused(run, tmp_path, line):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "cells.jsonl").write_text(line + "\n")
    code, said, _ = run("--page-only")
    assert (code, said.count("\n")) == (2, 1)
    assert "was not written by this tool" in said


def test_one_file_of_each_kind_is_for_inductor():
    assert set(check_zoo.FOR_INDUCTOR) <= set(check_zoo.ZOO)
    built = [check_zoo.zoo_configuration(name).model for name in check_zoo.FOR_INDUCTOR]
    assert len({model.meta_architecture for model in built}) == 5


# How it is judged -------------------------------------------------------------------------------


def test_an_engine_that_is_wrong_has_a_reason(subject, monkeypatch):
    class Shifted:
        def unavailable(self, device):
            return None

        def optimize(self, export, precision, device):
            def call(image):
                boxes = export.fields.index("proposal_boxes")
                found = list(export.eager(image))
                found[boxes] = found[boxes] + 40 * (image.shape[1] > 64)
                return found

            return base.Optimized(call=call, precision=precision, provider="cpu")

    monkeypatch.setattr(base, "load", lambda name: Shifted())
    text, note = subject.runs_in("wrong")
    assert text == ""
    assert note.startswith("Mismatch at 75x131: of ")
    assert note.endswith(".")


def test_an_engine_that_is_not_there_has_a_reason(subject, monkeypatch):
    backend = base.load("openvino")
    monkeypatch.setattr(type(backend), "unavailable", lambda self, device: "install openvino")
    assert subject.runs_in("openvino") == ("", "Install openvino.")


def test_scores_are_spread_until_something_is_found(monkeypatch):
    """The head of this one finds nothing with the seeded weights as they are."""
    subject = check_zoo.Subject("PascalVOC-Detection/faster_rcnn_R_50_C4")
    monkeypatch.setitem(subject.sizes, "max", (64, 96))
    assert min(map(subject.count, subject.reference.values())) >= check_zoo.LEAST_FOUND
    assert subject.builds() == ("yes", "")


@pytest.mark.detectron2
def test_it_equals_detectron2(subject):
    pytest.importorskip("detectron2")
    assert subject.equals_detectron2() == ("all", "")


def test_what_is_told_of_two_sizes():
    found = Agreement("match", expected=50, matched=50)
    assert check_zoo.told({"1x2": found, "3x4": found}) == ("all", "")
    fewer = Agreement("match", expected=50, matched=49)
    assert check_zoo.told({"1x2": found, "3x4": fewer}) == ("99 of 100", "")
    wrong = Agreement("mismatch", "boxes are\noff", expected=50, matched=0)
    assert check_zoo.told({"1x2": found, "3x4": wrong}) == ("", "Mismatch at 3x4: boxes are off.")
    few = Agreement("too few", expected=2, matched=2)
    assert check_zoo.told({"1x2": few})[0] == ""
    labels = Agreement("match", labels=0.99999)
    assert check_zoo.told({"1x2": labels}) == ("99.99% of labels", "")


# The page ---------------------------------------------------------------------------------------


def test_notes_are_numbered_once(tmp_path):
    check_zoo.keep(tmp_path, cell_of("Base-RCNN-FPN", "builds", "yes"))
    check_zoo.keep(tmp_path, cell_of("Base-RCNN-FPN", "openvino", "", "It died."))
    check_zoo.keep(tmp_path, cell_of("Base-RetinaNet", "openvino", "", "It died."))
    check_zoo.keep(tmp_path, cell_of("Base-RetinaNet", "detectron2", "all", "It differs."))
    check_zoo.keep(tmp_path, cell_of(QUICK, "openvino", "", "It died."))
    check_zoo.keep(tmp_path, cell_of(QUICK, "openvino", "17 of 18", day="2026-01-02", found=18))
    page = check_zoo.page(tmp_path, "some machine")
    assert row_of(page, "Base-RCNN-FPN")[3] == "[1]"
    assert row_of(page, "Base-RetinaNet")[1] == "all [2]"
    assert row_of(page, "Base-RetinaNet")[3] == "[1]"
    assert row_of(page, QUICK)[3] == "17 of 18"
    assert page.endswith("\n1. It died.\n2. It differs.\n")
    assert "\n2026-01-02 to " in page
    assert "some machine, one thread" in page
    assert "earlier code" not in page
