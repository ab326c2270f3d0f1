"""What sweeps add up to: summaries, ratios between architectures, and figures."""

from rlscale.scaling.plots import plot_runs
from rlscale.scaling.summary import Ratio, hybrid_to_mla, ratio_table, summarise, summary_table, write_summary

__all__ = [
    "Ratio",
    "hybrid_to_mla",
    "plot_runs",
    "ratio_table",
    "summarise",
    "summary_table",
    "write_summary",
]
