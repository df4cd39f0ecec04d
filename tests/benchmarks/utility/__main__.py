"""``make bench-utility``: all jobs that are not in the cache yet, several at a time, then the tables."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.benchmarks.utility import plan
from tests.benchmarks.utility.settings import Job

HERE = Path(__file__).parent
GRACE_S = 20.0
"""Jobs that still run so long after the time given are ended; they start anew the next time."""


def main() -> None:
    options = _options()
    options.cache.mkdir(parents=True, exist_ok=True)
    if options.key:
        _one(options)
        return
    until = time.monotonic() + options.minutes * 60
    for stage in plan.STAGES[options.jobs]:
        jobs = [job for job in stage(options.cache) if not (options.cache / f"{job.key}.json").exists()]
        publics = dict.fromkeys(job.public.key for job in jobs)
        missing = [key for key in publics if not (options.cache / key / "recipe.json").exists()]
        _run([f"public:{key}" for key in missing], options, until, threads=options.public_threads)
        _run([job.key for job in jobs], options, until, threads=options.threads)
        left = [job.key for job in jobs if not (options.cache / f"{job.key}.json").exists()]
        print(f"{stage.__name__}: {len(jobs) - len(left)} jobs done, {len(left)} left", flush=True)
    if options.jobs == "all":
        from tests.benchmarks.utility.report import write_report

        print(write_report(options.cache, options.report))
    print(f"figures: {options.cache}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--at-once", type=int, default=1, help="Jobs side by side.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e6, help="Start no job after this.")
    parser.add_argument("--public-threads", type=int, default=1, help="While public networks train.")
    parser.add_argument("--jobs", default="all", choices=sorted(plan.STAGES))
    parser.add_argument("--report", type=Path, default=HERE, help="Where tables and curves go.")
    parser.add_argument("--cache", type=Path, default=HERE.parent / "results" / "utility")
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("LACUNA_DATA", HERE.parents[3] / "shared" / "data"))
    )
    parser.add_argument("--key", help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(keys: list[str], options: argparse.Namespace, until: float, *, threads: int) -> None:
    """Each in a process of its own, so that one that fails stops nobody else."""
    waiting, running, started = list(keys), {}, time.monotonic()
    while waiting or running:
        while waiting and len(running) < options.at_once and time.monotonic() < until:
            key = waiting.pop(0)
            log = (options.cache / f"{key.replace(':', '-')}.log").open("w")
            command = [
                sys.executable,
                "-m",
                "tests.benchmarks.utility",
                "--key",
                key,
                *_passed_on(options, threads),
            ]
            running[key] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        if time.monotonic() >= until:
            waiting.clear()
        if time.monotonic() >= until + GRACE_S:
            for process in running.values():
                process.terminate()
        for key, process in list(running.items()):
            if process.poll() is not None:
                del running[key]
                words = "done" if process.returncode == 0 else f"FAILED ({process.returncode})"
                print(f"{time.monotonic() - started:7.0f} s  {key}  {words}", flush=True)
        time.sleep(0.2)


def _passed_on(options: argparse.Namespace, threads: int) -> list[str]:
    return [
        "--device", options.device, "--cache", str(options.cache), "--data", str(options.data),
        "--threads", str(threads), "--jobs", options.jobs,
    ]  # fmt: skip


def _one(options: argparse.Namespace) -> None:
    import torch

    from tests.benchmarks.utility.jobs import Bench, run_job

    torch.set_num_threads(options.threads)
    jobs: list[Job] = [job for stage in plan.STAGES[options.jobs] for job in stage(options.cache)]
    if options.key.startswith("public:"):
        wanted = options.key.removeprefix("public:")
        public = next(job.public for job in jobs if job.public.key == wanted)
        bench = Bench(public=public, data=options.data, cache=options.cache, device=options.device)
        bench.pretrain()
        return
    job = next(job for job in jobs if job.key == options.key)
    run_job(job, data=options.data, cache=options.cache, device=options.device)


main()
