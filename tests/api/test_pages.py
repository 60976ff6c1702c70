"""The pages as they are served; ``tests/browser`` has them in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

from inward.api.routes import pages
from inward.offline.annotate.decisions import key_of
from inward_client.rows import DataError, read_pair
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


TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Go"},
]
SAID = [{"role": "assistant", "content": "yes"}]
TEXTS = {"chosen": "yes", "rejected": "no"}
CHATS = {"chosen": SAID, "rejected": [{"role": "assistant", "content": "no\x7f"}]}
HH = "\n\nHuman: hi\n\nAssistant: what?\n\nHuman: more\n\nAssistant:"
ROWS = [
    {"prompt": "q", **TEXTS},
    {"prompt": '\x7f\u2028é\U0001f600"\\\n', **TEXTS},
    {"prompt": TURNS, **TEXTS, "id": 3},
    {"messages": TURNS, **CHATS},
    {"prompt": "q", **CHATS},
    {"chosen": [*TURNS, *SAID], "rejected": [*TURNS, {"role": "assistant", "content": "no"}]},
    {"prompt": TURNS, "chosen": [*TURNS, *SAID], "rejected": [*TURNS, *SAID]},
    {"prompt": [{"from": "human", "value": "q"}], **CHATS},
    {"prompt": "q", "system": "Be brief.", **TEXTS},
    {"prompt": TURNS, "system": "Be brief.", **CHATS},
    {"prompt": HH, **TEXTS},
    {"chosen": f"{HH} yes", "rejected": f"{HH} no"},
    {"prompt": HH, "chosen": f"{HH} yes", "rejected": f"{HH} no"},
    {"prompt": "q", "chosen": "yes"},
    {"chosen": "yes", "rejected": "no"},
    {"prompt": "q", "images": ["x"], **TEXTS},
    {"prompt": "q", "chosen": TURNS, "rejected": TURNS},
    {"prompt": TURNS, "chosen": [*TURNS[2:], *SAID], "rejected": [*TURNS[:1], *SAID]},
    {"chosen": [*TURNS, *SAID], "rejected": [*TURNS[:1], *SAID]},
]


@pytest.mark.skipif(shutil.which("node") is None, reason="no node")
def test_the_page_reads_a_row_as_annotate_does_and_knows_its_pair_by_the_same_key():
    script = f"""
      import {{ read }} from "{(pages.FOLDER / "rows.js").as_uri()}";
      import {{ keyOf }} from "{(pages.FOLDER / "keys.js").as_uri()}";
      function of(row) {{
        try {{
          const one = read(row);
          return [one, keyOf(one.prompt, one.chosen, one.rejected)];
        }} catch {{
          return null;
        }}
      }}
      console.log(JSON.stringify({json.dumps(ROWS)}.map(of)));
    """
    told = subprocess.run(["node", "--input-type=module", "-e", script], capture_output=True, text=True, check=True)
    for row, found in zip(ROWS, json.loads(told.stdout), strict=True):
        try:
            pair = read_pair(row)
        except DataError:
            assert found is None, row
        else:
            assert found == [pair.body(), key_of(pair)], row
