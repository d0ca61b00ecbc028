"""The reference of the site: one Markdown page for every public name, written from its signature and docstring."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import upweight as uw
from upweight.model.losses import Loss

MODULES = (
    "upweight",
    "upweight.operators",
    "upweight.solvers",
    "upweight.losses",
    "upweight.apps",
    "upweight.adapters",
    "upweight.baselines",
    "upweight.minibatch",
    "upweight.errors",
    "upweight.datasets",
    "upweight.plots",
    "upweight.calculus",
    "upweight.penalties",
    "upweight.defaults",
    "upweight.diagnostics",
    "upweight.markup",
)
FOLDER = Path("docs/reference")
_LISTS = ("Args", "Raises", "Attributes")
_WORDS = ("Cost", "Memory", "Reference", "References", "Ref", "Example", "Examples")
_SPAN = re.compile(r"(`+)(.+?)\1")
_MENTIONED = re.compile(r"(?<!`)`(?P<code>[^`\n]+)`(?!`)|\b(?P<word>[A-Z]\w+)\b")
_NAME = re.compile(r"(?:uw\.|upweight\.)?([A-Za-z_][\w.]*?)(\(.*\))?")


@dataclass(frozen=True)
class Entry:
    """A public name, what it stands for, and its page."""

    name: str
    value: object

    @property
    def kind(self) -> str:
        if inspect.ismodule(self.value):
            return "module"
        if inspect.isclass(self.value):
            return "exception" if issubclass(self.value, BaseException) else "class"
        return "function" if callable(self.value) else "data"

    @property
    def page(self) -> Path:
        """Classes apart from functions, for `LDS` and `lds` are one file on some disks."""
        folder = {"module": "modules", "class": "classes", "exception": "classes"}.get(self.kind, "functions")
        return FOLDER / folder / f"{self.name}.md"


def home(name: str) -> ModuleType:
    """What a public name such as `upweight.losses` stands for: the package itself, or an attribute of it."""
    return uw if name == "upweight" else getattr(uw, name.removeprefix("upweight."))


def names_of(module: ModuleType) -> list[str]:
    """`__all__` of a module, or the public functions and classes that are written in it."""
    if names := getattr(module, "__all__", None):
        return list(names)
    written = (inspect.isfunction, inspect.isclass)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and any(is_(value) for is_ in written) and value.__module__ == module.__name__
    ]


@cache
def entries() -> dict[str, Entry]:
    """Every public name and what it stands for."""
    found = {name: Entry(name, home(name)) for name in MODULES}
    for module in MODULES:
        for name in names_of(home(module)):
            whole = f"{module}.{name}"
            found.setdefault(whole, Entry(whole, getattr(home(module), name)))
    return found


@cache
def targets() -> dict[str, str]:
    """What may stand in backticks, to the whole name it means: `CG`, `solvers.CG`, `on_loss`; ambiguous ones not."""
    found: dict[str, set[str]] = {}
    for name, entry in entries().items():
        if entry.kind == "module":
            continue
        short = name.removeprefix("upweight.")
        last = short.rpartition(".")[2]
        for way in {short, last} if last[0].isupper() else {short}:
            found.setdefault(way, set()).add(name)
        if inspect.isclass(entry.value):
            for member in members(entry.value):
                found.setdefault(f"{short}.{member}", set()).add(f"{name}.{member}")
    for member in members(uw.Influence):
        if member.startswith(("on_", "of_")):
            found.setdefault(member, set()).add(f"upweight.Influence.{member}")
    canonical = {way: {_first(name) for name in names} for way, names in found.items()}
    return {way: names.pop() for way, names in canonical.items() if len(names) == 1}


def _first(name: str) -> str:
    """`upweight.explain` for `upweight.adapters.explain`: the same thing under its shortest name."""
    short = f"upweight.{name.rpartition('.')[2]}"
    both = entries().get(short), entries().get(name)
    return short if both[0] and both[1] and both[0].value is both[1].value else name


def members(value: type) -> dict[str, object]:
    """Public methods and properties that a class writes down, its own bases' included."""
    found: dict[str, object] = {}
    for base in reversed(value.__mro__):
        if base.__module__.startswith("upweight"):
            for name, member in vars(base).items():
                given = isinstance(member, property | classmethod | staticmethod) or inspect.isfunction(member)
                if given and not name.startswith("_"):
                    found[name] = member
    return found


# ---- docstrings as Markdown ------------------------------------------------------------------------------------------


def linked(text: str, within: str = "") -> str:
    """Prose of a docstring as Markdown: code spans stay, names in them and equations of the paper become links."""
    parts, end = [], 0
    for span in _SPAN.finditer(text):
        parts += [_prose(text[end : span.start()]), _code(span[2], within)]
        end = span.end()
    return "".join([*parts, _prose(text[end:])])


def _prose(text: str) -> str:
    text = re.sub(r"([\\*_<>\[\]{}|~])", r"\\\1", text)
    return re.sub(r"\b([Ee]quations? [1-5])\b", r"[\1](/docs/math.md#equations)", text)


def _code(text: str, within: str) -> str:
    if (whole := _meant(text, within)) is not None:
        return f"{{py:obj}}`{text} <{whole}>`"
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _meant(text: str, within: str = "") -> str | None:
    """The whole name of what stands in backticks, of upweight or of what is documented elsewhere."""
    import inventories

    match = _NAME.fullmatch(text)
    if match is None or "<" in text:
        return None
    own = f"{within.removeprefix('upweight.')}.{match[1]}" if within else ""
    named, _, method = match[1].partition(".")
    bound = f"{named.title()}.{method}" if named in {"influence", "scores"} else ""
    return next(
        (targets()[way] for way in (own, match[1], bound) if way in targets()), inventories.ways().get(match[1])
    )


def markdown(text: str, within: str = "") -> str:
    """A docstring as Markdown: paragraphs, lists, formulas and examples as blocks, sections of Google's style."""
    out: list[str] = []
    for block in _blocks(text.splitlines()):
        first = block[0]
        head, _, rest = first.partition(":")
        if first.startswith(">>>"):
            out += ["```pycon", *block, "```", ""]
        elif head in _LISTS and not rest.strip():
            out += [f"**{head}**", ""]
            items = list(_items(block[1:]))
            out += [_item(head, item, within) for item in items] + [""]
        elif first.startswith("    "):
            out += ["```text", *inspect.cleandoc("\n".join(["", *block])).splitlines(), "```", ""]
        elif block_is_list(block):
            out += [f"{line[:2]}{linked(line[2:].strip(), within)}" for line in block] + [""]
        elif head in _WORDS and rest:
            out += [f"**{head}:** {linked(' '.join(part.strip() for part in [rest, *block[1:]]).strip(), within)}", ""]
        else:
            out += [linked(" ".join(part.strip() for part in block), within), ""]
    return "\n".join(out)


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Lines that belong together: a blank line, an indented run or a section's head begins another block."""
    block: list[str] = []
    for line in [*lines, ""]:
        section = bool(block) and block[0].rstrip() in {f"{head}:" for head in _LISTS}
        example = bool(block) and block[0].startswith(">>>")
        formula = bool(block) and block[0].startswith("    ")
        starts_word = line.partition(":")[0] in _WORDS or line.rstrip() in {f"{head}:" for head in _LISTS}
        apart = (
            (section and line.strip() and not line.startswith(" "))
            or (formula and line.strip() and not line.startswith("    "))
            or (not section and not formula and not example and not block_is_list(block) and line.startswith("    "))
            or (not section and not example and line.startswith(("* ", "- ")) and not block_is_list(block))
            or (not example and line.startswith(">>>"))
            or (not section and starts_word)
        )
        if block and apart:
            yield _trimmed(block)
            block = []
        if line.strip():
            block.append(line)
        elif block and (section or formula):
            block.append("")
        elif block:
            yield block
            block = []
    if _trimmed(block):
        yield _trimmed(block)


def block_is_list(block: list[str]) -> bool:
    """Whether a block is a list of points."""
    return bool(block) and block[0].startswith(("* ", "- "))


def _trimmed(block: list[str]) -> list[str]:
    while block and not block[-1].strip():
        block = block[:-1]
    return block


def _items(lines: list[str]) -> Iterator[str]:
    item: list[str] = []
    for line in lines:
        if line.startswith("    ") and not line.startswith("     ") and item:
            yield " ".join(item)
            item = []
        if line.strip():
            item.append(line.strip())
    if item:
        yield " ".join(item)


def _item(section: str, text: str, within: str) -> str:
    name, colon, rest = text.partition(":")
    if colon and re.fullmatch(r"[\w.*, ]+", name):
        shown = linked(f"`{name}`", within) if section == "Raises" else f"`{name}`"
        return f"* {shown}: {linked(rest.strip(), within)}"
    return f"* {linked(text, within)}"


# ---- pages -----------------------------------------------------------------------------------------------------------


def what_it_is(value: object) -> str:
    """The first sentence of a docstring, or the formula of a loss."""
    if isinstance(value, Loss):
        return value.formula
    text = " ".join((value.__doc__ or "").strip().split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", text)[0].replace("|", "\\|")


def _signature(value: object) -> inspect.Signature | None:
    try:
        return inspect.signature(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _directive(kind: str, name: str, signature: inspect.Signature | None) -> list[str]:
    """The name with its arguments and their defaults; types stand in the table below it."""
    shown = ""
    if signature is not None:
        bare = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
        if kind in {"method", "class"} and bare and bare[0].name == "self":
            bare = bare[1:]
        shown = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return [f"```{{py:{kind}}} {name}{shown}", "```", ""]


def _types(signature: inspect.Signature | None, within: str) -> list[str]:
    """Types, with shapes, of arguments and of what comes back."""
    if signature is None:
        return []
    rows = [
        f"| `{one.name}` | {_type(one.annotation, within)} |"
        for one in signature.parameters.values()
        if one.annotation is not inspect.Parameter.empty and one.name != "self"
    ]
    back = signature.return_annotation
    if back not in {inspect.Signature.empty, "None", None}:
        rows.append(f"| *result* | {_type(back, within)} |")
    return ["| | type |", "|---|---|", *rows, ""] if rows else []


def _type(annotation: object, within: str) -> str:
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    return " or ".join(linked(f"`{one}`", within) for one in text.split(" | ")).replace("|", "\\|")


def _class_parts(entry: Entry, value: type) -> list[str]:
    protocol = getattr(value, "_is_protocol", False)
    plain = value.__init__ in (object.__init__, BaseException.__init__) or protocol or entry.kind == "exception"
    signature = None if plain else _signature(value)
    if signature is not None:  # what making one gives is the class
        signature = signature.replace(return_annotation=inspect.Signature.empty)
    out = [*_directive(entry.kind, entry.name, signature), markdown(inspect.getdoc(value) or "", entry.name)]
    if bases := [base.__name__ for base in value.__bases__ if base is not object and not protocol]:
        out += ["Is a " + ", ".join(linked(f"`{base}`") for base in bases) + ".", ""]
    out += _types(signature, entry.name)
    if not dataclasses.is_dataclass(value) and protocol and (fields := inspect.get_annotations(value)):
        out += [
            "| attribute | type |",
            "|---|---|",
            *(f"| `{n}` | {_type(t, entry.name)} |" for n, t in fields.items()),
            "",
        ]
    for name, member in members(value).items():
        out += [f"## {name}".replace("_", "\\_"), ""]
        if isinstance(member, property):
            out += _directive("property", f"{entry.name}.{name}", None)
            own = _signature(member.fget)
        else:
            inner = getattr(member, "__func__", member)
            kind = {classmethod: "classmethod", staticmethod: "staticmethod"}.get(type(member), "method")
            own = _signature(getattr(value, name) if kind == "classmethod" else inner)
            out += _directive(kind, f"{entry.name}.{name}", own)
        out += [markdown(inspect.getdoc(getattr(value, name)) or "", entry.name), *_types(own, entry.name)]
    return out


def example_of(loss: Loss) -> list[str]:
    """A Loss at a predictor and a target, its slope and its curvature: as they are now."""
    import torch

    name = loss.name
    eta, y = ("[[0.5, -1.0, 2.0]]", "[2]") if name in {"cross_entropy", "squared"} else ("[[0.5]]", "[1.0]")
    y = "[[1.0, 0.0, 2.0]]" if name == "squared" else y
    called = f"uw.losses.{name}"
    values = {"eta": torch.tensor(ast.literal_eval(eta)), "y": torch.tensor(ast.literal_eval(y))}
    shown = [f">>> eta, y = torch.tensor({eta}), torch.tensor({y})"]
    for part in ("value", "slope", "curvature"):
        result = getattr(loss, part)(values["eta"], values["y"]).numpy().round(3)
        shown += [f">>> {called}.{part}(eta, y).numpy().round(3)", *repr(result).splitlines()]
    return shown


def page(entry: Entry) -> str:
    """The page of one name."""
    above = entry.name.rpartition(".")[0]
    title = entry.name.removeprefix("upweight.").replace("_", "\\_") or "upweight"
    out = ["---", "orphan: true", "---", "", f"# {title}", ""]
    if above in entries():
        out += [f"In [`{above}`](/{entries()[above].page})", ""]
    value = entry.value
    if inspect.ismodule(value):
        out += [f"```{{py:module}} {entry.name}", "```", "", markdown(inspect.getdoc(value) or "")]
        out += ["| name | what it is |", "|---|---|"]
        for name in names_of(value):
            whole = entries()[f"{entry.name}.{name}"]
            what = linked(what_it_is(whole.value).replace("\\|", "|"))
            out.append(f"| [`{name}`](/{whole.page}) | {what} |")
        return "\n".join(out) + "\n"
    if isinstance(value, type):
        return "\n".join([*out, *_class_parts(entry, value), *_in_use(entry)]) + "\n"
    signature = None if isinstance(value, Loss) else _signature(value)
    out += _directive(entry.kind, entry.name, signature)
    if isinstance(value, Loss):
        out += ["```text", f"{value.name} = {value.formula}", "```", "", "A {py:obj}`Loss <upweight.losses.Loss>`.", ""]
        out += ["```pycon", *example_of(value), "```", ""]
    else:
        out += [markdown(inspect.getdoc(value) or ""), *_types(signature, "")]
    out += _in_use(entry)
    if file := getattr(value, "__module__", None):
        source = Path(importlib.import_module(file).__file__ or "").resolve()
        out += [
            f"Written in `{'/'.join(source.parts[source.parts.index('upweight') :])}`."
            if "upweight" in source.parts
            else ""
        ]
    return "\n".join(out) + "\n"


def _in_use(entry: Entry) -> list[str]:
    """Where a result comes from, and the pages that are run in which the name stands."""
    import usage

    out: list[str] = []
    if makers := usage.comes_from().get(entry.name):
        ways = [f"{{py:obj}}`{name.removeprefix('upweight.')} <{name}>`" for name in makers[:8]]
        out += ["**Comes from:** " + ", ".join(ways) + ".", ""]
    pages = [path for path in usage.used_in()[entry.name] if path.suffix != ".py" and path.parts[0] == "docs"]
    if pages:
        links = [f"[{path.parent.name} · {path.stem}](/{path})" for path in pages[:4]]
        out += ["**In use:** " + ", ".join(links) + ".", ""]
    return out


def write(root: Path) -> None:
    """Every page, in a folder that holds nothing else."""
    shutil.rmtree(root / FOLDER, ignore_errors=True)
    for entry in entries().values():
        target = root / entry.page
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page(entry))


def with_names(text: str) -> str:
    """A page of Markdown with the first mention of a name leading to where it is described; blocks of code stay."""
    import inventories

    seen: set[str] = set()

    def span(match: re.Match[str]) -> str:
        code = match["code"]
        if code is None:
            whole = inventories.ways().get(match["word"], "")
            shown = match["word"]
        else:
            whole = _meant(code) or ""
            shown = code
            if re.fullmatch(r"[a-z]+", code):  # a word of its own, which need not be the name of a function
                whole = ""
        if not whole or whole in seen or (code is None and not whole.startswith("sklearn.")):
            return match[0]
        seen.add(whole)
        return f"{{py:obj}}`{shown} <{whole}>`"

    parts = re.split(r"(^```.*?^```$|^#[^\n]*$|\[[^\]\n]*\]\([^)\n]*\))", text, flags=re.M | re.S)
    return "".join(part if k % 2 else _MENTIONED.sub(span, part) for k, part in enumerate(parts))


def with_links(listing: str) -> str:
    """docs/api.md with each name leading to its page."""
    module, out = "", []
    for line in listing.splitlines():
        if line.startswith("## "):
            module = line[3:]
        if match := re.match(r"\| `(\w+)` \|", line):
            target = entries()[f"{module}.{match[1]}"].page
            line = f"| [`{match[1]}`](/{target}) |" + line[match.end() :]
        out.append(line)
    return "\n".join(out) + "\n"
