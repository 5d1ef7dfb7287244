"""Files of keys and values, read strictly into dataclasses: typed sections, each key checked, every error with file and key.

A field is a plain type, a choice, a tuple, another section, or dict[str, SECTION]: sections under names of the user's. A field
`lambda_` is the key `lambda`.
"""
import dataclasses
import difflib
import json
import math
import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml


class ConfigError(ValueError):
    """A mistake in what the user gave: file, key, value or shape. The command line exits with code 2."""


# -- reading YAML ------------------------------------------------------------------------------------------------------

class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice and reads 1e-3 as a number (YAML 1.1 reads it as text)."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode):
                problem = "a key is a list or a section; a text that begins with { or [ is put in quotes"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is written twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {first: list(rules) for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
                              list("-+.0123456789"))


def parse(text: str, origin: str) -> Any:
    """What a YAML text says, as plain values. Raises: ConfigError that names `origin`."""
    try:
        return yaml.load(text, _Loader)                               # a SafeLoader: builds plain values only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        if "alias" in problem or "'*'" in problem:
            problem += "; a text that begins with * is put in quotes"
        raise ConfigError(f"{origin}{where}: {problem}") from None


def read_yaml(path: str | Path, what: str) -> Any:
    """What a YAML file says. Raises: ConfigError for a missing file, a repeated key, or no YAML."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such {what} file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the {what} cannot be read: {error}") from None
    values = parse(text, str(path))
    return {} if values is None else values


# -- types -------------------------------------------------------------------------------------------------------------

def key_of(name: str) -> str:
    """A field's key."""
    return name.rstrip("_")


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _named(kind):
    """The section of which a key holds several under names of the user's, or None."""
    sections = get_args(kind)[1:] if get_origin(kind) is dict else ()
    return next((section for section in sections if dataclasses.is_dataclass(section)), None)


def keys_of(cls, prefix: str = "") -> list[str]:
    """All known keys, sections included: seed, ..., student, student.model, ..."""
    keys = []
    for name, kind in get_type_hints(cls).items():
        keys.append(_join(prefix, key_of(name)))
        if dataclasses.is_dataclass(kind):
            keys += keys_of(kind, keys[-1])
        elif section := _named(kind):
            keys += keys_of(section, f"{keys[-1]}.NAME")
    return keys


def nearest(key: str, known_keys: Sequence[str]) -> str:
    """The known key most like `key`: first by its last word, then by its section."""
    section, _, name = key.lower().rpartition(".")

    def likeness(known: str) -> float:
        known_section, _, known_name = known.rpartition(".")
        return (difflib.SequenceMatcher(None, name, known_name).ratio() + 0.3 * (section == known_section)
                + 0.1 * difflib.SequenceMatcher(None, section, known_section).ratio())
    return max(known_keys, key=likeness)


def describe(kind) -> str:
    """A type in words, for error messages."""
    if kind is type(None):
        return "null"
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind)) if len(get_args(kind)) > 1 else get_args(kind)[0]
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(describe(k) for k in get_args(kind))
    if get_origin(kind) is tuple:
        if get_args(kind)[-1] is not ...:
            return f"a list of {len(get_args(kind))} numbers"
        return "a list of texts" if get_args(kind)[0] is str else f"a list of which each is {describe(get_args(kind)[0])}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "text",
            dict: "keys with values"}[get_origin(kind) or kind]


def convert(value, kind):
    """The value as `kind`, or TypeError. A whole number is a number; true and false are neither; no text is parsed, a path is
    text. What is in a dict is not looked at.
    """
    if get_origin(kind) in (Union, types.UnionType):
        for option in get_args(kind):
            try:
                return convert(value, option)
            except TypeError:
                pass
    elif get_origin(kind) is Literal:
        if isinstance(value, str) and value in get_args(kind):
            return value
    elif get_origin(kind) is tuple:
        kinds = get_args(kind)
        if isinstance(value, (list, tuple)):
            kinds = kinds[:1] * len(value) if kinds[-1] is ... else kinds
            if len(value) == len(kinds):
                return tuple(convert(v, k) for v, k in zip(value, kinds, strict=True))
    elif kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif kind is Path:
        if isinstance(value, (str, Path)):
            return Path(value)
    elif isinstance(value, get_origin(kind) or kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise TypeError


def merge(node, values: Any, origin: str, origins: dict[str, str], prefix: str = "", root: type | None = None):
    """`node` (a section) with `values` put in, each key checked. Records in `origins` where each key came from."""
    root = root or type(node)
    if not isinstance(values, dict):
        what = prefix or f"a {getattr(root, 'called', root.__name__.lower())}"
        raise ConfigError(f"{origin}: {what} is a section with keys, not {show(values)}")
    known = {key_of(name): (name, kind) for name, kind in get_type_hints(type(node)).items()}
    changes = {}
    for key, value in values.items():
        path = _join(prefix, str(key))
        if key not in known:
            raise ConfigError(f"{origin}: unknown key {path!r}; the nearest known key is {nearest(path, keys_of(root))!r}")
        name, kind = known[key]
        if dataclasses.is_dataclass(kind):
            changes[name] = merge(getattr(node, name), value, origin, origins, path, root)
            continue
        if section := _named(kind):
            if not isinstance(value, dict):
                raise ConfigError(f"{origin}: {path} is {show(value)}; expected names, each with its own keys")
            changes[name] = {
                str(own): merge(section(), {} if keys is None else keys, origin, origins, f"{path}.{own}", root)
                for own, keys in value.items()
            }
            continue
        try:
            changes[name] = convert(value, kind)
        except TypeError:
            raise ConfigError(f"{origin}: {path} is {show(value)}; expected {describe(kind)}") from None
        origins[path] = origin
    return dataclasses.replace(node, **changes)


def show(value) -> str:
    """A value as it is written in YAML, with its type where that helps."""
    if isinstance(value, str):
        return f"the text {value!r}"
    try:
        return json.dumps(value, default=str)
    except (TypeError, ValueError):  # a date as a key, a list in itself
        return repr(value)
