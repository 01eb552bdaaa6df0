"""Draws samples/method.png: one group of clips of the bundled base model, from noise to advantage.

    python samples/draw_method.py

Nothing in it is a sketch: the paths are the latents of 16 real clips, projected on the direction in
which the finished clips differ most; the rewards and advantages are theirs, and so are the sounds.
"""

import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import clap_ppo  # noqa: E402

PROMPT, SEED, START = "a man whistling then lion roaring", 2, 1


def group(world) -> dict:
    """Latents (T + 1, K, C, H, W) of the K paths, waveforms (K, samples), rewards (K,)."""
    cfg, policy = world.cfg, world.policy
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.full((cfg.clips_per_prompt,), world.prompts.index(PROMPT))
    paths = [clap_ppo.randn(policy, 1, generator).expand(len(ids), -1, -1, -1)]
    for step in range(cfg.num_steps):
        noisy = START <= step < START + cfg.window
        mean, sigma = clap_ppo.denoise(policy, paths[-1], step, ids, eta=cfg.eta * noisy)
        noise = clap_ppo.randn(policy, len(ids), generator)
        paths.append(mean + sigma.view(-1, 1, 1, 1) * noise if noisy else mean)
    waveforms = clap_ppo.decode(world.pipeline, paths[-1], cfg.seconds)
    rewards = world.reward(waveforms, world.sample_rate, [PROMPT] * len(ids))
    return {"paths": torch.stack(paths), "waveforms": waveforms, "rewards": rewards}


def draw(world, found: dict, path: Path) -> None:
    """Three panels: paths, rewards with their advantages, and the sound of the extremes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rewards = found["rewards"]
    advantages = clap_ppo.group_advantages(rewards[None])[0]
    flat = found["paths"].flatten(2)
    _, _, directions = torch.linalg.svd(flat[-1] - flat[-1].mean(dim=0), full_matrices=False)
    heights = (flat - flat[-1].mean(dim=0)) @ directions[0]
    figure, axes = plt.subplot_mosaic([["paths", "rewards", "best"], ["paths", "rewards", "worst"]],
                                      figsize=(11, 4.2), layout="constrained",
                                      width_ratios=[2.4, 1.3, 1.5])
    colour = plt.get_cmap("coolwarm_r")((advantages / 4 + 0.5).clamp(0, 1).numpy())
    for k, line in enumerate(heights.T):
        axes["paths"].plot(line, color=colour[k], linewidth=1.2)
    end = START + world.cfg.window
    axes["paths"].plot(heights[:START + 1, 0], color="black", linewidth=2)
    axes["paths"].axvspan(START, end, color="gold", alpha=0.35)
    for x, text in ((0.05, "one\nnoise"), (START + 0.05, "noisy steps:\nthe actions"),
                    (end + 0.2, "plain DDIM, to 16 different clips")):
        axes["paths"].text(x, 0.98, text, va="top", transform=axes["paths"].get_xaxis_transform())
    axes["paths"].margins(y=0.16)
    axes["paths"].set(xlabel="denoising step", title=f'{len(rewards)} clips of "{PROMPT}"',
                      ylabel="latents, main direction", xticks=range(world.cfg.num_steps + 1))
    order = rewards.argsort()
    axes["rewards"].barh(range(len(rewards)), rewards[order], color=colour[order])
    axes["rewards"].axvline(rewards.mean(), color="black", linewidth=1, linestyle="--")
    for y, k in enumerate(order.tolist()):
        axes["rewards"].text(max(0.0, rewards[k].item()) + 0.04, y, f"{advantages[k]:+.1f}",
                             va="center", fontsize=8)
    axes["rewards"].set(xlabel="CLAP reward (dashed: mean); at its end the advantage", yticks=[],
                        xlim=(min(0, rewards.min().item()) - 0.05, 1.25),
                        title="compared with each other")
    for name, k in (("best", order[-1]), ("worst", order[0])):
        axes[name].specgram(found["waveforms"][k].numpy() + 1e-5, NFFT=512, noverlap=384,
                            Fs=world.sample_rate, vmin=-110, cmap="magma")
        axes[name].set(title=f"{name}: {'made more' if name == 'best' else 'made less'} likely",
                       yticks=[], xticks=[])
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    cfg, _ = clap_ppo.parse_args(["--prompts", str(HERE / "prompts.txt")])
    world = clap_ppo.load_world(cfg)
    draw(world, group(world), HERE / "method.png")
