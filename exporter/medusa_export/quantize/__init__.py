"""Quantisation: bundles with weights in 8 or 4 bits, and measurements of their quality."""

from medusa_export.check.quality import Quality
from medusa_export.quantize.direct_export import export_quantized
from medusa_export.quantize.quantized_bundle import QuantizeOptions, quantize_bundle

__all__ = ["Quality", "QuantizeOptions", "export_quantized", "quantize_bundle"]
