"""Recipe files: YAML in, `dotted.key=value` overrides on top, errors in one line that says what to change.

The rules themselves stand in `recipe.py`; here they get a place in the file and a wording.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from kimi_rl.errors import InputError, one_line
from kimi_rl.recipe import DistillStage, Recipe, RLVRStage, SFTStage

STAGES: dict[str, type[BaseModel]] = {"sft": SFTStage, "distill": DistillStage, "rlvr": RLVRStage}
MAX_ERRORS = 5
Model = TypeVar("Model", bound=BaseModel)

# What a field of a from-scratch model is good for only while `model.path` is unset.
_FROM_SCRATCH = ("arch", "size", "mlp", "layer_types", "overrides")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 minus its surprises: duplicate keys are refused, `1e-3` is a number, dates stay text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first_line: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is not text: put it in quotes", key_node.start_mark
                )
            if key in first_line:
                problem = f"key `{key}` stands twice, first in line {first_line[key]}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            first_line[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """The counterpart of `_Loader`: what it writes plain, the loader reads back as the same value."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML document. `where` names it in errors. Raises `InputError` with the line and column."""
    try:
        # `_unshare` gives every alias its own value: an override of one must not change the others.
        return _unshare(yaml.load(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = error.problem or error.context or "not YAML"
        raise InputError(f"{where}{place}: {one_line(problem)}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not YAML: {one_line(error)}") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply, or an anchor that contains itself") from None
    except ValueError as error:  # for instance an integer of more digits than Python converts
        raise InputError(f"{where}: {one_line(error)}") from None


def _unshare(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshare(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unshare(item) for item in value]
    return value


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply `dotted.key=value` overrides in order, check every rule.

    A value is parsed as YAML. `stages.0.steps=10` and `stages.rlvr.steps=10` (by stage name) both work. An
    override of `data.path` replaces a `data.task` (and its `params`) and the other way round; one of
    `model.path` replaces the from-scratch fields of `model`, and one of `model.size`, `arch`, `mlp` or
    `layer_types` replaces a `model.path`.

    Raises:
        InputError: one line; several problems are joined by "; ", five at most.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"recipe {path}: no such file; recipes/ holds the ones that ship") from None
    except UnicodeDecodeError as error:
        raise InputError(f"recipe {path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"recipe {path}: cannot be read: {error.strerror or error}") from None
    return parse_recipe(text, overrides, where=f"recipe {path}")


def parse_recipe(text: str, overrides: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """`load_recipe` for text that is already in memory; `where` opens every error message."""
    tree = parse_yaml(text, where)
    if not isinstance(tree, dict):
        found = "empty" if tree is None else f"found {_show(tree)}"
        raise InputError(f"{where}: {found}, expected a mapping with at least `data` and `stages`")
    apply_overrides(tree, overrides)
    return validate(Recipe, tree, where)


def validate(kind: type[Model], tree: Any, where: str) -> Model:
    """`tree` as a `kind` (a recipe, or another file of this project's), or `InputError`; `where` opens its message."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        problems = [_word(item, kind) for item in error.errors(include_url=False)]
        more = f"; and {len(problems) - MAX_ERRORS} more" if len(problems) > MAX_ERRORS else ""
        raise InputError(f"{where}: {'; '.join(problems[:MAX_ERRORS])}{more}") from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, defaults written out; `parse_recipe` gives back an equal recipe."""
    return yaml.dump(recipe.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


# ------------------------------------------------------------------------------------------------ overrides


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Apply `dotted.key=value` overrides to a parsed recipe, in place. An unknown key raises `InputError`."""
    pairs = [_split(override) for override in overrides]
    _switch_sources(tree, pairs)
    for key, text in pairs:
        _set(tree, key, text)


def _split(override: str) -> tuple[str, str]:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise InputError(f"override {override!r}: expected dotted.key=value, for example stages.0.steps=10")
    return key, text.strip()


def _switch_sources(tree: dict[str, Any], pairs: list[tuple[str, str]]) -> None:
    """Clear what an overridden source replaces: `data.path=X` must work on a recipe with a `data.task`."""
    sources = ("data.task", "data.path", "model.path")
    given = {key: _value(text, str, key) for key, text in pairs if key in sources}
    keys = {key for key, _ in pairs}
    data, model = tree.get("data"), tree.get("model")
    if isinstance(data, dict):
        if given.get("data.path") is not None:
            data.pop("task", None)
            data.pop("params", None)
        elif given.get("data.task") is not None:
            data.pop("path", None)
            if data.get("task") != given["data.task"]:  # the parameters belong to the task that goes
                data.pop("params", None)
    if isinstance(model, dict):
        if given.get("model.path") is not None:
            for field in _FROM_SCRATCH:
                model.pop(field, None)
        elif keys & {"model.arch", "model.size", "model.mlp", "model.layer_types"}:
            model.pop("path", None)


def _set(tree: dict[str, Any], key: str, text: str) -> None:
    """Walk `tree` and the schema side by side along the dotted `key`, then set the last part."""
    parts = key.split(".")
    node: Any = tree
    kind: Any = Recipe
    for depth, part in enumerate(parts):
        done = ".".join(parts[:depth])
        slot, kind = _step(node, kind, part, done, key)
        if depth == len(parts) - 1:
            node[slot] = _value(text, kind, key)
            return
        child = node[slot] if isinstance(node, list) else node.get(slot)
        if child is None and (_container(kind) is dict or kind is Any):  # Any: inside a free mapping
            child = node[slot] = {}
        node = child


def _step(node: Any, kind: Any, part: str, done: str, key: str) -> tuple[str | int, Any]:
    """One part of a dotted key: the slot in `node` it means, and the schema of what lies there."""
    where = f"override {key!r}"
    kind = _strip(kind)
    if isinstance(node, list):
        index = _index(node, part, done, where)
        items = get_args(kind)[0] if get_origin(kind) is list else Any
        if done == "stages":
            items = _stage_class(node[index])
        return index, items
    if isinstance(kind, tuple) or _is_model(kind):
        if not isinstance(node, dict):
            raise InputError(f"{where}: `{done}` is {_show(node)} in the recipe, expected a mapping")
        fields = {n: f.annotation for model in (kind if isinstance(kind, tuple) else (kind,))
                  for n, f in model.model_fields.items()}
        if part not in fields:
            raise InputError(f"{where}: unknown key `{_join(done, part)}`{_nearest(part, fields, done)}")
        return part, fields[part]
    if isinstance(node, dict):  # a free mapping such as `data.params`
        return part, Any
    found = "not set" if node is None else _show(node)
    raise InputError(f"{where}: `{done}` is {found} and has no part `{part}`")


def _index(node: list[Any], part: str, done: str, where: str) -> int:
    if part.isdecimal():
        if int(part) < len(node):
            return int(part)
        raise InputError(f"{where}: `{done}` has {len(node)} entries, numbered from 0")
    if done == "stages":
        # A stage without a `name` goes by the default, which is its kind.
        names = [str(s.get("name", s.get("kind"))) if isinstance(s, dict) else "" for s in node]
        if names.count(part) == 1:
            return names.index(part)
        if part in names:
            count = names.count(part)
            raise InputError(f"{where}: {count} stages are named {part!r}; use the number, from 0")
        raise InputError(f"{where}: no stage {part!r}{_nearest(part, names, 'stages', 'stages')}")
    raise InputError(f"{where}: `{done}` is a list of {len(node)}; expected a number from 0, found {part!r}")


def _stage_class(stage: Any) -> Any:
    kind = stage.get("kind") if isinstance(stage, dict) else None
    known = STAGES.get(kind) if isinstance(kind, str) else None
    return known or tuple(STAGES.values())  # unknown kind: allow the fields of all; validation names the kind


def _value(text: str, kind: Any, key: str) -> Any:
    """An override's value. For a field of text, what YAML reads as something else is taken as it stands."""
    if _strip(kind) is not str:
        return parse_yaml(text, f"override {key!r}")
    try:
        value = parse_yaml(text, key)
    except InputError:
        return text
    return value if value is None or isinstance(value, str) else text


def _strip(kind: Any) -> Any:
    """Take `Annotated` and `| None` off a type."""
    while True:
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        elif get_origin(kind) in (Union, types.UnionType):
            options = [option for option in get_args(kind) if option is not type(None)]
            if len(options) != 1:
                return Any
            kind = options[0]
        else:
            return kind


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _container(kind: Any) -> Any:
    kind = _strip(kind)
    return dict if isinstance(kind, tuple) or _is_model(kind) or get_origin(kind) is dict else None


# --------------------------------------------------------------------------------------------------- errors

_EXPECTED = {
    "int_type": "a whole number", "int_parsing": "a whole number", "int_from_float": "a whole number",
    "float_type": "a number", "float_parsing": "a number", "finite_number": "a finite number",
    "bool_type": "true or false", "bool_parsing": "true or false", "string_type": "text",
    "list_type": "a list", "dict_type": "a mapping", "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}  # fmt: skip


def _word(error: Any, root: Any) -> str:
    """One pydantic error as `path: found X, expected Y`; `root` is the class of the whole file."""
    loc, kind, found, context = error["loc"], error["type"], error["input"], error.get("ctx", {})
    if len(loc) > 2 and loc[0] == "stages" and loc[2] in STAGES:
        loc = loc[:2] + loc[3:]  # the tag of the union is no key of the file
    path = ".".join(str(part) for part in loc)
    if kind == "extra_forbidden":
        known = _fields_at(error["loc"][:-1], root)
        return f"unknown key `{path}`{_nearest(str(loc[-1]), known, '.'.join(map(str, loc[:-1])))}"
    if kind == "model_attributes_type" and len(loc) == 2 and loc[0] == "stages":
        return f"{path}: found {_show(found)}, expected a mapping with a `kind`: {_either(STAGES)}"
    if kind == "union_tag_not_found":
        return f"{path}: `kind` is missing, expected {_either(STAGES)}"
    if kind == "union_tag_invalid":
        tag = str(context.get("tag", ""))
        return f"{path}.kind: found {_show(tag)}, expected {_either(STAGES)}{_did_you_mean(tag, STAGES)}"
    if kind == "missing":
        return f"{path}: missing, expected {_describe(error['loc'], root)}"
    if kind == "value_error":
        message = one_line(context.get("error", error["msg"]))
        return f"{path}: {message}" if path else message
    return f"{path}: found {_show(found)}, expected {_expected(kind, context, error, root)}"


def _expected(kind: str, context: dict[str, Any], error: Any, root: Any) -> str:
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind == "literal_error":
        choices = _choices(_annotation_at(error["loc"], root))
        if choices:
            return _either(choices) + _did_you_mean(str(error["input"]), choices)
    if kind == "string_pattern_mismatch":
        return f"letters, digits, `_` or `-` (pattern {context['pattern']})"
    if kind in ("greater_than_equal", "greater_than", "less_than_equal", "less_than"):
        bound = next(iter(context.values()))
        words = {"greater_than_equal": "at least", "greater_than": "more than", "less_than_equal": "at most",
                 "less_than": "less than"}  # fmt: skip
        return f"{words[kind]} {bound}"
    if kind == "too_short":
        count = context["min_length"]
        return f"at least {count} {'entry' if count == 1 else 'entries'}"
    return one_line(error["msg"])


def _describe(loc: tuple[Any, ...], root: Any) -> str:
    """What belongs into a field that is missing."""
    kind = _strip(_annotation_at(loc, root))
    if _is_model(kind):
        return "a mapping with " + ", ".join(f"`{name}`" for name in kind.model_fields)
    if get_origin(kind) is list:
        return "a list"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(kind, "a value")


def _annotation_at(loc: Iterable[Any], root: Any) -> Any:
    """The type that the schema `root` gives for pydantic's location `loc` (with the union's tag)."""
    kind: Any = root
    for part in loc:
        kind = _strip(kind)
        if _is_model(kind) and part in kind.model_fields:
            kind = kind.model_fields[part].annotation
        elif part in STAGES:
            kind = STAGES[part]
        elif get_origin(kind) is list:
            kind = get_args(kind)[0]
        else:
            return Any
    return kind


def _fields_at(loc: Iterable[Any], root: Any) -> list[str]:
    kind = _strip(_annotation_at(loc, root))
    return list(kind.model_fields) if _is_model(kind) else []


def _choices(kind: Any) -> list[str]:
    kind = _strip(kind)
    return [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []


def _join(done: str, part: str) -> str:
    return f"{done}.{part}" if done else part


def _nearest(word: str, known: Iterable[str], done: str, noun: str = "keys") -> str:
    known = list(known)
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if matches:
        return f", did you mean `{_join(done, matches[0])}`?"
    return f" (known {noun}: {', '.join(known)})"


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]}?)" if matches else ""


def _either(choices: Iterable[str]) -> str:
    *others, last = list(choices)
    return f"{', '.join(others)} or {last}" if others else last


def _show(value: Any) -> str:
    """A found value, short enough for one line."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def first_difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first dotted key at which two parsed recipes differ, with both values; None when they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            found = first_difference(old.get(key), new.get(key), _join(path, str(key)))
            if found:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            found = first_difference(a, b, _join(path, str(index)))
            if found:
                return found
        return None
    # Python counts True == 1, which differ in a recipe, and nan != nan, which do not.
    same = (old == new and isinstance(old, bool) == isinstance(new, bool)) or (old != old and new != new)
    return None if same else (path, old, new)
