"""The ranks that all tests of this folder share."""

import pytest

from tests.distributed.matrix import Pools


@pytest.fixture(scope="session")
def pools():
    made = Pools()
    yield made
    made.close()
