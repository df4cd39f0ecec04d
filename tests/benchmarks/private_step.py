"""A private step's gradients against a plain step on the same samples, in time and in peak memory.

One step sums the clipped gradients of all patients; the plain step is one forward and backward pass over the
same samples. Peers in the same run: Opacus' hooks, functorch and ghost clipping. On a CPU: one thread, CPU
seconds (so that other programs on the machine weigh little), peak resident memory of a process of its own.
On a GPU: CUDA events, peak allocated memory, with and without bfloat16 autocast; peers that do not fit
say so.

``python -m tests.benchmarks private_step`` for the table of a CPU; ``python -m tests.benchmarks.private_step
--device cuda`` for a GPU's, which needs torch, numpy, monai and einops (and opacus for its rows) alone.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from privacy.dp.book_keeping import BookKeeping
from privacy.dp.clipping import clip_factors
from privacy.dp.layer_gradients import convolution_weight
from privacy.dp.microbatch_gradients import ClippedTotal
from shared.model.denoiser import build_denoiser, parameter_subset
from shared.model.presets import PRESETS, ModelPreset

CLIP = 0.1
N_CONDITIONS = 2
REPEATS = 5
ONE_DRAW_A_PASS = "engine, 1 draw a pass"
PEERS = ("opacus hooks", "opacus functorch", "opacus ghost")
Step = Callable[[], object]


def presets() -> dict[str, ModelPreset]:
    """``tiny`` and ``base`` of the table; until that has a base, one of 29M parameters."""
    base = replace(
        PRESETS["tiny"], name="base", denoiser_channels=(64, 128, 256), head_channels=32,
        attention_levels=(False, False, True),
    )  # fmt: skip
    return {"tiny": PRESETS["tiny"], "base": PRESETS.get("base", base)}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One table: a network, a batch, and how it is grouped into patients."""

    preset: str
    edge: int
    samples: int
    draws: int
    microbatch: int
    peers: tuple[str, ...] = ()
    repeats: int = REPEATS

    @property
    def title(self) -> str:
        """For people."""
        return (
            f"{self.preset}, latents of {self.edge}^3, {self.samples} samples: {self.samples // self.draws} "
            f"patients x {self.draws} draws, microbatches of {self.microbatch} patients"
        )


CPU_CASES = (
    Case(preset="tiny", edge=8, samples=64, draws=1, microbatch=8, peers=PEERS),
    Case(preset="tiny", edge=8, samples=64, draws=4, microbatch=8),
    Case(preset="tiny", edge=8, samples=64, draws=8, microbatch=4),
    Case(preset="base", edge=16, samples=4, draws=1, microbatch=2, peers=PEERS),
    Case(preset="base", edge=16, samples=4, draws=4, microbatch=1, peers=(ONE_DRAW_A_PASS,)),
)
CUDA_CASES = (
    Case(preset="tiny", edge=8, samples=4096, draws=1, microbatch=512, repeats=3),
    Case(preset="tiny", edge=8, samples=4096, draws=4, microbatch=256, repeats=3),
    Case(preset="tiny", edge=8, samples=512, draws=1, microbatch=512, peers=PEERS, repeats=3),
    Case(preset="base", edge=16, samples=256, draws=1, microbatch=64, repeats=3),
    Case(preset="base", edge=16, samples=256, draws=4, microbatch=64, repeats=3),
    Case(preset="base", edge=16, samples=256, draws=8, microbatch=32, repeats=3),
    Case(preset="base", edge=16, samples=64, draws=1, microbatch=64, peers=PEERS, repeats=3),
)


class Bench:
    """A network, a batch of samples (patient after patient) and the steps to compare."""

    def __init__(self, case: Case, device: str, autocast: torch.dtype | None = None) -> None:
        self.case, self.device, self.autocast = case, device, autocast
        preset = presets()[case.preset]
        self.network = build_denoiser(preset, n_conditions=N_CONDITIONS).to(device)
        self.params = parameter_subset(self.network, "all")
        generator = torch.Generator().manual_seed(0)
        shape = (case.samples, preset.latent_channels, *(case.edge,) * 3)
        self.batch = tuple(
            part.to(device)
            for part in (
                torch.randn(shape, generator=generator),
                torch.randint(0, N_CONDITIONS, (case.samples,), generator=generator),
                torch.rand(case.samples, generator=generator),
                torch.randn(shape, generator=generator),
            )
        )

    def losses(self, network: Any, batch: tuple[Tensor, ...]) -> Tensor:
        """Flow loss of each sample (:func:`shared.model.diffusion.per_sample_loss`, here without scipy)."""
        z_BCDHW, condition_B, t_B, noise_BCDHW = batch
        t = t_B.view(-1, 1, 1, 1, 1)
        with torch.autocast(self.device, dtype=self.autocast, enabled=self.autocast is not None):
            velocity = network((1 - t) * z_BCDHW + t * noise_BCDHW, t_B, condition_B)
        return (velocity.float() - (noise_BCDHW - z_BCDHW)).square().flatten(1).mean(dim=1)

    def plain(self) -> tuple[Tensor, ...]:
        """Forward and backward pass, gradients of the mean loss."""
        return torch.autograd.grad(self.losses(self.network, self.batch).mean(), [p for _, p in self.params])

    def engine(self, samples: int | None = None, draws_per_pass: int | None = None) -> Tensor:
        """Clipped sum over the patients of the first ``samples`` samples, as ``PatientGradients`` does it."""
        case = self.case
        size = case.microbatch * case.draws
        total = ClippedTotal(
            torch.zeros(sum(p.numel() for _, p in self.params), dtype=torch.float64, device=self.device)
        )
        book = BookKeeping(self.network, self.params, case.microbatch)
        with book.hooked() as network:
            for start in range(0, samples or case.samples, size):
                part = tuple(x[start : start + size] for x in self.batch)
                by_patient = [x.reshape(-1, case.draws, *x.shape[1:]) for x in part]
                for draws in torch.arange(case.draws).split(draws_per_pass or case.draws):
                    some = tuple(x[:, draws].flatten(0, 1) for x in by_patient)
                    torch.autograd.backward(self.losses(network, some).sum() / case.draws)
                gradients = book.collect()
                gradients.add_scaled(total, clip_factors(gradients.squared_norms(), CLIP))
        return total.vector()

    def one_by_one(self, patients: int) -> Tensor:
        """The definition: a backward pass for each patient."""
        total = torch.zeros(sum(p.numel() for _, p in self.params), dtype=torch.float64, device=self.device)
        for patient in range(patients):
            rows = slice(patient * self.case.draws, (patient + 1) * self.case.draws)
            loss = self.losses(self.network, tuple(x[rows] for x in self.batch)).mean()
            grads = torch.autograd.grad(loss, [p for _, p in self.params])
            row = torch.cat([g.flatten() for g in grads]).double()
            total += row * min(1.0, CLIP / float(row.norm()))
        return total

    def opacus(self, kind: str) -> Step:
        """Opacus' step up to the clipped sum. It clips samples: one draw a patient."""
        from opacus.grad_sample import GradSampleModule
        from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
            GradSampleModuleFastGradientClipping,
        )
        from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping

        self.network.train()
        options: dict[str, Any] = {
            "noise_multiplier": 0.0,
            "max_grad_norm": CLIP,
            "expected_batch_size": self.case.samples,
        }
        sgd = torch.optim.SGD(self.network.parameters(), lr=0.1)
        if kind == "opacus ghost":
            ghost = GradSampleModuleFastGradientClipping(
                self.network, max_grad_norm=CLIP, use_ghost_clipping=True, loss_reduction="mean"
            )
            ghost_optimizer = DPOptimizerFastGradientClipping(sgd, **options)

            def two_passes() -> None:
                ghost_optimizer.zero_grad()
                losses_B = self.losses(ghost, self.batch)
                losses_B.mean().backward(retain_graph=True)
                coefficients_B = ghost.get_clipping_coef()
                ghost_optimizer.zero_grad()
                ghost.disable_hooks()
                (coefficients_B * losses_B).sum().backward()
                ghost.enable_hooks()
                ghost_optimizer.accumulate()

            return two_passes
        wrapped = GradSampleModule(
            self.network, loss_reduction="mean", force_functorch=kind == "opacus functorch"
        )
        optimizer = DPOptimizer(sgd, **options)

        def hooks() -> None:
            optimizer.zero_grad()
            self.losses(wrapped, self.batch).mean().backward()
            optimizer.clip_and_accumulate()

        return hooks

    def step(self, name: str) -> Step:
        """A step by its row's name."""
        own: dict[str, Step] = {
            "plain step": self.plain,
            "engine": self.engine,
            ONE_DRAW_A_PASS: partial(self.engine, draws_per_pass=1),
        }
        return own.get(name) or self.opacus(name)


def run() -> str:
    """The table of a CPU, one thread, with a profile of the engine's steps."""
    torch.set_num_threads(1)
    tables = [_table(case, "cpu") for case in CPU_CASES]
    tables += [_draws_table(), _whole_update_table(), _profile(CPU_CASES[0]), _profile(CPU_CASES[3])]
    return "\n\n".join(tables)


def _table(case: Case, device: str, autocast: torch.dtype | None = None) -> str:
    lines = [case.title + (f", autocast {autocast}" if autocast else "")]
    lines.append(f"{'':28}{'median s':>12}{'ratio':>8}{'peak MiB':>12}{'ratio':>8}")
    base: tuple[float, float] | None = None
    for name in ("plain step", "engine", *case.peers):
        seconds, mebibytes = _measure(case, name, device, autocast)
        if base is None:
            base = seconds, mebibytes
        ratios = seconds / base[0], mebibytes / base[1]
        lines.append(f"{name:28}{seconds:12.4f}{ratios[0]:8.2f}{mebibytes:12.0f}{ratios[1]:8.2f}")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def _measure(case: Case, name: str, device: str, autocast: torch.dtype | None) -> tuple[float, float]:
    """(median seconds, peak MiB), in a process of its own on a CPU; not a number where it does not fit."""
    if device == "cpu":
        command = [sys.executable, "-m", "tests.benchmarks.private_step", "--measure", name]
        command += ["--case", str(CPU_CASES.index(case))]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds, mebibytes = (float(word) for word in done.stdout.split()[-2:])
        return seconds, mebibytes
    gc.collect()
    torch.cuda.empty_cache()
    try:
        return _measure_cuda(Bench(case, device, autocast).step(name), case.repeats)
    except (torch.OutOfMemoryError, RuntimeError, ImportError) as error:
        print(f"{name}: {type(error).__name__}: {str(error)[:150]}", file=sys.stderr, flush=True)
        return float("nan"), float("nan")


def _measure_cpu(case: Case, name: str) -> tuple[float, float]:
    """CPU seconds of one thread, and the peak of resident memory over what stood before the network did."""
    torch.set_num_threads(1)
    if name.startswith("opacus"):
        import opacus.optimizers  # noqa: F401
    before = _status("VmRSS")
    bench = Bench(case, "cpu")
    step = bench.step(name)
    # A minute or more a step: measured once, without a step to warm up.
    slow = name == "opacus ghost"
    if not slow:
        step()
    Path("/proc/self/clear_refs").write_text("5")
    times = []
    for _ in range(1 if slow else case.repeats):
        started = time.process_time()
        step()
        times.append(time.process_time() - started)
    return statistics.median(times), (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    """A figure of this process in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _measure_cuda(step: Step, repeats: int) -> tuple[float, float]:
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        started.record()  # type: ignore[no-untyped-call]
        step()
        ended.record()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        times.append(started.elapsed_time(ended) / 1e3)  # type: ignore[no-untyped-call]
    return statistics.median(times), torch.cuda.max_memory_allocated() / 2**20


def _draws_table() -> str:
    """16 patients of ``tiny`` with 8 draws against the same with 1, microbatches of 4 and 8 patients."""
    few = Bench(replace(CPU_CASES[0], samples=16), "cpu")
    many = Bench(replace(CPU_CASES[2], samples=128), "cpu")
    times: dict[str, list[float]] = {"1 draw": [], "8 draws": []}
    for turn in range(REPEATS + 1):
        for name, bench in (("1 draw", few), ("8 draws", many)):
            started = time.process_time()
            bench.engine()
            if turn:
                times[name].append(time.process_time() - started)
    one, eight = (statistics.median(values) for values in times.values())
    return f"tiny, 16 patients: 8 draws cost {eight / one:.2f} times 1 draw ({eight:.3f} s, {one:.3f} s)"


def _whole_update_table() -> str:
    """What surrounds the clipped sum in a site's update: draws, rounding, clamping, integer noise."""
    import numpy as np

    from privacy.dp.calibration import propose_privacy
    from privacy.dp.noise import noise_share
    from privacy.dp.quantization import quantize
    from privacy.secret_random import SecretRandom

    lines = ["rest of an update: rounding, clamping and integer noise, in CPU seconds"]
    for name, preset in presets().items():
        network = build_denoiser(preset, n_conditions=N_CONDITIONS)
        d = sum(p.numel() for p in network.parameters())
        plan = propose_privacy(
            mode="distributed", epsilon=8.0, delta=1e-5, clip_norm=0.3, rounds=30, n_sites=3, threshold=3,
            max_colluding=1, dimension=d, declared_patients=48, draws_per_patient=4,
        ).execution  # fmt: skip
        started = time.process_time()
        quantize(np.zeros(d), grid_step=plan.gradient_grid_step, clamp_steps=plan.clamp_steps)
        noise_share(plan, SecretRandom())
        lines.append(f"{name:8}{d:12,} parameters{time.process_time() - started:10.3f}")
    return "\n".join(lines)


def _profile(case: Case) -> str:
    """Where the engine's time goes."""
    from torch.profiler import profile

    bench = Bench(case, "cpu")
    bench.engine()
    with profile() as recorded:
        bench.engine()
    table = recorded.key_averages().table(
        sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=36
    )
    columns = [line[:110].rstrip() for line in table.splitlines() if "USDT" not in line]
    return f"profile of the engine, {case.title}\n" + "\n".join(columns)


def run_cuda() -> None:
    """Tables of a GPU, flushed one by one: steps (small batches first), exactness, forms of convolutions."""
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    for case in sorted(CUDA_CASES, key=lambda case: case.samples):
        for low in (None, torch.bfloat16):
            if importlib.util.find_spec("opacus") is None or low is not None:
                case = replace(case, peers=())
            print(_table(case, "cuda", low), "\n", flush=True)
            torch.cuda.empty_cache()
    print(_exactness_table(), flush=True)
    print(_forms_table(), flush=True)


def _forms_table() -> str:
    """Each form of the per-patient weight gradient beside cuDNN's for the whole batch, TF32 and bfloat16."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    lines = ["3^3 convolutions: milliseconds of the plain weight gradient, then ratios to it"]
    for patients, draws, c, o, edge in (
        (64, 1, 48, 48, 8), (64, 4, 48, 48, 8), (64, 1, 96, 96, 4), (32, 1, 64, 64, 16), (16, 4, 64, 64, 16),
        (32, 1, 128, 128, 16), (8, 4, 128, 128, 16), (32, 1, 256, 256, 8), (8, 4, 256, 256, 8),
        (32, 1, 256, 256, 4), (8, 1, 128, 128, 32),
    ):  # fmt: skip
        for dtype in (torch.float32, torch.bfloat16):
            conv = nn.Conv3d(c, o, 3, padding=1).cuda().to(dtype)
            x_B = torch.randn(patients * draws, c, edge, edge, edge, device="cuda", dtype=dtype)
            g_B = torch.randn(patients * draws, o, edge, edge, edge, device="cuda", dtype=dtype)

            def plain(x: Tensor = x_B, g: Tensor = g_B, conv: nn.Conv3d = conv) -> None:
                torch.ops.aten.convolution_backward(
                    g, x, conv.weight, None, (1,) * 3, (1,) * 3, (1,) * 3, False, (0,) * 3, 1,
                    (False, True, False),
                )  # fmt: skip

            base, _ = _measure_cuda(plain, 5)
            row = f"P {patients:3} K {draws} {c:4} to {o:4} at {edge:2}^3 {str(dtype)[6:]:9}{1e3 * base:9.3f}"
            for form in ("each", "grouped", "shifted", "unfolded"):
                try:
                    seconds, _ = _measure_cuda(
                        lambda: convolution_weight(conv, x_B, g_B, patients, form=form),  # noqa: B023
                        3,
                    )
                    row += f"  {form} {seconds / base:6.2f}"
                except RuntimeError as error:
                    row += f"  {form} {type(error).__name__}"
            lines.append(row)
    return "\n".join(lines)


def _exactness_table() -> str:
    """Relative error of the clipped sum against one backward pass a patient in float32 without TF32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    lines = ["relative error of the clipped sum (16 patients x 4 draws) to a float32 pass for each patient"]
    for name, edge in (("tiny", 8), ("base", 16)):
        case = Case(preset=name, edge=edge, samples=64, draws=4, microbatch=8)
        exact = Bench(case, "cuda")
        expected = exact.one_by_one(16)
        low = Bench(case, "cuda", torch.bfloat16)
        rows: tuple[tuple[str, bool, Callable[[], Tensor]], ...] = (
            ("engine, float32", False, exact.engine),
            ("engine, TF32", True, exact.engine),
            ("engine, bfloat16", True, low.engine),
            ("a pass for each patient, TF32", True, lambda: exact.one_by_one(16)),  # noqa: B023
            ("a pass for each patient, bfloat16", True, lambda: low.one_by_one(16)),  # noqa: B023
        )
        for label, tf32, compute in rows:
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
            try:
                total = compute()
            except RuntimeError as error:
                lines.append(f"{name:6}{label:36}{type(error).__name__}: {str(error)[:100]}")
                continue
            error_norm = float((total - expected).norm() / expected.norm())
            lines.append(f"{name:6}{label:36}{error_norm:10.2e}   norm {float(total.norm()):.4f}")
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return "\n".join(lines)


def main() -> None:
    """Measure one row in this process (used by :func:`run`), or print a GPU's tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--case", type=int)
    parser.add_argument("--measure")
    arguments = parser.parse_args()
    if arguments.measure:
        print(*_measure_cpu(CPU_CASES[arguments.case], arguments.measure))
    elif arguments.device == "cuda":
        run_cuda()
    else:
        print(run())


if __name__ == "__main__":
    main()
