"""What every test shares: threads that wait asleep, set before torch is imported, and no deadlines on busy machines."""

import importlib.util
import os
import shutil
import signal
from pathlib import Path

import hypothesis
import pytest

import halfstep.core.threads  # noqa: F401

if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core already
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background: children would not hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
hypothesis.settings.register_profile("busy", deadline=None, derandomize="HALFSTEP_DRILLS" not in os.environ)
"""The same examples in every run of the same code; new ones in `make drills`."""
hypothesis.settings.load_profile("busy")


class Naming:
    """Names a failure when it happens: a run that is cut before its end has told of it."""

    def __init__(self, terminal):
        self.terminal = terminal

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.terminal.write_line(f"\n{report.nodeid} failed at its {report.when}")


@pytest.hookimpl(trylast=True)  # after the terminal has its reporter
def pytest_configure(config):
    if (terminal := config.pluginmanager.get_plugin("terminalreporter")) is not None:
        config.pluginmanager.register(Naming(terminal))


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of the test's own, its folder."""
    monkeypatch.setenv("HALFSTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def workers():
    """Ray's on this machine, as an executor; gone with the file's last test, for others fork."""
    ray = pytest.importorskip("ray")
    import torch

    from halfstep.engine import cluster

    yield cluster.Cluster(cluster.connected(cluster.LOCAL), torch.device("cpu"))
    ray.shutdown()


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium. `make browser` installs what this needs."""
    sync = pytest.importorskip("playwright.sync_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium here")
    with sync.sync_playwright() as play:
        yield (opened := play.chromium.launch(executable_path=chromium, args=["--no-sandbox"]))
        opened.close()


@pytest.fixture(scope="module")
def axe() -> str:
    """axe-core's script, as the package of `make browser` has it."""
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        pytest.skip("no axe-core here")
    return (Path(found.origin).parent / "axe.min.js").read_text()
