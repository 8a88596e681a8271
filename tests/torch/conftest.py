"""What the tests of the adapter share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.opponent import one_torch_thread as one_thread


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    with one_thread():
        yield
