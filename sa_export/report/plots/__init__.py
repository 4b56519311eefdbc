"""The figures of a report. Drawn with matplotlib's Agg canvas, without pyplot; matplotlib is imported only when one is drawn."""

from sa_export.report.plots.blocks import blocks_figure
from sa_export.report.plots.curves import error_figure, error_rows, tradeoff_figure
from sa_export.report.plots.heatmap import cra_figure, density_figure
from sa_export.report.plots.style import Picture

__all__ = ["Picture", "blocks_figure", "cra_figure", "density_figure", "error_figure", "error_rows", "tradeoff_figure"]
