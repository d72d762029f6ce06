"""Many runs in one table and one page. Imports neither PyTorch nor Hydra."""

from lowrank_pl.overview.entry import Entry
from lowrank_pl.overview.page import page
from lowrank_pl.overview.read import gather
from lowrank_pl.overview.tables import overview_tables, to_csv, to_markdown

__all__ = ["Entry", "gather", "overview_tables", "page", "to_csv", "to_markdown"]
