"""Puts the parts of a GGUF file together (`NAME-00001-of-00003.gguf`, as llama.cpp's gguf-split writes them)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medusa_heads.errors import CheckpointError
from medusa_runtime.errors import first_line

OWN = ("GGUF.", "split.")  # fields that describe a file, not the model


def merge_parts(parts: Sequence[Path], target: Path) -> Path:
    """Write one GGUF file with the first part's metadata and the tensors of all parts, which are copied one by one.

    Returns:
        The file.

    Raises:
        CheckpointError: a part is damaged.
    """
    import gguf  # noqa: PLC0415 - only for files in parts

    try:
        readers = [gguf.GGUFReader(part) for part in parts]
        first = readers[0]
        writer = gguf.GGUFWriter(target, str(first.fields["general.architecture"].contents()))
        for field in first.fields.values():
            if field.name.startswith(OWN) or field.name == "general.architecture":
                continue
            kind, inner = field.types[0], field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, inner)
        tensors = [tensor for reader in readers for tensor in reader.tensors]
        for tensor in tensors:
            data = tensor.data
            writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor.data)
        writer.close()
    except OSError:
        raise
    except Exception as error:  # the library raises anything for a damaged file
        raise CheckpointError(f"the parts of {parts[0]} cannot be put together: {first_line(error)}") from error
    return target
