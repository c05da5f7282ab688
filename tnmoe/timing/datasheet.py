"""Devices by their vendors' data sheets: peaks by dtype, bandwidth, and a plain roofline on them.

The figures are files in `tnmoe/profiles`, each with its source. They are peaks: what a device reaches is less, and
`tnmoe calibrate` measures it. Peaks are of dense matrix products; those with structured sparsity stand beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from tnmoe.costing.op_cost import op_cost
from tnmoe.costing.traffic import forward_traffic
from tnmoe.errors import CostError, DeclarationError, unknown
from tnmoe.io.json_fields import Field, read_json
from tnmoe.ir.ops import Op
from tnmoe.ir.routing_ops import GroupedContract
from tnmoe.ir.value import DTYPE_BYTES
from tnmoe.symbolic.dims import Dim
from tnmoe.timing.op_time import torch_calls

FORMAT = "tnmoe-datasheet-1"

GROUPED_KERNELS = 4
"""Of a grouped product: where each expert's rows end, the product, and a bias for each row."""


@dataclass(frozen=True, slots=True)
class Peak:
    """FLOP/s of matrix products in one dtype.

    Attributes:
        dense: without sparsity; what predictions use.
        sparse: with 2:4 structured sparsity, None where the vendor states none.
    """

    dense: float
    sparse: float | None = None

    @classmethod
    def read(cls, data: Field) -> Peak:
        """The peak in a file."""
        fields = data.keys("dense", optional=("sparse",))
        return cls(fields["dense"].number(), fields["sparse"].maybe(Field.number))


@dataclass(frozen=True, slots=True)
class Datasheet:
    """A device by its data sheet.

    Attributes:
        name: of the device.
        source: the document and what was taken from it.
        device: the kind, "cpu" or "cuda" (ROCm included).
        peaks: of matrix products, by dtype.
        vector: FLOP/s of everything else, in float32.
        bandwidth: of the memory, in bytes/s.
        memory: bytes of it.
        overhead: seconds that each op takes at least; no data sheet states it, so it is assumed.
    """

    name: str
    source: str
    device: str
    peaks: Mapping[str, Peak]
    vector: float
    bandwidth: float
    memory: int
    overhead: float

    def of(self, dtype: str) -> Peak:
        """The peak for a dtype.

        Raises:
            CostError: if the device has none, with the dtypes that it has.
        """
        if dtype not in self.peaks:
            raise CostError(
                f"the profile of {self.name!r} has no dtype {dtype!r}; it has {', '.join(self.peaks)}. "
                f"Choose one of these, or another device"
            )
        return self.peaks[dtype]

    @property
    def calibrated(self) -> bool:
        """False: its figures are the vendor's."""
        return False

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Those with a peak, float32 first."""
        return tuple(sorted(self.peaks, key=lambda dtype: dtype != "float32"))

    def op_seconds(
        self, op: Op, sizes: Mapping[str, Dim], dtype: str, *, working_set: int = 0, fast: bool = False
    ) -> float:
        """Seconds of one op, by its roofline; a data sheet knows nothing of fetching, nor of other libraries."""
        return roofline(op, sizes, self, dtype)

    def call_seconds(self, dtype: str, *, parameters: int, calls: int, functions: int) -> float:
        """0: the overhead of each op is all that is assumed."""
        return 0.0

    def graph_seconds(self, dtype: str, *, nodes: int, functions: int, leaves: int) -> float:
        """A node costs the least overhead of an op twice: recorded, and visited."""
        return 2 * nodes * self.overhead

    def gradient_seconds(self, kind: str, dtype: str, *, count: int, length: int | None, passes: int) -> float | None:
        """None: no kernel of a gradient is known."""
        return None

    def fill_seconds(self, dtype: str, count: int) -> float:
        """Seconds of so many elements of zeros."""
        return DTYPE_BYTES[dtype] * count / self.bandwidth

    @classmethod
    def from_json(cls, text: str) -> Datasheet:
        """The data sheet in a file of `tnmoe/profiles`.

        Raises:
            DeclarationError: naming the key that is missing or wrong.
        """
        keys = ("name", "source", "device", "peaks", "vector", "bandwidth", "memory", "overhead")
        fields = read_json(text, "a data sheet", FORMAT, DeclarationError).keys(*keys)
        return cls(
            fields["name"].words(),
            fields["source"].words(),
            fields["device"].words(),
            {dtype: Peak.read(peak) for dtype, peak in fields["peaks"].some_keys(DTYPE_BYTES).items()},
            fields["vector"].number(),
            fields["bandwidth"].number(),
            int(fields["memory"].number()),
            fields["overhead"].number(),
        )


def datasheet_names() -> tuple[str, ...]:
    """The devices that come with the package."""
    folder = files("tnmoe") / "profiles"
    return tuple(sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json")))


@cache
def datasheet(name: str) -> Datasheet:
    """A device that comes with the package, e.g. "h100".

    Raises:
        CostError: with the names there are.
    """
    if name not in datasheet_names():
        raise CostError(unknown("device", name, datasheet_names()))
    return Datasheet.from_json((files("tnmoe") / "profiles" / f"{name}.json").read_text(encoding="utf-8"))


def roofline(op: Op, sizes: Mapping[str, Dim], device: Datasheet, dtype: str) -> float:
    """Seconds of one op: max(FLOPs / peak, bytes / bandwidth) + overhead (Williams et al., 2009).

    Ops that dispatch are several kernels, each with its overhead (`tnmoe.timing.op_time.torch_calls`). A loop over
    experts is one for each expert, but in bfloat16 on a CUDA device one for all of them.

    Raises:
        CostError: a dtype that the device lacks, or an op without a cost formula.
    """
    work, moved = op_cost(op, sizes), forward_traffic(op, sizes)
    computing = int(work.matmul_flops) / device.of(dtype).dense
    computing += int(work.elementwise_flops + work.special_flops) / device.vector
    moving = DTYPE_BYTES[dtype] * int(moved.read + moved.written) / device.bandwidth
    at_once = isinstance(op, GroupedContract) and device.device == "cuda" and dtype == "bfloat16"
    kernels = GROUPED_KERNELS if at_once else torch_calls(op, sizes)
    return max(computing, moving) + (kernels * device.overhead if moved.written else 0.0)
