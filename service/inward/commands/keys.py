"""``inward keys new | list | revoke``."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from datetime import UTC, datetime, timedelta

from inward.commands.options import add_settings, settings_of
from inward.errors import SetupError

DAYS = re.compile(r"(\d{1,5})d")


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Looks after the file of API keys that --api-keys-file names: each has a name, a scope, perhaps an "
        "end and a quota, and is kept as its SHA-256. Servers read the file again when it changes."
    )
    parser.epilog = "example: inward keys new trainer --scope admin --expires 90d --api-keys-file keys.yaml"
    verbs = parser.add_subparsers(dest="verb", metavar="new|list|revoke", required=True)
    new = verbs.add_parser(
        "new",
        help="make a key",
        description="Makes a key, prints it, and writes what is kept of it into the file, which is made where there is "
        "none. The key is shown this once.",
    )
    listing = verbs.add_parser("list", help="which keys there are", description="Lists the keys of the file.")
    revoke = verbs.add_parser("revoke", help="take a key out", description="Takes a key out: it opens nothing more.")
    for verb in (new, revoke):
        verb.add_argument("name", help="by which logs and metrics call it")
    new.add_argument(
        "--scope",
        choices=("read", "update", "admin"),
        default="read",
        help="what it may do: score and look; also update and switch heads; also switch policies, sleep and wake",
    )
    new.add_argument("--expires", metavar="WHEN", help="such as 90d, 2027-01-31, or 2027-01-31T12:00:00Z")
    new.add_argument("--quota", type=int, metavar="TOKENS", help="a minute, in place of INWARD_QUOTA")
    listing.add_argument("--json", action="store_true", help="as JSON")
    for verb in (new, listing, revoke):
        add_settings(verb, ("api_keys_file",))


def run(args: argparse.Namespace) -> int:
    from inward.api import keys

    file = settings_of(args).api_keys_file
    if file is None:
        raise SetupError("which file? name it with --api-keys-file or INWARD_API_KEYS_FILE")
    if args.verb == "new":
        secret, key = keys.make_key(args.name, scope=args.scope, expires=_moment(args.expires), quota=args.quota)
        if key.expired(time.time()):
            raise SetupError(f"--expires {args.expires} is past: the key would open nothing; give a later time")
        keys.add_key(file, key)
        print(f"{key.name} is in {file}; this is its key, which is shown this once:", file=sys.stderr)
        print(secret)
    elif args.verb == "revoke":
        keys.revoke_key(file, args.name)
        print(f"{args.name} is revoked", file=sys.stderr)
    else:
        rows = [key.model_dump(mode="json", exclude={"sha256"}) for key in keys.read_keys(file)]
        for row in rows:
            print(
                json.dumps(row) if args.json else "  ".join(f"{name} {value}" for name, value in row.items() if value)
            )
    return 0


def _moment(said: str | None) -> datetime | str | None:
    days = DAYS.fullmatch(said or "")
    return datetime.now(UTC) + timedelta(days=int(days[1])) if days else said
