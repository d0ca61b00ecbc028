"""One page a file: an address, a function that makes a plain dict, and its template of the same name."""

from upweight.explore.page import Action, Download, Page
from upweight.explore.pages import compare, export, items, overview, proof, review, row, slices, trust, why

PAGES: tuple[Page, ...] = (
    overview.PAGE,
    items.QUERIES,
    why.PAGE,
    items.ROWS,
    row.PAGE,
    slices.PAGE,
    trust.PAGE,
    compare.PAGE,
    compare.QUERY,
    review.PAGE,
    review.LOG,
    proof.PAGE,
    export.PAGE,
)
ACTIONS: tuple[Action, ...] = (review.DECIDE,)
DOWNLOADS: tuple[Download, ...] = (export.DOWNLOAD,)
