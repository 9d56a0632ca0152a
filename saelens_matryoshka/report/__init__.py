"""Samples of a dictionary's latents, the formats they are handed on in, and the page of a run."""

from saelens_matryoshka.report.collect import collect_samples
from saelens_matryoshka.report.page import PageContent, render_page, write_page
from saelens_matryoshka.report.samples import Examples, Samples

__all__ = ["Examples", "PageContent", "Samples", "collect_samples", "render_page", "write_page"]
