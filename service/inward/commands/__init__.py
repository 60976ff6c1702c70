"""One module for each command: ``add(parser)`` gives it its options, ``run(args)`` does it.

A module is imported when its command is called, and imports what it needs when it runs.
"""

from collections.abc import Mapping
from types import MappingProxyType

COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "serve": "serve a model and its heads over HTTP",
        "api": "talk HTTP, and leave the scoring to workers behind a Redis",
        "worker": "own a backbone and score what API replicas put into a Redis",
        "fit": "fit a head",
        "evaluate": "judge a head",
        "annotate": "add margins and confidences to a file of preference pairs",
        "bench": "measure this machine",
        "heads": "list, show and verify heads",
        "keys": "make, list and revoke API keys",
        "info": "print the resolved settings",
        "dead-letters": "jobs that were given up because they ended several workers",
        "completion": "print a completion script for a shell",
    }
)
"""What each command is for; so that the list of them, and a mistyped one, cost no import."""
