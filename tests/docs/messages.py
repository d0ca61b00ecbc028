"""Every message of the library, read off its source, and the test in tests/remedies that types what it says."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from upweight import errors

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "upweight"
TESTS = ROOT / "tests" / "remedies"
UNKNOWN = "…"
_KINDS = frozenset(errors.__all__)
_DEPTH = 4


@dataclass(frozen=True)
class Message:
    """One place of the source that makes an error or a TheoryWarning."""

    package: str
    file: str
    line: int
    kind: str
    text: str

    def holds(self, says: str, advice: str) -> bool:
        return says in self.text and advice in self.text[self.text.index(says) :]


@dataclass(frozen=True)
class Remedy:
    """One `with refused(says, advice)` of a test, and whether the test goes on behind it."""

    package: str
    test: str
    says: str
    advice: str
    goes_on: bool


@cache
def messages() -> list[Message]:
    """Every message, in the order of packages, files and lines."""
    found = []
    for file in sorted(SOURCE.rglob("*.py")):
        place = file.relative_to(SOURCE)
        package = place.parts[0] if len(place.parts) > 1 else "errors"
        tree = ast.parse(file.read_text())
        functions = {node.name: node for node in functions_of(tree)}
        for function in [tree, *functions_of(tree)]:
            calls = [(call, kind) for call in _own_calls(function) if call.args and (kind := _kind(call))]
            strings = _strings(function) if calls else {}
            for call, kind in calls:
                text = _text(call.args[0], strings | _reaching(function, call), functions, _DEPTH)
                found.append(Message(package, str(place), call.lineno, kind, text))
    return sorted(set(found), key=lambda one: (one.package, one.file, one.line))


@cache
def remedies() -> list[Remedy]:
    """Every `with refused(…)` and `with warned(…)` in tests/remedies: of test_PACKAGE.py, or test_PACKAGE__PART.py."""
    found = []
    for file in sorted(TESTS.glob("test_*.py")):
        for test in functions_of(ast.parse(file.read_text())):
            for block in _blocks(test):
                for place, node in enumerate(block):
                    for call in _refusals(node):
                        says, advice = (ast.literal_eval(argument) for argument in call.args)
                        name = f"{file.name}::{test.name}"
                        found.append(
                            Remedy(
                                file.stem.removeprefix("test_").partition("__")[0],
                                name,
                                says,
                                advice,
                                place + 1 < len(block),
                            )
                        )
    return found


def functions_of(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    for inside in ast.walk(node):
        yield from (block for name in ("body", "orelse") if isinstance(block := getattr(inside, name, None), list))


def _refusals(node: ast.stmt) -> Iterator[ast.Call]:
    if isinstance(node, ast.With):
        for item in node.items:
            call = item.context_expr
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in {"refused", "warned"}:
                yield call


def _own_calls(function: ast.AST) -> Iterator[ast.Call]:
    """Calls inside a function, without those of functions inside it."""
    waiting = list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef):
            continue
        if isinstance(node, ast.Call):
            yield node
        waiting += ast.iter_child_nodes(node)


def _kind(call: ast.Call) -> str | None:
    name = call.func.id if isinstance(call.func, ast.Name) else None
    if ast.unparse(call.func) == "warnings.warn":
        return "TheoryWarning"
    return name if name in _KINDS else None


def _reaching(function: ast.AST, call: ast.Call) -> dict[str, list[ast.expr]]:
    """What the names of a function are at a call, where its own block of code says so in front of it."""
    found: dict[str, list[ast.expr]] = {}
    for block in _blocks(function):
        place = next((j for j, node in enumerate(block) if any(one is call for one in ast.walk(node))), None)
        if place is None or isinstance(
            block[place], ast.If | ast.For | ast.While | ast.With | ast.Try | ast.FunctionDef
        ):
            continue
        for start in range(place - 1, -1, -1):
            if isinstance(block[start], ast.Assign):
                behind = _strings(ast.Module(block[start:place], []))
                for target in ast.walk(block[start]):
                    if isinstance(target, ast.Name) and target.id in behind and target.id not in found:
                        found[target.id] = behind[target.id]
    return found


def _strings(function: ast.AST) -> dict[str, list[ast.expr]]:
    """What is assigned to each name of a function, in order; `+=` as a sum."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value] * len(names)
                for name, value in zip(names, values, strict=False):
                    if isinstance(name, ast.Name):
                        found.setdefault(name.id, []).append(value)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            found.setdefault(node.target.id, []).append(node.value)
    return found


def _text(node: ast.expr, strings: dict, functions: dict, depth: int) -> str:
    """An expression as text: `…` where only a run tells, (a / b) where the code chooses."""

    def of(inside: ast.expr) -> str:
        return _text(inside, strings, functions, depth - 1)

    if isinstance(node, ast.Constant):
        return str(node.value) if isinstance(node.value, str) else UNKNOWN
    if isinstance(node, ast.JoinedStr):
        return "".join(of(part.value if isinstance(part, ast.FormattedValue) else part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return of(node.left) + of(node.right)
    if isinstance(node, ast.IfExp):
        return _either([of(node.body), of(node.orelse)])
    if depth <= 0:
        return UNKNOWN
    if isinstance(node, ast.Name) and node.id in strings:
        return _either([of(value) for value in strings[node.id] if value is not node])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
        inside = functions[node.func.id]
        returns = [one.value for one in ast.walk(inside) if isinstance(one, ast.Return) and one.value is not None]
        return _either([_text(value, _strings(inside), functions, depth - 1) for value in returns])
    return UNKNOWN


def _either(texts: list[str]) -> str:
    known = list(dict.fromkeys(text for text in texts if text.replace(UNKNOWN, "").strip()))
    if not known:
        return UNKNOWN
    return known[0] if len(known) == 1 else "(" + " / ".join(known) + ")"


def without_a_test(package: str) -> list[Message]:
    """Messages of a package that no test provokes and follows; those that only pass another on do not count."""
    typed = [remedy for remedy in remedies() if remedy.package == package and remedy.goes_on]
    return [
        message
        for message in messages()
        if message.package == package
        and message.text != UNKNOWN
        and not any(message.holds(remedy.says, remedy.advice) for remedy in typed)
    ]


def unclear(package: str) -> list[str]:
    """Remedies whose words stand in no message of their package or in several, or behind which nothing follows."""
    known = [message for message in messages() if message.package == package]
    found = []
    for remedy in remedies():
        if remedy.package == package:
            count = sum(message.holds(remedy.says, remedy.advice) for message in known)
            if count != 1 or not remedy.goes_on:
                found.append(f"{remedy.test}: {remedy.says!r}, {remedy.advice!r} ({count} messages)")
    return found


def page() -> str:
    """docs/errors.md: every message, what it says to type, and the test that types it."""
    known, typed = [one for one in messages() if one.text != UNKNOWN], remedies()
    lines = [
        "# What errors say, and what to type",
        "",
        f"Written by `scripts/docs` from the source and tests/remedies: {len(known)} messages, each provoked by a test",
        "that then types what it says. `…` stands for what only a run can tell, (a / b) for what depends on it.",
    ]
    for package in sorted({one.package for one in known}):
        mine = [one for one in known if one.package == package]
        lines += ["", f"## {package} ({len(mine)})", "", "| error | says | what to type | test |", "|---|---|---|---|"]
        for message in mine:
            found = [one for one in typed if one.package == package and message.holds(one.says, one.advice)]
            start = min((message.text.index(one.advice) for one in found), default=len(message.text))
            tests = ", ".join(dict.fromkeys(f"`{one.test.partition('::')[2].removeprefix('test_')}`" for one in found))
            says, advice = (_cell(text) for text in (message.text[:start], message.text[start:]))
            lines.append(f"| {message.kind} | {says} | {advice} | {tests} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("](", "]\\(")


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        for message in without_a_test(wanted):
            print(f"{message.file}:{message.line} {message.kind}: {message.text}\n")
        print("\n".join(unclear(wanted)))
