"""What sweeps add up to: summaries, fitted curves, ratios between architectures, and figures."""

from rlscale.scaling.fit import FitRefused, SigmoidFit, extrapolate, fit_power_law, fit_sigmoid
from rlscale.scaling.plots import plot_runs
from rlscale.scaling.summary import Ratio, hybrid_to_mla, ratio_table, summarise, summary_table, write_summary

__all__ = [
    "FitRefused",
    "Ratio",
    "SigmoidFit",
    "extrapolate",
    "fit_power_law",
    "fit_sigmoid",
    "hybrid_to_mla",
    "plot_runs",
    "ratio_table",
    "summarise",
    "summary_table",
    "write_summary",
]
