"""What the README says, against the code: settings, messages, tests."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from config import Settings

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
INTEGRATION = ROOT / "tests" / "integration"
SAYING = ("config.py", "kafka_consumer.py", "kafka_producer.py")
SAYING += ("infra/audit.py", "infra/local_stack.py", "infra/kafka.sh", "infra/venv.sh")
SOURCE = "".join((ROOT / name).read_text() for name in SAYING)


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    lines = [line for line in section(title).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def test_the_settings_table_has_every_setting_in_order_with_its_default() -> None:
    told = []
    for names, defaults, *_ in rows("Settings"):
        said = [re.sub(r"^empty.*|^none$", "", text) for text in defaults.split(", ")]
        each = names.split(", ")
        told += list(zip(each, said * len(each) if len(said) == 1 else said, strict=True))
    assert told == [(each.name.upper(), each.metadata["default"]) for each in fields(Settings)]


def test_every_promise_names_its_test_files_and_they_exist() -> None:
    promises = rows("What is promised")
    assert [number for number, *_ in promises] == [str(n) for n in range(1, 12)]
    for _, _, files in promises:
        named = re.findall(r"`(test_\w+\.py)`", files)
        assert named
        assert [name for name in named if not (INTEGRATION / name).is_file()] == []


@pytest.mark.parametrize(
    "part",
    [p for row in rows("When something is wrong") for p in re.findall(r"`([^`]+)`", row[0])],
)
def test_every_message_of_the_readme_is_one_that_is_said(part: str) -> None:
    said = re.sub(r'"\s*\n\s*f?"', "", SOURCE)
    if part in ("NoSuchBucket", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
        return  # S3's own words
    # What stands for a value, or is one: the parts between are in the source as they are here.
    pieces = re.split(r"\.\.\.|: Connection refused|\d+ s|\d+|at test/.*|error_topic|S3 ", part)
    assert all(piece.strip("() :,-") in said for piece in pieces if len(piece) > 3), pieces


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)", README):
        assert (ROOT / link).exists(), link
