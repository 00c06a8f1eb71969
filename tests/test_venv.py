"""infra/venv.sh on the folders and machines that it meets. The project that it installs here has no
dependencies and builds itself, so nothing is fetched."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PYPROJECT = """\
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "tiny"
version = "1"

[project.optional-dependencies]
# A comment.
local = []
test = []

[tool.ruff]
line-length = 100
"""

# As small as a build backend can be: an editable wheel with one module's place in it.
BACKEND = """\
import pathlib
import zipfile


def get_requires_for_build_editable(config_settings=None):
    return []


def build_editable(folder, config_settings=None, metadata_directory=None):
    files = {
        "tiny.pth": str(pathlib.Path.cwd()),
        "tiny-1.dist-info/METADATA": "Metadata-Version: 2.1\\nName: tiny\\nVersion: 1\\n"
        "Provides-Extra: local\\nProvides-Extra: test\\n",
        "tiny-1.dist-info/WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\n"
        "Tag: py3-none-any\\n",
        "tiny-1.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(pathlib.Path(folder, "tiny-1-py3-none-any.whl"), "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return "tiny-1-py3-none-any.whl"
"""


class Checkout:
    """A folder with infra/venv.sh and the tiny project, and the programs that it may find."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.venv = folder / ".venv"
        self.env = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHON": sys.executable}
        (folder / "infra").mkdir(parents=True)
        shutil.copy(ROOT / "infra" / "venv.sh", folder / "infra")
        (folder / "pyproject.toml").write_text(PYPROJECT)
        (folder / "backend.py").write_text(BACKEND)

    def make(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run infra/venv.sh."""
        return subprocess.run(
            [self.folder / "infra" / "venv.sh", *args],
            cwd=self.folder,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def check(self, folder: Path | None = None) -> None:
        """The environment's Python has pip and the project."""
        command = [(folder or self.venv) / "bin" / "python", "-m", "pip", "list"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert re.search(r"^tiny +1\b", listed, re.MULTILINE)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "a checkout")


def programs(folder: Path, *names: str) -> str:
    """A PATH with these programs and no others."""
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(shutil.which(name) or name)
    return str(folder)


def test_it_makes_the_environment_once_and_is_then_silent(checkout: Checkout) -> None:
    done = checkout.make("local")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    checkout.check()
    before = checkout.venv.stat().st_ino
    done = checkout.make("local")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert checkout.venv.stat().st_ino == before


def test_a_misspelt_extra_is_exit_code_2_with_those_that_exist(checkout: Checkout) -> None:
    done = checkout.make("locl")
    assert (done.returncode, done.stderr) == (
        2,
        "venv.sh: no extra 'locl' in pyproject.toml; there are: local test\n",
    )
    assert not checkout.venv.exists()


def test_the_extras_are_those_of_the_project() -> None:
    done = subprocess.run(
        [ROOT / "infra" / "venv.sh", "locl"], capture_output=True, text=True, check=False
    )
    told = done.stderr.partition("there are: ")[2].split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert told == list(project["optional-dependencies"])


def python_is_gone(folder: Path) -> None:
    for python in folder.glob("bin/python*"):
        python.unlink()
        python.symlink_to("/nowhere/python3")


def python_was_upgraded(folder: Path) -> None:
    (lib,) = folder.glob("lib/python3*")
    lib.rename(lib.with_name("python3.10"))


def was_moved(folder: Path) -> None:
    (folder / "bin" / "tool").write_text("#!/nowhere/.venv/bin/python\n")


def was_moved_from_a_path_with_blanks(folder: Path) -> None:
    (folder / "bin" / "tool").write_text("#!/bin/sh\n'''exec' \"/no where/bin/python\" \"$0\"\n")


@pytest.mark.parametrize(
    "damage",
    [
        was_moved_from_a_path_with_blanks,
        pytest.param(was_moved, marks=pytest.mark.slow),
        pytest.param(python_was_upgraded, marks=pytest.mark.slow),
        pytest.param(python_is_gone, marks=pytest.mark.slow),
    ],
)
def test_an_environment_that_cannot_work_is_made_anew(
    checkout: Checkout, damage: Callable[[Path], None]
) -> None:
    venv.create(checkout.venv, with_pip=False, symlinks=True)
    (checkout.venv / "bin" / "left-over").touch()
    damage(checkout.venv)
    done = checkout.make()
    assert done.returncode == 0, done.stderr
    assert "was moved, is of another Python or not complete: making it anew" in done.stderr
    assert not (checkout.venv / "bin" / "left-over").exists()
    checkout.check()


def test_an_environment_without_pip_as_uv_makes_it_is_given_one(checkout: Checkout) -> None:
    venv.create(checkout.venv, with_pip=False, symlinks=True)
    (checkout.venv / "left-over").touch()
    done = checkout.make()
    assert done.returncode == 0, done.stderr
    assert (checkout.venv / "left-over").exists()
    checkout.check()


def test_a_folder_that_is_no_environment_is_left_alone(checkout: Checkout) -> None:
    (checkout.folder / "mine").mkdir()
    (checkout.folder / "mine" / "precious").touch()
    done = checkout.make(VENV="mine")
    assert done.returncode == 1
    assert done.stderr.endswith(
        "mine is there and is no virtual environment: set VENV to another folder\n"
    )
    assert (checkout.folder / "mine" / "precious").exists()


@pytest.mark.parametrize("mark", ["pyvenv.cfg", "install.log"])
def test_what_no_environment_has_is_never_removed(checkout: Checkout, mark: str) -> None:
    (checkout.folder / "mine").mkdir()
    for name in (mark, "precious"):
        (checkout.folder / "mine" / name).write_text("mine")
    done = checkout.make(VENV="mine")
    assert done.returncode == 1
    assert "mine is no virtual environment that works, and has precious in it" in done.stderr
    assert (checkout.folder / "mine" / "precious").read_text() == "mine"


def test_an_extra_is_a_name_and_one_at_most(checkout: Checkout) -> None:
    assert checkout.make("l.cal").returncode == 2
    done = checkout.make("local", "test")
    assert done.returncode == 2 and done.stderr.startswith("Usage: infra/venv.sh [EXTRA]")
    assert not checkout.venv.exists()


def test_cdpath_of_the_caller_does_not_matter(checkout: Checkout) -> None:
    done = subprocess.run(
        ["infra/venv.sh", "locl"],
        cwd=checkout.folder,
        env=checkout.env | {"CDPATH": "."},
        capture_output=True,
        text=True,
    )
    assert done.stderr.endswith("there are: local test\n")


@pytest.mark.slow
def test_venv_names_another_folder(checkout: Checkout) -> None:
    assert checkout.make(VENV="other").returncode == 0
    checkout.check(checkout.folder / "other")
    assert not checkout.venv.exists()


def test_uv_does_the_work_where_it_is(checkout: Checkout, tmp_path: Path) -> None:
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    log = tmp_path / "calls"
    uv.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >>"{log}"\n')
    uv.chmod(0o755)
    done = checkout.make("test", PATH=f"{uv.parent}:/usr/bin:/bin")
    assert (done.returncode, done.stderr) == (0, "")
    made, installed = log.read_text().splitlines()
    assert made == f"venv --seed --allow-existing --python {sys.executable} {checkout.venv}"
    assert installed == (
        f"pip install --python {checkout.venv}/bin/python --editable {checkout.folder}[test]"
    )


@pytest.mark.parametrize(
    "manager, remedy",
    [
        ("apt-get", "apt install python3 python3-venv"),
        ("dnf", "dnf install python3"),
        ("brew", "brew install python@"),
        ("", "https://www.python.org/downloads"),
    ],
)
def test_without_python_it_says_how_to_get_it(
    checkout: Checkout, tmp_path: Path, manager: str, remedy: str
) -> None:
    tools = "bash", "sed", "grep", "paste", "dirname", "mkdir", "rmdir", "ls"
    path = Path(programs(tmp_path / "bin", *tools))
    if manager:
        (path / manager).symlink_to("/bin/true")
    del checkout.env["PYTHON"]
    done = checkout.make(PATH=str(path))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("venv.sh: no Python 3.11 or newer was found. To get it: " + remedy)


def test_a_python_that_is_too_old_or_missing_is_named(checkout: Checkout) -> None:
    done = checkout.make(PYTHON="/nowhere/python")
    assert (done.returncode, done.stderr) == (
        1,
        "venv.sh: PYTHON=/nowhere/python is not Python 3.11 or newer\n",
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_checkout_that_cannot_be_written_to_is_to_be_copied(checkout: Checkout) -> None:
    checkout.folder.chmod(0o555)
    done = checkout.make()
    checkout.folder.chmod(0o755)
    assert done.returncode == 1
    assert "cannot be written to: copy it" in done.stderr


@pytest.mark.slow
def test_what_cannot_be_installed_is_one_line_and_the_next_run_tries_again(
    checkout: Checkout,
) -> None:
    pyproject = checkout.folder / "pyproject.toml"
    pyproject.write_text(PYPROJECT.replace('"backend"', '"nothing"'))
    done = checkout.make()
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert "not installed: " in line and "run this again" in line
    pyproject.write_text(PYPROJECT)
    assert checkout.make().returncode == 0
    checkout.check()
