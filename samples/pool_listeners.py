"""Preference and recognition rates of several listeners of the blind test, pooled.

    python samples/pool_listeners.py listener-1a2b.json listener-3c4d.json

The files are those that the page offers for download at the end of its test. Counts are added up,
intervals are Wilson's at 95 %; answers of one listener are not independent, so with few listeners
and many clips each the true intervals are wider.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from clap_ppo import UserError, wilson  # noqa: E402


def read_answers(paths: list[str]) -> tuple[list[dict], int]:
    """All answers of the files and the number of listeners.

    Raises: UserError for a file that is no export, of another run, or of a listener seen before.
    """
    answers, seen, runs = [], {}, {}
    for path in paths:
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            listener, run, given = data["listener"], data["run"], data["answers"]
            for answer in given:
                found = answer["chosen"] if answer["task"] == "preference" else answer["side"]
                if found not in ("base", "tuned", "none"):
                    raise ValueError(f"an answer says {found!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a download of the listening page ({error})") from None
        if listener in seen:
            raise UserError(f"{path}: the listener of {seen[listener]} again; give one of the two")
        if runs and run not in runs:
            raise UserError(f"{path}: answers about the run {run}, but {next(iter(runs.values()))} "
                            f"is about {next(iter(runs))}; pool one run at a time")
        seen[listener], runs[run] = path, path
        answers += given
    return answers, len(seen)


def pooled_rates(answers: list[dict]) -> dict[str, dict | None]:
    """Share of pairs in which tuned was preferred (no difference: half), and of clips recognised.

    Each with its Wilson interval, or None where nothing was asked.
    """
    wins = [{"tuned": 1.0, "none": 0.5, "base": 0.0}[answer["chosen"]]
            for answer in answers if answer["task"] == "preference"]
    rates = {"preference": wins}
    for side in ("base", "tuned"):
        heard = [a for a in answers if a["task"] == "recognition" and a["side"] == side]
        rates[f"recognition_{side}"] = [float(answer["right"]) for answer in heard]
    return {name: wilson(sum(values), len(values)) if values else None
            for name, values in rates.items()}


def main(paths: list[str]) -> int:
    """Prints the pooled rates; exit code 2 and one line if a file is not usable."""
    try:
        if not paths:
            raise UserError("name the files that listeners downloaded: listener-*.json")
        answers, listeners = read_answers(paths)
    except UserError as error:
        print(f"pool_listeners.py: {error}", file=sys.stderr)
        return 2
    print(f"{listeners} listeners, {len(answers)} answers")
    for name, rate in pooled_rates(answers).items():
        print(f"{name:<18}" + ("-" if rate is None else
                               "{value:.3f} [{low:.3f}, {high:.3f}]".format(**rate)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
