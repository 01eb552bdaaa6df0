# SPDX-License-Identifier: MIT
"""The pictures of the README, and samples/demo.

    python samples/pictures.py runs/seed-0             # results.png, method.png, before-after.png
    python samples/pictures.py runs/seed-0 log.txt     # and the demo, with what the run printed

The run must have been evaluated (`evaluate.py`). results.png shows the rows of results.jsonl.
"""

import argparse
import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import soundfile
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from experiments import ARMS, GUIDED, mean, read_rows, scores, table

import clap_ppo


# ==== 1. The README's pictures ====
def draw_results(rows: list) -> None:
    """Recognition and held-out reward by minutes of training: each arm, and what is free."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    best = max(GUIDED, key=lambda label: mean(scores(rows, label, "recognition")))
    metrics = "recognition", "reward"
    for axes, metric in zip(figure.subplots(1, 2), metrics, strict=True):
        for i, label in enumerate((GUIDED[0], best, "base, best of 4")):
            value = mean(scores(rows, label, metric))
            axes.axhline(value, color="grey", linestyle="--")
            axes.text(12 * i, value, label, va="bottom")
        for i, (name, arm) in enumerate(ARMS.items()):
            curves = {}
            for row in rows:
                if row["name"] == name and "epoch" in row:
                    point = row["minutes"], row[metric]["value"]
                    curves.setdefault(row["seed"], []).append(point)
            if curves:
                points = torch.tensor(list(curves.values()))        # (seeds, points, 2)
                minutes, values = points.permute(2, 1, 0)           # (points, seeds) each
                minutes = minutes.amin(1)                           # of the least disturbed run
                axes.plot(minutes, values, color=f"C{i}", linewidth=0.5)
                axes.plot(minutes, values.mean(1), "o-", color=f"C{i}", label=arm.title)
        axes.set(xlabel="minutes of training", ylabel=f"{metric} on held-out prompts")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(HERE / "results.png", dpi=110)

def draw_sound(axes, waveform, title: str) -> None:
    """Loudness by time and pitch."""
    axes.specgram(waveform + 1e-5, NFFT=512, vmin=-70, cmap="magma")
    axes.set(yticks=[], xticks=[])
    axes.set_title(title, fontsize=9)

def draw_method(prompt="a man whistling then lion roaring", seed: int = 1) -> None:
    """One group of clips of the bundled base model, from noise to advantage: nothing is a sketch.
    The paths are the clips' latents, in the direction in which the finished ones differ most."""
    cfg = clap_ppo.Config(prompts_per_epoch=1)
    setup = clap_ppo.load_setup(cfg, [prompt], 1)
    prompt_ids, paths = torch.tensor([0]), []
    policy = clap_ppo.policy

    def watched_policy(setup, rows, eta, condition):
        paths.append(rows["latents"])
        return policy(setup, rows, eta, condition)

    with mock.patch.object(clap_ppo, "policy", watched_policy):
        generator = torch.Generator().manual_seed(seed)
        latents, _ = clap_ppo.rollout(setup, prompt_ids, generator)
    waveforms, rewards = clap_ppo.score_clips(setup, latents, prompt_ids)
    advantages = clap_ppo.group_advantages(rewards)[0]
    order = advantages.argsort()
    paths = torch.stack(paths + [latents]).flatten(2)                   # (T + 1, K, D)
    _, _, directions = torch.pca_lowrank(paths[-1])
    heights = paths @ directions[:, 0]                                  # (T + 1, K)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplot_mosaic("LB;LW", width_ratios=[2.6, 1])
    colours = colormaps["coolwarm_r"]((advantages / 4 + 0.5).numpy())
    left = axes["L"]
    for k in order.flip(0):
        label = f"{rewards[0, k]:.2f}: {advantages[k]:+.1f}"
        left.plot(heights[:, k], color=colours[k], label=label)
    left.legend(title="reward: advantage", loc="lower left", fontsize=7)
    left.axvspan(0, cfg.noisy_steps, color="gold", alpha=0.35)
    left.set(xlabel="denoising step (yellow: with noise)",
             ylabel="latents, main direction", title=f'{len(latents)} clips of "{prompt}"')
    draw_sound(axes["B"], waveforms[order[-1]], "best: made more likely")
    draw_sound(axes["W"], waveforms[order[0]], "worst: made less likely")
    figure.savefig(HERE / "method.png", dpi=110)

def changed_most(run: Path) -> list:
    """The pairs on an evaluated run's page, by how much the judge's score rose: the best of each
    kind (sounds in order, several, one), then the second best of each kind, and so on."""
    rows = json.loads((run / "data.js").read_text().split("=", 1)[1].strip(";\n"))["rows"]
    rows.sort(key=lambda row: row["base"]["judge"] - row["tuned"]["judge"])
    seen = Counter()
    for row in rows:
        word = re.search("then|before|after|followed|and|while|$", row["prompt"])[0]
        kind = word in ("and", "while"), word == ""
        row["turn"] = seen[kind]
        seen[kind] += 1
    return sorted(rows, key=lambda row: row["turn"])

def draw_before_after(run: Path) -> None:
    """Three held-out prompts, base above tuned from the same noise, and what the judge hears."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(2, 3)
    for column, row in enumerate(changed_most(run)[:3]):
        for i, (side, title) in enumerate((("base", "before"), ("tuned", "after"))):
            axes = panels[i, column]
            waveform, _ = soundfile.read(run / row[side]["file"])
            draw_sound(axes, waveform, f"{title}: {row['prompt']}")
            verdict = "recognised by the judge"
            if row[side]["heard"] != row["prompt"]:
                verdict = "the judge hears: " + row[side]["heard"]
            axes.set_xlabel(verdict, fontsize=8)
    figure.savefig(HERE / "before-after.png", dpi=110)

# ==== 2. The demo ====
DEMO = """# Before and after
Made by `python samples/pictures.py {run} {log}`; the run's [settings](config.json) and
[log](log.txt). Held-out prompts, both clips from the same noise: of each kind (sounds in order,
several at once, one) those whose judge score rose most, and last the fine-tuned clip that the judge
likes least, a failure. `listen.html`, opened from a clone, plays all.\n
"""


def make_demo(run: Path, log: Path, demo: Path = HERE / "demo") -> None:
    """Replaces samples/demo by an evaluated run's page, its sounds as mp3, and six named pairs."""
    shutil.rmtree(demo, ignore_errors=True)
    (demo / "listen").mkdir(parents=True)
    (demo / "named").mkdir()
    for wav in (run / "listen").glob("*.wav"):
        waveform, rate = soundfile.read(wav)
        soundfile.write(demo / f"listen/{wav.stem}.mp3", waveform, rate, compression_level=0.8)
    shutil.copy(log, demo / "log.txt")
    for name in ("curve.png", "listen.html"):
        shutil.copy(run / name, demo)
    for name in ("config.json", "data.js"):             # without this machine's folders
        text = (run / name).read_text().replace(f"{clap_ppo.HERE}/", "")
        (demo / name).write_text(text.replace(".wav", ".mp3"))
    lines = []
    rows = changed_most(run)
    failure = min(rows, key=lambda row: row["tuned"]["judge"])
    for number, row in enumerate(rows[:5] + [failure], 1):
        cells = [row["prompt"]]
        for side, title in (("base", "before"), ("tuned", "after")):
            name = f"named/{number:02}-{row['prompt'].replace(' ', '-')}-{title}.mp3"
            shutil.copy(demo / row[side]["file"].replace(".wav", ".mp3"), demo / name)
            cells.append(f"[{title}]({name}): the judge hears *{row[side]['heard']}*")
        lines.append(cells)
    text = DEMO.format(run=run, log=log) + table(["asked for", "original", "fine-tuned"], lines)
    (demo / "README.md").write_text(text + "\n")

# ==== 3. Command line ====
def main(argv=None) -> None:
    """Writes the pictures, and the demo where a log is given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("run", type=Path, help="an evaluated run's directory")
    parser.add_argument("log", type=Path, nargs="?", help="what the run printed")
    args = parser.parse_args(argv)
    draw_results(read_rows())
    draw_method()
    draw_before_after(args.run)
    if args.log:
        make_demo(args.run, args.log)


if __name__ == "__main__":
    main()
