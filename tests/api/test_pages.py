"""The pages as they are served; ``tests/browser`` has them in a browser."""

from __future__ import annotations

import re

import pytest

from inward.api.routes import pages
from support.fake_services import FakeServices, error

NAMES = sorted(pages._names())
OWN = [name for name in NAMES if not name.startswith("swagger/")]


@pytest.mark.parametrize(("path", "title"), [("/", "Inward · playground"), ("/docs", "Inward · API")])
async def test_a_page_comes_with_a_policy_that_lets_nothing_from_elsewhere_in(api, path, title):
    page = await api.get(path)
    assert f"<title>{title}</title>" in page.text
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy and "unsafe-eval" not in policy
    linked = re.findall(r'(?:src|href)="(/[^"]+)"', page.text)
    for link in linked:
        assert (await api.get(link)).status_code == 200, link


@pytest.mark.parametrize("name", NAMES)
async def test_a_part_has_its_type_and_is_not_sent_twice(api, name):
    part = await api.get(f"/playground/{name}")
    assert part.status_code == 200
    assert part.headers["content-type"] == pages.TYPES[name[name.rindex(".") :]]
    again = await api.get(f"/playground/{name}", headers={"if-none-match": part.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", [name for name in OWN if name.endswith(".js")])
def test_modules_import_what_is_there_and_no_page_names_another_host(name):
    text = (pages.FOLDER / name).read_text(encoding="utf-8")
    for imported in re.findall(r'from "\./([^"]+)"', text):
        assert imported in NAMES
    assert set(re.findall(r"https?://[^\"'`\s]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "localStorage" not in text and "innerHTML" not in text


@pytest.mark.parametrize("name", ["", "nothing.js", "../routes/pages.py", "..%2Froutes%2Fpages.py", "swagger/LICENSE"])
async def test_nothing_else_is_given_out(api, name):
    response = await api.get(f"/playground/{name}")
    assert (response.status_code, error(response)["code"]) == (404, "not_found")


async def test_a_key_is_needed_and_a_browser_is_asked_for_it():
    api = FakeServices(keys=frozenset({"secret"}))
    for path in ("/", "/docs", "/playground/app.js"):
        response = await api.get(path)
        assert response.status_code == 401
        assert "Basic" in response.headers["www-authenticate"]
        assert (await api.get(path, auth=("any", "secret"))).status_code == 200
