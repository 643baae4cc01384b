"""Threads that wait asleep. Imported for its effect, by whatever begins a process, before torch is imported.

By default OpenMP's threads spin while they wait for one another. Beside any other busy process they spin away the time
slice that the thread they wait for needs, and a call of some milliseconds takes seconds. Here they sleep, after a spin
so short that it costs nothing there and saves, on an idle machine, some of what falling asleep costs small nets
(`benchmarks/waiting.py`). The OpenMP library reads the variables once, when torch loads it; processes that are started
later inherit them.

numpy's OpenBLAS has threads of its own, which spin whatever OpenMP is told, between products too small for them: of
the resamples of a distance they made 23 s of 0.2 s. It gets one; what gains by more asks for them (`measure/quality`).
"""

from __future__ import annotations

import os

_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""What a user who knows better may have set: OpenMP's own variable, and GNU's and LLVM's for the same thing."""

if not any(name in os.environ for name in _SETTINGS):
    os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
