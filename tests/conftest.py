"""What every test shares: threads that wait asleep, set before torch is imported, and no deadlines on busy machines."""

import os

import hypothesis

import halfstep.core.threads  # noqa: F401

if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core already
    os.environ.setdefault("OMP_NUM_THREADS", "1")
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")
