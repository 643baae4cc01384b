"""Completion of the shell: what bash itself is told after an installation, and what each option offers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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


@pytest.mark.slow
def test_bash_completes_after_an_installation(tmp_path):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "halfstep"
    command.write_text(f"#!{bash}\nexec {sys.executable} -c 'from halfstep.app.cli import main; main()' \"$@\"\n")
    command.chmod(0o755)
    env = os.environ | {
        "HOME": str(tmp_path),
        "SHELL": bash,
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
    }
    subprocess.run([bash, "-c", "halfstep --install-completion; true"], env=env, check=True, capture_output=True)
    assert ".bash_completions/halfstep.sh" in (tmp_path / ".bashrc").read_text()
    asked = "COMP_WORDS=(halfstep tu); COMP_CWORD=1; _halfstep_completion halfstep; echo ${COMPREPLY[@]}"
    told = subprocess.run(
        [bash, "-c", f"source ~/.bash_completions/halfstep.sh; {asked}"], env=env, capture_output=True, text=True
    )
    assert told.stdout.split() == ["tune"]
