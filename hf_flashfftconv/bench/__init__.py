"""Measures this package and its rivals on the GPU at hand, side by side in one run.

Every time is put beside the least that the memory of this very GPU allows: each input read once and each output written
once at the bandwidth of a large copy, measured in the same run. Whole models are put beside their unpatched selves.
"""

from .models import ModelReport, ModelResult, bench_model
from .problem import Problem
from .report import Report, Result
from .run import bench

__all__ = ["ModelReport", "ModelResult", "Problem", "Report", "Result", "bench", "bench_model"]
