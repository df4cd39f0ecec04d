# ruff: noqa: E501 - the long lines are the card's own sentences and table rows
"""The model card of a release: ``docs/README.md``, for a reader who is no statistician.

Every figure comes from a signed statement in ``attestations/`` (the plan, or the gate decision, which holds
the figures recomputed from ledgers and verdicts); the card says which. Order and headings follow NIST SP
800-226, "Guidelines for Evaluating Differential Privacy Guarantees": unit, neighbouring relation, trust
model, parameters, composition, randomness, what is not covered.
"""

from __future__ import annotations

import math
from typing import Any

from privacy.compliance.approvals import ApprovalCount
from server.release.monai_config import SYNTHETIC_STATEMENT
from shared.identity import VerifyKey
from shared.study_plan import StudyPlan

_ATTACKER = {
    "world": "everybody who sees the released model, the coordinator's server, and up to {c} of the sites, together",
    "colluding": "the same, if all other sites pooled what they know against one",
}


def model_card(plan: StudyPlan, decision: dict[str, Any], approvals: ApprovalCount) -> str:
    """Markdown of the card.

    Args:
        plan: The study's plan.
        decision: Predicate of the gate decision that this release rests on.
        approvals: Who approved that decision.
    """
    parts = [
        _opening(plan, decision),
        _guarantee(plan, decision),
        _budget(plan, decision),
        _audit(plan, decision),
        _gate(decision),
        _approvals(plan, approvals),
        _limits(plan),
        _checking(plan),
        _use(plan),
    ]
    return "\n\n".join(parts) + "\n"


def format_epsilon(value: Any) -> str:
    """A figure as people read it: two decimals, or ``infinite``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "infinite" if value == "infinite" or value == math.inf else "unknown"
    return f"{value:.2f}"


def _opening(plan: StudyPlan, decision: dict[str, Any]) -> str:
    data = "simulated scans (no real patient)" if plan.data.simulated else "scans of patients"
    conditions = ", ".join(plan.data.conditions)
    return f"""# {plan.title or plan.study_id}: a generator of synthetic scans

> **{SYNTHETIC_STATEMENT}**

This bundle makes 3D images together with their segmentation masks ({", ".join(plan.data.labels)}), for the
conditions {conditions}. {plan.n_sites} sites trained it together on {data}. No scan left a site. About
{plan.privacy.declared_patients} patients took part (a rounded number, declared before training).

| | |
| --- | --- |
| study | `{plan.study_id}` |
| decided | {decision.get("evaluated_at", "unknown")} |
| networks | preset `{plan.model.preset}`; trained on patients: `{plan.model.trainable}` \
({plan.model.dimension:,} parameters); the rest was trained on public data |
| grid | {" x ".join(map(str, plan.data.grid_shape))} voxels of \
{" x ".join(f"{s:g}" for s in plan.data.spacing_mm)} mm |
| intended use | research on methods; not for diagnosis, no evidence about any real patient |"""


def _guarantee(plan: StudyPlan, decision: dict[str, Any]) -> str:
    privacy, secagg = plan.privacy, plan.secure_aggregation
    t, c = secagg.threshold, secagg.max_colluding
    spending = [entry for entry in decision.get("spending", []) if isinstance(entry, dict)]
    worst = _largest([entry.get("epsilon_world") for entry in spending])
    worst_colluding = _largest([entry.get("epsilon_colluding") for entry in spending])
    noise = {
        "distributed": f"Each site adds a share of the noise to its sum, 1/(t - c) = 1/{max(t - c, 1)} of the "
        f"variance, before a masked sum over at least t = {t} sites is opened. One clipped, noised step a round.",
        "local": f"Each site adds the full noise by itself in each of its {privacy.local_steps} local steps a "
        "round; masking the sums protects on top of that.",
        "unprotected": "No noise at all. This mode gives no protection.",
    }[privacy.mode]
    return f"""## The guarantee

Whatever an attacker knows about everybody else: seeing this model changes what can be concluded about whether
any one patient took part only within the bound below. This is a proof about the training (differential privacy),
not a measurement.

| question | answer | from |
| --- | --- | --- |
| Who is protected? (unit) | one **patient** at one site, with all scans of that patient | plan |
| Compared with what? (neighbouring relation) | the same data with one patient added or removed | plan |
| Bound promised | epsilon {format_epsilon(privacy.epsilon)} at delta {privacy.delta:g} | plan |
| Bound spent, largest of all sites | epsilon **{worst}** at delta {privacy.delta:g} | ledgers |
| against whom? | {_ATTACKER["world"].format(c=c)} | plan |
| Bound spent, largest of all sites, if all other sites collude | epsilon **{worst_colluding}** at delta \
{privacy.delta:g}: {_ATTACKER["colluding"]}; the promise above is not about this case | ledgers |
| Mechanism | clipped sum over patients plus Gaussian noise on an integer grid (mode `{privacy.mode}`), noise \
multiplier {privacy.noise_multiplier:g}, clip norm {privacy.clip_norm:g}, sampling rate \
{privacy.sampling_rate:g} | plan |
| Who adds the noise? (trust model) | {noise} The server is not trusted with any site's update. | plan |
| Composition | every attempt of every round and of the audit is charged before anything leaves a site, also \
when it failed; all charges of a site add up in the figures above | ledgers |
| Accountants | privacy loss distributions (Google dp-accounting) and a second one (closed form of the Gaussian \
mechanism, or Renyi); they agree, and the larger figure counts | gate |
| Randomness | noise, masks and coins come from the operating system's generator through a stream cipher; nothing \
is seeded | the software that the sites ran; no statement proves it |"""


def _budget(plan: StudyPlan, decision: dict[str, Any]) -> str:
    lines = [
        "## What each site spent",
        "",
        "Recomputed from the sites' own signed ledgers (`attestations/ledgers/`).",
        "",
        "| site | training attempts | audit attempts | epsilon | epsilon if all others collude | promised (first figure) |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for entry in decision.get("spending", []):
        lines.append(
            f"| {entry['site_id']} | {entry['train_attempts']} | {entry['audit_attempts']} "
            f"| {format_epsilon(entry['epsilon_world'])} | {format_epsilon(entry['epsilon_colluding'])} "
            f"| {format_epsilon(plan.privacy.epsilon)} |"
        )
    return "\n".join(lines)


def _audit(plan: StudyPlan, decision: dict[str, Any]) -> str:
    conditions = [c for c in decision.get("conditions", []) if str(c.get("name", "")).startswith("audit-")]
    lines = [
        "## The audit",
        "",
        "Before the release, every site attacked the model: can one tell the patients it was trained on from "
        "patients held out before training? Are generated scans copies of a patient? Only counts of patients, pooled "
        "over sites and noised, left the sites; the figures below are computed from them.",
        "",
        "An audit can refute the guarantee, never prove it. Where everything below passed, the result is: **no "
        "violation found, at the power stated** - not: the model is private. Intervals include the noise; all tests "
        f"share one significance level of {plan.audit.significance:g}, split before anything was looked at.",
        "",
        "| test | figure | must be | result | remark |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [_row(condition) for condition in conditions] or ["| none | | | | |"]
    return "\n".join(lines)


def _gate(decision: dict[str, Any]) -> str:
    conditions = decision.get("conditions", [])
    lines = [
        f"## The gate: {str(decision.get('decision', 'unknown')).upper()}",
        "",
        "A release needs every condition; nothing makes up for a failed one "
        "(`attestations/gate-decision.dsse.json`).",
        "",
        "| condition | figure | must be | result | remark |",
        "| --- | --- | --- | --- | --- |",
    ]
    others = [c for c in conditions if not str(c.get("name", "")).startswith("audit-")]
    lines += [_row(condition) for condition in others]
    lines += ["", f"And the {len(conditions) - len(others)} conditions of the audit, above."]
    return "\n".join(lines)


def _row(condition: dict[str, Any]) -> str:
    cells = [
        str(condition.get("title", "")),
        str(condition.get("figure", "")),
        str(condition.get("bound", "")),
        "pass" if condition.get("passed") is True else "**FAIL**",
        str(condition.get("reason", "")),
    ]
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def _approvals(plan: StudyPlan, approvals: ApprovalCount) -> str:
    officer = VerifyKey.from_hex(plan.roster.officer_key).fingerprint
    lines = [
        "## Who approved",
        "",
        f"Needed: {approvals.bound}. Given: {approvals.figure}. Each approval is a signature over this very gate "
        "decision (`attestations/approvals/`).",
        "",
        "| who | key fingerprint | approved |",
        "| --- | --- | --- |",
        f"| compliance officer | `{officer}` | {'yes' if approvals.officer else 'no'} |",
    ]
    lines += [
        f"| site {entry.site_id} | `{entry.verify_key.fingerprint}` "
        f"| {'yes' if entry.site_id in approvals.sites else 'no'} |"
        for entry in plan.roster.sites
    ]
    return "\n".join(lines)


def _limits(plan: StudyPlan) -> str:
    c = plan.secure_aggregation.max_colluding
    return f"""## What is not covered

- **A patient at several hospitals.** The bound is for one patient at one site. Budgets add up for a patient who is
  known to two: two sites at epsilon 8 give about 19.
- **More than {c} colluding site{"s" if c > 1 else ""}.** Then the second figure above holds, not the first.
- **What is true of the whole group.** If a disease looks a certain way, the model shows it, and that can be used
  on people who never took part. Differential privacy does not prevent this.
- **The public part.** Autoencoder and prior were trained on data declared public; nothing is promised for those.
- **Other uses of the same scans**, outside this site's ledger.
- **Poisoning.** A site or the coordinator can make the model worse. Synthetic scans can be wrong.
- **Side channels** of the machines at a site, and theft of a site's keys.
- **An old ledger.** Whether a ledger is the newest one shows only against receipts that peers keep.
- **The audit's own limits**: it sees only what its attacks see, at the power stated, on the patients it had."""


def _checking(plan: StudyPlan) -> str:
    coordinator = VerifyKey.from_hex(plan.roster.coordinator_key).fingerprint
    return f"""## How to check this bundle

```
lacuna compliance verify BUNDLE
```

It needs no network, no GPU and none of the coordinator's code; it recomputes all of the above from `attestations/`.
Compare the coordinator's fingerprint with one that you got by another way (a call, a letter), not from this page:

`{coordinator}`

| file | what it is | signed by |
| --- | --- | --- |
| `attestations/plan.json`, `plan.dsse.json` | what was agreed before training | coordinator |
| `attestations/plan-approvals/` | each site's agreement to that plan | sites |
| `attestations/ledgers/` | what each site charged | sites |
| `attestations/verdicts/` | the audit's result, recomputed and signed at each site | sites |
| `attestations/gate-decision.dsse.json` | every condition, and the decision | coordinator |
| `attestations/approvals/` | approvals of that decision | sites, officer |
| `attestations/release.dsse.json` | SHA-256 of every other file here | coordinator |"""


def _use(plan: StudyPlan) -> str:
    return f"""## How to make scans

```
lacuna generate BUNDLE --condition {plan.data.rare_condition} --count 8 --seed 1 --out synthetic/
```

Each scan comes with its mask and a sidecar file that says it is synthetic, and from which bundle. A MONAI config
that builds the networks and the sampler is in `configs/inference.json`; weights are safetensors, never pickle."""


def _largest(values: list[Any]) -> str:
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if not values or len(numbers) != len(values):
        return "infinite" if "infinite" in values else "unknown"
    return format_epsilon(max(numbers))
