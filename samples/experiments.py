# SPDX-License-Identifier: MIT
"""The experiments behind the README's tables: `clap_ppo.py` with other flags, or one part replaced.

    python samples/experiments.py                  # what there is, and what is still to run
    python samples/experiments.py ppo pull         # these, with all their seeds; all: a day
    python samples/experiments.py report           # writes the README's tables

Arms are other ways to train; ablations are the defaults with one change, two or three seeds. A run
is a call of `clap_ppo.main` in runs/experiments/NAME-SEED, then of `evaluate.py`, and at last some
rows of `samples/results.jsonl`. What is cut goes on with the next call. Two calls can run side by
side: give them other names, and one thread each (OMP_NUM_THREADS=1).
"""

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import evaluate

import clap_ppo

RESULTS = HERE / "results.jsonl"
RUNS = Path("runs/experiments")
PROMPTS = str(HERE / "prompts.txt")

# ==== 1. Parts of clap_ppo.py that an experiment replaces ====
policy = clap_ppo.policy            # the original
PULL_GUIDANCE = 5                   # 1 would be none


def policy_with_pull(setup, rows, eta, condition):
    """`policy`, but guided where the adapter is off and there is noise: the base model's mean to
    which --kl-weight pulls."""
    mean, sigma = policy(setup, rows, eta, condition)
    if eta == 0 or setup.unet.get_model_status().enabled:
        return mean, sigma
    # Guidance of means is guidance of predictions, at any eta: a mean is a x_t + b eps, both
    # passes have the same a, b and x_t, and the weights, 5 and 1 - 5, add up to 1.
    mean_of_empty, _ = policy(setup, rows, eta, setup.empty_condition)
    return mean_of_empty + PULL_GUIDANCE * (mean - mean_of_empty), sigma


def own_starting_latents(setup, generator):
    """`starting_latents`, but each clip has its own."""
    cfg = setup.cfg
    return clap_ppo.randn(setup, cfg.prompts_per_epoch * cfg.clips_per_prompt, generator)


# ==== 2. The experiments ====
class Experiment(NamedTuple):
    title: str              # what the README calls it
    seeds: int
    flags: str = ""
    parts: dict = {}        # of clap_ppo.py, replaced

PULL_ALONE = {"policy": policy_with_pull, "group_advantages": torch.zeros_like}
OWN_NOISE = {"starting_latents": own_starting_latents}
# What the base model has for free, measured with each run of "ppo".
GUIDANCE, BEST_OF = (1, 2, 5, 7), (4, 16)
GUIDED = [f"base, guidance {scale:g}" for scale in GUIDANCE]
ARMS = {
    "ppo": Experiment("PPO: the defaults", 5),
    "pull": Experiment("guidance distillation, no reward", 5, "--kl-weight 0.05", PULL_ALONE),
    "textbook": Experiment("PPO with the textbook's policy: as many clips", 2,
                           "--noisy-steps 9", OWN_NOISE),
    "textbook-minutes": Experiment("the same: about as many minutes", 3,
                                   "--noisy-steps 9 --epochs 50", OWN_NOISE),
    "long": Experiment("PPO, three times the epochs", 1, "--epochs 240"),
}
ABLATIONS = {
    "one-step": Experiment("noise in one step", 3, "--noisy-steps 1"),
    "own-noise": Experiment("each clip its own starting noise", 3, "", OWN_NOISE),
    "no-clipping": Experiment("no clipping", 3, "--clip-range 1e7"),
    "small-kl": Experiment("KL 0.01 to the base", 2, "--kl-weight 0.01"),
}
EXPERIMENTS = ARMS | ABLATIONS
PASSES = {"base, guidance 1": 10} | dict.fromkeys(GUIDED[1:], 20)       # of the U-Net, per clip
PASSES |= {"base, best of 4": 40, "base, best of 16": 160} | dict.fromkeys(ARMS, 10)

# ==== 3. Running them ====
def write_rows(rows: list) -> None:
    """Adds lines to the results, floats cut to 5 digits: all of a run, or none."""
    rows = json.loads(json.dumps(rows), parse_float=lambda text: round(float(text), 5))
    text = "".join([json.dumps(row) + "\n" for row in rows])
    with open(RESULTS, "ab", buffering=0) as file:      # two processes do not mix their lines
        file.write(text.encode())

def read_rows() -> list:
    """The results so far, by seed; none that was made with other flags than today's."""
    flags = {name: experiment.flags for name, experiment in EXPERIMENTS.items()}
    flags["free"] = flags["ppo"]
    rows = []
    for line in RESULTS.read_text().splitlines():
        row = json.loads(line)
        if row["flags"] == flags.get(row["name"]):
            rows.append(row)
    return sorted(rows, key=lambda row: row["seed"])

def runs_of(rows: list, name: str) -> dict:
    """The rows of an experiment's finished runs, by seed."""
    return {row["seed"]: row for row in rows if row["name"] == name and "tuned" in row}

def run_one(name: str, seed: int) -> None:
    """Train and evaluate, or go on with it, and add its rows; nothing if they are there already."""
    known = read_rows()
    if seed in runs_of(known, name):
        return
    _, _, flags, parts = EXPERIMENTS[name]
    run = RUNS / f"{name}-{seed}"
    argv = ["--prompts", PROMPTS, "--seed", str(seed), "--out", str(run)] + flags.split()
    if (run / "config.json").exists():
        argv = ["--resume", str(run)]
    guidance = best = ()
    if name == "ppo":
        guidance = GUIDANCE
        best = [n for n in BEST_OF
                if seed not in scores(known, f"base, best of {n}", "recognition")]
    with ExitStack() as stack:
        for part, replacement in parts.items():
            stack.enter_context(mock.patch.object(clap_ppo, part, replacement))
        if clap_ppo.main(argv) != 0:
            return
        result = evaluate.evaluate(run, "", 12, guidance, best, snapshots=name in ARMS)
    minutes = [0.0]                     # of training, after each epoch
    for line in (run / "metrics.jsonl").read_text().splitlines():
        minutes.append(minutes[-1] + json.loads(line)["seconds"] / 60)
    rows, same = [], {"name": name, "seed": seed, "flags": flags}
    for row in [{"epoch": 0, "label": "0"} | result["base"]] + result.pop("snapshots"):
        rows.append(same | row | {"minutes": minutes[row["epoch"]]})
    for row in result.pop("guidance") + result.pop("best_of"):
        rows.append(same | row | {"name": "free"})
    write_rows(rows + [same | {"minutes": minutes[-1]} | result])

# ==== 4. The README's tables ====
def scores(rows: list, name: str, metric: str) -> dict:
    """A figure of merit by seed: of an experiment's tuned model, or of what is free, by label."""
    found = {}
    for row in rows:
        cell = row.get("tuned", row).get(metric)
        if cell and name == row.get("label", row["name"]):      # of a snapshot that is its epoch
            found[row["seed"]] = cell["value"]
    return found

def mean(values: dict) -> float:
    """Over seeds; NaN of none."""
    return torch.tensor(list(values.values())).mean().item()

def spread(values: dict, sign: str = "") -> str:
    """Mean over seeds ± half of its 95 % t-interval; the mean alone of one or two seeds."""
    from scipy import stats
    count, text = len(values), f"{mean(values):{sign}.2f}"
    if count > 2:
        half = stats.t.ppf(0.975, count - 1) * stats.sem(list(values.values()))
        text += f" ± {half:.2f}"
    return text

def table(head: list, lines: list) -> str:
    """A table in Markdown."""
    rule = ["---"] * len(head)
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in [head, rule] + lines])

def results_table(rows: list) -> str:
    """What is free, then every arm that has run: means over seeds."""
    lines = []
    for name, passes in PASSES.items():
        found, runs = scores(rows, name, "recognition"), runs_of(rows, name)
        cells = [EXPERIMENTS.get(name, Experiment(name, 5)).title, spread(found)]
        for metric, digits in (("reward", 2), ("diversity_right", 3)):
            cells.append(f"{mean(scores(rows, name, metric)):.{digits}f}")
        cells += [str(passes), "", "", str(len(found))]
        if runs:                                # an arm
            minutes, mended, broke = float("inf"), 0, 0
            for run in runs.values():
                minutes = min(minutes, run["minutes"])      # of the least disturbed run
                mended += run["mended"]
                broke += run["broke"]
            cells[5:7] = f"{minutes:.1f}", f"{mended} : {broke}"
        if found:
            lines.append(cells)
    return table(["", "recognition", "held-out reward", "diversity, recognised",
                  "U-Net passes per clip", "minutes", "mended : broken", "seeds"], lines)

def ablation_table(rows: list) -> str:
    """The defaults with one change each, the largest gain first; paired, seed by seed."""
    defaults, entries = scores(rows, "ppo", "recognition"), []
    for name, ablation in ABLATIONS.items():
        found = scores(rows, name, "recognition")
        gains = {seed: found[seed] - defaults[seed] for seed in found.keys() & defaults.keys()}
        diversity = f"{mean(scores(rows, name, 'diversity_right')):.3f}"
        if gains:
            cells = [ablation.title, spread(gains, "+"), diversity, str(len(gains))]
            entries.append((mean(gains), cells))
    entries.sort(reverse=True)
    return table(["changed", "recognition against the defaults", "diversity, recognised", "seeds"],
                 [cells for _, cells in entries])

def fill(text: str, rows: list) -> str:
    """README text with what stands between the lines <!-- NAME --> and <!-- /NAME --> replaced."""
    log = (HERE / "demo/log.txt").read_text().splitlines()      # of most epochs nothing is shown
    log = "\n".join(["```"] + log[:2] + ["...", log[20], "..."] + log[-4:] + ["```"])
    parts = {"log": log, "results": results_table(rows),
             "ablations": ablation_table(rows)}
    for name, part in parts.items():
        head, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, rest = rest.partition(f"<!-- /{name} -->\n")
        if end:
            text = head + begin + part + "\n" + end + rest
    return text

# ==== 5. Command line ====
def main(argv: list) -> None:
    """Runs what is named; without a name, lists what there is and how much of it is done."""
    command, rows = (argv or ["list"])[0], read_rows()
    if command == "list":
        for name, (_, seeds, flags, parts) in EXPERIMENTS.items():
            print(f"{name:<17} {len(runs_of(rows, name))} of {seeds} seeds   {flags}", *parts)
    elif command == "report":
        readme = HERE.parent / "README.md"
        readme.write_text(fill(readme.read_text(), rows))
    else:
        names = list(EXPERIMENTS) if command == "all" else argv
        for name in set(names) - set(EXPERIMENTS):
            sys.exit(f"{name}: no experiment; without a name this lists them")
        for seed in range(5):                   # all experiments' first seeds come first
            for name in names:
                if seed < EXPERIMENTS[name].seeds:
                    run_one(name, seed)


if __name__ == "__main__":
    main(sys.argv[1:])
