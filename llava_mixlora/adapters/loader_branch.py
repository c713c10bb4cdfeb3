"""The name of a model by which a LLaVA's loader takes the branch of a language model, as the loader's own text tells.

LLaVA and its forks choose the class of a model by words in its name, each by others.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

MOST_WORDS = 3
NAME = "model_name"


@dataclass(frozen=True)
class Branch:
    """Where a loader loads a whole model as one class.

    Args:
        name: of a model, that leads there.
        takes_config: whether a keyword `config` reaches the class; else the loader reads one from the model's folder.
    """

    name: str
    takes_config: bool


@functools.cache
def branch_of(loader: Callable[..., Any], language_model: str) -> Branch | None:
    """The branch of `load_pretrained_model` that loads a whole model as a class of that name; None where none does."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(loader))))
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
    tests = {node: _compiled(node.test) for node in ast.walk(function) if isinstance(node, ast.If)}
    words = list(dict.fromkeys(_words(function)))
    for count in range(min(MOST_WORDS, len(words)) + 1):
        for chosen in itertools.combinations(words, count):
            name = "-".join(chosen)
            call = _call(function.body, tests, {**_arguments(function), NAME: name})
            if call is not None and call.func.value.id == language_model:
                return Branch(name, _takes_config(function, call))
    return None


def _words(function: ast.FunctionDef) -> Iterator[str]:
    """What the loader looks for in the name, in the order of its text."""
    for node in ast.walk(function):
        is_test = isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In)
        if is_test and isinstance(node.left, ast.Constant) and NAME in ast.unparse(node.comparators[0]):
            yield str(node.left.value)


def _arguments(function: ast.FunctionDef) -> dict[str, Any]:
    """What the loader is called with for a whole model, for its tests: no base, nothing quantized."""
    given = {each.arg: False for each in (*function.args.args, *function.args.kwonlyargs)}
    given |= {each.arg: {} for each in [function.args.kwarg] if each is not None}
    return {**given, "model_path": "", "model_base": None, NAME: ""}


def _call(body: Sequence[ast.stmt], tests: dict[ast.If, CodeType], names: dict[str, Any]) -> ast.Call | None:
    """The first call of a class's `from_pretrained` that a model comes from."""
    for node in body:
        found = None
        if isinstance(node, ast.If):
            found = _call(node.body if _holds(tests[node], names) else node.orelse, tests, names)
        elif isinstance(node, (ast.Try, ast.With)):
            found = _call(node.body, tests, names)
        else:
            found = next((inner for inner in ast.walk(node) if _loads_model(inner)), None)
        if found is not None:
            return found
    return None


def _holds(test: CodeType, names: dict[str, Any]) -> bool:
    try:
        return bool(eval(test, {"__builtins__": {}}, names))
    except Exception:  # it asks for what only a call would tell
        return False


def _compiled(test: ast.expr) -> CodeType:
    return compile(ast.Expression(test), "<test>", "eval")


def _loads_model(node: ast.AST) -> bool:
    is_call = (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained"
    )
    return is_call and isinstance(node.func.value, ast.Name) and node.func.value.id.endswith("LM")


def _takes_config(function: ast.FunctionDef, call: ast.Call) -> bool:
    given, any_keyword = {keyword.arg for keyword in call.keywords}, function.args.kwarg
    passes_on = any(
        keyword.arg is None and any_keyword is not None and ast.unparse(keyword.value) == any_keyword.arg
        for keyword in call.keywords
    )
    return passes_on and "config" not in given
