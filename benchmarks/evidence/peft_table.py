"""Finds out which methods PEFT's published comparison can separate, from the history of its result files.

    python benchmarks/evidence/peft_table.py CHECKOUT [--revision REVISION] [--out reports/peft-method-comparison]

CHECKOUT is a clone of github.com/huggingface/peft with its history, as a work tree or a bare repository. The program
reads every version of `method_comparison/*/results/*.json` in the first-parent history up to REVISION. Experiment and
creation time identify a run, so that a rewritten file counts once. The folder of `--out` gets `report.txt`,
`report.html`, `runs.csv` (every run with its commit) and `ranking.csv`. The numbers are those of PEFT's authors;
nothing is measured here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from lorameter.report.blocks import (
    Axis,
    Cell,
    Document,
    Figure,
    Intervals,
    Line,
    Row,
    Section,
    Table,
    name_columns,
    to_line,
    to_lines,
    write_row,
)
from lorameter.report.html.page import save_html, write_html
from lorameter.report.terminal import render_text

TITLE = "PEFT's method comparison, and what its history says of its ranking"
CONFIDENCE = 0.95
ITEMS = {"MetaMathQA": 1319}
"""Items of a test set whose metric is the share of right answers: GSM8K `main`, split `test`."""
QUALITY = {"MetaMathQA": "test accuracy", "image-gen": "test dino_similarity"}
"""The metric by which PEFT's page ranks a task; higher is better."""
MEMORY = ("accelerator_memory_max", "cuda_memory_max")
"""The peak memory under its two names: the key was renamed when other accelerators than CUDA were supported."""
MODEL = "llama-3.2-3B-"
"""The common prefix of the names of all experiments on text."""
MIN_PAIRS = 3  # for a row in the table of repeats
OUTCOMES = ("peft_version", "base_model_name_or_path", "rank_pattern")
"""Entries of a stored adapter configuration that the run wrote and its author did not choose (AdaLoRA's ranks)."""


def git(checkout: Path, *words: str) -> str:
    """Return the output of a git command. Raises CalledProcessError."""
    done = subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, check=True, encoding="utf-8")
    return done.stdout


def read_runs(checkout: Path, revision: str, task: str) -> tuple[pd.DataFrame, dict[str, str]]:
    """Return every version of the result files of a task, oldest first, one row for each blob, and the commits that
    deleted paths.

    Columns: the identity of a run (experiment, created), its origin (commit, path, blob), its software and GPU, its
    settings by dotted name, and its figures. `rewrite` marks a later blob of the same run.
    """
    folder = f"method_comparison/{task}/results"
    history = git(
        checkout, "log", "--first-parent", "-m", "--reverse", "--raw", "--abbrev=40", "--no-renames",
        "--format=commit %H", revision, "--", folder,
    )  # fmt: skip
    found, deleted, commit = [], {}, ""
    for line in history.splitlines():
        if line.startswith("commit "):
            commit = line.split()[1][:9]
        elif line.startswith(":") and line.endswith(".json"):
            blob, path = line.split()[3], line.split("\t")[-1]
            if set(blob) == {"0"}:
                deleted[path] = commit
            else:
                found.append((commit, path, blob))
    runs = pd.DataFrame(
        {"commit": commit, "path": path, "blob": blob, **parse_run(task, json.loads(git(checkout, "show", blob)))}
        for commit, path, blob in found
    ).drop_duplicates("blob")
    runs["rewrite"] = runs.duplicated(["experiment", "created"])
    return runs, deleted


def parse_run(task: str, result: dict) -> dict:
    """Return the columns of one result file. Times are in seconds, memory in bytes."""
    run, train, meta = result["run_info"], result["train_info"], result["meta_info"]
    rows = train["metrics"]
    adapter = {key: value for key, value in (run["peft_config"] or {}).items() if key not in OUTCOMES}
    (settings,) = pd.json_normalize({"train": run["train_config"], "adapter": adapter}).to_dict("records")
    final = next((row for row in reversed(rows) if QUALITY[task] in row), {})
    return {
        "experiment": run["experiment_name"],
        "created": run["created_at"],
        "gpu": meta["system_info"].get("accelerator") or meta["system_info"].get("gpu"),
        "torch": meta["package_info"]["torch-version"],
        "transformers": meta["package_info"]["transformers-version"],
        "peft": meta["package_info"]["peft-version"],
        "seed": run["train_config"]["seed"],
        "learning_rate": run["train_config"]["optimizer_kwargs"].get("lr"),
        "settings": settings,
        "quality": final.get(QUALITY[task], math.nan),
        "memory": next((train[name] for name in MEMORY if name in train), math.nan),
        "train_time": train["train_time"],
        "step_time": sum(row.get("train time", 0.0) for row in rows if QUALITY[task] not in row),
    }


def pair_repeats(runs: pd.DataFrame, *, same_versions: bool) -> pd.DataFrame:
    """Return consecutive runs of one experiment with equal settings and GPU type, whose versions are equal or not.

    Columns: experiment, commits, and the differences (quality) or logarithms of ratios (step_time, memory), later to
    earlier. A setting that only one of the files has was added by a version and is not a change.
    """
    pairs = []
    for _, repeats in runs.sort_values("created").groupby("experiment", sort=False):
        for (_, old), (_, new) in itertools.pairwise(repeats.iterrows()):
            versions = all(old[name] == new[name] for name in ("torch", "transformers"))
            if versions is same_versions and old.gpu == new.gpu and not changed_settings(old.settings, new.settings):
                pairs.append({
                    "experiment": new.experiment, "commits": f"{old.commit}..{new.commit}",
                    "days": (pd.Timestamp(new.created) - pd.Timestamp(old.created)) / pd.Timedelta(days=1),
                    "quality": new.quality - old.quality,
                    "step_time": math.log(new.step_time / old.step_time), "memory": math.log(new.memory / old.memory),
                })  # fmt: skip
    return pd.DataFrame(pairs, columns=["experiment", "commits", "days", "quality", "step_time", "memory"])


def changed_settings(old: dict, new: dict) -> list[str]:
    """Return the names of settings that both have and that differ; lists of names are equal in any order."""
    before, after = (
        {name: sorted(map(str, value)) if isinstance(value, list) else value for name, value in settings.items()}
        for settings in (old, new)
    )
    return sorted(name for name in before.keys() & after.keys() if before[name] != after[name])


def smallest_difference(differences: pd.Series) -> float:
    """Return the difference that two equal runs exceed in 5 % of cases, from their repeats.

    Differences d of n pairs with mean 0 have the variance sum(d²) / n with n degrees of freedom, so that two equal runs
    differ by more than t(0.975, n) × its root with probability 0.05. NaN without pairs.
    """
    values = differences.dropna()
    if values.empty:
        return math.nan
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values)) * math.sqrt((values**2).mean()))


def compute_limits(task: str, ranking: pd.DataFrame, runs: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return by kind of noise the difference in quality that two experiments must exceed, (experiments,
    experiments)."""
    count = len(ranking)
    limits = {
        "numerical": np.full((count, count), smallest_difference(pair_repeats(runs, same_versions=True).quality)),
        "versions": np.full((count, count), smallest_difference(pair_repeats(runs, same_versions=False).quality)),
    }
    if task in ITEMS:
        variance = (ranking.quality * (1 - ranking.quality) / ITEMS[task]).to_numpy()
        z = stats.norm.ppf((1 + CONFIDENCE) / 2)
        limits["test items"] = z * np.sqrt(variance[:, None] + variance[None, :])
    return limits


def rank_experiments(task: str, runs: pd.DataFrame, current: set[str]) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Return the current results, best first, and the limits of each kind of noise.

    Adds a column for each kind of noise, true if an experiment is separable from the next one, and `best` and `worst`,
    the possible ranks of an experiment under the largest noise.
    """
    ranking = runs[runs.path.isin(current)].drop_duplicates("path", keep="last")
    ranking = ranking.sort_values("quality", ascending=False, ignore_index=True)
    limits = compute_limits(task, ranking, runs[~runs.rewrite])
    gap = ranking.quality.to_numpy()[:, None] - ranking.quality.to_numpy()[None, :]
    for kind, limit in limits.items():
        ranking[kind] = [*(np.diagonal(gap, 1) > np.diagonal(limit, 1)), False]
    widest = widest_limit(limits)
    ranking["best"] = 1 + (gap < -widest).sum(axis=1)
    ranking["worst"] = len(ranking) - (gap > widest).sum(axis=1)
    return ranking, limits


def widest_limit(limits: dict[str, np.ndarray]) -> np.ndarray:
    """Return the largest known limit of all kinds of noise for each pair; NaN without a known one."""
    return np.fmax.reduce(list(limits.values()))


def find_front(ranking: pd.DataFrame, runs: pd.DataFrame, limit: np.ndarray) -> pd.DataFrame:
    """Return the members of the front (more quality, less memory) with the number of experiments that could dominate
    each (`rivals`).

    An experiment is a rival if its quality is lower by at most `limit` and its memory is higher by at most the
    difference of repeats with equal versions. A member with rivals is open.
    """
    quality, memory = ranking.quality.to_numpy(), ranking.memory.to_numpy()
    tolerance = math.exp(smallest_difference(pair_repeats(runs, same_versions=True).memory))
    better = (quality[None, :] >= quality[:, None]) & (memory[None, :] <= memory[:, None])
    strictly = (quality[None, :] > quality[:, None]) | (memory[None, :] < memory[:, None])
    member = ~(better & strictly).any(axis=1)
    near = (quality[None, :] >= quality[:, None] - limit) & (memory[None, :] <= memory[:, None] * tolerance)
    np.fill_diagonal(near, False)
    return ranking.assign(rivals=near.sum(axis=1))[member]


def describe_repeats(task: str, runs: pd.DataFrame) -> Document:
    """Describe how much repeats of one configuration differ, with equal and with other versions."""
    rows: list[Row] = []
    for title, same in (("equal", True), ("other", False)):
        for commits, pairs in pair_repeats(runs, same_versions=same).groupby("commits", sort=False):
            if len(pairs) >= MIN_PAIRS:
                longer = np.exp(pairs.step_time.abs())
                rows.append(write_row(
                    str(commits), title, str(len(pairs)), f"{pairs.days.max():.0f}",
                    f"{longer.min():.2f} to {longer.max():.2f}, median {longer.median():.2f}",
                    f"{(pairs.step_time < 0).sum()}", f"{pairs.quality.abs().max():.3f}",
                    f"{pairs.memory.abs().max():.1%}",
                ))  # fmt: skip
    if not rows:
        return ()
    heads = name_columns(
        "commits", "versions", "pairs", "days", "steps, × as long", "later faster", "Δ quality", "Δ memory", left=2
    )
    note = (
        "Pairs of consecutive runs of one experiment with equal settings and GPU type. Versions: of torch and "
        "transformers. Steps: the slower run over the faster one. Δ: the largest."
    )
    return (Table(title="The same configuration, run again", heads=heads, rows=tuple(rows), notes=(to_line(note),)),)


def describe_ranking(task: str, ranking: pd.DataFrame, limits: dict[str, np.ndarray], runs: pd.DataFrame) -> Document:
    """Describe the ranking with the noises that separate neighbours, the front, the share of steps, and the learning
    rates."""
    known = {kind: limit for kind, limit in limits.items() if not np.isnan(limit).any()}
    fronts = {kind: find_front(ranking, runs, limit) for kind, limit in known.items()}
    front = find_front(ranking, runs, widest_limit(limits))
    share = 1 - ranking.step_time / ranking.train_time
    rates = ranking.learning_rate.value_counts()
    open_counts = "; ".join(f"{kind}: {(one.rivals > 0).sum()}" for kind, one in fronts.items()) or "unknown"
    lines = [
        *(
            f"{kind} noise: {ranking[kind].sum()} of {len(ranking) - 1} pairs of neighbours are separable (they must "
            f"differ by {np.median(np.diagonal(limit, 1)):.4f}, median)"
            for kind, limit in known.items()
        ),
        f"seed noise: unknown, because every run has seed {runs.seed.iloc[0]}" if runs.seed.nunique() == 1 else "",
        f"Pareto front of quality and peak memory: {len(front)} members. Open under each kind of noise: {open_counts}",
        f"{share.median():.0%} of train time is no training step (median of {len(ranking)}: evaluation, data loading, "
        "bookkeeping)",
        f"{rates.iloc[0]} of {len(ranking)} share the learning rate {rates.index[0]:g}",
    ]
    rivals = dict(zip(front.experiment, front.rivals, strict=True))
    rows = tuple(
        write_row(
            str(row.Index + 1), row.experiment, f"{row.quality:.4f}", f"{row.best}–{row.worst}" if known else "unknown",
            ", ".join(kind for kind in known if getattr(row, kind.replace(" ", "_"))) or "–",
            f"{row.memory / 2**30:.1f} GiB",
            "" if row.experiment not in rivals else "unknown" if not known
            else "open" if rivals[row.experiment] else "certain",
            row.commit,
        )
        for row in ranking.rename(columns=lambda name: name.replace(" ", "_")).itertuples()
    )  # fmt: skip
    heads = name_columns(
        "rank", "experiment", "quality", "possible", "separable from next by", "memory", "front", "commit", left=2
    )
    return (
        Section(title=f"{task}: what the ranking supports", lines=to_lines(filter(None, lines))),
        Table(title=f"Current results; quality is {QUALITY[task]}", heads=heads, rows=rows),
    )


def summarise(task: str, ranking: pd.DataFrame, limits: dict[str, np.ndarray], runs: pd.DataFrame) -> Line:
    """Summarise how many neighbours are separable, how wide the ranks are, and how much of the front is open."""
    counts = ", ".join(f"{ranking[kind].sum()} ({kind})" for kind, limit in limits.items() if not np.isnan(limit).any())
    if not counts:
        return replace(
            to_line("nothing was run again, so no two experiments are known to differ", label=task), last=True
        )
    front, ranks = find_front(ranking, runs, widest_limit(limits)), (ranking.worst - ranking.best + 1).median()
    text = (
        f"separable pairs of neighbours, of {len(ranking) - 1}, by kind of noise: {counts}; ranks that an experiment "
        f"can have: {ranks:.0f} (median); open members of the Pareto front: {(front.rivals > 0).sum()} of {len(front)}"
    )
    return replace(to_line(text, label=task), last=True)


def describe_changes(runs: pd.DataFrame, deleted: dict[str, str]) -> Iterator[str]:
    """Yield a line for each experiment whose settings changed, under its own name or when another replaced it."""
    for _, group in runs.sort_values("created").groupby("experiment", sort=False):
        for (_, old), (_, new) in itertools.pairwise(group.iterrows()):
            if names := changed_settings(old.settings, new.settings):
                yield f"settings of {new.experiment} changed in {new.commit}: {', '.join(names)}"
    for path, commit in deleted.items():
        old = runs[runs.path == path]
        method = old.experiment.iloc[-1].split("/")[0] if len(old) else ""
        for new in runs[(runs.commit == commit) & runs.experiment.str.startswith(f"{method}/")].itertuples():
            names = changed_settings(old.settings.iloc[-1], new.settings)
            changed = ", ".join(names) or "nothing"
            yield f"{new.experiment} replaced {old.experiment.iloc[-1]} in {commit}; changed: {changed}"


@dataclass(frozen=True, kw_only=True)
class Task:
    """The report of one task, its summary and chart, its runs and its ranking."""

    document: Document
    summary: Line
    figures: tuple[Figure, ...]
    runs: pd.DataFrame
    ranking: pd.DataFrame


def describe_task(checkout: Path, revision: str, task: str) -> Task:
    """Describe one task; the chart needs some known noise."""
    blobs, deleted = read_runs(checkout, revision, task)
    runs = blobs[~blobs.rewrite]
    folder = f"method_comparison/{task}/results"
    names = git(checkout, "ls-tree", "-r", "--name-only", revision, folder).split()
    ranking, limits = rank_experiments(task, blobs, set(names))
    repeats = runs.experiment.value_counts()
    removed = {path: commit for path, commit in deleted.items() if path not in names}
    lines = (
        f"{blobs.commit.nunique()} commits bring {len(blobs)} result files: {len(runs)} runs of {len(repeats)} "
        f"experiments, {(repeats > 1).sum()} repeated, up to {repeats.max()} times; {blobs.rewrite.sum()} files are "
        "rewrites of a run",
        f"{len(ranking)} are current at {revision[:9]}",
        *describe_changes(runs, removed),
    )
    marks = tuple(
        Cell(name=row.experiment.replace(MODEL, ""), value=row.quality, low=row.quality - half, high=row.quality + half)
        for row, half in zip(ranking.itertuples(), np.nan_to_num(np.diagonal(widest_limit(limits))) / 2, strict=True)
    )
    figure = Figure(
        title=f"{task}: {QUALITY[task]}",
        caption="Two experiments whose lines overlap are not separable by one run each, by the largest noise that the "
        "history shows.",
        drawing=Intervals(axis=Axis(title=QUALITY[task]), marks=marks),
        table=None,
    )
    document: Document = (
        Section(title=task, lines=to_lines(lines)),
        *describe_repeats(task, runs),
        *describe_ranking(task, ranking, limits, runs),
    )
    return Task(
        document=document,
        summary=summarise(task, ranking, limits, blobs),
        figures=(figure,) if not np.isnan(widest_limit(limits)).any() else (),
        runs=blobs.assign(task=task),
        ranking=ranking.assign(task=task),
    )


def main() -> int:
    """Write the report of all tasks."""
    parser = argparse.ArgumentParser(description=TITLE)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--revision", default="HEAD")
    parser.add_argument("--out", type=Path, default=Path("reports/peft-method-comparison"))
    options = parser.parse_args()
    revision = git(options.checkout, "rev-parse", options.revision).strip()
    folders = git(options.checkout, "ls-tree", "-d", "--name-only", revision, "method_comparison/").split()
    present = [task for task in QUALITY if f"method_comparison/{task}" in folders]
    tasks = [describe_task(options.checkout, revision, task) for task in present]
    notes = (
        f"github.com/huggingface/peft at {revision}, method_comparison/*/results; the numbers are its authors'",
        "forgetting is not compared: its definition changed in #2986 and in #3419",
        f"separable: by a two-sided test of each pair at {CONFIDENCE:.0%}, without correction for the number of pairs; "
        "test items: the answers of two methods are taken as independent",
    )
    document: Document = (
        Section(title=TITLE, lines=(*(task.summary for task in tasks), *to_lines(notes))),
        *(block for task in tasks for block in task.document),
    )
    text = render_text(document, width=160, coloured=False)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "report.txt").write_text(text)
    page = write_html(document, title=TITLE, figures=[figure for task in tasks for figure in task.figures])
    save_html(page, options.out / "report.html")
    every = pd.concat([task.runs for task in tasks]).drop(columns=["settings", "blob"])
    every.to_csv(options.out / "runs.csv", index=False)
    ranked = pd.concat([task.ranking for task in tasks]).drop(columns=["settings", "blob", "rewrite"])
    ranked.to_csv(options.out / "ranking.csv", index=False)
    print(text, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
