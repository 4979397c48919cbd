"""How many bytes a call takes: measured by running it, or traced without allocating anything.

`measure_peak` runs a function, `trace_peak` predicts a training step of any module. Both count
tensors with the same tracker. `resident_bytes` and its like ask the operating system.
"""

from effseg.memory.cuda_workspace import CudaCard
from effseg.memory.measure import measure_peak
from effseg.memory.report import MemoryEvent, MemoryReport
from effseg.memory.resident import PeakResident, peak_resident_bytes, resident_bytes
from effseg.memory.trace import trace_forward, trace_peak

__all__ = [
    "CudaCard",
    "MemoryEvent",
    "MemoryReport",
    "PeakResident",
    "measure_peak",
    "peak_resident_bytes",
    "resident_bytes",
    "trace_forward",
    "trace_peak",
]
