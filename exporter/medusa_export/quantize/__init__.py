"""Quantisation: bundles with weights in 8 or 4 bits, and measurements of their quality."""

from medusa_export.check.quality import Quality
from medusa_export.command_options.quantize_options import QuantizeOptions
from medusa_export.quantize.direct_export import export
from medusa_export.quantize.quantized_bundle import quantize_bundle

__all__ = ["Quality", "QuantizeOptions", "export", "quantize_bundle"]
