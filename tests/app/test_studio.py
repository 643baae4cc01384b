"""The studio as a browser and as strangers meet it: the page by headless Chromium, the server by plain requests."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest

from app.test_exploring import write_run
from halfstep.app.serving import HOST, MOST_BYTES, is_free, require_free
from halfstep.core.errors import RunError
from halfstep.engine.stepaware import StepAwarePipeline

HERE = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def free_port() -> int:
    with closing(socket.socket()) as one:
        one.bind((HOST, 0))
        return one.getsockname()[1]


def test_a_port_in_use_is_told_with_the_next_free_one():
    with closing(socket.socket()) as one:
        one.bind((HOST, 0))
        one.listen()
        port = one.getsockname()[1]
        assert not is_free(port)
        with pytest.raises(RunError, match=rf"port {port}, which is in use.*--port \d+, which is free") as told:
            require_free(port)
    named = int(re.search(r"--port (\d+)", str(told.value))[1])
    assert named > port and is_free(named)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """`halfstep studio RUN` as a process: its address and the run."""
    pytest.importorskip("gradio")
    run, port = tmp_path_factory.mktemp("studio") / "run", free_port()
    write_run(run)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE / "src")}
    command = [sys.executable, "-m", "halfstep", "studio", str(run), "--port", str(port)]
    with (run.parent / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=run.parent)
    until = time.monotonic() + 400
    while "studio: " not in (said := (run.parent / "log").read_text()):
        assert process.poll() is None and time.monotonic() < until, said
        time.sleep(0.3)
    yield f"http://{HOST}:{port}", run
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert "src/halfstep" not in (run.parent / "log").read_text()  # no error of ours; Gradio prints its own refusals


def status(url: str, **headers: str) -> tuple[int, bytes]:
    data = headers.pop("data", None)
    request = urllib.request.Request(url, None if data is None else data.encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
def test_nothing_but_the_page_is_served(served):
    address, run = served
    assert status(address)[0] == 200
    for file in ("/etc/passwd", run / "recipe.json", run / ".." / "log", "../run/plan.json", run.parent / "log"):
        code, body = status(f"{address}/gradio_api/file={file}")
        assert code in (403, 404) and b"root:" not in body and b"verb" not in body
    for path in ("/run/recipe.json", "/..%2f..%2fetc/passwd", "/static/../../../../etc/passwd", "/docs"):
        assert status(address + path)[0] in (403, 404)


@pytest.mark.slow
def test_requests_of_other_names_and_of_any_length_are_refused(served):
    address, _ = served
    assert status(address, Host="evil.example:80")[0] == 403
    port = int(address.rpartition(":")[2])
    long = f"POST /gradio_api/call/draw HTTP/1.1\r\nHost: {HOST}:{port}\r\nContent-Length: {MOST_BYTES + 1}\r\n\r\n"
    for sent, code in ((long.encode(), b"413"), (b"\x00\xff nonsense\r\n\r\n", b"400")):
        with closing(socket.create_connection((HOST, port), 20)) as one:
            one.sendall(sent)  # a body that was announced is not waited for
            assert code in one.recv(100)
    assert status(address)[0] == 200


def call(address: str, name: str, *values: object) -> str:
    """What an event of the page answers, as its API tells it."""
    headers = {"Content-Type": "application/json", "data": json.dumps({"data": values})}
    code, body = status(f"{address}/gradio_api/call/{name}", **headers)
    if code != 200:
        return f"error {code}"
    event = json.loads(body)["event_id"]
    return status(f"{address}/gradio_api/call/{name}/{event}")[1].decode()


@pytest.mark.slow
def test_nonsense_from_a_browser_is_an_error_and_the_server_lives(served):
    address, run = served
    name = str(run)
    for bad in ([name, "abc"], [name, -5], ["/etc", 3], [None, None], [name, {"a": 1}], [name, 1e400], []):
        assert "error" in call(address, "move", *bad)
    for bad in ([name, "../../x"], [name, "/tmp/x"], [name, None], ["/etc/passwd", "x"], [name, "x" * 5000]):
        assert "error" in call(address, "save", *bad)
    assert "error" in call(address, "draw", name, 10**9, 0, "all in turn", "")
    assert "error" in call(address, "draw", name, 2, -1, "all in turn", "")
    assert "error" in call(address, "edit", name, 99, "full")
    assert not (run / "studio").exists()
    assert "event: complete" in call(address, "draw", name, 2, 3, "all in turn", "")


def settled(page) -> None:
    """Wait until no event is on its way."""
    page.wait_for_timeout(300)
    page.wait_for_function("() => !document.querySelector('.generating, .pending')", timeout=120_000)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_as_a_person_would(served):
    """Open, move the slider, edit a row by mouse and keyboard, draw, film, save, reload; nothing else is asked for."""
    sync = pytest.importorskip("playwright.sync_api")
    address, run = served
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 420, "height": 900})
        asked, wrong = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#strip button", timeout=120_000)
        slider = page.locator("#ms input[type=range]")
        slider.focus()
        page.keyboard.press("End")
        page.wait_for_function("() => document.querySelectorAll('#strip button').length == 8", timeout=120_000)
        page.keyboard.press("Home")
        page.wait_for_function("() => document.querySelectorAll('#strip button').length == 2", timeout=120_000)
        page.click("#strip button[data-row='1']")
        page.wait_for_selector("#strip button[data-row='1'][aria-pressed=true]")
        page.keyboard.press("ArrowLeft")
        page.wait_for_selector("#strip button[data-row='0'][aria-pressed=true]")
        page.get_by_label("w0.50").check()
        said = "(q, t) => document.querySelector(q).innerText.includes(t)"
        for where, what in (("#strip", "w0.50: 1 rows"), ("#price", "not measured")):
            page.wait_for_function(f"([q, t]) => ({said})(q, t)", arg=[where, what], timeout=120_000)
        page.click("#draw")
        page.wait_for_selector("#beside img >> nth=1", timeout=120_000)
        assert all(page.locator("#beside img").nth(k).get_attribute("alt") for k in (0, 1))
        page.click("#film")
        page.wait_for_selector("#frame img", timeout=120_000)
        assert page.evaluate("document.documentElement.scrollWidth") <= 420
        page.fill("#name input, #name textarea", "by-hand")
        page.click("#save")
        page.wait_for_function("() => document.querySelector('#saved').innerText.includes('by-hand')", timeout=120_000)
        assert StepAwarePipeline.from_pretrained(run / "studio" / "by-hand").plan.entries == ("w0.50", "full")
        page.fill("#name input, #name textarea", "../no")
        page.click("#save")
        page.wait_for_selector("text=expected 1 to 40 letters", timeout=120_000)
        page.reload()
        page.wait_for_selector("#strip button", timeout=120_000)
        settled(page)
        page.click("#kept input")
        page.get_by_role("option", name="by-hand").click()
        page.click("#open")
        page.wait_for_function("() => document.querySelector('#strip').innerText.includes('w0.50')", timeout=120_000)
        foreign = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
        assert foreign == [] and wrong == []
        browser.close()
