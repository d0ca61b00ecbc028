"""The parts of README and docs that a command writes: `scripts/docs` writes them, test_generated.py compares them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import messages
from reference import FOLDER, MODULES, home, names_of, what_it_is

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "demo",
    "explore",
    "check",
    "plan",
    "score",
    "merge",
    "run",
    "index",
    "resume",
    "top",
    "report",
    "validate",
    "doctor",
    "understand",
    "repair",
    "reviews",
    "export",
    "apply",
    "prove",
    "attack",
    "mismatch",
    "contrast",
)
BEGIN, END = "<!-- upweight demo -->", "<!-- end -->"


def run(*arguments: str) -> str:
    """What a command prints, on a terminal of 100 columns without colours."""
    plain = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    entry = "from upweight.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", entry, *arguments], capture_output=True, text=True, env=os.environ | plain, check=True
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines())


def markdown_pages() -> list[Path]:
    """The Markdown that is kept: docs and what lies at the root, but not what the site's build writes."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "paper/README.md", ROOT / "findings/README.md"]
    return sorted(page for page in pages if not page.is_relative_to(ROOT / FOLDER))


def cli_page() -> str:
    """docs/cli.md: every help text."""
    parts = ["# The command line", "", "Written by `scripts/docs` from `--help`.", "", "```", run("--help"), "```"]
    for command in COMMANDS:
        parts += ["", f"## upweight {command}", "", "```", run(command, "--help"), "```"]
    return "\n".join(parts) + "\n"


def api_page() -> str:
    """docs/api.md: every public name with the first sentence of its docstring."""
    lines = ["# Every public name", "", "Written by `scripts/docs` from the docstrings; `help(name)` shows the whole."]
    for name in MODULES:
        module = home(name)
        lines += ["", f"## {name}", "", "| name | what it is |", "|---|---|"]
        lines += [f"| `{public}` | {what_it_is(getattr(module, public))} |" for public in names_of(module)]
    return "\n".join(lines) + "\n"


def peers_page() -> str:
    """docs/peers.md: benchmarks/peers/page.py on the result that is kept."""
    script = ROOT / "benchmarks" / "peers" / "page.py"
    code = (
        f"import json, runpy; found = runpy.run_path({str(script)!r}); "
        "read = [json.loads(found[name].read_text()) for name in ('RESULT', 'PROTOCOLS')]; "
        "print(found['page'](*read), end='')"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def demo_block() -> str:
    """The demo's own words, as they stand in the README."""
    text = re.sub(r"\n\nReport with pictures: .*", "\n\nReport with pictures: upweight-demo/index.html", run("demo"))
    return f"{BEGIN}\n```text\n{text}\n```\n{END}"


def main() -> None:
    (ROOT / "docs/cli.md").write_text(cli_page())
    (ROOT / "docs/api.md").write_text(api_page())
    (ROOT / "docs/errors.md").write_text(messages.page())
    (ROOT / "docs/peers.md").write_text(peers_page())
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(before + demo_block() + rest.split(END, 1)[1])


if __name__ == "__main__":
    main()
