import pytest

from support.fake_services import FakeServices


@pytest.fixture
def api() -> FakeServices:
    return FakeServices()
