"""What every test shares: threads that wait asleep, set before torch is imported, and no deadlines on busy machines."""

import hypothesis

import halfstep.threads  # noqa: F401

hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")
