"""The ranks that all tests of this folder share, and the runs made in them."""

from collections.abc import Iterator

import pytest

from tests.distributed.matrix import Pools


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    made = Pools()
    yield made
    made.close()
