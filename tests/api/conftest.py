import pytest

from support.fake_services import FakeServices


@pytest.fixture
def house() -> FakeServices:
    return FakeServices()
