"""``make bench-utility``: all jobs that are not in the cache yet, several at a time, then the tables."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from tests.benchmarks.utility import plan

HERE = Path(__file__).parent
GRACE_S = 20.0
"""Jobs that still run so long after the time given are ended; they start anew the next time."""


def main() -> None:
    options = _options()
    options.cache.mkdir(parents=True, exist_ok=True)
    if options.key:
        _compute(options)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    until = time.monotonic() + options.minutes * 60
    for stage in plan.STAGES[options.jobs]:
        jobs = [job for job in stage(options.cache) if not (options.cache / f"{job.key}.json").exists()]
        publics = dict.fromkeys(job.public.key for job in jobs)
        missing = [key for key in publics if not (options.cache / key / "recipe.json").exists()]
        _run([f"public:{key}" for key in missing], options, until, threads=options.public_threads)
        _run([job.key for job in jobs], options, until, threads=options.threads)
        left = [job.key for job in jobs if not (options.cache / f"{job.key}.json").exists()]
        print(f"{stage.__name__}: {len(jobs) - len(left)} jobs done, {len(left)} left", flush=True)
        if options.jobs != "toy":
            from tests.benchmarks.utility.report import write_report

            write_report(options.cache, options.report, run=options.jobs)
    if options.jobs != "toy":
        print((options.report / "tables.md").read_text())
    print(f"figures: {options.cache}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--at-once", type=int, default=1, help="Jobs side by side.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e6, help="Start no job after this.")
    parser.add_argument("--public-threads", type=int, default=1, help="While public networks train.")
    parser.add_argument("--jobs", default="two_cores", choices=sorted(plan.STAGES))
    parser.add_argument("--report", type=Path, default=HERE, help="Where tables and curves go.")
    parser.add_argument("--cache", type=Path, default=HERE.parent / "results" / "utility")
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("LACUNA_DATA", HERE.parents[3] / "shared" / "data"))
    )
    parser.add_argument("--key", action="append", help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(keys: list[str], options: argparse.Namespace, until: float, *, threads: int) -> None:
    """In processes of their own; one after the other in one process where none shall run beside it."""
    groups = [[key] for key in keys] if options.at_once > 1 else [keys] if keys else []
    running: list[subprocess.Popen[bytes]] = []
    try:
        while groups or running:
            while groups and len(running) < options.at_once and time.monotonic() < until:
                command = [
                    sys.executable,
                    "-m",
                    "tests.benchmarks.utility",
                    *(f"--key={key}" for key in groups.pop(0)),
                    *_passed_on(options, threads, until),
                ]
                running.append(subprocess.Popen(command))
            if time.monotonic() >= until:
                groups.clear()
            if time.monotonic() >= until + GRACE_S:
                return
            running = [process for process in running if process.poll() is None]
            time.sleep(0.2)
    finally:
        for process in running:
            process.terminate()
            process.wait()


def _passed_on(options: argparse.Namespace, threads: int, until: float) -> list[str]:
    return [
        "--device", options.device, "--cache", str(options.cache), "--data", str(options.data),
        "--threads", str(threads), "--jobs", options.jobs,
        "--minutes", str((until - time.monotonic()) / 60),
    ]  # fmt: skip


def _compute(options: argparse.Namespace) -> None:
    """The jobs named; one that fails is reported, and stops nobody else."""
    import torch

    from tests.benchmarks.utility.jobs import Bench, run_job

    torch.set_num_threads(options.threads)
    started, until = time.monotonic(), time.monotonic() + options.minutes * 60
    jobs = {job.key: job for stage in plan.STAGES[options.jobs] for job in stage(options.cache)}
    benches = {
        job.public.key: Bench(
            public=job.public, data=options.data, cache=options.cache, device=options.device
        )
        for job in jobs.values()
    }
    for key in options.key:
        if time.monotonic() >= until:
            break
        words = "done"
        try:
            if key.startswith("public:"):
                benches[key.removeprefix("public:")].pretrain()
            else:
                run_job(jobs[key], benches[jobs[key].public.key])
        except Exception:
            traceback.print_exc()
            words = "FAILED"
        print(f"{time.monotonic() - started:7.0f} s  {key}  {words}", flush=True)


main()
