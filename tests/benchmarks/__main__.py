"""`make bench`, or some of its sections: python -m tests.benchmarks [SECTION ...]

    headline    how many times more tokens training from scratch needs
    curves      how many tokens our students need for plain slicing's loss
    reproduce   a few random cells of those two tables' data and of the ground truth, computed again (with NAS_REFERENCE)
    proxies     what parameters, loss, KL and task scores after few tokens say of the final result, on the ground truth
    replay      whole searches replayed on the ground truth: regret and tokens of ours, random, the largest, zero-shot and Minitron's
    samplers    GP, TPE, NSGA-II and random proposals in searches of a large space, replayed on a model of the ground truth (with NAS_REFERENCE)
    spread      how much training seeds differ on the ground truth, and what repeats of one shape tell of it
    training    tokens per second of our training loop against the loop that one writes with the transformers Trainer
    losses      peak memory of the loss and its way back at a large vocabulary
    signals     distillation from stored teacher signals against the teacher in the loop, beside the ceiling
    memory      peaks of real training steps beside the estimate
    slicing     what a student costs before its first step: time, memory, and a teacher that workers share
    simulation  proposals per second at up to 10,000 finished trials, idle workers, and every promise of a search on pretended workers
    dispatch    what it costs to hand a step to a worker, on a local Ray cluster of several nodes; one-thread training on all cores
    scoring     stock tasks through evaluation packs, against lm-eval's own path at its best batch size (with NAS_REFERENCE)
    load        the API and the store under load: leaderboards of 10,000 trials, 100 submits, 200 streams, 64 workers; memory
    search      seconds per trial by step, in a search through the running service

Seconds of one core where they are known: curves, headline and spread 8, proxies and replay 30, losses 50, simulation 55, dispatch 75, signals and
slicing 95, memory 140, load 200, search 250, samplers 260, training 430, scoring 500; reproduce takes ten minutes more the first time, while it prepares its
teachers under build/benchmarks.

Every number is a ratio against a baseline in the same run, or a held-out loss; the goal stands beside it. Speed is printed and never fails
(machines are noisy); the command fails where a committed number cannot be reproduced. campaign.py computes what is committed.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib import import_module

from rich.console import Console

SECTIONS = {
    "headline": "headline",
    "curves": "curves",
    "reproduce": "reproduce",
    "proxies": "proxies",
    "replay": "replay",
    "samplers": "samplers",
    "spread": "spread",
    "training": "training_speed",
    "losses": "losses",
    "signals": "signals",
    "memory": "memory",
    "slicing": "slicing",
    "simulation": "simulation",
    "dispatch": "dispatch",
    "scoring": "scoring",
    "load": "load",
    "search": "search_cost",
}
"""Section -> module beside this one. Its `bench()` prints, and returns False where a claim does not hold."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of: {', '.join(SECTIONS)}; all where none is named")
    chosen = parser.parse_args().sections or list(SECTIONS)
    if unknown := [name for name in chosen if name not in SECTIONS]:
        parser.error(f"sections: expected some of {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    failed = []
    for name in chosen:
        Console().rule(name, align="left")
        started = time.perf_counter()
        if not import_module(f"tests.benchmarks.{SECTIONS[name]}").bench():
            failed.append(name)
        Console().print(f"{name}: {time.perf_counter() - started:.0f} s")
    if failed:
        Console(stderr=True).print(f"claims that do not hold: {', '.join(failed)}", style="red")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
