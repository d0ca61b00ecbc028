"""The site: the Markdown of the repository where it lies, and the reference written from docstrings.

The source folder is the root of the repository, so that one link works on GitHub and in the site alike:
`python -m sphinx -c docs . build/site`, or `scripts/docs site`. Nothing is fetched, while building or while reading.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "docs")]

import inventories  # noqa: E402
import reference  # noqa: E402
from sphinx.application import Sphinx  # noqa: E402

import upweight  # noqa: E402

project = "upweight"
author = "the authors of upweight"
copyright = "the authors of upweight, Apache-2.0"
version = release = upweight.__version__

extensions = ["myst_nb", "sphinx_copybutton", "sphinx.ext.intersphinx"]
intersphinx_mapping = {
    name: (address, str(inventories.KEPT / f"{name}.inv")) for name, address in inventories.SITES.items()
}
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "paper/README.md",
    "findings/README.md",
    "benchmarks/results/*.md",
]
exclude_patterns = [
    ".*",
    "build",
    "dist",
    "src",
    "tests",
    "examples",
    "docs/site",
    "**/jupyter_execute",
    "**/__pycache__",
    "**/.ipynb_checkpoints",
]
nitpicky = True
nitpick_ignore: list[tuple[str, str]] = []

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
# Tutorials are notebooks without outputs: the build runs them, and keeps what they gave beside the pages.
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "build" / "notebooks")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "remove"  # warnings about the machine that built it
python_maximum_signature_line_length = 88
toc_object_entries = False
add_module_names = True

html_theme = "furo"
html_title = "upweight"
html_static_path = ["site/static"]
html_css_files = ["upweight.css"]
html_extra_path = ["site/root"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


# The order of the pages. It stands here, so that the front page stays plain Markdown where no Sphinx reads it.
NAVIGATION = {
    "Five minutes": (
        "scikit-learn <start/scikit-learn>",
        "torch <start/torch>",
        "language models <start/language-model>",
        "statistics <start/statistician>",
        "data quality <start/data-quality>",
        "security <start/security>",
    ),
    "Reading the answer": (
        "read-a-score",
        "trust",
        "how-to-choose",
        "costs",
        "limits",
        "three-derivatives",
        "explorer",
        "coming-from",
        "peers",
    ),
    "Tutorials": (
        "tutorials/wrong-labels",
        "tutorials/why-this-prediction",
        "tutorials/which-sentences",
        "tutorials/a-poisoned-row",
        "tutorials/which-hospital",
    ),
    "Recipes": ("recipes/*",),
    "Reference": ("api", "cli", "errors", "math", "store-format", "explorer-security"),
    "The paper": ("gallery", "paper and measurement, side by side </paper/README>", "/benchmarks/results/mnist_lds"),
    "The house": (
        "/ARCHITECTURE",
        "where-to-put",
        "/CONTRIBUTING",
        "/SECURITY",
        "/findings/README",
        "/CHANGELOG",
        "README </README>",
        "adr/*",
    ),
}


PROSE = {f"docs/{name}" for name in NAVIGATION["Reading the answer"] if name != "peers"}


def _read(_app: Sphinx, name: str, source: list[str]) -> None:
    """The list of names and the pages lead to the reference, and the front page to every other one."""
    if name == "docs/api":
        source[0] = reference.with_links(source[0])
    elif name.startswith(("docs/recipes/", "docs/start/")) or name in PROSE:
        source[0] = reference.with_names(source[0])
    if name == root_doc:
        trees = [f":caption: {caption}\n\n" + "\n".join(pages) for caption, pages in NAVIGATION.items()]
        source[0] += "".join(f"\n```{{toctree}}\n:hidden:\n:glob:\n{tree}\n```\n" for tree in trees)


def _for_keyboards(app: Sphinx, name: str, _template: str, context: dict[str, Any], _doctree: object) -> None:
    """What scrolls sideways can be reached by the keyboard, and captions say what level of heading they are."""
    body = context.get("body") or ""
    body = body.replace("<pre>", '<pre tabindex="0">').replace(
        '<div class="table-wrapper', '<div tabindex="0" class="table-wrapper'
    )
    context["body"] = _link_to_picture(app, _LINES.sub(_of_arguments, body))
    if tree := context.get("furo_navigation_tree"):
        tree = tree.replace('role="heading"', 'role="heading" aria-level="2"')
        context["furo_navigation_tree"] = _of_reference(tree) if name.startswith("docs/reference/") else tree


_LINES = re.compile(r"<dl>\s*((?:<dd>.*?</dd>\s*)+)</dl>", re.S)


def _of_arguments(match: re.Match[str]) -> str:
    """Arguments a line each, as lines: Sphinx has them as definitions of nothing."""
    lines = match[1].replace("<dd>", '<span class="sig-line">').replace("</dd>", "</span>")
    return f'<span class="sig-lines">{lines}</span>'


def _pictures(app: Sphinx) -> set[str]:
    """The names, in _images, of what pages show."""
    return {name for _, name in app.env.images.values()}


def _link_to_picture(app: Sphinx, body: str) -> str:
    """A link to a picture that some page shows leads to that picture, not to a second copy for downloading."""
    shown = _pictures(app)

    def link(match: re.Match[str]) -> str:
        return f'href="{match[2]}_images/{match[3]}"' if match[3] in shown else match[0]

    return re.sub(r'(download="" )?href="([./]*)_downloads/[0-9a-f]+/([\w.-]+)"', link, body)


def _without_copies(app: Sphinx, error: Exception | None) -> None:
    """No picture lies in the site twice."""
    if error is None:
        for copy in Path(app.outdir).glob("_downloads/*/*"):
            if copy.name in _pictures(app):
                copy.unlink()


def _of_reference(tree: str) -> str:
    """The part of the navigation that a page of one name shows: all of it, 280 times, is two megabytes."""
    head, *parts = tree.split('<p class="caption"')
    return head + "".join('<p class="caption"' + part for part in parts if ">Reference</span>" in part)


def setup(app: Sphinx) -> None:
    """The reference is written before anything is read."""
    reference.write(ROOT)
    app.connect("source-read", _read)
    app.connect("html-page-context", _for_keyboards, priority=900)
    app.connect("build-finished", _without_copies)
