"""Fixtures of all tests."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[..., list[str]]:
    """What was said: lines("records") on standard output, lines() on standard error."""
    caplog.set_level(logging.INFO)

    def said(logger: str = "") -> list[str]:
        return [
            record.getMessage()
            for record in caplog.records
            if (record.name == "records") == (logger == "records")
        ]

    return said
