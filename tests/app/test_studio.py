"""The studio as a browser and as strangers meet it: the page by headless Chromium, the server by plain requests."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from app.test_exploring import line_of, write_run
from banks import net, slim_bank
from halfstep.app.exploring import Asked, explore
from halfstep.app.panels import data_url
from halfstep.app.serving import HOST, MOST_BYTES, is_free, require_free
from halfstep.core.disk import append_record
from halfstep.core.errors import RunError
from halfstep.core.process import Process
from halfstep.core.recipe import Recipe, SampleSpec
from halfstep.engine.bank import Bank
from halfstep.engine.sampling import reference_plan
from halfstep.engine.stepaware import StepAwarePipeline

HERE = Path(__file__).parents[2]


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


def write_classes(folder):
    """A pipeline of two nets of three classes."""
    bank = Bank(
        {"full": net(0, num_class_embeds=3), "small": net(1, channels=(8, 8), num_class_embeds=3)}, "full", "epsilon"
    )
    bank = bank.with_vae(None, ("cat", "dog", "hen"))
    plan = reference_plan(bank, Process(), SampleSpec(steps=4)).uniform("small")
    StepAwarePipeline(bank, plan).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """`halfstep studio RUN` as a process, over a run and a model of classes beside it: its address and the run."""
    pytest.importorskip("gradio")
    run, port = tmp_path_factory.mktemp("studio") / "run", free_port()
    write_run(run)
    classes = write_classes(run.parent / "classes")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE / "src")}
    command = [sys.executable, "-m", "halfstep", "studio", str(run), str(classes), "--port", str(port)]
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
    for prompt, label in (("x" * 10_000, "all in turn"), ("", ["cat"]), ("", "nobody")):
        assert "error" in call(address, "draw", name, 2, 0, label, prompt)
    assert "error" in call(address, "edit", name, 99, "full")
    assert not (run / "studio").exists()
    assert "event: complete" in call(address, "draw", name, 2, 3, "all in turn", "")


# ---------------------------------------------------------------------------------------------------------- a browser


@contextmanager
def looked_at(browser, address: str, width: int = 420, scheme: str = "light"):
    """The page as it is opened, with patience for a busy machine; it asks nobody else and throws nothing."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(120_000)
    asked, wrong = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#strip button")
    yield page
    foreign = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert foreign == [] and wrong == []
    page.close()


def says(page, where: str, what: str) -> None:
    """Wait until a part of the page says so."""
    page.wait_for_function("([q, t]) => document.querySelector(q).innerText.includes(t)", arg=[where, what])


def strip_of(page, rows: int) -> None:
    page.wait_for_function("(n) => document.querySelectorAll('#strip button').length == n", arg=rows)


@pytest.mark.slow
def test_as_a_person_would(served, browser):
    """Open, move the slider, edit a row by mouse and keyboard, draw, film, save, reload, open what was saved."""
    address, run = served
    with looked_at(browser, address) as page:
        page.locator("#ms input[type=range]").focus()
        page.keyboard.press("End")
        strip_of(page, 8)
        page.keyboard.press("Home")
        strip_of(page, 2)
        page.click("#strip button[data-row='1']")
        page.wait_for_selector("#strip button[data-row='1'][aria-pressed=true]")
        page.keyboard.press("ArrowLeft")
        page.wait_for_selector("#strip button[data-row='0'][aria-pressed=true]")
        page.get_by_label("w0.50").check()
        says(page, "#strip", "w0.50: 1 row")
        says(page, "#price", "not measured")
        page.click("#draw")
        page.wait_for_selector("#beside img >> nth=1")
        assert all(page.locator("#beside img").nth(k).get_attribute("alt") for k in (0, 1))
        page.click("#film")
        says(page, "#frame", "row 2 of 2")  # it plays to its end
        page.focus("#frame input")
        page.keyboard.press("Home")
        says(page, "#frame", "noise, before the first call")
        assert page.evaluate("document.documentElement.scrollWidth") <= 420
        page.fill("#name input, #name textarea", "by-hand")
        page.click("#save")
        says(page, "#saved", "by-hand")
        assert StepAwarePipeline.from_pretrained(run / "studio" / "by-hand").plan.entries == ("w0.50", "full")
        page.fill("#name input, #name textarea", "../no")
        page.click("#save")
        page.wait_for_selector("text=expected 1 to 40 letters")
        page.reload()
        page.wait_for_selector("#strip button")
        page.wait_for_function("() => !document.querySelector('#strip').innerText.includes('w0.50')")
        pick(page, "#kept", "by-hand")
        page.click("#open")
        says(page, "#strip", "w0.50: 1 row")


def pick(page, where: str, name: str) -> None:
    """Choose in a list, as by mouse."""
    page.click(f"{where} input")
    page.get_by_role("option", name=name).click()


@pytest.mark.slow
def test_a_class_is_chosen(served, browser):
    """The pictures in the page are, bit for bit, those of the class; another run is chosen at the top."""
    address, run = served
    with looked_at(browser, address, width=1200) as page:
        assert not page.is_visible("#class")
        pick(page, "#run", "classes")
        says(page, "#about", "3 classes")
        page.wait_for_selector("#class")
        pick(page, "#class", "hen")
        page.click("#draw")
        explored = explore(str(run.parent / "classes"), Recipe())
        wanted = data_url(explored.drawn(explored.reference, Asked(label="hen")))
        sources = "(src) => document.querySelector('#beside img')?.src == src"
        page.wait_for_function(sources, arg=wanted)
        assert wanted != data_url(explored.drawn(explored.reference, Asked()))


GRADIO_S_OWN = {
    "toast-header": "an error's head is a button about its closing button, both made by Gradio's script",
}
"""What axe-core objects to in what cannot be reached from outside of Gradio, by its class, and why."""
RULES = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice")


def objections(page, axe: str) -> list[str]:
    """What axe-core finds serious or critical, by rule and element."""
    page.evaluate(axe)
    how = {"runOnly": {"type": "tag", "values": RULES}}
    wrong = page.evaluate("(how) => axe.run(document, how)", how)["violations"]
    bad = [one for one in wrong if one["impact"] in ("serious", "critical")]
    nodes = [(one["id"], node["html"][:200]) for one in bad for node in one["nodes"]]
    return [f"{rule}: {html}" for rule, html in nodes if not any(name in html for name in GRADIO_S_OWN)]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 420])
def test_axe_finds_nothing_serious(served, browser, axe, width, scheme):
    """With everything drawn, in every view, and with an error on the page."""
    with looked_at(browser, served[0], width, scheme) as page:
        page.click("#draw")
        page.wait_for_selector("#beside img >> nth=1")
        page.click("#film")
        page.wait_for_selector("#frame img:not([hidden])")
        page.get_by_text("The plan in words").click()
        page.wait_for_selector("#words textarea")
        assert objections(page, axe) == []
        for tab, image in (("Swipe", "#swipe img"), ("Difference", "#difference img")):
            page.get_by_role("tab", name=tab).click()
            page.wait_for_selector(image)
            assert objections(page, axe) == []
        page.fill("#name input, #name textarea", "../no")
        page.click("#save")
        page.wait_for_selector("text=expected 1 to 40 letters")
        assert objections(page, axe) == []


@pytest.mark.slow
def test_a_search_moves_while_it_is_looked_at(served, browser):
    """A plan that is measured meanwhile is counted by itself, and is on the frontier when it is taken in."""
    address, run = served
    with looked_at(browser, address) as page:
        says(page, "#progress", "5 plans measured")
        assert "3 measured plans" in page.get_attribute("#frontier svg", "aria-label")
        bank = slim_bank()
        fewest = reference_plan(bank, Process(), SampleSpec(scheduler="dpmsolver++", steps=2))
        append_record(run / "scores.jsonl", line_of(bank, fewest.uniform("w0.25"), 12.0).to_json())
        with (run / "scores.jsonl").open("a") as file:
            file.write('{"stage": "fit", "dig')  # the next line, being written
        says(page, "#progress", "6 plans measured")
        page.click("#again")
        page.wait_for_selector("#frontier svg[aria-label^='4 measured plans']")
        for dot, told in ((-1, "full: 8 rows"), (0, "w0.25: 2 rows")):  # also where a mark lies over it
            page.locator("#frontier .dot").nth(dot).click()
            says(page, "#strip", told)
