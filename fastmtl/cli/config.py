"""A run's configuration: defaults < YAML file < flags and KEY=VALUE, every value checked against its key."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from .keys import BY_NAME, KEYS, OF_DATA, OF_MODEL, Key

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "widths": "a list of whole numbers of at least 1, such as [64, 32]",
}
_WORDS = {"yes": True, "no": False, "true": True, "false": False}
#: What stands for "no value" where a key may have none.
_NULLS = (None, "none", "null", "")


class Given(dict[str, tuple[Any, str]]):
    """What the user asked for: key -> (value, where it was said)."""

    def value(self, name: str) -> Any:
        """The value given for a key, else its general default."""
        return self[name][0] if name in self else BY_NAME[name].default


class _Dumper(yaml.SafeDumper):
    """One key a line; a list on its key's line."""


_Dumper.add_representer(list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))


def gather(config_file: str | None, words: Sequence[str], flags: Mapping[str, str]) -> Given:
    """Collect and check what the user asked for.

    Args:
        config_file: YAML file of keys; None for none.
        words: the positional words: at most one data set, and KEY=VALUE pairs.
        flags: key -> the text given with its flag.

    Returns:
        The keys that were given, their values of the right type.

    Raises:
        ConfigError: an unknown key (names the nearest), a value of another type or out of range, a key given twice.
    """
    given = Given()
    if config_file is not None:
        for name, value in _read(config_file).items():
            given[name] = (_checked(name, value, config_file), config_file)
    said: dict[str, str] = {}
    for name, text, origin in [*_split(words), *((name, text, "") for name, text in flags.items())]:
        value = _checked(name, yaml_value(text, name), origin)
        if name in said and given[name][0] != value:
            raise ConfigError(
                f"{name} is given twice on the command line, as {given[name][0]!r} and as {value!r}; give it once"
            )
        said[name] = text
        given[name] = (value, "the command line")
    return given


def resolve(given: Given, data_set: str, model: str) -> dict[str, Any]:
    """The complete configuration of a run.

    Args:
        given: what the user asked for.
        data_set: the data set, "auto" already decided.
        model: the model.

    Returns:
        key -> value, for each key that such a run has, in the order of the documentation.

    Raises:
        ConfigError: a key that this model or data set does not have.
    """
    settings = {key.name: key.default for key in KEYS if key.belongs_to(data_set, model)}
    for defaults in (OF_DATA[data_set], OF_MODEL[model]):
        settings |= {name: value for name, value in defaults.items() if name in settings}
    for name, (value, origin) in given.items():
        if name not in settings:
            _refuse_foreign(BY_NAME[name], origin, data_set, model, list(settings))
        settings[name] = value
    settings |= {"data.name": data_set, "model.name": model}
    return settings


def to_yaml(settings: Mapping[str, Any]) -> str:
    """The configuration as a YAML text that :func:`gather` reads back to the same values."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    return yaml.dump(sections, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True)


def yaml_value(text: str, name: str) -> Any:
    """A value as it is written in YAML: 3, 3e-4, [16, 8], true, null, a word."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: {text!r} is no YAML value ({_short(error)})") from None


def nearest(word: str, known: Sequence[str]) -> str:
    """The known words that the user may have meant, or all of them, for an error."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"the known ones are {', '.join(known)}"


def _split(words: Sequence[str]) -> list[tuple[str, str, str]]:
    """(key, text, origin) of each positional word."""
    pairs = []
    for word in words:
        name, equals, text = word.partition("=")
        pairs.append((name, text, "") if equals else ("data.name", word, ""))
    return pairs


def _read(path: str) -> dict[str, Any]:
    """The keys in a YAML file, nested or dotted, as dotted ones."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is no UTF-8 text") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is no YAML ({_short(error)})") from None
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: holds {_shown(content)}, where sections (data, model, train) with keys belong")
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[str(name)] = value
    return flat


def _checked(name: str, value: Any, origin: str) -> Any:
    """The value in its key's type, or the error that names key, value and what was expected."""
    where = f"{origin}: " if origin else ""
    if name not in BY_NAME:
        raise ConfigError(f"{where}unknown key {name!r}; {nearest(name, list(BY_NAME))}")
    key = BY_NAME[name]
    if key.optional and (value in _NULLS if isinstance(value, str) else value is None):
        return None
    converted = _CONVERSIONS[key.kind](value)
    if key.choices and converted not in key.choices:
        raise ConfigError(f"{where}{name}: {_shown(value)} is not known; {nearest(str(value), key.choices)}")
    if converted is None or not _within(key, converted):
        raise ConfigError(f"{where}{name} is {_shown(value)}; expected {_expected(key)}")
    return converted


def _int(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)  # YAML reads 3e-4, without a point, as a text
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _bool(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _str(value: Any) -> str | None:
    if value is None:
        return "none"  # `amp: null`, and YAML's reading of an empty value
    return None if isinstance(value, (Mapping, list)) else str(value)


def _widths(value: Any) -> list[int] | None:
    if isinstance(value, str):
        value = [int(part) if part.strip().isdigit() else None for part in value.split(",")]
    values = value if isinstance(value, list) else [value]
    return list(values) if values and all(_int(width) is not None and width >= 1 for width in values) else None


_CONVERSIONS = {"int": _int, "float": _float, "bool": _bool, "str": _str, "widths": _widths}


def _within(key: Key, value: Any) -> bool:
    return (
        (key.least is None or value >= key.least)
        and (key.above is None or value > key.above)
        and (key.most is None or value <= key.most)
    )


def _expected(key: Key) -> str:
    limits = [
        f"{word} {limit:g}"
        for word, limit in (("at least", key.least), ("above", key.above), ("at most", key.most))
        if limit is not None
    ]
    return _EXPECTED[key.kind] + (f" {' and '.join(limits)}" if limits else "") + (", or null" if key.optional else "")


def _refuse_foreign(key: Key, origin: str, data_set: str, model: str, known: list[str]) -> None:
    """Raise for a key that exists, but not for this run."""
    if not key.belongs_to(data_set, key.models[0] if key.models else model):
        what, own = f"the data set {data_set!r}", f"it belongs to {', '.join(key.data_sets)}"
    else:
        what, own = f"the model {model!r}", f"it belongs to {', '.join(key.models)}"
    section = key.name.partition(".")[0]
    mine = ", ".join(name for name in known if name.startswith(f"{section}."))
    raise ConfigError(f"{what} has no key {key.name!r} (given by {origin}); {own}; the keys here are {mine}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _short(error: yaml.YAMLError) -> str:
    """What is wrong and in which line, without YAML's picture of it."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
    return f"{problem}, line {mark.line + 1}" if mark is not None else problem
