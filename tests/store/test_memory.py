"""Tests the trajectory store in the memory of this process."""

from __future__ import annotations

import uuid

import pytest

from tests.store.contract import TrajectoryStoreContract


class TestMemory(TrajectoryStoreContract):
    @pytest.fixture
    def uri(self) -> str:
        return f"memory://{uuid.uuid4().hex}/store"
