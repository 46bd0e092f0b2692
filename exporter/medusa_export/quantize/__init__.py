"""Quantisation: bundles with weights in 8 or 4 bits, and measurements of their quality."""

from medusa_export.quantize.bundle import QuantizeOptions, export_quantized, quantize_bundle
from medusa_export.quantize.quality import Quality

__all__ = ["Quality", "QuantizeOptions", "export_quantized", "quantize_bundle"]
