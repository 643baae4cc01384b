"""Completion of the shell: what bash, fish and zsh themselves do after an installation, and what each option offers."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from halfstep.app.cli import SCHEMES, main
from halfstep.core.bundled import BUNDLED
from halfstep.data import sources


@pytest.fixture
def offered(monkeypatch, capsys):
    """What a shell is offered for the last of some words."""

    def offer(*words: str) -> list[str]:
        monkeypatch.setenv("_HALFSTEP_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", " ".join(words))
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        monkeypatch.setattr(sys, "argv", ["halfstep"])
        with pytest.raises(SystemExit):
            main()
        return capsys.readouterr().out.split()

    return offer


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("halfstep tu", "tune"),
        ("halfstep compress sp", "sparse spectral"),
        ("halfstep tune --sch", "--scheduler"),
        ("halfstep sample --scheduler dd", "ddim ddpm"),
        ("halfstep sample --dtype b", "bfloat16"),
        ("halfstep tune --recipe fashion16-", "fashion16-dense"),
        ("halfstep tune --set train.sa", "train.save_every train.sample_every"),
        ("halfstep sample --model f", "fashion"),
        ("halfstep train --data f", "fashion folder:"),
    ],
)
def test_words_are_offered(words, wanted, offered):
    assert offered(*words.split()) == wanted.split()


def test_every_kind_of_data_is_offered():
    assert {*BUNDLED, *(scheme.removesuffix(":") for scheme in SCHEMES)} >= set(sources.READERS)


@pytest.fixture
def installed(tmp_path):
    """After `halfstep --install-completion` in a shell, in a home of its own: where the shell is, the environment."""

    def install(shell: str) -> tuple[str, dict[str, str]]:
        where = shutil.which(shell)
        if where is None:
            pytest.skip(f"no {shell}")
        (tmp_path / "bin").mkdir()
        command = tmp_path / "bin" / "halfstep"
        main_of = "from halfstep.app.cli import main; main()"
        command.write_text(f"#!{shutil.which('sh')}\nexec {sys.executable} -c '{main_of}' \"$@\"\n")
        command.chmod(0o755)
        env = os.environ | {
            "HOME": str(tmp_path),
            "SHELL": where,
            "PATH": f"{command.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
            "TERM": "dumb",
        }
        subprocess.run([where, "-c", "halfstep --install-completion; true"], env=env, check=True, capture_output=True)
        return where, env

    return install


@pytest.mark.slow
def test_bash_completes_after_an_installation(installed):
    bash, env = installed("bash")
    assert ".bash_completions/halfstep.sh" in (Path(env["HOME"]) / ".bashrc").read_text()
    asked = "COMP_WORDS=(halfstep tu); COMP_CWORD=1; _halfstep_completion halfstep; echo ${COMPREPLY[@]}"
    told = subprocess.run(
        [bash, "-c", f"source ~/.bash_completions/halfstep.sh; {asked}"], env=env, capture_output=True, text=True
    )
    assert told.stdout.split() == ["tune"]


@pytest.mark.slow
def test_fish_completes_after_an_installation(installed):
    fish, env = installed("fish")
    asked = [fish, "-c", "complete -C 'halfstep tu'; complete -C 'halfstep sample --scheduler dd'"]
    told = subprocess.run(asked, env=env, capture_output=True, text=True).stdout.splitlines()
    assert [line.split("\t")[0] for line in told] == ["tune", "ddim", "ddpm"]


@pytest.mark.slow
def test_zsh_completes_at_the_first_tab_of_a_shell(installed):
    zsh, env = installed("zsh")
    child, terminal = pty.fork()
    if child == 0:
        os.execve(zsh, [zsh, "-i"], env)

    def shown(wanted: bytes, seconds: float = 60) -> bytes:
        found, end = b"", time.monotonic() + seconds
        while wanted not in found and time.monotonic() < end:
            if select.select([terminal], [], [], 0.2)[0]:
                found += os.read(terminal, 4096)
        return found

    try:
        os.write(terminal, b"echo rea''dy\n")
        shown(b"ready")
        for word in (b"tu", b"eva"):
            os.write(terminal, b"halfstep " + word + b"\t")
            whole = {b"tu": b"ne ", b"eva": b"luate "}[word]
            assert whole in shown(whole, 60), word
            os.write(terminal, b"\x15")  # kill the line
    finally:
        os.kill(child, signal.SIGKILL)
        os.close(terminal)
        os.waitpid(child, 0)
