"""How many bytes a call takes: measured by running it, or traced without allocating anything.

`measure_peak` runs a function, `trace_peak` predicts a training step of any module. Both count
tensors with the same tracker. `resident_bytes` and its like ask the operating system; so does
`free_bytes`, which tells what may still be taken.
`apply_policy` makes a training step of any network take less.
"""

from effseg.memory.choice import choose_policy, outermost_parts, outermost_stages
from effseg.memory.cuda_workspace import CudaCard, bytes_beyond_allocator
from effseg.memory.free import Free, free_bytes, parse_budget, shared_bytes
from effseg.memory.heap import KEPT_WORST, give_back_memory, heap_of, kept_blocks, mapped_blocks
from effseg.memory.measure import measure_peak
from effseg.memory.policy import Policy, apply_policy, remove_policy, stage_policies
from effseg.memory.recompute import recompute
from effseg.memory.report import MemoryEvent, MemoryReport
from effseg.memory.resident import PeakResident, peak_resident_bytes, resident_bytes
from effseg.memory.trace import trace_forward, trace_peak
from effseg.memory.work import Work

__all__ = [
    "KEPT_WORST",
    "CudaCard",
    "Free",
    "MemoryEvent",
    "MemoryReport",
    "PeakResident",
    "Policy",
    "Work",
    "apply_policy",
    "bytes_beyond_allocator",
    "choose_policy",
    "free_bytes",
    "give_back_memory",
    "heap_of",
    "kept_blocks",
    "mapped_blocks",
    "measure_peak",
    "outermost_parts",
    "outermost_stages",
    "parse_budget",
    "peak_resident_bytes",
    "recompute",
    "remove_policy",
    "resident_bytes",
    "shared_bytes",
    "stage_policies",
    "trace_forward",
    "trace_peak",
]
