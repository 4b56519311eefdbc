"""Takes fused operators apart into standard ones, for as long as it is looked for attention, and for good where that was asked
for or is needed."""

from graph_passes.passes.expand.expander import Expander, Expansion
from graph_passes.passes.expand.maker import Maker
from graph_passes.passes.expand.rules import MICROSOFT

__all__ = ["MICROSOFT", "Expander", "Expansion", "Maker"]
