"""The experiments behind the README's tables: `clap_ppo.py` with other flags, or one part replaced.

    python samples/experiments.py                    # what there is, and what is still to run
    python samples/experiments.py defaults           # one experiment with all its seeds
    python samples/experiments.py all                # everything; hours
    python samples/experiments.py report             # the README's tables
    python samples/experiments.py pictures           # samples/guidance.png and samples/method.png
    python samples/experiments.py demo RUN LOG       # samples/demo, of an evaluated run and its log

Every run is a call of `clap_ppo.main` in runs/experiments/NAME-SEED, then of `evaluate.py`. What
finishes becomes a row of `samples/results.jsonl`; what is cut is resumed by the next call. When two
run side by side, give them other names, and one thread each (OMP_NUM_THREADS=1).
"""

import json
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import clap_ppo  # noqa: E402
import evaluate  # noqa: E402

RESULTS = HERE / "results.jsonl"
RUNS = Path("runs/experiments")
PROMPTS = str(HERE / "prompts.txt")

# ==== 1. Parts of clap_ppo.py that an experiment replaces ====
policy, replay = clap_ppo.policy, clap_ppo.replay       # as they are, whatever is replaced

def with_guidance(scale):
    """`policy`, but guided wherever it acts."""
    def guided_policy(setup, rows, eta):
        mean, sigma = policy(setup, rows, eta)
        count = len(setup.prompts)
        empty = rows | {"prompt_id": rows["prompt_id"] % count + count}
        mean_of_empty, _ = policy(setup, empty, eta)
        # Guidance of means is guidance of predictions, at any eta: a mean is a x_t + b eps, both
        # passes have the same a, b and x_t, and the weights, scale and 1 - scale, add up to 1.
        return mean_of_empty + scale * (mean - mean_of_empty), sigma
    return guided_policy

def replay_with_pull(setup, rows):
    """`replay`, but guided where the adapter is off: --kl-weight pulls to the guided base model."""
    log_prob, mean, sigma = replay(setup, rows)
    if not setup.unet.get_model_status().enabled:
        mean, _ = with_guidance(5)(setup, rows, clap_ppo.ETA)
    return log_prob, mean, sigma

@torch.no_grad()
def rollout_of_ddim(setup, prompt_ids, first_noisy, generator):
    """Reward-weighted regression: finished clips of plain DDIM, each from its own noise."""
    ids = prompt_ids.repeat_interleave(setup.cfg.clips_per_prompt)
    clip_ids = torch.arange(len(ids), device=setup.device)
    rows = {"prompt_id": ids, "clip_id": clip_ids, "input_id": clip_ids}
    rows["latents"] = clap_ppo.randn(setup, len(ids), generator)
    for step in range(setup.cfg.num_steps):
        rows["step"] = torch.full_like(ids, step)
        rows["latents"], _ = policy(setup, rows, 0.0)
    return rows["latents"], rows

def regression_update(setup, rows, epoch, generator):
    """Reward-weighted regression: the diffusion loss on own clips, weighted by exp(advantage).

    Lee et al. 2023 (arXiv 2302.12192), with the weights that DDPO, section 5, calls RWR. Four
    passes over the clips, with a quarter of the epoch's updates each.
    """
    updates, count = setup.cfg.updates_per_epoch, len(rows["clip_id"])
    weights = rows["advantage"].exp()
    rows["weight"] = weights / weights.mean()
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(4)])
    for i, at in enumerate(order.tensor_split(updates)):
        part = clap_ppo.take(rows, at.to(setup.device))
        # Each clip is noised to a random step of the sampler, and that noise is to be predicted.
        step = torch.randint(setup.cfg.num_steps, (len(at),), generator=generator)
        timesteps, alpha_bar, _ = [table[step] for table in setup.schedule]
        noise = clap_ppo.randn(setup, len(at), generator)
        noisy = alpha_bar.sqrt() * part["latents"] + (1 - alpha_bar).sqrt() * noise
        condition = clap_ppo.take(setup.condition, part["prompt_id"])
        noise_pred = setup.unet(noisy, timesteps, **condition).sample
        error = (noise_pred - noise).square().flatten(1).mean(dim=1)
        loss = (error * part["weight"]).mean()
        setup.scaler.scale(loss).backward()
        norm = clap_ppo.optimizer_step(setup, epoch * updates + i)
    return {"loss": loss.item(), "grad_norm": norm}

def attention_lora(unet, rank):
    """`add_lora` on the attention alone, as DDPO has it."""
    from peft import LoraConfig, get_peft_model
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    return get_peft_model(unet, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)).eval()

# ==== 2. The experiments ====
SHORT = "--epochs 30 --eval-guidance 1"         # clips made as in training: what was learned
TEXTBOOK = "--noise-window 10 --noise-until 1"
DDPO = (f"{TEXTBOOK} --starting-noise own --epochs 15 --clips-per-prompt 16 --eval-guidance 1 "
        "--learning-rate 3e-4 --updates-per-epoch 2 --clip-range 6.25e-6 --lora-rank 4")

# name: (what the README calls it, seeds, flags, replaced parts); 0 seeds: of an earlier recipe
EXPERIMENTS: dict[str, tuple] = {
    "defaults": ("the defaults, whole run", 5, "", {}),
    "long": ("ten times as long", 1, "--epochs 1000", {}),
    "short": ("**the defaults**", 3, SHORT, {}),
    "ppo-alone": ("no KL: PPO alone", 0, "", {}),
    "kl-alone": ("advantages 0: the pull alone", 0, "", {}),
    "kl-plain": ("KL to the base without guidance", 3, f"{SHORT} --kl-weight 0.05", {}),
    "pull": ("no reward, KL to the base with guidance 5", 3, f"{SHORT} --kl-weight 0.05",
             dict(replay=replay_with_pull, group_advantages=torch.zeros_like)),
    "pull-and-ppo": ("KL to the base with guidance 5", 3, f"{SHORT} --kl-weight 0.05",
                     dict(replay=replay_with_pull)),
    "two-steps": ("noise in two steps", 3, f"{SHORT} --noise-window 2", {}),
    "all-steps": ("noise in all 10 steps, 9 trained", 3, f"{SHORT} {TEXTBOOK}", {}),
    "own-noise": ("each clip its own starting noise", 3, f"{SHORT} --starting-noise own", {}),
    "ddpo": ("DDPO's published settings, 10 steps", 3, DDPO,
             dict(add_lora=attention_lora, policy=with_guidance(5), WARMUP_UPDATES=1)),
    "regression": ("reward-weighted regression", 3, f"{SHORT} --updates-per-epoch 8",
                   dict(rollout=rollout_of_ddim, update=regression_update)),
    "no-clipping": ("no clipping", 3, f"{SHORT} --clip-range 1", {}),
    "group-2": ("64 prompts x 2 clips", 3,
                f"{SHORT} --prompts-per-epoch 64 --clips-per-prompt 2", {}),
    "guidance": ("guidance 2 in rollout and training", 3, SHORT, dict(policy=with_guidance(2))),
}

# ==== 3. Running them ====
def write_row(row: dict) -> None:
    """One line at the end of the results, its floats cut to 5 significant digits."""
    row = json.loads(json.dumps(row), parse_float=lambda digits: float(f"{float(digits):.5g}"))
    with open(RESULTS, "ab", buffering=0) as file:      # two processes do not mix their lines
        file.write((json.dumps(row) + "\n").encode())

def read_rows() -> list:
    """All results so far, in the order of the experiments above; none of what is not among them."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    order = list(EXPERIMENTS) + ["free", "bench"]
    rows = [row for row in map(json.loads, lines) if row["name"] in order]
    rows.sort(key=lambda row: (order.index(row["name"]), row["seed"], row.get("epoch", 0)))
    return rows

def runs_of(rows: list, name: str) -> list:
    """The finished runs of an experiment, by seed."""
    return [row for row in rows if row["name"] == name and "tuned" in row]

def seeds_done(name: str) -> set:
    """The seeds of which the results hold rows."""
    return {row["seed"] for row in read_rows() if row["name"] == name}

def read_metrics(run: Path) -> list:
    """The metrics of a run, a row per epoch."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]

def run_one(name: str, seed: int) -> None:
    """Train and evaluate, or go on with it, and add its rows; nothing if they are there already."""
    if seed in seeds_done(name):
        return
    _, _, flags, parts = EXPERIMENTS[name]
    run = RUNS / f"{name}-{seed}"
    argv = ["--prompts", PROMPTS, "--seed", str(seed), "--out", str(run)] + flags.split()
    if (run / "config.json").exists():
        argv = ["--resume", str(run)]
    more = dict(noises=4, snapshots=name == "long")
    if name == "defaults":                      # and what is free: guidance, the base's best of 4
        more = dict(noises=12, best=(4,), guidance=(1, 1.5, 2, 3, 5, 7))
    with ExitStack() as stack:
        for part, replacement in parts.items():
            stack.enter_context(mock.patch.object(clap_ppo, part, replacement))
        print(f"\n=== {name}, seed {seed}: {' '.join(argv)}", flush=True)
        if clap_ppo.main(argv) != 0:
            return
        result = evaluate.evaluate(run, **more)
    for row in result.pop("snapshots"):
        keys = ("reward", "judge_score", "recognition", "diversity")
        values = {key: row[key]["value"] for key in keys}
        write_row({"name": name, "seed": seed, "epoch": row["epoch"]} | values)
    for row in result.pop("best_of") + result.pop("guidance"):
        write_row({"name": "free", "seed": seed} | row)
    minutes = sum([row["seconds"] for row in read_metrics(run)]) / 60
    write_row({"name": name, "seed": seed, "flags": flags, "minutes": minutes} | result)

# ==== 4. The README's tables ====
def interval(values: list) -> tuple:
    """Mean over seeds, and half of its 95 % t-interval (NaN of one seed)."""
    from scipy import stats
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return sum(values) / len(values), half

def spread(values: list, sign: str = "+") -> str:
    """Mean and interval as "mean ± half"; the mean alone of one seed."""
    if len(values) == 1:
        return f"{values[0]:{sign}.2f}"
    mean, half = interval(values)
    return f"{mean:{sign}.2f} ± {half:.2f}"

def table(head: list, lines: list) -> str:
    """A table in Markdown."""
    rule = ["---"] * len(head)
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in [head, rule] + lines])

def values_of(rows: list, metric: str, side: str = "") -> list:
    """A figure of merit of each row; side, of runs: base, tuned, or tuned_minus_base."""
    if side:
        rows = [row[side] for row in rows]
    return [row[metric]["value"] for row in rows]

def base_to_tuned(runs: list, metric: str) -> str:
    """Means over runs as "base → tuned"."""
    base, tuned = values_of(runs, metric, "base"), values_of(runs, metric, "tuned")
    return f"{sum(base) / len(base):.2f} → {sum(tuned) / len(tuned):.2f}"

def seeds_table(rows: list) -> str:
    """The whole runs with the default settings, seed by seed, and their means."""
    runs, columns = runs_of(rows, "defaults"), ["recognition", "reward", "diversity"]
    groups = {str(run["seed"]): [run] for run in runs}
    groups["all"] = runs
    lines = []
    for title, group in groups.items():
        if not group:                           # nothing has run yet
            continue
        cells = [base_to_tuned(group, column) for column in columns]
        mended = sum([run["mended"] for run in group])
        broke = sum([run["broke"] for run in group])
        gain = spread(values_of(group, "recognition", "tuned_minus_base"))
        lines.append([title] + cells + [f"{mended} : {broke}", gain])
    return table(["seed"] + columns + ["mended : broken", "gain"], lines)

def free_table(rows: list) -> str:
    """One clip by the base model, guided, or its best of 4, and after PPO; and what it costs."""
    groups, lines = {}, []
    for row in rows:
        too_much = row.get("label") in ("tuned, guidance 5", "tuned, guidance 7")   # see the text
        if row["name"] == "free" and not too_much:
            groups.setdefault(row["label"], []).append(row)
    for label, group in groups.items():
        passes = clap_ppo.Config.num_steps * group[0].get("n", 1)
        if group[0].get("scale") != 1:
            passes *= 2
        recognition = spread(values_of(group, "recognition"), "")
        diversity = spread(values_of(group, "diversity"), "")
        lines.append([label, str(passes), recognition, diversity])
    return table(["", "U-Net passes", "recognition", "diversity"], lines)

def ablation_table(rows: list) -> str:
    """What each change does to a short run; differences paired, where the base clips are alike."""
    defaults = {run["seed"]: run for run in runs_of(rows, "short")}
    lines = []
    for name in EXPERIMENTS:
        runs, against = runs_of(rows, name), []
        if not runs or name in ("defaults", "long"):
            continue
        for run in runs:
            other = defaults.get(run["seed"])
            if name != "short" and other and other["base"] == run["base"]:
                tuned, tuned_by_defaults = values_of([run, other], "judge_score", "tuned")
                against.append(tuned - tuned_by_defaults)
        difference = spread(against) if len(against) == len(runs) else ""
        lines.append([EXPERIMENTS[name][0], base_to_tuned(runs, "recognition"), difference])
    return table(["changed", "recognition", "judge score against the defaults"], lines)

def long_table(rows: list, epochs=(100, 200, 300, 400, 600, 800, 1000)) -> str:
    """The run that goes on ten times as long, on held-out prompts."""
    found = [row for row in rows if row["name"] == "long" and row.get("epoch") in epochs]
    lines = []
    for metric in ("reward", "recognition"):
        lines.append([metric] + [f"{row[metric]:.2f}" for row in found])
    return table(["epoch"] + [str(row["epoch"]) for row in found], lines)

def bench_table(rows: list) -> str:
    """The rows that `samples/bench.py --save samples/results.jsonl` has added."""
    lines = []
    for row in rows:
        if row["name"] == "bench":
            numbers = [f"{row['seconds']:.1f} s", f"{row['overhead']:.2f}",
                       f"{row['peak_gib']:.1f} GiB"]
            lines.append([row["preset"], row["device"], str(row["clips"])] + numbers)
    return table(["preset", "device", "clips", "epoch", "over the networks alone", "memory"], lines)

def log_block() -> str:
    """What the run of samples/demo printed, without most of its epochs."""
    lines = (HERE / "demo/log.txt").read_text().splitlines()
    last = max([i for i, line in enumerate(lines) if line.startswith("epoch ")])
    return "\n".join(["```"] + lines[:3] + ["..."] + lines[last:] + ["```"])

def fill(text: str, rows: list) -> str:
    """README text with what stands between the lines <!-- NAME --> and <!-- /NAME --> replaced."""
    parts = {"log": log_block(), "seeds": seeds_table(rows), "free": free_table(rows),
             "ablations": ablation_table(rows), "long": long_table(rows),
             "bench": bench_table(rows)}
    for name, part in parts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
        if begin in text:
            head, rest = text.split(begin)
            text = head + begin + part + "\n" + end + rest.split(end)[1]
    return text

# ==== 5. The pictures, and the demo ====
def draw_guidance(rows: list) -> None:
    """Recognition against diversity, one dot per guidance, base and tuned: 95 % over seeds."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for model, title, colour, away, scales in (
            ("base", "base model", "C7", -13, (1, 1.5, 2, 3, 5, 7)),
            ("tuned", "after PPO", "C1", 6, (1, 1.5, 2, 3))):
        points = []
        for scale in scales:
            label = f"{model}, guidance {scale:g}"
            found = [row for row in rows if row.get("label") == label]
            x, x_half = interval(values_of(found, "diversity_right"))
            y, y_half = interval(values_of(found, "recognition"))
            points.append([x, y, x_half, y_half])
            axes.annotate(f"{scale:g}", (x, y), (5, away), textcoords="offset points", color=colour)
        x, y, x_half, y_half = torch.tensor(points).T
        axes.errorbar(x, y, y_half, x_half, "o-", color=colour, elinewidth=0.8, label=title)
    axes.set(xlabel="diversity of a prompt's recognised clips (mean cosine distance)",
             ylabel="clips whose prompt is recognised",
             title="held-out prompts, five seeds; at each dot the guidance it was listened to with")
    axes.legend()
    figure.savefig(HERE / "guidance.png", dpi=110)

@torch.no_grad()
def draw_method(prompt="a man whistling then lion roaring", seed: int = 2, start: int = 1) -> None:
    """One group of clips of the bundled base model, from noise to advantage: nothing is a sketch.
    The paths are the clips' latents, in the direction in which the finished ones differ most."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    cfg = clap_ppo.Config(prompts=PROMPTS)
    prompts, num_train = clap_ppo.split_prompts(cfg)
    setup = clap_ppo.load_setup(cfg, prompts, num_train)
    generator = torch.Generator().manual_seed(seed)
    end, K = start + cfg.noise_window, cfg.clips_per_prompt
    ids = torch.full((K,), prompts.index(prompt), device=setup.device)
    rows = {"prompt_id": ids, "input_id": torch.arange(K, device=setup.device)}
    paths = [clap_ppo.randn(setup, 1, generator).expand(K, -1, -1, -1)]
    for step in range(cfg.num_steps):
        rows["latents"], rows["step"] = paths[-1], torch.full_like(ids, step)
        mean, sigma = policy(setup, rows, float(start <= step < end))
        paths.append(mean + sigma * clap_ppo.randn(setup, K, generator))
    waveforms, rewards = clap_ppo.score_clips(setup, paths[-1], ids[:1])
    rewards, advantages = rewards[0], clap_ppo.group_advantages(rewards)[0]
    flat = torch.stack(paths).flatten(2).cpu()                          # (T + 1, K, D)
    centred = flat - flat[-1].mean(dim=0)
    _, _, directions = torch.linalg.svd(centred[-1], full_matrices=False)
    heights = centred @ directions[0]                                   # (T + 1, K)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplot_mosaic("LMB;LMW", width_ratios=[2.4, 1.3, 1.5])
    colour = colormaps["coolwarm_r"]((advantages / 4 + 0.5).clamp(0, 1).numpy())
    left, middle, order = axes["L"], axes["M"], rewards.argsort()
    for k in range(K):
        left.plot(heights[:, k], color=colour[k], linewidth=1.2)
    left.plot(heights[:start + 1, 0], color="black", linewidth=2)
    left.axvspan(start, end, color="gold", alpha=0.35)
    for x, text in ((0.05, "one\nnoise"), (start + 0.05, "one\naction"),
                    (end + 0.3, f"plain DDIM, to {K} different clips")):
        left.text(x, 0.98, text, va="top", transform=left.get_xaxis_transform())
    left.margins(y=0.16)
    left.set(xlabel="denoising step", title=f'{K} clips of "{prompt}"',
             ylabel="latents, main direction", xticks=range(cfg.num_steps + 1))
    middle.barh(range(K), rewards[order], color=colour[order])
    middle.axvline(rewards.mean(), color="black", linewidth=1, linestyle="--")
    for y, k in enumerate(order.tolist()):
        x = max(0.0, rewards[k].item()) + 0.04
        middle.text(x, y, f"{advantages[k]:+.1f}", va="center", fontsize=8)
    middle.set(xlabel="CLAP reward (dashed: mean); at its end the advantage", yticks=[],
               xlim=(min(0, rewards.min().item()) - 0.05, 1.25), title="compared with each other")
    for panel, k, title in (("B", order[-1], "best: made more likely"),
                            ("W", order[0], "worst: made less likely")):
        axes[panel].specgram(waveforms[k].numpy() + 1e-5, NFFT=512, noverlap=384, Fs=16000,
                             vmin=-110, cmap="magma")
        axes[panel].set(title=title, yticks=[], xticks=[])
    figure.savefig(HERE / "method.png", dpi=110)

def make_demo(run: Path, log: Path, demo: Path = HERE / "demo") -> None:
    """Replaces samples/demo by the figures of an evaluated run, and by a page of 18 of its prompts:
    12 held-out ones, and the six that the method was published with, in the toy's voice."""
    from peft import set_peft_model_state_dict
    cfg, _ = clap_ppo.parse_args(["--resume", str(run)])
    shutil.rmtree(demo, ignore_errors=True)
    demo.mkdir()
    shutil.copy(log, demo / "log.txt")
    for name in ("metrics.jsonl", "evaluation.json", "curve.png"):
        shutil.copy(run / name, demo / name)
    config = (run / "config.json").read_text()          # without this machine's folders
    (demo / "config.json").write_text(config.replace(f"{clap_ppo.HERE}/", ""))
    published = list(clap_ppo.read_prompts(HERE / "published_prompts.txt").values())
    held_out = list(clap_ppo.read_prompts(HERE / "eval_prompts.txt").values())
    prompts = published + held_out[::3][:12]
    setup = clap_ppo.load_setup(cfg, prompts, 0)        # none of them for training
    file = run / "adapter/adapter_model.safetensors"
    set_peft_model_state_dict(setup.unet, evaluate.load_file(file))
    ear = evaluate.load_judge(str(HERE / "toy/judge"))
    base, tuned = evaluate.make_base_clips(setup, ear, 1), evaluate.make_clips(setup, ear, 1)
    rows = evaluate.save_clips(demo, base, tuned, prompts, 16000, "mp3")
    for row in rows[:len(published)]:
        row["note"] = "one of the method's six published prompts, in the toy's voice"
    result = json.loads((run / "evaluation.json").read_text())
    evaluate.save_page(demo, cfg, rows, result, 16000, name="the bundled model")

# ==== 6. Command line ====
def main(argv: list) -> None:
    """Runs what is named; without a name, lists what there is and how much of it is done."""
    command, readme = (argv or ["list"])[0], HERE.parent / "README.md"
    if command == "list":
        for name, (_, seeds, flags, parts) in EXPERIMENTS.items():
            more = f" with other {', '.join(parts)}" if parts else ""
            if seeds > 0:
                print(f"{name:<12} {len(seeds_done(name))} of {seeds} seeds   {flags}{more}")
    elif command == "report":
        readme.write_text(fill(readme.read_text(), read_rows()))
    elif command == "pictures":
        draw_guidance(read_rows())
        draw_method()
    elif command == "demo":
        make_demo(Path(argv[1]), Path(argv[2]))
    else:
        names = list(EXPERIMENTS) if command == "all" else argv
        for name in set(names) - set(EXPERIMENTS):
            sys.exit(f"{name}: not one of all, report, {', '.join(EXPERIMENTS)}")
        for seed in range(5):                   # all experiments' first seeds come first
            for name in names:
                if seed < EXPERIMENTS[name][1]:
                    run_one(name, seed)


if __name__ == "__main__":
    main(sys.argv[1:])
