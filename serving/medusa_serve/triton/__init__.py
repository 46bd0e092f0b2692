"""Bundles as models of NVIDIA Triton: `write_model` makes the directory, and `model.py` in it runs there.

`tensors` lists the inputs and outputs. `request` reads a request, `answering` answers it, `responses` makes its tensors.
"""

from medusa_serve.triton.repository import check_name, is_model, write_model
from medusa_serve.triton.settings import ModelSettings

__all__ = ["ModelSettings", "check_name", "is_model", "write_model"]
