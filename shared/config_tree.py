"""Plain trees <-> frozen dataclasses, and the YAML and `a.b=c` texts that trees come from.

dicts, lists and scalars, as YAML and JSON hold them -> a dataclass whose every field is checked for name and type.
Nothing is guessed: a setting of the wrong type is an error that names it. Ranges are the dataclasses' own business.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import yaml

from .errors import ConfigError


def to_tree(config: Any) -> Any:
    """The plain dicts, lists and scalars of a configuration: what plans and manifests store as JSON."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_tree(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_tree(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_tree(value) for value in config]
    return config


def from_tree(kind: type, tree: Any, where: str = "") -> Any:
    """Inverse of `to_tree` for the dataclass `kind`, checking every name and type on the way."""
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where or 'configuration'}: expected settings by name, got {tree!r}")
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in tree.items():
        full = f"{where}.{name}" if where else str(name)
        if name not in hints:
            raise ConfigError(f"unknown setting {full!r}{suggest(str(name), list(hints))}")
        values[name] = _convert(hints[name], value, full)
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{where or 'configuration'}: {error}") from error


_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")
"""Numbers of YAML 1.2 that PyYAML, which reads YAML 1.1, leaves as strings: 1e-4, 3E5."""


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`, without guessing: "3" is not an int, but 3 and 3e0 are floats."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for option in args:
            try:
                return _convert(option, value, where)
            except ConfigError:  # a section's own complaint is worth more than "none fits"
                if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
                    raise
    if origin is Literal:
        # 1 == True and 1 == 1.0 in Python, but not in a configuration.
        if any(value == option and type(value) is type(option) for option in args):
            return value
        names = [str(option) for option in args]
        raise ConfigError(f"{where} = {value!r}: expected one of {', '.join(names)}{_near(str(value), names)}")
    if origin is tuple and isinstance(value, list | tuple):
        items = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(items) == len(value):
            return tuple(_convert(a, v, f"{where}.{i}") for i, (a, v) in enumerate(zip(items, value, strict=True)))
        raise ConfigError(f"{where} = {value!r}: expected {len(items)} values, got {len(value)}")
    if (origin or hint) in (Mapping, dict) and isinstance(value, Mapping):
        of_key, of_value = args or (Any, Any)
        return {_convert(of_key, k, where): _convert(of_value, v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_tree(hint, value, where)
    if hint is float:
        number = float(value) if isinstance(value, str) and _FLOAT.fullmatch(value) else value
        if isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number):
            return float(number)
        if isinstance(number, float):
            raise ConfigError(f"{where} = {value!r}: expected a finite number")
    elif hint is Any or (hint in (int, str, bool, type(None)) and type(value) is hint):
        return value
    raise ConfigError(f"{where} = {value!r}: expected {_type_name(hint)}, got {type(value).__name__}")


def _type_name(hint: Any) -> str:
    """A type as a user would write it: `float or null`, `a list`, `shared or int`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type_name(option) for option in args)
    if origin is Literal:
        return " or ".join(str(option) for option in args)
    if origin is tuple:
        return "a list"
    if (origin or hint) in (Mapping, dict):
        return "settings by name"
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))


class _Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys in silence, and with it half of a configuration."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(k, deep=True) for k, _ in node.value if k.tag != "tag:yaml.org,2002:merge"]
        twice = [key for number, key in enumerate(keys) if key in keys[:number]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from error


def read_yaml(text: str, where: str) -> dict[str, Any]:
    """Sections of a YAML file; `where` names it in errors. Raises: ConfigError: not YAML, a key twice, no mapping."""
    tree = _yaml(text, where)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: expected sections such as `train:`, got {type(tree).__name__}")
    return {name: {} if section is None else section for name, section in tree.items()}


def merge(tree: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Settings of `more` into `tree`, section by section; a list replaces the whole list."""
    for name, value in more.items():
        if isinstance(value, Mapping) and isinstance(tree.get(name), dict):
            merge(tree[name], value)
        else:
            tree[name] = value


def override(tree: dict[str, Any], item: str) -> None:
    """One `a.b=value` into `tree`. Raises: ConfigError: not of this form, or `a` has no settings below it."""
    name, equals, text = item.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set {item!r}: expected section.setting=value, for example --set train.lr=3e-4")
    *parents, last = name.strip().split(".")
    node: Any = tree
    for parent in parents:
        node = node[_index(node, parent, name)] if isinstance(node, list) else node.setdefault(parent, {})
        if not isinstance(node, dict | list):
            raise ConfigError(f"--set {name}: {parent!r} holds a single value, it has no settings below it")
    value = _yaml(text, f"--set {item}")
    place: Any = _index(node, last, name) if isinstance(node, list) else last
    node[place] = value


def _index(items: Sequence[Any], text: str, name: str) -> int:
    if not text.isdigit() or int(text) >= len(items):
        raise ConfigError(f"--set {name}: {text!r} is not an index of a list of {len(items)}")
    return int(text)


def suggest(name: str, known: Sequence[str]) -> str:
    """The end of an error about an unknown name: the nearest known one, or all of them."""
    return _near(name, known) or f"; known: {', '.join(known)}"


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
