"""What a step keeps of every token: the tensors of the cache, as the step graph's inputs describe them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from medusa_runtime.bundle.manifest import GraphFacts, TensorFacts
from medusa_runtime.errors import BundleError

PAST, PRESENT = "past.", "present."  # prefixes of the step graph's inputs and outputs that hold the cache
FROM, SOURCES, TARGETS = "from.", "sources", "targets"  # inputs of the graph that edits a cache
BATCH_AXIS, CAPACITY_AXIS = 0, 2  # of a cache tensor: [B, H, S, D]
ITEM_BYTES = {"float": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class CacheTensor:
    """One tensor of the cache, [B, H, S, D]. B and S are those of all tensors, H and D its own."""

    name: str  # "{layer}.{part}", such as "0.key"
    heads: int  # H
    width: int  # D
    dtype: str  # one of ITEM_BYTES

    @property
    def past(self) -> str:
        """The name of the graph's input."""
        return PAST + self.name

    @property
    def present(self) -> str:
        """The name of the graph's output, to be bound to the memory of `past`."""
        return PRESENT + self.name

    @property
    def part(self) -> str:
        """What it holds of its layer, such as ``key``."""
        return self.name.partition(".")[2]

    @property
    def item_bytes(self) -> int:
        """Bytes of a number."""
        return ITEM_BYTES[self.dtype]

    @property
    def entry_bytes(self) -> int:
        """Bytes that one token takes."""
        return self.heads * self.width * self.item_bytes

    @property
    def kind(self) -> tuple[int, int, str]:
        """What tensors must have in common to lie in one array."""
        return self.heads, self.width, self.dtype

    def shape(self, batch: int, capacity: int) -> tuple[int, int, int, int]:
        """Its shape for B sequences and S entries."""
        return batch, self.heads, capacity, self.width


@dataclass(frozen=True)
class CacheLayout:
    """The tensors of the cache, in the order of the step graph's inputs."""

    tensors: tuple[CacheTensor, ...]

    @classmethod
    def of(cls, step: GraphFacts) -> CacheLayout:
        """The layout that a step graph has.

        Raises:
            BundleError: there is no cache tensor, one has not the form of docs/onnx-contract.md, or one is not returned.
        """
        outputs = {tensor.name: tensor for tensor in step.outputs}
        tensors = tuple(_tensor(step, tensor, outputs) for tensor in step.inputs if tensor.name.startswith(PAST))
        if not tensors:
            raise BundleError(f"{step.file} has no cache: no input's name begins with {PAST}; export the bundle again")
        return cls(tensors)

    @cached_property
    def entry_bytes(self) -> int:
        """Bytes of one token's entry in the cache, all tensors together."""
        return sum(tensor.entry_bytes for tensor in self.tensors)

    @cached_property
    def groups(self) -> tuple[tuple[CacheTensor, ...], ...]:
        """The tensors grouped by H, D and dtype. A group can lie in one array, whose entries are moved at once."""
        groups: dict[tuple[int, int, str], list[CacheTensor]] = {}
        for tensor in self.tensors:
            groups.setdefault(tensor.kind, []).append(tensor)
        return tuple(tuple(group) for group in groups.values())

    def describe(self) -> str:
        """The tensors in words, such as ``60 of [2, S, 16] float``. S stands for the entries."""
        return " + ".join(f"{len(group)} of [{group[0].heads}, S, {group[0].width}] {group[0].dtype}" for group in self.groups)


def _tensor(step: GraphFacts, tensor: TensorFacts, outputs: dict[str, TensorFacts]) -> CacheTensor:
    name, shape = tensor.name.removeprefix(PAST), tensor.shape
    if not (_is_entries(shape) and tensor.dtype in ITEM_BYTES):
        raise BundleError(
            f"{step.file} has the cache input {tensor.name} as {tensor.dtype} {shape}, not as floats "
            "[batch, heads, entries, width] with known heads and width; export the bundle again"
        )
    output = outputs.get(PRESENT + name)
    if output is None or (output.shape, output.dtype) != (shape, tensor.dtype):
        found = "no such output" if output is None else f"{output.dtype} {output.shape}"
        raise BundleError(
            f"{step.file} must return {tensor.name} as {PRESENT}{name}, {tensor.dtype} {shape}, but has {found}; "
            "export the bundle again"
        )
    return CacheTensor(name, int(shape[1]), int(shape[3]), tensor.dtype)


def _is_entries(shape: list[int | str]) -> bool:
    """Whether a shape is [B, H, S, D] with known H and D, and a name for B. S is a number in engines."""
    sizes = [shape[axis] for axis in (1, 3)] if len(shape) == 4 else []
    return bool(sizes) and isinstance(shape[BATCH_AXIS], str) and all(isinstance(size, int) and size > 0 for size in sizes)
