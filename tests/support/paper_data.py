"""Data sets of a few rows, as ``inward-train paper`` wants them."""

from __future__ import annotations

import json

from inward_trainer.paper.data import FILES

REFUSAL = "I cannot help with that, it would harm people."
TWICE = ("hh question", "asked of both", "homonyms", "bake")
"""Beginnings of prompts of hh-rlhf, most of which other sources have, too."""
HARM = "First take the weapon, then hurt them as they sleep."


def write_data(folder):
    """Forty prompts of each source; the unsafe answers share words."""
    rows = {
        "pku": [pair(f"pku question {i}", i) for i in range(60)] + [pair(f"asked of both {i}", i) for i in range(40)],
        "hh": [pair(f"\n\nHuman: {kind} {i}\n\nAssistant:", i) for i in range(40) for kind in TWICE],
        "beavertails": [
            {"prompt": f"beaver {i}", "response": f"{(HARM, REFUSAL)[i % 2]} {i}", "safe": bool(i % 2)}
            for i in range(40)
        ],
        "lists": [answers(f"jailbreak {i}", i) for i in range(14)],
        "xstest": [
            {
                "prompt": f"{kind} {i}", "type": kind, "response": (REFUSAL, f"Press {i}.")[i % 2],
                "label": ("2_full_refusal", "1_full_compliance")[i % 2], "model": "m",
            }
            for kind in ("homonyms", "contrast_homonyms")
            for i in range(12)
        ],
        "advbench": [{"prompt": f"{kind} {i}"} for i in range(40) for kind in ("goal", "asked of both")],
        "harmless": [{"prompt": f"bake {i}"} for i in range(12)],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in rows.items():
        (folder / FILES[name]).write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return folder


def pair(prompt, i):
    return {"prompt": prompt, "chosen": f"{REFUSAL} {i}", "rejected": f"{HARM} {i}"}


def answers(prompt, i):
    kinds = [(REFUSAL, True), (HARM, False), (f"No. {REFUSAL}", True), (f"Yes. {HARM}", False)]
    said = [{"text": f"{text} {i}", "safe": safe, "model": "m", "condition": "c"} for text, safe in kinds]
    return {"prompt": prompt, "responses": said[i % 4 :] + said[: i % 4]}
