"""``inward heads list | show | verify | push``."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from inward.backbones.fingerprint import fingerprint
from inward.commands.options import MODEL_SETTINGS, add_settings, settings_of
from inward.errors import NotFound
from inward.offline import head_versions
from inward.processes.wiring import find_model, heads_folder, open_prompts, opened_model


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = "Looks at the heads of a model."
    verbs = parser.add_subparsers(dest="verb", metavar="list|show|verify|push", required=True)
    listing = verbs.add_parser(
        "list", help="every version of every head", description="Lists every version of every head."
    )
    show = verbs.add_parser(
        "show",
        help="a head's card",
        description="Prints what the manifest of a head's active version says, for people: how it was fitted, how good "
        "it is, and what its numbers mean.",
    )
    push = verbs.add_parser(
        "push",
        help="upload a head to the hub",
        description="Uploads the active version of a head (tensors, manifest and a card) to a repository of the hub, "
        "from where `--heads hf://ORG/REPO` takes it. Needs HF_TOKEN.",
    )
    for verb in (show, push):
        verb.add_argument("name")
    push.add_argument("repository", metavar="ORG/REPO", help="made if it isn't there; several heads may share one")
    push.add_argument("--private", action="store_true", help="make it a private one")
    push.add_argument("--branch", help="other than the main one")
    verify = verbs.add_parser(
        "verify",
        help="load every head as the server would",
        description="Loads every version of every head as the server would, "
        "and says which ones it would refuse, and why. Exit status 1 if any. With recent pairs also: how well the "
        "active ones still fit them.",
    )
    recent = verify.add_mutually_exclusive_group()
    recent.add_argument("--pairs", type=Path, metavar="FILE", help="recent labelled pairs, read through the model")
    recent.add_argument("--states", type=Path, metavar="FILE", help="the same as saved states")
    for verb in (listing, show, verify):
        verb.add_argument("--json", action="store_true", help="as JSON")
    for verb in (listing, show, verify, push):
        add_settings(verb, (*MODEL_SETTINGS, "heads"))


def run(args: argparse.Namespace) -> int:
    settings = settings_of(args)
    model = find_model(settings)
    print_ = fingerprint(model.folder)
    folder = heads_folder(settings)
    if folder is None or not folder.is_dir():
        raise NotFound("there is no heads folder: name one with --heads, or make one with `inward fit … --out DIR`")
    if args.verb == "show":
        return head_versions.show(folder, args.name, as_json=args.json)
    if args.verb == "push":
        return head_versions.push(folder, args.name, args.repository, args.branch, private=args.private)
    if args.verb == "list":
        return head_versions.show_all(folder, as_json=args.json)
    read = (folder, print_, open_prompts(settings, model, 2**31).template)
    opened = partial(opened_model, settings)
    drifts = head_versions.drifts(*read, states=args.states, pairs=args.pairs, opened=opened)
    return head_versions.verify(*read, drifts, as_json=args.json)
