"""Configuration: frozen dataclasses filled from one YAML file and the environment.

A service's `Config` is a frozen, slotted, keyword-only dataclass whose fields are made by `setting`. `load` fills several
of them, one per section of the file; an environment variable `SLUICE_<SECTION>__<FIELD>` (nested fields joined by `__`)
wins over the file. Types are strict, unknown keys are refused, and every problem is reported at once in one `ConfigError`.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

ENVIRONMENT_PREFIX: Final = "SLUICE_"
_KEY: Final = "sluice.setting"
_SECRET_NAMES: Final = re.compile(r"(token|secret|password|credential|api_?key|_key)$")
_URL_PASSWORD: Final = re.compile(r"://[^@/\s]*@")


class _Required(enum.Enum):
    REQUIRED = "required"


REQUIRED: Final = _Required.REQUIRED
"""As a default: the setting has none and must be given."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Setting:
    doc: str
    unit: str | None
    minimum: float | None
    maximum: float | None
    choices: tuple[Any, ...] | None
    secret: bool


class ConfigError(Exception):
    """The configuration can't be used. `problems` has one line per problem; the text has all of them."""

    def __init__(self, problems: Collection[str]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        heading = "1 problem in the configuration" if count == 1 else f"{count} problems in the configuration"
        super().__init__("\n".join([heading + ":", *(f"  {problem}" for problem in self.problems)]))


def setting(
    default: Any,
    doc: str,
    *,
    unit: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Collection[Any] | None = None,
    secret: bool = False,
) -> Any:
    """A field of a Config.

    `default` is `REQUIRED` when there is none. `minimum` and `maximum` are inclusive, and bound the length of a string, a
    tuple or a mapping and the value of a number. `secret` keeps the value out of error texts; names that end in `token`,
    `key`, `password` or the like are secret anyway.
    """
    metadata = {
        _KEY: _Setting(doc, unit, minimum, maximum, None if choices is None else tuple(choices), secret),
    }
    if default is REQUIRED:
        return dataclasses.field(metadata=metadata)
    if type(default).__hash__ is None:
        # Dataclasses refuse a mutable default; a copy per instance is as good.
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def load(
    sections: Mapping[str, type[Any]],
    file: Path | None,
    environ: Mapping[str, str],
    *,
    others: Collection[str] = (),
) -> dict[str, Any]:
    """One filled Config per section.

    `file` is a YAML mapping of section name to settings; None: defaults and environment alone. `others` names the sections that
    may be there and are none of this process's business. Raises ConfigError with every problem found.
    """
    problems: list[str] = []
    content = _read(file, problems) if file is not None else {}
    origin = str(file)
    allowed = {*sections, *others}
    problems.extend(
        f"{name}: unknown section in {origin}{_suggestion(name, allowed)}" for name in content if name not in allowed
    )
    overrides = _overrides(sections, environ, allowed, problems)
    configs = {}
    for name, cls in sections.items():
        given = content.get(name)
        if given is None:
            given = {}
        configs[name] = _build(cls, given, overrides.get(name, {}), name, origin, problems)
    if problems:
        raise ConfigError(problems)
    return configs


def describe(sections: Mapping[str, type[Any]]) -> str:
    """A YAML file with every setting of `sections`, its meaning, unit, bounds and default; `load` reads it back."""
    lines: list[str] = []
    for name, cls in sections.items():
        lines.append(f"{name}:")
        lines.extend(f"  {line}".rstrip() for line in _describe(cls))
        lines.append("")
    return "\n".join(lines)


def _read(file: Path, problems: list[str]) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        problems.append(f"{file}: can't be read: {reason}")
        return {}
    try:
        content = yaml.load(text, Loader=_Loader)  # noqa: S506  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problems.append(f"{file}: not valid YAML{where}: {getattr(error, 'problem', None) or 'syntax error'}")
        return {}
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        problems.append(f"{file}: must be a mapping of section names to settings")
        return {}
    return content


def read_yaml(path: Path) -> Any:
    """The content of a file beside the configuration, such as the catalogue. Raises ConfigError with the place of the fault."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise ConfigError([f"{path}{place}: is not YAML: {error.problem}"]) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError([f"{path}: can't be read: {type(error).__name__}"]) from None


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, which plain YAML loaders take in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key != "<<" and key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _suggestion(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class _Text(str):
    """A value from the environment: text whose type the field decides. Remembers the variable's name."""

    variable: str


def _overrides(
    sections: Mapping[str, type[Any]], environ: Mapping[str, str], allowed: Collection[str], problems: list[str]
) -> dict[str, dict[str, Any]]:
    tree: dict[str, dict[str, Any]] = {}
    for variable in sorted(environ):
        if not variable.startswith(ENVIRONMENT_PREFIX) or "__" not in variable:
            continue
        section, *path = variable.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
        if section not in sections:
            if section not in allowed:
                problems.append(f"{variable}: unknown section {section!r}{_suggestion(section, allowed)}")
            continue
        value = _Text(environ[variable])
        value.variable = variable
        node: Any = tree.setdefault(section, {})
        for part in path[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or path[-1] in node:
            problems.append(f"{variable}: another variable sets a part of it, or the whole of it")
            continue
        node[path[-1]] = value
    return tree


def _build(cls: type[Any], given: Any, override: Any, path: str, origin: str, problems: list[str]) -> Any:
    """An instance of the dataclass `cls`, or None after noting at least one problem."""
    before = len(problems)
    if isinstance(override, _Text):
        given, origin = _yaml_of(override), override.variable
        override = {}
    if not isinstance(given, Mapping):
        problems.append(f"{path}: must be a mapping of settings (in {origin})")
        return None
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    problems.extend(
        f"{path}.{key}: unknown setting in {origin}{_suggestion(str(key), fields)}" for key in given if key not in fields
    )
    for key, value in override.items():
        if key not in fields:
            problems.append(f"{_variable_of(value)}: unknown setting {key!r} of {path}{_suggestion(key, fields)}")
    values = {}
    for name, field in fields.items():
        where = f"{path}.{name}"
        about = field.metadata.get(_KEY) or _Setting("", None, None, None, None, False)
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name in override or name in given:
            count = len(problems)
            value = _convert(hints[name], given.get(name, _ABSENT), override.get(name, _ABSENT), where, origin, about, problems)
            if len(problems) == count:
                values[name] = value
        elif not has_default:
            variable = ENVIRONMENT_PREFIX + where.replace(".", "__").upper()
            problems.append(f"{where}: must be set, in {origin if origin != 'None' else 'a file'} or as {variable}")
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ValueError as error:
        problems.append(f"{path}: {error}")
        return None


class _Absent(enum.Enum):
    ABSENT = "absent"


_ABSENT: Final = _Absent.ABSENT


def _variable_of(value: Any) -> str:
    while isinstance(value, dict):
        value = next(iter(value.values()))
    return str(value.variable)


def _yaml_of(text: _Text) -> Any:
    try:
        return yaml.load(str(text), Loader=_Loader)  # noqa: S506  # a SafeLoader
    except yaml.YAMLError:
        return str(text)


def _convert(hint: Any, given: Any, override: Any, path: str, origin: str, about: _Setting, problems: list[str]) -> Any:
    """`override` over `given` as a value of type `hint`; a noted problem means that the result is meaningless."""
    secret = about.secret or _SECRET_NAMES.search(path) is not None
    kind = typing.get_origin(hint) or hint
    if kind in (types.UnionType, typing.Union):
        options = [option for option in typing.get_args(hint) if option is not types.NoneType]
        value = override if override is not _ABSENT else given
        if value is None or (isinstance(value, _Text) and value in ("", "null")):
            return None
        if len(options) == 1:
            return _convert(options[0], given, override, path, origin, about, problems)
        best: list[str] = []
        for option in options:
            attempt: list[str] = []
            result = _convert(option, given, override, path, origin, about, attempt)
            if not attempt:
                return result
            best = best or attempt
        problems.extend(best)
        return None
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _build(
            kind,
            {} if given is _ABSENT else given,
            {} if override is _ABSENT else override,
            path,
            origin,
            problems,
        )
    if kind in (dict, Mapping):
        return _mapping(hint, kind, given, override, path, origin, about, problems)
    if isinstance(override, dict):
        problems.append(f"{_variable_of(override)}: {path} has no settings below it")
        return None
    value = given
    if override is not _ABSENT:
        value, origin = override, override.variable
    if kind is tuple:
        return _tuple(hint, value, path, origin, about, problems)
    return _scalar(kind, value, path, origin, about, secret, problems)


def _mapping(
    hint: Any, kind: Any, given: Any, override: Any, path: str, origin: str, about: _Setting, problems: list[str]
) -> Any:
    inner = (typing.get_args(hint) or (str, Any))[1]
    if isinstance(override, _Text):
        given, origin, override = _yaml_of(override), override.variable, {}
    if given is _ABSENT or given is None:
        given = {}
    if override is _ABSENT:
        override = {}
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        problems.append(f"{path}: must be a mapping with text keys (in {origin})")
        return None
    # Values are bounded by the settings of their own type; the bounds here are those of the mapping's size.
    element = _Setting(about.doc, about.unit, None, None, about.choices, about.secret)
    result = {}
    for key in [*given, *(key for key in override if key not in given)]:
        result[key] = _convert(
            inner, given.get(key, _ABSENT), override.get(key, _ABSENT), f"{path}.{key}", origin, element, problems
        )
    _bounds(len(result), f"{len(result)} entries", path, origin, about, problems)
    return result if kind is dict else types.MappingProxyType(result)


def _tuple(hint: Any, value: Any, path: str, origin: str, about: _Setting, problems: list[str]) -> Any:
    if isinstance(value, _Text):
        text = value.strip()
        value = _yaml_of(value) if text.startswith("[") else [part.strip() for part in text.split(",") if part.strip()]
        value = [_Text(part) if isinstance(part, str) else part for part in value] if isinstance(value, list) else value
    if not isinstance(value, list | tuple):
        problems.append(f"{path}: must be a list, got {_shown(value, about.secret)} (in {origin})")
        return None
    arguments = typing.get_args(hint)
    inner = arguments[0] if arguments else Any
    fixed = bool(arguments) and not (len(arguments) == 2 and arguments[1] is Ellipsis)
    if fixed and len(value) != len(arguments):
        problems.append(f"{path}: must have {len(arguments)} elements, got {len(value)} (in {origin})")
        return None
    element = _Setting(about.doc, about.unit, None, None, about.choices, about.secret)
    converted = []
    for index, item in enumerate(value):
        text_item = isinstance(item, _Text)
        if text_item:
            item.variable = origin
        converted.append(
            _convert(
                arguments[index] if fixed else inner,
                _ABSENT if text_item else item,
                item if text_item else _ABSENT,
                f"{path}[{index}]",
                origin,
                element,
                problems,
            )
        )
    _bounds(len(converted), f"{len(converted)} elements", path, origin, about, problems)
    return tuple(converted)


def _scalar(kind: Any, value: Any, path: str, origin: str, about: _Setting, secret: bool, problems: list[str]) -> Any:
    shown = _shown(value, secret)
    if isinstance(value, _Text) and kind in (bool, int, float):
        value = _yaml_of(value)
        if isinstance(value, str):
            value = _number(value)
    elif isinstance(value, _Text):
        value = str(value)
    wanted: str | None = None
    if kind is Any:
        return value
    if kind is bool:
        wanted = None if isinstance(value, bool) else "true or false"
    elif kind is int:
        wanted = None if isinstance(value, int) and not isinstance(value, bool) else "a whole number"
    elif kind is float:
        if isinstance(value, str):
            # YAML reads `1e-3` as text; people mean the number.
            value = _number(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            value = float(value)
        else:
            wanted = "a number"
    elif kind is str:
        wanted = None if isinstance(value, str) else "text (quote it)"
    elif kind is Path:
        wanted = None if isinstance(value, str) and value else "a path"
        value = Path(value).expanduser() if wanted is None else value
    elif isinstance(kind, type) and issubclass(kind, enum.Enum):
        names = [str(member.value) for member in kind]
        if value in names:
            return kind(value)
        hint = _suggestion(str(value), names)
        problems.append(f"{path}: must be one of {', '.join(names)}, got {shown} (in {origin}){hint}")
        return None
    else:
        raise TypeError(f"{path} has the type {kind!r}, which settings don't support")
    if wanted is not None:
        problems.append(f"{path}: must be {wanted}, got {shown} (in {origin})")
        return None
    if about.choices is not None and value not in about.choices:
        choices = ", ".join(map(str, about.choices))
        problems.append(f"{path}: must be one of {choices}, got {shown} (in {origin})")
        return None
    if isinstance(value, str):
        _bounds(len(value), f"{len(value)} characters", path, origin, about, problems)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        _bounds(value, shown, path, origin, about, problems)
    return value


def _figure(number: float) -> str:
    """A bound in digits: 268435456, not 2.68435e+08."""
    return str(int(number)) if float(number).is_integer() else repr(number)


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _bounds(value: float, shown: str, path: str, origin: str, about: _Setting, problems: list[str]) -> None:
    unit = f" {about.unit}" if about.unit else ""
    if about.minimum is not None and value < about.minimum:
        problems.append(f"{path}: {shown} is below the minimum of {_figure(about.minimum)}{unit} (in {origin})")
    if about.maximum is not None and value > about.maximum:
        problems.append(f"{path}: {shown} is above the maximum of {_figure(about.maximum)}{unit} (in {origin})")


def _shown(value: Any, secret: bool) -> str:
    if secret and value not in (None, ""):
        return "a secret value"
    text = repr(str(value) if isinstance(value, _Text) else value)
    text = _URL_PASSWORD.sub("://…@", text)
    return text if len(text) <= 80 else text[:77] + "…"


def _describe(cls: type[Any]) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        about: _Setting | None = field.metadata.get(_KEY)
        default: Any = REQUIRED
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if about is not None:
            yield from (f"# {line}" for line in _wrapped(_summary(about, hints[field.name])))
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            yield f"{field.name}:"
            yield from (f"  {line}" for line in _describe(type(default)))
        elif default is REQUIRED:
            yield f"# {field.name}: (required)"
        else:
            # In a list of one, so that a bare value isn't followed by YAML's end-of-document mark.
            text = yaml.safe_dump([_plain(default)], default_flow_style=True, allow_unicode=True, width=10_000, sort_keys=False)
            yield f"{field.name}: {text.strip()[1:-1]}"


def _summary(about: _Setting, hint: Any) -> str:
    parts = [about.doc.rstrip(".") + "."]
    if about.unit:
        parts.append(f"Unit: {about.unit}.")
    kind = next((arg for arg in typing.get_args(hint) if arg is not types.NoneType), hint)
    kind = hint if typing.get_origin(hint) not in (types.UnionType, typing.Union) else kind
    if about.choices is not None:
        parts.append(f"One of {', '.join(map(str, about.choices))}.")
    elif isinstance(kind, type) and issubclass(kind, enum.Enum):
        parts.append(f"One of {', '.join(str(member.value) for member in kind)}.")
    if about.minimum is not None and about.maximum is not None:
        parts.append(f"{_figure(about.minimum)} to {_figure(about.maximum)}.")
    elif about.minimum is not None:
        parts.append(f"At least {_figure(about.minimum)}.")
    elif about.maximum is not None:
        parts.append(f"At most {_figure(about.maximum)}.")
    return " ".join(parts)


def _wrapped(text: str, width: int = 110) -> Iterator[str]:
    line = ""
    for word in text.split():
        if line and len(line) + len(word) + 1 > width:
            yield line
            line = word
        else:
            line = f"{line} {word}" if line else word
    if line:
        yield line


def _plain(value: Any) -> Any:
    """`value` as what YAML can say."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value
