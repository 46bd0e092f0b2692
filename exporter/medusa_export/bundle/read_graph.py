"""Reads a bundle's graphs."""

from __future__ import annotations

from pathlib import Path, PurePath

import onnx_ir as ir

from medusa_runtime.errors import BundleError


class BundleTensor(ir.ExternalTensor):
    """A tensor of a bundle's weights file, which may be a symbolic or a hard link, as in a hub's cache.

    onnx-ir refuses links, since a graph could name any file. `read_graph` takes only files of the bundle itself instead.
    """

    def _check_path_containment(self) -> None:
        """Checked by `read_graph`."""


def read_graph(path: Path) -> ir.Model:
    """Read a graph. Its large weights stay in the file beside it until they are needed.

    Raises:
        BundleError: the graph names a weights file outside its directory.
        Exception: any, if the file is damaged.
    """
    model = ir.load(path)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        location = str(tensor.location)
        if PurePath(location).name != location or location in {"", ".", ".."}:
            raise BundleError(f"{path} keeps weights in {location!r}, which is not a file beside it; export the bundle again")
        value.const_value = BundleTensor(
            location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name or "",
            base_dir=path.parent,
        )
    return model
