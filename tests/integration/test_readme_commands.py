"""The README's commands, run as they stand there."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import scratch_env, until
from local_stack import ROOT, port_is_free

TERMINALS = (ROOT / "README.md").read_text().split("\n## Three terminals\n")[1].split("\n**")[0]
BLOCKS = re.findall(r"```\n(.+?)```", TERMINALS, re.DOTALL)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[[str], tuple[subprocess.Popen[bytes], Path]]]:
    """Start a command as in a terminal of its own, in a fresh clone; returns it and its output."""
    for port in (9092, 9000):
        if not port_is_free(port):
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"port {port} is in use")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    env = scratch_env(tmp_path) | {"PATH": os.environ["PATH"]}
    if (ROOT / ".local").is_dir():
        (clone / ".local").symlink_to(ROOT / ".local")  # what was fetched and built before
    started: list[subprocess.Popen[bytes]] = []

    def start(command: str) -> tuple[subprocess.Popen[bytes], Path]:
        output = tmp_path / f"output-{len(started)}"
        with output.open("wb") as stream:
            started.append(
                subprocess.Popen(
                    ["bash", "-c", f"exec {command}"],
                    **dict(cwd=clone, env=env, stdout=stream, stderr=subprocess.STDOUT),
                )
            )
        return started[-1], output

    yield start
    for process in reversed(started):
        if process.poll() is None:
            process.terminate()
            process.wait(20)


@pytest.mark.slow
def test_two_terminals_word_for_word_then_kill_9_and_audit(
    terminal: Callable[[str], tuple[subprocess.Popen[bytes], Path]],
) -> None:
    *setup, stack = [line.split("#")[0].strip() for line in BLOCKS[0].splitlines()]
    for command in setup:
        process, output = terminal(command)
        assert process.wait(300) == 0, output.read_text()
    _, output = terminal(stack)
    until(lambda: "Ready" in output.read_text(), 90, "local stack ready")
    commands = [re.search(r"^\$ (.+)$", block, re.MULTILINE) for block in BLOCKS[1:]]
    produce, consume, audit = (match[1] for match in commands if match)

    producer, sent = terminal(produce)
    consumer, written = terminal(consume)
    for n in range(2):
        name = f"Upload Successfully: s3://stock-market-local/stock_market_{n}.json"
        until(lambda name=name: name in written.read_text(), 30, name)
    for process in (producer, consumer):
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    last = sent.read_text().count("[Sent]") - 1
    before = written.read_text()
    _, written = terminal(consume)
    name = f"stock_market_{last}.json"
    until(lambda: name in before + written.read_text(), 60, f"{name}, by the second start")
    until(lambda: "assigned: test/0\n" in written.read_text(), 60, "the second start")
    audited, told = terminal(audit)
    assert audited.wait(60) == 0
    assert "nothing missing, nothing twice, every byte the same" in told.read_text()


@pytest.mark.slow
def test_what_requirements_txt_names_is_all_that_the_two_scripts_need(
    env: dict[str, str], tmp_path: Path
) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("config.py", "kafka_producer.py", "kafka_consumer.py", "requirements.txt"):
        shutil.copy(ROOT / name, checkout)
    folder = checkout / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [folder / "bin" / "pip", "install", "-q", "-r", checkout / "requirements.txt"]
    subprocess.run(install, check=True)
    for script in ("kafka_producer.py", "kafka_consumer.py"):
        command = [folder / "bin" / "python", script, "--max-messages", "3"]
        done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("Upload Successfully") == 3
