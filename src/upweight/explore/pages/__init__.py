"""One page a file: an address, a function that makes a plain dict, and its template of the same name."""

from upweight.explore.page import Action, Download, Page
from upweight.explore.pages import overview

PAGES: tuple[Page, ...] = (overview.PAGE,)
ACTIONS: tuple[Action, ...] = ()
DOWNLOADS: tuple[Download, ...] = ()
