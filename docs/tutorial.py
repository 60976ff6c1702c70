# %% [markdown]
# # From raw preference pairs to a reward model with margins
#
# A pair says that one answer is better, but not by how much. LEGEND (arXiv 2406.08124) reads that from the hidden
# states of a language model. Here: annotate a file, look at what it says about the labels, and train TRL's
# RewardTrainer with and without the margins.
#
#     python docs/tutorial.py PAIRS.jsonl [--model smollm2] [--rows 400] [--seeds 0 1 2]
#
# PAIRS are preference pairs in any layout that `inward annotate --help` names, Anthropic's hh-rlhf for instance. Needs
# `pip install ./clients/trainer` for TRL. The margins are a real model's, if a small one; the reward models are trained
# from the bundled toy of seven million parameters, so that it takes minutes on a laptop, and proves little: put your
# own model and heads into step 1, and your own backbone into step 3, for real work.

# %%
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("pairs", type=Path)
parser.add_argument("--model", default="smollm2", help="that the margins are read from; toy takes seconds")
parser.add_argument("--rows", type=int, default=400)
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
args = parser.parse_args()
folder = Path(tempfile.mkdtemp(prefix="inward-tutorial-"))

# %% [markdown]
# ## 1. Annotate
#
# `--trl` writes the columns that RewardTrainer takes: `prompt`, `chosen`, `rejected` and `margin`, here the bin of the
# margin (0, 1/3, 2/3 or 1). `--suspicious 3` prints the three pairs whose labels contradict the model the most.

# %%
annotated = folder / "annotated.parquet"
files = [str(args.pairs), str(annotated), "--html", str(folder / "look.html")]
options = ["--model", args.model, "--trl", "--truncate", "--limit", str(args.rows), "--suspicious", "3"]
subprocess.run([sys.executable, "-m", "inward", "annotate", *files, *options], check=True)

# %% [markdown]
# What annotated stands in the file itself.

# %%
from pyarrow import parquet  # noqa: E402

about = json.loads(parquet.read_schema(annotated).metadata[b"inward"])
print(f"\nannotated by {about['head']} on {about['model']}; look through the pairs at {folder / 'look.html'}\n")

# %% [markdown]
# ## 2. Split by prompt
#
# Pairs of one prompt must not stand on both sides.

# %%
import hashlib  # noqa: E402

from datasets import Dataset  # noqa: E402

rows = [row for row in parquet.read_table(annotated).to_pylist() if len(str(row["prompt"])) < 1500]
held_out = [int(hashlib.sha256(str(row["prompt"]).encode()).hexdigest(), 16) % 4 == 0 for row in rows]
columns = ("prompt", "chosen", "rejected", "margin")
train, test = (
    [{name: row[name] for name in columns} for row, out in zip(rows, held_out, strict=True) if out == side]
    for side in (False, True)
)
print(f"{len(train)} pairs to train on, {len(test)} to judge")

# %% [markdown]
# ## 3. Train with and without
#
# The loss with a margin m is `-log sigmoid(r_chosen - r_rejected - m)`: a pair that is clearly apart has to be further
# apart. A third way, the same margin for all pairs, tells what a margin says from what its size alone does.

# %%
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed  # noqa: E402
from trl import RewardConfig, RewardTrainer  # noqa: E402

from inward.processes.wiring import TOY  # noqa: E402

backbone = str(TOY / "backbone")
tokenizer = AutoTokenizer.from_pretrained(backbone)
mean_margin = statistics.mean(row["margin"] for row in train)


def accuracy(way: str, seed: int) -> float:
    """Share of held-out pairs that a reward model trained in this way ranks as labelled."""
    set_seed(seed)
    margin = {"no margin": lambda _: 0.0, "margin": lambda row: row["margin"], "constant": lambda _: mean_margin}[way]
    data = Dataset.from_list([{**row, "margin": margin(row)} for row in train])
    model = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1, dtype="float32")
    config = RewardConfig(
        output_dir=str(folder / "trainer"), seed=seed, num_train_epochs=1, learning_rate=1e-4, max_length=512,
        gradient_checkpointing=False,
        per_device_train_batch_size=8, per_device_eval_batch_size=1, bf16=False, report_to="none", save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    judged = Dataset.from_list([{name: row[name] for name in columns[:3]} for row in test])
    trainer = RewardTrainer(
        model=model, args=config, train_dataset=data, eval_dataset=judged, processing_class=tokenizer
    )
    trainer.train()
    return float(trainer.evaluate()["eval_accuracy"])


results = {way: [accuracy(way, seed) for seed in args.seeds] for way in ("no margin", "margin", "constant")}

# %% [markdown]
# ## 4. Compare

# %%
print(f"\naccuracy on {len(test)} held-out pairs; the standard error of one is {(0.25 / len(test)) ** 0.5:.3f}")
for way, values in results.items():
    print(f"{way:10} {statistics.mean(values):.3f}   {', '.join(f'{value:.3f}' for value in values)}")
