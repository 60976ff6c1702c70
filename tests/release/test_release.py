"""One version everywhere; wheels that hold what they should; lists that pip and scanners can read."""

import sys
import zipfile
from pathlib import Path

import pytest

from release import release


def test_there_is_one_version():
    assert len(set(release.versions().values())) == 1, release.versions()
    assert {"inward: pyproject.toml", "CHANGELOG.md", "Dockerfile"} <= release.versions().keys()


GOOD = {
    "inward_client/__init__.py": "",
    "inward_client/py.typed": "",
    "inward_client-1.dist-info/METADATA": "Requires-Python: >=3.11\nLicense-Expression: Apache-2.0\n",
}


def wheel(folder, name="inward_client-1-py3-none-any.whl", **more):
    with zipfile.ZipFile(folder / name, "w") as archive:
        for path, content in {**GOOD, **more}.items():
            if content is not None:
                archive.writestr(path, content)
    return folder / name


def test_a_good_wheel_is_said_to_be_one(tmp_path, capsys):
    release.check("inward_client", wheel(tmp_path))
    assert capsys.readouterr().out == "inward_client-1-py3-none-any.whl: 0.0 MiB, 3 files\n"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"inward_client/py.typed": None}, r"there is no inward_client/py\.typed"),
        ({"tests/test_a.py": ""}, r"tests/test_a\.py is in it"),
        ({"inward_client/model.pkl": ""}, r"model\.pkl is in it"),
        ({"inward_client-1.dist-info/METADATA": "Requires-Python: >=3.11"}, "no 'License-Expression"),
        ({"inward_client/large": "0123456789abcdef" * 2**17}, "more than"),
    ],
)
def test_a_wheel_that_lacks_something_or_has_too_much_is_refused(more, said, tmp_path):
    with pytest.raises(SystemExit, match=said):
        release.check("inward_client", wheel(tmp_path, **more))


def test_a_wheel_for_one_machine_only_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="not for any Python and machine"):
        release.check("inward_client", wheel(tmp_path, "inward_client-1-cp311-cp311-linux_x86_64.whl"))


INSTALLED = [
    {
        "download_info": {"url": "https://host/a.whl", "archive_info": {"hashes": {"sha256": "aa"}}},
        "metadata": {"name": "Some_Thing", "version": "1.2", "license_expression": "MIT"},
    },
    {
        "download_info": {"url": "file:///inward.whl", "archive_info": {"hashes": {"sha256": "bb"}}},
        "metadata": {"name": "inward", "version": "1.0", "license": "Apache-2.0\nand all of its text"},
    },
]


def test_the_list_for_machines_without_a_network_has_hashes_and_leaves_our_own_wheels_out():
    assert release.offline_list(INSTALLED) == "Some_Thing==1.2 --hash=sha256:aa\n"


def test_the_bill_of_materials_names_everything_by_purl_licence_and_hash():
    bill = release.materials(INSTALLED, "1.0")
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"] == {"type": "application", "name": "inward", "version": "1.0"}
    assert bill["components"] == [
        {
            "type": "library", "name": "Some_Thing", "version": "1.2", "purl": "pkg:pypi/some-thing@1.2",
            "hashes": [{"alg": "SHA-256", "content": "aa"}], "licenses": [{"expression": "MIT"}],
        },
        {
            "type": "library", "name": "inward", "version": "1.0", "purl": "pkg:pypi/inward@1.0",
            "hashes": [{"alg": "SHA-256", "content": "bb"}], "licenses": [{"license": {"name": "Apache-2.0"}}],
        },
    ]  # fmt: skip


@pytest.mark.skipif(
    not Path(sys.executable).with_name("inward").exists(), reason="inward is not installed in this environment"
)
def test_an_installation_is_tried_as_often_as_one_likes(capsys):
    for _ in range(2):
        release.smoke(Path(sys.executable), model=False)
    assert capsys.readouterr().out.count(" answers as inward on Python 3.") == 2
