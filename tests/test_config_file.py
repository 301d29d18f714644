"""Configuration files: what is read, what is refused, and that nothing is run."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from configuration import IGNORED, Configuration, keys
from detectors.config_file import (
    LARGEST_FILE,
    MOST_FILES,
    read_configuration,
    read_program,
    read_settings,
)
from detectors.zoo_configurations import KNOWN_EXPRESSIONS, ZOO, zoo_configuration
from errors import InputError

FPN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x"
TOO_MUCH = "has too many values, or more than 20 levels"


@pytest.fixture
def written(tmp_path):
    """A function that writes a configuration file, and returns its path."""

    def write(text: str, name: str = "config.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return write


# What is read ----------------------------------------------------------------------------------


def test_without_any_setting_it_is_detectron2s_default(written):
    assert read_configuration(written("VERSION: 2\n")) == Configuration()


def test_a_file_as_detectron2_dumps_it(written):
    """Lists for tuples, aliases, and keys of training all over it."""
    config = read_configuration(
        written(
            """
CUDNN_BENCHMARK: false
DATASETS:
  TEST:
  - shapes_val
INPUT:
  FORMAT: RGB
  MIN_SIZE_TEST: 128
MODEL:
  ANCHOR_GENERATOR:
    ANGLES:
    - - -90
      - 0
    SIZES:
    - - 14
      - 19.79
    - - 28
      - 39.59
  ROI_BOX_CASCADE_HEAD:
    BBOX_REG_WEIGHTS:
    - &id001
      - 10.0
      - 10.0
      - 5.0
      - 5.0
    IOUS:
    - 0.5
  ROI_BOX_HEAD:
    BBOX_REG_WEIGHTS: *id001
  RESNETS:
    NORM: ''
SOLVER:
  AMP:
    ENABLED: false
VERSION: 2
"""
        )
    )
    assert (config.input.format, config.input.min_size_test) == ("RGB", 128)
    assert config.model.anchor_generator.sizes == ((14, 19.79), (28, 39.59))
    assert config.model.roi_box_head.bbox_reg_weights == (10, 10, 5, 5)
    assert config.model.roi_box_cascade_head.ious == (0.5,)
    assert config.model.resnets.norm == ""


def test_python_literals_in_strings_and_tuples_of_pythons_tag(written):
    """YAML has no tuples: Detectron2's files spell them as Python does, or with a tag."""
    config = read_configuration(
        written(
            "MODEL:\n"
            '  RPN:\n    IN_FEATURES: ("p2", "p3")\n'
            "  ROI_HEADS:\n    IN_FEATURES: !!python/tuple [p4, p5]\n"
            '  PIXEL_STD: "[1, 2.5, 3]"\n'
            "  RESNETS: {DEPTH: '101'}\n"
        )
    )
    assert config.model.rpn.in_features == ("p2", "p3")
    assert config.model.roi_heads.in_features == ("p4", "p5")
    assert config.model.pixel_std == (1, 2.5, 3)
    assert config.model.resnets.depth == 101


def test_a_base_beside_it_is_overridden(written):
    written("MODEL: {MASK_ON: true, RESNETS: {DEPTH: 101, NORM: BN}}", "bases/base.yaml")
    written("_BASE_: base.yaml\nMODEL: {FPN: {NORM: BN}, RESNETS: {NORM: GN}}", "bases/middle.yaml")
    path = written("_BASE_: bases/middle.yaml\nMODEL: {MASK_ON: false}\n")
    model = read_configuration(path).model
    assert (model.mask_on, model.resnets.depth, model.resnets.norm) == (False, 101, "GN")
    assert model.fpn.norm == "BN"


def test_several_bases(written):
    written("MODEL: {MASK_ON: true, RESNETS: {DEPTH: 101}}", "a.yaml")
    written("MODEL: {RESNETS: {DEPTH: 152}}", "b.yaml")
    model = read_configuration(written("_BASE_: [a.yaml, b.yaml]")).model
    assert (model.mask_on, model.resnets.depth) == (True, 152)


@pytest.mark.parametrize(
    "name", [f"{FPN}.yaml", FPN, f"configs/{FPN}.yaml", f"detectron2://{FPN}.yaml"]
)
def test_a_name_of_the_model_zoo(name):
    assert read_configuration(name) == zoo_configuration(FPN)


def test_a_base_of_the_model_zoo(written):
    config = read_configuration(
        written(f"_BASE_: detectron2://{FPN}.yaml\nMODEL: {{ROI_HEADS: {{NUM_CLASSES: 3}}}}")
    )
    model = zoo_configuration(FPN).model
    assert config.model == replace(model, roi_heads=replace(model.roi_heads, num_classes=3))


def test_a_file_of_that_name_comes_before_the_zoo(written, monkeypatch, tmp_path):
    written("MODEL: {MASK_ON: true}", f"{FPN}.yaml")
    monkeypatch.chdir(tmp_path)
    assert read_configuration(f"{FPN}.yaml").model.rpn.in_features == ("res4",)


def test_overrides_come_last(written):
    path = written("MODEL: {RESNETS: {DEPTH: 101}}")
    options = ["MODEL.RESNETS.DEPTH", "152", "MODEL.FPN.NORM", "GN", "SOLVER.BASE_LR", "0.1"]
    options += ["MODEL.PIXEL_MEAN", "[1, 2, 3]", "MODEL.MASK_ON", "True"]
    model = read_configuration(path, options).model
    assert (model.resnets.depth, model.fpn.norm, model.mask_on) == (152, "GN", True)
    assert model.pixel_mean == (1, 2, 3)


def test_the_one_expression_of_the_zoo_is_known_by_its_text(written):
    (text,) = KNOWN_EXPRESSIONS
    path = written(f'MODEL: {{ANCHOR_GENERATOR: {{SIZES: !!python/object/apply:eval ["{text}"]}}}}')
    sizes = read_configuration(path).model.anchor_generator.sizes
    assert sizes[0] == pytest.approx((32, 40.3175, 50.7968), abs=1e-4)
    assert sizes == zoo_configuration("Base-RetinaNet").model.anchor_generator.sizes


def test_every_configuration_of_the_zoo_is_of_the_types_that_are_told():
    """As from a file: the zoo's own values are taken as they are."""
    for name in ZOO:
        assert read_configuration(name) == zoo_configuration(name), name


def test_no_key_is_both_used_and_ignored():
    assert not {key for key, _ in keys()} & IGNORED


def test_it_imports_no_pytorch():
    code = "import sys, detectors.config_file; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


# What is refused -------------------------------------------------------------------------------


def refused(path: str, *overrides: str) -> str:
    with pytest.raises(InputError) as raised:
        read_configuration(path, overrides)
    message = str(raised.value)
    assert message.isprintable()
    assert len(message) < 1200
    return message


@pytest.mark.parametrize(
    "text",
    [
        "MODEL: !!python/object/apply:os.system ['touch {marker}']",
        "MODEL: !!python/object/new:os.system ['touch {marker}']",
        "A: !!python/name:os.system",
        "A: !!python/module:os",
        "A: !!python/object:pathlib.Path {{}}",
        'A: !!python/object/apply:eval [\'__import__("os").system("touch {marker}")\']',
        "A: !!python/object/apply:eval ['1 + 1']",
        "A: !!python/object/apply:eval {{args: ['1']}}",
    ],
)
def test_what_would_run_code_is_refused_and_does_not_run(written, tmp_path, text):
    marker = tmp_path / "marker"
    message = refused(written("VERSION: 2\n" + text.format(marker=marker)))
    assert "asks to run Python code in line 2 (!!python/" in message
    assert not marker.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("MODEL: [", "is no YAML: "),
        ("MODEL: {A: 1\n", "is no YAML: "),
        ("a: !unknown 1", "is no YAML: could not determine a constructor"),
        ("a: 2001-99-99", "is no YAML: "),
        ("- 1\n- 2\n", "holds no keys"),
        ("", "holds no keys"),
        ("3", "holds no keys"),
        ("MODEL: {1: 2}", "a key is 1"),
        ("[" * 2000, "nested too deeply"),
        (f"a: {'[' * 40}{']' * 40}", TOO_MUCH),
        ("a: &a [*a]", TOO_MUCH),
        ("VERSION: 1", "VERSION is 1, and has to be the number 2"),
        ('VERSION: "2"', "VERSION is '2', and has to be the number 2"),
        ("VERSION: 2.0", "VERSION is 2.0, and has to be the number 2"),
        ('VERSION: "1\\n2"', "VERSION is '1\\n2', and has to be"),
        (
            "MODEL: {RPN: {NMS_TRESH: 0.7}}",
            "MODEL.RPN.NMS_TRESH is not known (is it MODEL.RPN.NMS_THRESH?)",
        ),
        ("MODEL: {CENTERNET: {X: 1}}", "MODEL.CENTERNET.X is not known, and may change"),
        ("MODEL: {NONSENSE: {}}", "MODEL.NONSENSE is not known"),
        ("MODEL: {MASK_ON: {}}", "MODEL.MASK_ON is {}: Expected `bool`"),
        ("MODEL.MASK_ON: true", "a key is 'MODEL.MASK_ON', and has to be a word without dots"),
        ('"A\\nB": 1', "A\\nB is not known"),
        (f"? {'K' * 201}\n: 1", "KKK... has more than 200 characters"),
        ("MODEL: {RPN: 3}", "MODEL.RPN has keys of its own, such as MODEL.RPN."),
        ("MODEL: {MASK_ON: {X: 1}}", "MODEL.MASK_ON.X is not known"),
        ("MODEL: {MASK_ON: 1}", "MODEL.MASK_ON is 1: Expected `bool`"),
        ("MODEL: {RESNETS: {DEPTH: deep}}", "MODEL.RESNETS.DEPTH is 'deep': Expected `int`"),
        ("MODEL: {RESNETS: {DEPTH: 50.5}}", "MODEL.RESNETS.DEPTH is 50.5: Expected `int`"),
        ("MODEL: {PIXEL_MEAN: [1, a, 3]}", "MODEL.PIXEL_MEAN is [1, 'a', 3]: Expected `float`"),
        ("MODEL: {RPN: {IN_FEATURES: p2}}", "MODEL.RPN.IN_FEATURES is 'p2': Expected `array`"),
        ("MODEL: {RESNETS: {DEPTH: true}}", "MODEL.RESNETS.DEPTH is True: Expected `int`"),
        ("MODEL: {RPN: {NMS_THRESH: true}}", "MODEL.RPN.NMS_THRESH is True: Expected `float`"),
        ("MODEL: {RPN: {NMS_THRESH: .nan}}", "MODEL.RPN.NMS_THRESH is nan: a number has to be"),
        ("MODEL: {RPN: {NMS_THRESH: 1e999}}", "MODEL.RPN.NMS_THRESH is '1e999': a number has"),
        ("MODEL: {PIXEL_MEAN: [1, -.inf, 3]}", "is [1, -inf, 3]: a number has to be finite"),
        (f"MODEL: {{RESNETS: {{DEPTH: 0x{'f' * 99}}}}}", "less than 2 to the 63rd"),
        ("MODEL: {PIXEL_MEAN: !!set {1, 2}}", "is {1, 2}: a set has no order: write a list"),
        ("MODEL: {PIXEL_MEAN: '{1, 2}'}", "is '{1, 2}': a set has no order: write a list"),
        ("MODEL: {PIXEL_MEAN: '{[1]: 2}'}", "is '{[1]: 2}': Expected `array`"),
        (f"MODEL: {{PIXEL_MEAN: '{'[' * 40}{']' * 40}'}}", TOO_MUCH),
        ('MODEL: {FPN: {NORM: "a\\nb"}}', "is 'a\\nb': a text has characters that cannot be"),
        ("MODEL: !!python/a%0Ab 1", "(!!python/a\\nb), which is not done"),
        (f"MODEL: !{'a' * 9999} 1", "could not determine a constructor for the tag '!aaa"),
        ("a: &x 1\nb: &x 2", "found duplicate anchor 'x'; first occurrence"),
        ("a: !!bool foo", "is no YAML: a value cannot be read (KeyError: 'foo')"),
        ('a: !!int ""', "a value cannot be read (IndexError"),
        ("a: !!timestamp foo", "a value cannot be read (AttributeError"),
        ("a: !!float x", "a value cannot be read (ValueError"),
        ("a: 1" + ":1" * 300 + ".5", "a value cannot be read (OverflowError"),
        ('a: "\\UFFFFFFFF"', "a value cannot be read ("),
        ("? !!python/tuple [[1]]\n: 1", "found unhashable key in line 1"),
        ("_BASE_: nowhere.yaml", "nowhere.yaml"),
        ("_BASE_: [3]", "_BASE_ is 3, and has to name a file"),
        ("_BASE_:", "_BASE_ is None, and has to name a file"),
        ("_BASE_: 5", "_BASE_ is 5, and has to name a file"),
        ("_BASE_: true", "_BASE_ is True, and has to name a file"),
        ("_BASE_: {x: 1}", "_BASE_ is {'x': 1}, and has to name a file"),
        ("_BASE_: !!set {a, b}", "_BASE_ is {'a', 'b'}, and has to name a file"),
        ('_BASE_: "~a\\0b"', "_BASE_ is '~a\\x00b', and has to name a file"),
        ("_BASE_: ~nosuchuser/x.yaml", "there is no configuration file"),
        (f"_BASE_: {'x' * 2000}", "cannot be read: File name too long"),
    ],
    ids=lambda text: text[:40],
)
def test_what_is_no_configuration(written, text, said):
    assert said in refused(written(text))


def test_aliases_that_multiply(written):
    """The billion laughs: ten lines that stand for a billion values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for n in range(1, 10):
        lines.append(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]")
    assert TOO_MUCH in refused(written("\n".join(lines)))


def multiplied(first: str, each: str, last: str, levels: int = 40) -> str:
    """A file in which each line names the one before it, in braces."""
    lines = [each.format(f"*a{n}", n=n + 1) for n in range(levels)]
    return "\n ".join(["SOLVER:", f"a0: &a0 {first}", *lines]) + f"\n{last.format(f'*a{levels}')}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        # Repeated in mappings of a list, and so in a message.
        (
            multiplied("x", "a{n}: &a{n} [{{x: {0}, y: {0}}}]", "MODEL: {{PIXEL_MEAN: {0}}}"),
            TOO_MUCH,
        ),
        # Merged: each mapping has all keys of the one before it.
        (multiplied("{x: 1}", "a{n}: &a{n} {{<<: {0}, k{n}: 1}}", "", 6000), TOO_MUCH),
        # To the base of 60, in quadratic time.
        ("SOLVER: 1" + ":1" * 120_000, "has more than 2048 characters"),
    ],
    ids=["repeated", "merged", "base 60"],
)
def test_short_files_that_would_take_hours(written, text, said):
    assert said in refused(written(text))


def test_bases_that_multiply(written):
    """Each file names the next one twice: twenty files that would be read a million times."""
    last = MOST_FILES - 1
    paths = [written(f"_BASE_: [{n + 1}.yaml, {n + 1}.yaml]", f"{n}.yaml") for n in range(last)]
    written("VERSION: 2", f"{last}.yaml")
    assert f"leads to more than {MOST_FILES} files" in refused(paths[0])
    assert read_configuration(paths[-2]) == Configuration()


def test_nodes_without_keys_set_nothing(written):
    path = written("MODEL: {RPN: {}, PANOPTIC_FPN: {COMBINE: {}}}\nSOLVER: {}\nTEST: {AUG: {}}")
    assert read_configuration(path) == Configuration()


def test_a_file_that_is_too_large(written):
    assert "has more than 256 KiB" in refused(written("#" * (LARGEST_FILE + 1)))


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "is no text" in refused(str(path))


def test_a_file_that_is_not_there(tmp_path):
    message = refused(str(tmp_path / "none.yaml"))
    assert message.startswith(f"there is no configuration file {tmp_path / 'none.yaml'}")


def test_a_path_that_cannot_be_looked_up(monkeypatch, written):
    assert "cannot be read: File name too long" in refused("x" * 5000)
    assert "there is no configuration file a\\n\\x00b nor" in refused("a\n\0b")
    error = PermissionError(13, "Permission denied", "there")
    monkeypatch.setattr(Path, "is_file", lambda path: (_ for _ in ()).throw(error))
    assert refused("there") == "configuration there cannot be read: Permission denied"


def test_a_folder(tmp_path):
    assert "there is no configuration file" in refused(str(tmp_path))


def test_a_base_that_is_not_there_names_both(written):
    path = written("_BASE_: nowhere.yaml")
    message = refused(path)
    assert "nowhere.yaml" in message
    assert f"{Path(path).resolve()} is based on" in message


def test_bases_in_a_circle(written):
    written("_BASE_: b.yaml", "a.yaml")
    assert "in a circle" in refused(written("_BASE_: a.yaml", "b.yaml"))


def test_a_file_that_is_based_on_itself(written):
    assert "in a circle" in refused(written("_BASE_: config.yaml"))


def test_a_lazy_configuration_is_a_program(written, tmp_path):
    path = written(f"open({str(tmp_path / 'marker')!r}, 'w')", "config.py")
    assert "is a program" in refused(path)
    assert not (tmp_path / "marker").exists()


def test_overrides_that_are_wrong(written):
    path = written("VERSION: 2")
    assert "MODEL.MASK_ON has no value" in refused(path, "MODEL.MASK_ON")
    assert refused(path, "MODEL.MASK", "True").startswith("--opts MODEL.MASK: MODEL.MASK is not")
    assert "Expected `int`" in refused(path, "MODEL.RESNETS.DEPTH", "many")
    assert "Expected `int`" in refused(path, "MODEL.RESNETS.DEPTH", "__import__('os')")
    for value in ("{{}}", "{[1]: 2}", "9" * 2048, "-" * 2000 + "1", "nan", "a\nb"):
        assert "--opts MODEL.RPN.NMS_THRESH: " in refused(path, "MODEL.RPN.NMS_THRESH", value)
    assert "has more than 2048 characters" in refused(path, "MODEL.RESNETS.DEPTH", "9" * 2049)
    assert "has more than 200 characters" in refused(path, "A" + "." * 500_000, "1")
    assert "has keys of its own" in refused(path, "MODEL.RPN", "{}")
    assert "--opts A\\nB: A\\nB is not known" in refused(path, "A\nB", "1")
    assert "A\\nB has no value" in refused(path, "A\nB")


def test_python_does_not_warn_of_what_is_read(written, recwarn):
    """Its warnings would be lines of their own, as many as a text has escapes."""
    path = written("MODEL: {RPN: {NMS_THRESH: '1if 1else 2'}}")
    assert "is '1if 1else 2': Expected `float`" in refused(path)
    assert "Expected `float`" in refused(path, "MODEL.RPN.NMS_THRESH", r"'\d'")
    assert not recwarn.list


# For Detectron2 --------------------------------------------------------------------------------


def test_settings_for_detectron2_are_data(written):
    """Keys that the bundled detectors do not know are passed on, as are values of any type."""
    written("MODEL: {POINT_HEAD: {NUM_FC: 3, NAME: X}, RPN: {}}\nVERSION: 2", "base.yaml")
    path = written("_BASE_: base.yaml\nMODEL: {POINT_HEAD: {NAME: null, SIZES: [[1, 2], [3.5]]}}")
    assert read_settings(path, ["MODEL.POINT_HEAD.ON", "True", "A.B", "(1, [2])"]) == (
        ("MODEL.POINT_HEAD.NUM_FC", 3),
        ("MODEL.POINT_HEAD.NAME", None),
        ("MODEL.RPN", None),
        ("MODEL.POINT_HEAD.SIZES", ((1, 2), (3.5,))),
        ("MODEL.POINT_HEAD.ON", True),
        ("A.B", (1, (2,))),
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("VERSION: 1", "has to be the number 2"),
        ("A: 2020-01-01", "A is datetime.date(2020, 1, 1): date is neither"),
        ("A: !!binary QQ==", "bytes is neither a number nor a text"),
        ("A: [[1, .nan]]", "a number has to be finite"),
        ("A: !!set {1, 2}", "a set has no order"),
        ("A: [{B: 1}]", "dict is neither a number nor a text"),
        ("A: !!python/name:os.system x", "asks to run Python code in line 1"),
    ],
)
def test_settings_that_detectron2_does_not_get(written, text, said):
    with pytest.raises(InputError, match=r"^[^\n]*$") as error:
        read_settings(written(text))
    assert said in str(error.value)


def test_values_that_override_a_program(written):
    path = written("1 / 0", "config.py")
    texts = ["model.num_classes=3", "model.sizes=[[1], [2]]", "a.b=x=y"]
    assert read_program(path, texts) == (
        ("model.num_classes", 3),
        ("model.sizes", ((1,), (2,))),
        ("a.b", "x=y"),
    )
    for text in ("model", "model..a=1", "=1", "model.a b=1"):
        with pytest.raises(InputError, match="a LazyConfig file takes texts like"):
            read_program(path, [text])
    with pytest.raises(InputError, match="there is no configuration file"):
        read_program(path + "x.py")


def test_a_program_as_a_base_has_no_way_out(written):
    written("1 / 0", "base.py")
    assert "--trust-config" not in refused(written("_BASE_: base.py"))
    assert refused(written("_BASE_: base.py")).endswith("give the configuration as YAML")
