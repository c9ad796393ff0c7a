"""Run what has no result yet, and write docs/evidence.md with its figures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import monotonic

from evidence import page, runs
from evidence.studies import EIGHT, FULL, QUICK, SMOKE, STUDIES

SIZES = {"full": (FULL, 8192, 5), "eight": (EIGHT, 8192, 5), "quick": (QUICK, 1024, 2), "smoke": (SMOKE, 32, 1)}
"""Plan of the images, and longest run and seeds of the theorem."""

COMMANDS = {
    "full": "make evidence",
    "eight": 'make evidence ARGS="--size eight"',
    "quick": "make evidence-quick",
    "smoke": "python -m evidence --size smoke",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="full", help="(default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="directory of the page (default: %(default)s)")
    parser.add_argument(
        "--translation-alone",
        action="store_true",
        help="run the translation alone, which has files of its own; no page",
    )
    args = parser.parse_args()
    plan, longest, theorem_seeds = SIZES[args.size]
    folder, began = args.out / "evidence", monotonic()

    def report(line: str) -> None:
        print(f"{(monotonic() - began) / 60:5.1f} min  {line}", flush=True)

    translated = None
    if plan.translation is not None:
        translated = runs.translate(folder, plan.translation, args.processes, report)
    if args.translation_alone:
        return 0
    found = {"theorem": runs.prove(folder, longest, theorem_seeds, args.processes, report)}
    rates = runs.tune(folder, plan, args.processes, report)
    for name in STUDIES:
        found[name] = runs.study(name, folder, plan, rates, args.processes, report)
    page.figures(found, plan, args.out)
    page.write(found, plan, rates, translated, COMMANDS[args.size], args.out / "evidence.md")
    print(f"{args.out / 'evidence.md'}, {args.out / 'evidence_theorem.png'}, {args.out / 'evidence_tau.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
