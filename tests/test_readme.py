"""What the README says, against the code: settings, messages, tests."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from config import Settings

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
TESTS = "".join(path.read_text() for path in ROOT.glob("tests/**/test_*.py"))
SOURCE = "".join((ROOT / f"{name}.py").read_text() for name in ("config", "kafka_consumer"))
SOURCE += (ROOT / "kafka_producer.py").read_text()


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


def test_every_test_that_the_readme_names_exists() -> None:
    named = re.findall(r"`(test_\w+)(?:\[[^`]*\])?`", README)
    assert len(named) > 25
    assert [name for name in named if f"def {name}(" not in TESTS] == []
    files = re.findall(r"`(test_\w+\.py)`", README)
    assert [name for name in files if not (ROOT / "tests" / "integration" / name).is_file()] == []


@pytest.mark.parametrize(
    "part", [p for row in rows("When it says") for p in re.findall(r"`([^`]+)`", row[0])]
)
def test_every_message_of_the_readme_is_one_the_scripts_say(part: str) -> None:
    said = re.sub(r'"\s*\n\s*f?"', "", SOURCE)
    said = re.sub(r"%s failing, %sholding", "S3 failing, holding", said)
    said = re.sub(r"%\.0f s", "2 s", said) + "topic error_topic failing, holding at"
    if part in ("NoSuchBucket", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
        return  # S3's own words
    pieces = [piece for piece in re.split(r" ?\(?\.\.\.|: Connection refused| at test/.*", part)]
    assert all(piece.strip("() :") in said for piece in pieces if len(piece) > 3), pieces


def test_the_readme_is_two_screens_before_the_settings() -> None:
    assert README.split("\n## Settings\n")[0].count("\n") <= 100


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)", README):
        assert (ROOT / link).exists(), link
