"""``inward`` as it is where only its own distribution is installed, without ``inward[standard]``: run as a script."""

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
CALLED = {"scikit-learn": "sklearn"}
"""Distributions whose module has another name."""
ALSO_OURS = {"tqdm"}
"""In ``standard``, but huggingface-hub brings it as well."""


def standard() -> set[str]:
    """Modules that ``standard`` brings."""
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in extras["standard"]} - ALSO_OURS
    return {CALLED.get(name, name.replace("-", "_")) for name in names}


if __name__ == "__main__":
    sys.modules.update(dict.fromkeys(standard()))  # an import of what is None raises ModuleNotFoundError
    from inward.__main__ import main

    sys.exit(main(sys.argv[1:]))
