"""A torch module that loops over the slices of a contraction, around the module of one slice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tnmoe.ir.network import Network
from tnmoe.symbolic.dims import check_name


def emit(
    network: Network, indices: Sequence[str], sizes: Mapping[str, int], name: str, part: str, notes: Sequence[str]
) -> str:
    """The file of one slice's class, called `<name>Slice`, with the class of the loop after it.

    Args:
        network, indices, sizes: as in `execute`.
        name: of the class.
        part: source of the file that holds the slice's class.
        notes: lines of the docstring.
    """
    check_name(name, "class")
    tensors = [t.name for t in network.tensors]
    total = _free("total", tensors)
    at = {index: _free(f"at_{index}", [*tensors, total]) for index in indices}
    shape = ", ".join(str(sizes[i]) for i in network.output)
    lines = [f"{total} = {tensors[0]}.new_zeros({f'({shape},)' if shape else '()'})"]
    for depth, index in enumerate(indices):
        lines.append("    " * depth + f"for {at[index]} in range({sizes[index]}):")
    slices = ", ".join(t.name + _selected(t.indices, at) for t in network.tensors)
    place = _selected(network.output, at) or "[...]"
    lines += ["    " * len(indices) + f"{total}{place} += self.part({slices})", f"return {total}"]
    shown = "\n".join(f"    {line}".rstrip() for line in notes)
    body = "\n".join(f"        {line}" for line in lines)
    parameters = ", ".join(f"{t}: Tensor" for t in tensors)
    return f'''{part}

class {name}(nn.Module):
    """Contracts {network.expression}, slice by slice.

{shown}
    """

    def __init__(self, *, device=None, dtype=None) -> None:
        super().__init__()
        self.part = {name}Slice(device=device, dtype=dtype)

    def forward(self, {parameters}) -> Tensor:
        """Contract all tensors, their axes in the order of the expression."""
{body}
'''


def _selected(indices: Sequence[str], at: Mapping[str, str]) -> str:
    """The subscript that takes a slice; empty if nothing is sliced."""
    if not any(i in at for i in indices):
        return ""
    last = max(k for k, i in enumerate(indices) if i in at)
    return "[" + ", ".join(at.get(i, ":") for i in indices[: last + 1]) + "]"


def _free(name: str, taken: Sequence[str]) -> str:
    while name in taken:
        name += "_"
    return name
