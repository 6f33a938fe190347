"""Fixtures and markers shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

_SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared folder beside the repository; tests that need it are skipped without it."""
    if not _SHARED.is_dir():
        pytest.skip(f"needs the shared folder beside the repository: {_SHARED} does not exist")
    return _SHARED
