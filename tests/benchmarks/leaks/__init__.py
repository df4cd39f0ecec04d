"""What the audit sees when nothing protects the patients: ``python -m tests.benchmarks leaks``.

Three steps: :mod:`.volumes` packs the public scans, :mod:`.training` trains without protection and attacks
(minutes on a GPU; its scores are kept in ``scores.npz``), :mod:`.judging` puts the scores before the gate's
own verdict. The command does the last step, in a minute on a CPU, and writes ``table.md`` and ``plot.png``.
"""

from __future__ import annotations


def run() -> str:
    """Judge the kept scores and write table and plot."""
    from tests.benchmarks.leaks.judging import judge_kept_scores

    return judge_kept_scores()
