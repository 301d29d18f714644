"""Two releases of one engine in one table, from two environments: a real one is made for it."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import run_blade
from results.file import load

SCRIPT = Path(run_blade.__file__)
OLD = "2025.4.1"


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    """An interpreter whose environment shares this one's PyTorch, and has an older OpenVINO."""
    folder = tmp_path_factory.mktemp("environments") / "old"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "zz_shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", f"openvino=={OLD}"]
    subprocess.run(install, check=True)
    return python


@pytest.mark.slow
def test_two_releases_of_openvino_in_one_table(old, tmp_path):
    command = [
        *[sys.executable, str(SCRIPT), "--model", "testRetinaNet", "--weights", "synthetic"],
        *["--image-size", "96x128", "--threads", "1", "--warmup", "1", "--iterations", "6"],
        *["--precision", "fp32", "--device", "cpu", "--backend", "openvino"],
        *["--environment", f"openvino@old={old}", "--output", str(tmp_path)],
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (group,) = load(tmp_path / "results.json").groups
    baseline, new, before = group.runs
    assert [run.name for run in group.runs] == ["torch", "openvino", "openvino@old"]
    assert before.label == "OpenVINO@old"
    assert before.versions["openvino"].startswith(OLD)
    assert not new.versions["openvino"].startswith(OLD)
    for run in (new, before):
        assert len(run.samples_s) == len(baseline.samples_s) == 6
        assert {found.verdict for found in run.detections.values()} == {"match"}
        assert run.speedup.ratio > 0
    assert f"- OpenVINO@old: Python {before.python}, openvino {OLD}" in done.stdout
    listed = subprocess.run(
        [sys.executable, str(SCRIPT), "--list", "--environment", f"openvino@old={old}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"openvino {OLD}" in listed.stdout
