"""Reads a Detectron2 configuration: a YAML file with what it is based on, and overriding settings.

A configuration is data. Detectron2 reads its files with a loader that runs what they contain; here
nothing is run. It imports no PyTorch: the parent process reads.
"""

from __future__ import annotations

import ast
import difflib
import os
import reprlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Collection, Iterator, Sequence

import msgspec

from configuration import IGNORED, Configuration, from_settings, keys
from detectors.zoo_configurations import BASE, KNOWN_EXPRESSIONS, ZOO, zoo_settings
from errors import InputError

if TYPE_CHECKING:
    import yaml

# What a file, and all files of a configuration, may have at most: far above what Detectron2 writes
# (6 kB, 230 keys of up to 60 characters, 5 levels). Without these, short files take hours to read.
LARGEST_FILE = 1 << 18
MOST_FILES = 20
MOST_VALUES = 50_000
DEEPEST = 20
LONGEST_KEY = 200
LONGEST_TEXT = 2048
# What a number has to stay below; NaN and the infinities do not.
LARGEST_NUMBER = 1 << 63
# How much of a path or of a value a message shows.
LONGEST_SHOWN = 300
# In front of the name of a file of the model zoo.
ZOO_PREFIX = "detectron2://"
# What Detectron2's files have said since 2019, where they say it.
VERSION = 2
WAY_OUT = (
    "the bundled detectors cannot be built from it (--source detectron2 takes what an installed "
    "Detectron2 can build)"
)


@dataclass(frozen=True)
class Setting:
    """The value of a key.

    Attributes:
        origin: the file that has it, or the option.
    """

    value: Any
    origin: str


# Key -> its setting.
Settings = dict[str, Setting]
# Keys and their values, as they are told to a worker.
Pairs = tuple[tuple[str, Any], ...]
# The value of a node without keys in a file.
NO_KEYS: dict[Any, Any] = {}


def read_configuration(path: str, overrides: Sequence[str] = ()) -> Configuration:
    """Reads a configuration file.

    Args:
        path: of a YAML file, or the name of one of the model zoo, such as
            `COCO-Detection/retinanet_R_50_FPN_3x.yaml`, where there is no such file.
        overrides: keys and values in turns, as `--opts` takes them.

    Raises:
        errors.InputError: it cannot be read, would run code, or has a key that is not understood.
    """
    return configured(_all_settings(path, overrides))


def _all_settings(path: str, overrides: Sequence[str]) -> Settings:
    try:
        settings = _settings(path, (), _Budget())
    except OSError as error:
        told = f"{_line(str(error.filename or path))} cannot be read: {error.strerror}"
        raise InputError(f"configuration {told}") from None
    settings.update(_overrides(overrides))
    return settings


def read_settings(path: str, overrides: Sequence[str] = ()) -> Pairs:
    """Reads a configuration file for Detectron2, which knows what its keys mean.

    Args:
        path, overrides: as for `read_configuration`.

    Returns:
        keys and their values: numbers, texts, tuples of these, and None for no value.

    Raises:
        errors.InputError: it cannot be read, or would run code.
    """
    pairs = []
    for key, setting in _all_settings(path, overrides).items():
        if key == "VERSION":
            _check_version(setting)
        else:
            pairs.append((key, _plain(key, setting)))
    return tuple(pairs)


def read_program(path: str, overrides: Sequence[str] = ()) -> Pairs:
    """Makes sure that a LazyConfig file is there, and reads what overrides it. It is not run.

    Args:
        overrides: texts of the form `model.head.num_classes=3`.

    Raises:
        errors.InputError: there is no such file, or one of the texts is not of that form.
    """
    if not Path(path).is_file():
        raise InputError(f"there is no configuration file {_line(path)}")
    pairs = []
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not all(part.isidentifier() for part in key.split(".")):
            raise InputError(
                f"--opts {_line(text)}: a LazyConfig file takes texts like train.device=cpu"
            )
        setting = Setting(_literal(value), f"--opts {key}")
        pairs.append((key, _plain(key, setting)))
    return tuple(pairs)


def is_program(path: str) -> bool:
    """Whether a configuration file is a LazyConfig: a program."""
    return Path(path).suffix == ".py"


def configured(settings: Settings) -> Configuration:
    """The configuration that has these settings, and Detectron2's defaults for the rest.

    Raises:
        errors.InputError: a key is not known, or its value is of another type.
    """
    hints = dict(keys())
    values = {}
    for key, setting in settings.items():
        if key in hints:
            values[key] = _converted(key, setting, hints[key])
        elif key == "VERSION":
            _check_version(setting)
        elif not _is_ignored(key) and not (setting.value is NO_KEYS and _below(key, hints)):
            raise InputError(f"{setting.origin}: {_unknown(key, hints)}")
    configuration: Configuration = from_settings(values)
    return configuration


# From settings to a record ---------------------------------------------------------------------


def _is_ignored(key: str) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:count]) in IGNORED for count in range(1, len(parts) + 1))


def _below(key: str, known: Collection[str]) -> list[str]:
    return [each for each in known if each.startswith(f"{key}.")]


def _unknown(key: str, known: Collection[str]) -> str:
    below = _below(key, known)
    if below:
        return f"{key} has keys of its own, such as {min(below)}, and no value"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.9)
    hint = f" (is it {near[0]}?)" if near else ""
    return f"{_line(key)} is not known{hint}, and may change what is computed; {WAY_OUT}"


def _check_version(setting: Setting) -> None:
    if type(setting.value) is not int or setting.value != VERSION:
        raise InputError(
            f"{setting.origin}: VERSION is {_shown(setting.value)}, and has to be the number "
            f"{VERSION}: Detectron2's config.upgrade_config brings an older file to it"
        )


def _converted(key: str, setting: Setting, hint: Any) -> Any:
    value = setting.value
    if isinstance(value, str) and (hint is not str or value[:1] in "'\""):
        value = _literal(value)
    parts = _parts(value, _Budget(), setting.origin)
    wrong = next(filter(None, map(_wrong, parts)), None)
    if wrong is None:
        try:
            return msgspec.convert(value, hint)
        except msgspec.ValidationError as error:
            wrong = str(error)
    raise InputError(f"{setting.origin}: {key} is {_shown(setting.value)}: {wrong}")


def _plain(key: str, setting: Setting) -> Any:
    """A value that can be told to a worker: lists become tuples.

    Raises:
        errors.InputError: it is a date, for example.
    """
    parts = _parts(setting.value, _Budget(), setting.origin)
    wrong = next(filter(None, map(_wrong, parts)), None)
    try:
        value = None if setting.value is NO_KEYS else _as_tuples(setting.value)
    except TypeError as error:
        wrong = wrong or str(error)
    if wrong is not None:
        raise InputError(f"{setting.origin}: {_line(key)} is {_shown(setting.value)}: {wrong}")
    return value


def _as_tuples(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_as_tuples(each) for each in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} is neither a number nor a text, nor a list of these")


def _wrong(value: Any) -> str | None:
    """What is wrong with a value that its type does not tell; None for nothing."""
    if isinstance(value, str) and not value.isprintable():
        return "a text has characters that cannot be printed"
    if isinstance(value, (int, float)) and not abs(value) < LARGEST_NUMBER:
        return "a number has to be finite, and less than 2 to the 63rd"
    if isinstance(value, (set, frozenset)):
        return "a set has no order: write a list"
    return None


def _literal(text: str) -> Any:
    """What Python would read; the text itself where it is no literal. YAML knows no tuples."""
    try:
        with warnings.catch_warnings():
            # Of escapes and numbers that Python doubts: lines of their own on the screen.
            warnings.simplefilter("ignore")
            return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def _overrides(words: Sequence[str]) -> Settings:
    if len(words) % 2:
        raise InputError(f"--opts takes keys and values in turns: {_line(words[-1])} has no value")
    settings: Settings = {}
    for key, value in zip(words[::2], words[1::2]):
        origin = f"--opts {_line(key)}"
        _check_length(key, LONGEST_KEY, origin)
        _check_length(value, LONGEST_TEXT, origin)
        settings[key] = Setting(_literal(value), origin)
    return settings


# What a message shows: one line, not too long --------------------------------------------------


def _line(text: str) -> str:
    """A text in one line: what cannot be printed is escaped, the middle of a long one left out."""
    line = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
    half = LONGEST_SHOWN // 2
    return line if len(line) <= LONGEST_SHOWN else f"{line[:half]}...{line[-half:]}"


def _shown(value: Any) -> str:
    """A value as Python writes it, shortened: aliases can make one of any size."""
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxtuple, short.maxstring = 3, 8, 8, 80
    return _line(short.repr(value))


def _check_length(text: str, most: int, origin: str) -> None:
    if len(text) > most:
        raise InputError(f"{origin}: {_line(text[:20])}... has more than {most} characters")


# From files to settings ------------------------------------------------------------------------


def _settings(path: str, above: tuple[str, ...], budget: _Budget) -> Settings:
    """The settings of a file and of what it is based on.

    Args:
        above: the files that are based on it.
    """
    file, shown = Path(path), _line(path)
    budget.files -= 1
    if budget.files < 0:
        raise InputError(f"{shown}: {BASE} leads to more than {MOST_FILES} files")
    if not file.is_file():
        name = zoo_name(path)
        if name is not None:
            return _of_zoo(name)
        based = f", which {_line(above[-1])} is based on," if above else ""
        raise InputError(f"there is no configuration file {shown}{based} nor one of the model zoo")
    if is_program(path):
        way_out = "" if above else ", or take --source detectron2 --trust-config, which runs it"
        raise InputError(
            f"{shown} is a program, as LazyConfig files are, and is not run: "
            f"give the configuration as YAML{way_out}"
        )
    place = str(file.resolve())
    if place in above:
        raise InputError(f"{shown}: {BASE} goes in a circle")
    tree = _read(file, shown, budget)
    settings: Settings = {}
    for base in _bases(tree, shown):
        settings.update(_settings(_beside(file, base), (*above, place), budget))
    settings.update(_flat(tree, "", shown, budget))
    return settings


def _bases(tree: dict[Any, Any], path: str) -> Sequence[str]:
    """Takes the names of its bases out of what a file contains."""
    bases = tree.pop(BASE, [])
    names = bases if isinstance(bases, (list, tuple)) else [bases]
    for name in names:
        if not isinstance(name, str) or not name or not name.isprintable():
            raise InputError(f"{path}: {BASE} is {_shown(name)}, and has to name a file")
    return names


def zoo_name(path: str) -> str | None:
    """The name in `ZOO` that a path or an address of a file of the zoo means, or None."""
    name = path.removeprefix(ZOO_PREFIX).removesuffix(".yaml").removeprefix("configs/")
    return name if name in ZOO else None


def _beside(file: Path, base: str) -> str:
    """What a file calls its base, seen from here."""
    if base.startswith(ZOO_PREFIX):
        return base
    return str(file.parent / os.path.expanduser(base))


def _of_zoo(name: str) -> Settings:
    origin = ZOO_PREFIX + name
    return {key: Setting(value, origin) for key, value in zoo_settings(name).items()}


class _Budget:
    """What a configuration may still read: values count also where an alias repeats them."""

    def __init__(self) -> None:
        self.files, self.values = MOST_FILES, MOST_VALUES

    def take(self, path: str, depth: int = 1) -> None:
        """Takes note of one more value.

        Raises:
            errors.InputError: it is too many, or too deep.
        """
        self.values -= 1
        if self.values < 0 or depth > DEEPEST:
            raise InputError(f"{path} has too many values, or more than {DEEPEST} levels")


def _flat(tree: dict[Any, Any], prefix: str, path: str, budget: _Budget) -> Settings:
    settings: Settings = {}
    depth = prefix.count(".") + 1
    for name, value in tree.items():
        budget.take(path, depth)
        if not isinstance(name, str) or "." in name:
            told = f"a key is {_shown(name)}, and has to be a word without dots"
            raise InputError(f"{path}: {told} (--opts joins words with dots)")
        key = prefix + name
        _check_length(key, LONGEST_KEY, path)
        if isinstance(value, dict) and value:
            settings.update(_flat(value, f"{key}.", path, budget))
        else:
            for _ in _parts(value, budget, path, depth + 1):
                pass
            settings[key] = Setting(NO_KEYS if value == {} else value, path)
    return settings


def _parts(value: Any, budget: _Budget, path: str, depth: int = 1) -> Iterator[Any]:
    """A value and all that it holds, each of which is counted."""
    budget.take(path, depth)
    yield value
    if isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _parts(each, budget, path, depth + 1)


def _text(file: Path, path: str) -> str:
    with file.open("rb") as opened:
        data = opened.read(LARGEST_FILE + 1)
    if len(data) > LARGEST_FILE:
        raise InputError(f"{path} has more than {LARGEST_FILE >> 10} KiB: no configuration has")
    return data.decode("utf-8")


def _read(file: Path, path: str, budget: _Budget) -> dict[Any, Any]:
    """What a YAML file contains.

    Raises:
        errors.InputError: it cannot be read, is no mapping, or would run code.
    """
    import yaml

    try:
        tree = yaml.load(_text(file, path), _loader(path, budget))
    except (InputError, OSError):
        raise
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text, and so no configuration") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply: that is no configuration") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no YAML: {_line(_told(error))}") from None
    except Exception as error:  # PyYAML lets through whatever Python says of a number, a date, ...
        said = _line(f"{type(error).__name__}: {error}")
        raise InputError(f"{path} is no YAML: a value cannot be read ({said})") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds no keys, and so no configuration")
    return tree


def _told(error: yaml.YAMLError) -> str:
    """What is wrong and where, in one line."""
    mark = getattr(error, "problem_mark", None)
    said = [getattr(error, name, None) for name in ("context", "problem")]
    told = ": ".join(filter(None, said)) or str(error).partition("\n")[0]
    return told if mark is None else f"{told} in line {mark.line + 1}"


def _loader(path: str, budget: _Budget) -> type:
    """A loader of data: YAML's own types and tuples, which Detectron2 writes, and nothing else."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses what is not data, and what would take too long."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            budget.take(path)
            return super().compose_node(parent, index)

        def compose_scalar_node(self, anchor: Any) -> Any:
            node = super().compose_scalar_node(anchor)
            _check_length(node.value, LONGEST_TEXT, path)
            return node

        def flatten_mapping(self, node: Any) -> None:
            """Counts what it has merged: mappings that merge one another multiply."""
            super().flatten_mapping(node)
            for _ in node.value:
                budget.take(path)

    def construct_tuple(loader: Any, node: Any) -> Any:
        return loader.construct_sequence(node, deep=True)

    def refuse(loader: Any, suffix: str, node: Any) -> Any:
        if suffix == "object/apply:eval" and isinstance(node, yaml.SequenceNode):
            words = [each.value for each in node.value]
            if len(words) == 1 and isinstance(words[0], str) and words[0] in KNOWN_EXPRESSIONS:
                return KNOWN_EXPRESSIONS[words[0]]
        raise InputError(
            f"{path} asks to run Python code in line {node.start_mark.line + 1} "
            f"(!!python/{_line(suffix)}), which is not done: write the value that it has"
        )

    Loader.add_constructor("tag:yaml.org,2002:python/tuple", construct_tuple)
    Loader.add_multi_constructor("tag:yaml.org,2002:python/", refuse)
    return Loader
