"""What every test shares: threads that wait asleep, set before torch is imported."""

import halfstep.threads  # noqa: F401
