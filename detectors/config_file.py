"""Reads a Detectron2 configuration: a YAML file with what it is based on, and overriding settings.

A configuration is data. Detectron2 reads its files with a loader that runs what they contain; here
nothing is run. It imports no PyTorch: the parent process reads.
"""

from __future__ import annotations

import ast
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Collection, Sequence

import msgspec

from detectors.configuration import IGNORED, Configuration, from_settings, keys
from detectors.zoo_configurations import BASE, KNOWN_EXPRESSIONS, ZOO, zoo_settings
from errors import InputError

if TYPE_CHECKING:
    import yaml

# What a file may have at most: far above what Detectron2 writes (6 kB, 230 keys, 5 levels).
LARGEST_FILE = 1 << 20
MOST_VALUES = 20_000
DEEPEST = 20
LONGEST_CHAIN = 20
# In front of the name of a file of the model zoo.
ZOO_PREFIX = "detectron2://"
# What Detectron2's files have said since 2019, where they say it.
VERSION = 2
WAY_OUT = "what Detectron2 itself can build, --source detectron2 takes"


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


def read_configuration(path: str, overrides: Sequence[str] = ()) -> Configuration:
    """Reads a configuration file.

    Args:
        path: of a YAML file, or the name of one of the model zoo, such as
            `COCO-Detection/retinanet_R_50_FPN_3x.yaml`, where there is no such file.
        overrides: keys and values in turns, as `--opts` takes them.

    Raises:
        errors.InputError: it cannot be read, would run code, or has a key that is not understood.
    """
    settings = _settings(path, ())
    settings.update(_overrides(overrides))
    return configured(settings)


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
        elif not _is_ignored(key):
            raise InputError(f"{setting.origin}: {_unknown(key, hints)}")
    configuration: Configuration = from_settings(values)
    return configuration


# From settings to a record ---------------------------------------------------------------------


def _is_ignored(key: str) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:count]) in IGNORED for count in range(1, len(parts) + 1))


def _unknown(key: str, known: Collection[str]) -> str:
    below = [each for each in known if each.startswith(f"{key}.")]
    if below:
        return f"{key} has keys of its own, such as {min(below)}, and no value"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.9)
    hint = f" (is it {near[0]}?)" if near else ""
    return f"{key} is not known{hint}, and may change what is computed; {WAY_OUT}"


def _check_version(setting: Setting) -> None:
    if setting.value != VERSION:
        raise InputError(
            f"{setting.origin}: VERSION is {setting.value}, and only {VERSION} is understood: "
            "Detectron2's config.upgrade_config makes one of it"
        )


def _converted(key: str, setting: Setting, hint: Any) -> Any:
    value = setting.value
    if isinstance(value, str) and (hint is not str or value[:1] in "'\""):
        value = _literal(value)
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        raise InputError(f"{setting.origin}: {key} is {setting.value!r}: {error}") from None


def _literal(text: str) -> Any:
    """What Python would read; the text itself where it is no literal. YAML knows no tuples."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _overrides(words: Sequence[str]) -> Settings:
    if len(words) % 2:
        raise InputError(f"--opts takes keys and values in turns, and {words[-1]} has no value")
    return {
        key: Setting(_literal(value), f"--opts {key}")
        for key, value in zip(words[::2], words[1::2])
    }


# From files to settings ------------------------------------------------------------------------


def _settings(path: str, above: tuple[str, ...]) -> Settings:
    """The settings of a file and of what it is based on.

    Args:
        above: the files that are based on it.
    """
    file = Path(path)
    if not file.is_file():
        name = zoo_name(path)
        if name is not None:
            return _of_zoo(name)
        based = f", which {above[-1]} is based on," if above else ""
        raise InputError(f"there is no configuration file {path}{based} nor one of the model zoo")
    if file.suffix == ".py":
        raise InputError(
            f"{path} is a program, as LazyConfig files are, and is not run: "
            "--source detectron2 --trust-config runs it"
        )
    place = str(file.resolve())
    if place in above or len(above) >= LONGEST_CHAIN:
        raise InputError(f"{path}: {BASE} goes in a circle, or has more than {LONGEST_CHAIN} steps")
    tree = _read(file)
    bases = tree.pop(BASE, [])
    settings: Settings = {}
    for base in [bases] if isinstance(bases, str) else bases:
        if not isinstance(base, str):
            raise InputError(f"{path}: {BASE} is {base!r}, and has to name a file")
        settings.update(_settings(_beside(file, base), (*above, place)))
    settings.update(_flat(tree, "", str(path), _Counter(str(path))))
    return settings


def zoo_name(path: str) -> str | None:
    """The name in `ZOO` that a path or an address of a file of the zoo means, or None."""
    name = path.removeprefix(ZOO_PREFIX).removesuffix(".yaml").removeprefix("configs/")
    return name if name in ZOO else None


def _beside(file: Path, base: str) -> str:
    """What a file calls its base, seen from here."""
    if base.startswith(ZOO_PREFIX):
        return base
    return str(file.parent / Path(base).expanduser())


def _of_zoo(name: str) -> Settings:
    origin = ZOO_PREFIX + name
    return {key: Setting(value, origin) for key, value in zoo_settings(name).items()}


class _Counter:
    """Counts the values of a file, also those that an alias repeats."""

    def __init__(self, path: str) -> None:
        self.path, self.values = path, 0

    def count(self, depth: int) -> None:
        """Takes note of one more.

        Raises:
            errors.InputError: it is too many, or too deep.
        """
        self.values += 1
        if self.values > MOST_VALUES or depth > DEEPEST:
            raise InputError(
                f"{self.path} has more than {MOST_VALUES} values or {DEEPEST} levels: "
                "that is no configuration"
            )


def _flat(
    tree: dict[Any, Any], prefix: str, path: str, counter: _Counter, depth: int = 1
) -> Settings:
    settings: Settings = {}
    for name, value in tree.items():
        counter.count(depth)
        if not isinstance(name, str):
            raise InputError(f"{path}: a key is {name!r}, and has to be a word")
        key = prefix + name
        if isinstance(value, dict):
            settings.update(_flat(value, f"{key}.", path, counter, depth + 1))
        else:
            _count_all(value, counter, depth + 1)
            settings[key] = Setting(value, path)
    return settings


def _count_all(value: Any, counter: _Counter, depth: int) -> None:
    counter.count(depth)
    if isinstance(value, (list, tuple, dict)):
        for each in value:
            _count_all(each, counter, depth + 1)


def _read(path: Path) -> dict[Any, Any]:
    """What a YAML file contains.

    Raises:
        errors.InputError: it cannot be read, is no mapping, or would run code.
    """
    import yaml

    try:
        if path.stat().st_size > LARGEST_FILE:
            raise InputError(f"{path} has more than {LARGEST_FILE >> 20} MiB: no configuration has")
        tree = yaml.load(path.read_text(encoding="utf-8"), _loader(path))
    except OSError as error:
        raise InputError(f"configuration {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text, and so no configuration") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply: that is no configuration") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no YAML: {_told(error)}") from None
    except ValueError as error:  # A date that there is not, for example.
        raise InputError(f"{path} is no YAML: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds no keys, and so no configuration")
    return tree


def _told(error: yaml.YAMLError) -> str:
    """What is wrong and where, in one line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return problem if mark is None else f"{problem} in line {mark.line + 1}"


def _loader(path: Path) -> type:
    """A loader of data: YAML's own types and tuples, which Detectron2 writes, and nothing else."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses everything that is not data."""

    def construct_tuple(loader: Any, node: Any) -> Any:
        return loader.construct_sequence(node, deep=True)

    def refuse(loader: Any, suffix: str, node: Any) -> Any:
        if suffix == "object/apply:eval" and isinstance(node, yaml.SequenceNode):
            words = [each.value for each in node.value]
            if len(words) == 1 and isinstance(words[0], str) and words[0] in KNOWN_EXPRESSIONS:
                return KNOWN_EXPRESSIONS[words[0]]
        raise InputError(
            f"{path} asks to run Python code in line {node.start_mark.line + 1} "
            f"(!!python/{suffix}), which is not done: write the value that it has"
        )

    Loader.add_constructor("tag:yaml.org,2002:python/tuple", construct_tuple)
    Loader.add_multi_constructor("tag:yaml.org,2002:python/", refuse)
    return Loader
