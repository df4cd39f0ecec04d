"""``lacuna coordinator``: enrol sites, plan, launch and resume, gate and release."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from deploy.cli.coordinator_network import add_network_commands
from deploy.cli.coordinator_operations import add_operations_commands
from deploy.cli.coordinator_quality import evaluate
from deploy.cli.output import (
    console,
    json_option,
    print_json,
    progress_bars,
    read_input,
    write_output,
)
from deploy.cli.public_source import public_source_options
from shared.errors import CoordinatorError, UsageError
from shared.exit_codes import ExitCode

PathType = click.Path(path_type=Path)
study_option = click.option("--study", "study_id", required=True, help="Study id.")
longest_option = click.option(
    "--longest-exchange",
    type=click.FloatRange(60, 86_400),
    metavar="SECONDS",
    help="How long a slow site is waited for (600).",
)


@click.group(name="coordinator")
def command() -> None:
    """Write and sign a study plan, launch rounds, gate and release.

    State lives in LACUNA_HOME/coordinator (default ~/.lacuna/coordinator).
    """


@command.command("init")
@click.argument("study_id", metavar="STUDY")
def init(study_id: str) -> None:
    """Set a study up, and the coordinator's key at the first one."""
    from server.coordinator_home import CoordinatorHome

    home = CoordinatorHome.default()
    path = home.init(study_id)
    click.echo(f"study {study_id} is set up in {path}")
    click.echo(f"the coordinator's fingerprint, for sites to pin: {home.key().verify_key.fingerprint}")


@command.command("enrol")
@click.argument("request", type=PathType)
@study_option
@click.option("--fingerprint", required=True, help="Read to you by the site or officer, not from the file.")
@click.option("--out", type=PathType, help="Certificate for the site (init-network first).")
def enrol(request: Path, study_id: str, fingerprint: str, out: Path | None) -> None:
    """Enrol a site or the officer; with --out, sign the certificate of the site's perimeter too."""
    from server.coordinator_home import CoordinatorHome
    from shared.site_certificate import sign_certificate

    home = CoordinatorHome.default()
    data = read_input(request, what="enrolment request")
    enrolled = home.enrol(study_id, data, fingerprint=fingerprint)
    click.echo(f"enrolled {enrolled.role} {enrolled.name}: {enrolled.key.fingerprint}")
    if out is not None:
        write_output(out, sign_certificate(home.certify(data), home.key()), what="certificate for the site")


@command.command("pretrain")
@study_option
@click.option("--shipped", is_flag=True, help="Take the pair that ships for preset micro (simulated scans).")
@click.option("--preset", default="tiny", show_default=True, help="Size of the networks to train.")
@public_source_options
@click.option("--conditions", help="Names of the conditions, separated by commas.")
@click.option("--labels", help="Names of mask labels 1, 2, ..., separated by commas.")
@click.option(
    "--covariate",
    "covariates",
    multiple=True,
    help="Further public property, NAME=VALUE,VALUE,... (numbers are edges of bins); a column of --nifti.",
)
@click.option("--image-autoencoder", type=PathType, help="Public MAISI weights (safetensors); preset h200.")
@click.option("--image-denoiser", type=PathType, help="Public MAISI weights (safetensors); preset h200.")
@click.option("--autoencoder-steps", type=int, help="Default: by preset.")
@click.option("--prior-steps", type=int, help="Default: by preset.")
@click.option("--embedding-steps", type=int, help="Of the copy check's embedding. Default: by preset.")
@click.option(
    "--segmenter-steps", type=click.IntRange(0), help="Of the masks' check; 0: none. Default: by preset."
)
@click.option(
    "--copy-samples",
    type=click.IntRange(1, 100_000),
    default=500,
    show_default=True,
    help="Calibrate the copy distance for audits of so many samples.",
)
@click.option(
    "--calibrate-attacks",
    is_flag=True,
    help="Measure the secondary attacks on held-out public patients too, for plans that pool them.",
)
@click.option("--seed", type=int, default=7, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="Torch device to train on.")
@click.option(
    "--bfloat16",
    is_flag=True,
    help="Train in bfloat16 where torch's autocast would: faster where the device has it.",
)
def pretrain(
    study_id: str,
    shipped: bool,
    preset: str,
    nifti: Path | None,
    decathlon: Path | None,
    patients: Path | None,
    only: Path | None,
    volume_cut: float | None,
    conditions: str | None,
    labels: str | None,
    covariates: tuple[str, ...],
    image_autoencoder: Path | None,
    image_denoiser: Path | None,
    autoencoder_steps: int | None,
    prior_steps: int | None,
    embedding_steps: int | None,
    segmenter_steps: int | None,
    copy_samples: int,
    calibrate_attacks: bool,
    seed: int,
    device: str,
    bfloat16: bool,
) -> None:
    """Make the public networks, from public volumes only. Repeat it to continue.

    An autoencoder, the prior that hospitals start from, the embedding in which copies are looked for, and
    the segmenter that synthetic masks are held against.
    """
    from deploy import public_networks
    from server.coordinator_home import CoordinatorHome
    from shared.study_plan import parse_covariate

    folder = CoordinatorHome.default().study(study_id) / "public"
    with progress_bars() as progress:
        if shipped:
            public_networks.take_shipped(folder, preset="micro", progress=progress)
        else:
            if conditions is None or labels is None or (nifti is None) == (decathlon is None):
                raise UsageError(
                    "give --conditions, --labels, and either --nifti or --decathlon; or --shipped"
                )
            public_networks.train_on(
                folder,
                public_networks.PublicSource(
                    nifti=nifti, decathlon=decathlon, patients=patients, only=only, volume_cut_mm3=volume_cut
                ),
                preset_name=preset,
                conditions=tuple(conditions.split(",")),
                labels=tuple(labels.split(",")),
                covariates=tuple(parse_covariate(text) for text in covariates),
                image_autoencoder=image_autoencoder,
                image_denoiser=image_denoiser,
                autoencoder_steps=autoencoder_steps,
                prior_steps=prior_steps,
                embedding_steps=embedding_steps,
                segmenter_steps=segmenter_steps,
                bfloat16=bfloat16,
                copy_samples=copy_samples,
                calibrate_attacks=calibrate_attacks,
                seed=seed,
                device=device,
                progress=progress,
            )
    click.echo(f"public networks, recipe and calibration: {folder}")


@command.group("plan")
def plan_group() -> None:
    """Draft and sign the study plan."""


@plan_group.command("new")
@study_option
@click.option("--title", default="", help="One line for people.")
@click.option("--rare", "rare_condition", required=True, help="The rare condition.")
@click.option("--mode", type=click.Choice(["distributed", "local", "unprotected"]), default="distributed")
@click.option("--epsilon", type=float, default=8.0, show_default=True)
@click.option("--delta", type=float, default=1e-5, show_default=True)
@click.option("--rounds", type=int, default=30, show_default=True)
@click.option(
    "--declared-patients", type=int, required=True, help="Public, rounded number of members in all."
)
@click.option(
    "--sampling-rate", type=float, default=1.0, show_default=True, help="Chance to join a step (Poisson)."
)
@click.option(
    "--trainable", type=click.Choice(["all", "attention", "class_embedding", "conditioning", "low_rank"])
)
@click.option("--clip-norm", type=float, help="Default: measured on public data.")
@click.option("--learning-rate", type=float, help="Of the server's Adam.")
@click.option("--local-steps", type=int, default=1, show_default=True)
@click.option("--local-learning-rate", type=float, default=1e-3, show_default=True)
@click.option("--threshold", type=int, help="Default: floor((n + c) / 2) + 1.")
@click.option("--max-colluding", type=int, default=1, show_default=True)
@click.option("--max-attempts", type=int, help="Default: rounds plus max(3, 20%).")
@click.option(
    "--copy-samples",
    type=click.IntRange(0, 100_000),
    default=500,
    show_default=True,
    help="Generated samples that each site compares with its members.",
)
@click.option(
    "--secondary-attacks",
    type=click.Choice(["all", "unguided", "none"]),
    default="all",
    show_default=True,
    help="Which secondary attacks each site makes for itself; unguided ones take a third of the time.",
)
@click.option(
    "--pool-attack",
    "pool_attacks",
    multiple=True,
    metavar="ATTACK",
    help="Secondary attack whose noised counts leave the sites and are judged, such as pia; repeatable.",
)
@click.option(
    "--pooled-weight",
    type=click.IntRange(1, 16),
    default=8,
    show_default=True,
    help="Of each pooled attack: a larger one has less noise of its own and adds to all the others'.",
)
@click.option("--min-power", type=float, default=0.5, show_default=True, help="Least power of the audit.")
@click.option("--low-power", type=click.Choice(["refuse", "accept"]), default="refuse", show_default=True)
@click.option(
    "--mechanism-canaries",
    type=click.IntRange(0, 100_000),
    default=1024,
    show_default=True,
    help="Of the mechanism audit that every site's installation has to pass; 0: none is asked for.",
)
@click.option(
    "--canaries",
    "canaries_per_site",
    type=click.IntRange(0, 1000),
    default=0,
    show_default=True,
    help="In-run canaries at each site: synthetic patients, trained on if a committed coin says so.",
)
@click.option("--modality", type=click.Choice(["MR", "CT"]), help="Of the scans; for DICOM by generate.")
@click.option("--simulated", is_flag=True, help="Every scan of this study is simulated.")
@click.option(
    "--valid-days",
    type=click.IntRange(1, 3650),
    default=730,
    show_default=True,
    help="Days until nobody trains, approves or releases under this plan any more.",
)
def plan_new(
    study_id: str,
    title: str,
    rare_condition: str,
    mode: str,
    epsilon: float,
    delta: float,
    rounds: int,
    declared_patients: int,
    sampling_rate: float,
    trainable: str | None,
    clip_norm: float | None,
    learning_rate: float | None,
    local_steps: int,
    local_learning_rate: float,
    threshold: int | None,
    max_colluding: int,
    max_attempts: int | None,
    copy_samples: int,
    min_power: float,
    low_power: str,
    mechanism_canaries: int,
    secondary_attacks: str,
    pool_attacks: tuple[str, ...],
    pooled_weight: int,
    canaries_per_site: int,
    modality: str | None,
    simulated: bool,
    valid_days: int,
) -> None:
    """Propose a plan: noise, ranges and thresholds follow from a few choices. Edit plan.toml if you must."""
    from datetime import UTC, datetime, timedelta

    from privacy.audit.canary_opening import canary_outlook
    from privacy.audit.proposal import pooling_outlook
    from privacy.dp.execution_plan import ExecutionPlan
    from server.coordinator_home import CoordinatorHome
    from server.planning import PlanChoices, draft_plan

    home = CoordinatorHome.default()
    choices = PlanChoices(
        study_id=study_id,
        title=title,
        rare_condition=rare_condition,
        mode=mode,  # type: ignore[arg-type]
        epsilon=epsilon,
        delta=delta,
        rounds=rounds,
        declared_patients=declared_patients,
        sampling_rate=sampling_rate,
        trainable=trainable,  # type: ignore[arg-type]
        clip_norm=clip_norm,
        server_learning_rate=learning_rate,
        local_steps=local_steps,
        local_learning_rate=local_learning_rate,
        threshold=threshold,
        max_colluding=max_colluding,
        max_attempts=max_attempts,
        copy_samples=copy_samples,
        min_power=min_power,
        low_power=low_power,  # type: ignore[arg-type]
        mechanism_canaries=mechanism_canaries,
        secondary_attacks=secondary_attacks,  # type: ignore[arg-type]
        pool_attacks=pool_attacks,
        pooled_weight=pooled_weight,
        canaries_per_site=canaries_per_site,
        modality=modality,  # type: ignore[arg-type]
        simulated=simulated,
        expires=datetime.now(UTC).date() + timedelta(days=valid_days),
    )
    plan = draft_plan(choices, roster=home.roster(study_id), public=home.public(study_id))
    path = home.draft_path(study_id)
    write_output(path, plan.to_toml().encode(), what="draft plan")
    privacy = plan.privacy
    click.echo(
        f"{plan.n_sites} sites, t = {plan.secure_aggregation.threshold}, "
        f"c = {plan.secure_aggregation.max_colluding}; mode {privacy.mode}; "
        f"{plan.model.dimension:,} parameters ({plan.model.trainable}) train privately; "
        f"sigma {privacy.noise_multiplier:.3f} over {privacy.max_attempts} attempts"
    )
    if plan.audit.pooled_attacks:
        click.echo(pooling_outlook(plan))
    if plan.audit.canaries_per_site:
        click.echo(canary_outlook(plan))
    execution = ExecutionPlan.from_study_plan(plan)
    wraps = max(execution.wrap_probability, execution.audit_wrap_probability)
    click.echo(
        f"sums modulo 2^{execution.modulus_bits}; one leaves the range with probability {wraps:.1g} at most"
    )


@plan_group.command("sign")
@study_option
@click.option("--out", type=PathType, help="Also copy the package here, for the sites.")
def plan_sign(study_id: str, out: Path | None) -> None:
    """Sign plan.toml. From then on neither plan nor roster change."""
    import shutil

    from privacy.dp.execution_plan import check_plan
    from server.coordinator_home import CoordinatorHome
    from shared.plan_package import (
        COPY_EMBEDDING_FILE,
        PLAUSIBILITY_FILE,
        SEGMENTER_FILE,
        write_plan_package,
    )
    from shared.study_plan import load_plan_toml

    home = CoordinatorHome.default()
    plan = load_plan_toml(home.draft_path(study_id))
    check_plan(plan)
    if plan.study_id != study_id or plan.roster != home.roster(study_id):
        raise CoordinatorError(
            "plan.toml is for another study or roster than what is enrolled",
            remedy="lacuna coordinator plan new",
        )
    public = home.public(study_id)
    package = write_plan_package(
        home.study(study_id) / "plan",
        plan,
        key=home.key(),
        autoencoder=public / "autoencoder.safetensors",
        prior=public / "prior.safetensors",
        plausibility=public / PLAUSIBILITY_FILE if plan.data.plausibility_sha256 else None,
        copy_embedding=public / COPY_EMBEDDING_FILE if plan.audit.copy_embedding_sha256 else None,
        segmenter=public / SEGMENTER_FILE if plan.data.segmenter_sha256 else None,
    )
    click.echo(f"signed plan {study_id} ({plan.digest().hex()[:16]}): {package.root}")
    if out is not None:
        if out.exists():
            raise UsageError(f"{out} exists already")
        shutil.copytree(package.root, out)
        click.echo(f"package for the sites: {out}")


@plan_group.command("collect")
@study_option
@click.argument("approvals", nargs=-1, required=True, type=PathType, metavar="APPROVAL...")
def plan_collect(study_id: str, approvals: tuple[Path, ...]) -> None:
    """Keep the sites' signed approvals of the plan; the release bundle carries them."""
    from server.coordinator_home import CoordinatorHome
    from server.gating import keep_plan_approval
    from server.study_store import StudyStore

    store = StudyStore(CoordinatorHome.default().study(study_id))
    for path in approvals:
        site_id = keep_plan_approval(store, read_input(path, what="plan approval"))
        click.echo(f"{site_id} approved the plan")


@command.command("launch")
@study_option
@click.option(
    "--flwr-home", type=PathType, required=True, help="FLWR_HOME with config.toml of the SuperLink."
)
@click.option("--connection", default="lacuna", show_default=True, help="Its name in config.toml.")
@longest_option
@json_option
def launch(
    study_id: str, flwr_home: Path, connection: str, longest_exchange: float | None, as_json: bool
) -> None:
    """Submit the study to the SuperLink, as a Flower run."""
    from deploy.flower_run import submit_study

    run_id = submit_study(
        study_id, flwr_home=flwr_home, connection=connection, longest_exchange_s=longest_exchange
    )
    if as_json:
        print_json({"run_id": run_id, "study": study_id})
    else:
        click.echo(
            f"Flower run {run_id} carries study {study_id}; lacuna coordinator status --study {study_id}"
        )


@command.command("resume")
@study_option
@click.option(
    "--flwr-home", type=PathType, required=True, help="FLWR_HOME with config.toml of the SuperLink."
)
@click.option("--connection", default="lacuna", show_default=True, help="Its name in config.toml.")
@longest_option
@json_option
def resume(
    study_id: str, flwr_home: Path, connection: str, longest_exchange: float | None, as_json: bool
) -> None:
    """Continue a study in a new Flower run, from its last checkpoint.

    Runs of it that Flower still lists, though their round driver is gone, are stopped.
    """
    from deploy.flower_run import stop_dead_runs, submit_study
    from server.study_store import StudyStore

    done = StudyStore.default(study_id).completed_rounds()
    stopped = stop_dead_runs(study_id, flwr_home=flwr_home, connection=connection)
    run_id = submit_study(
        study_id, flwr_home=flwr_home, connection=connection, longest_exchange_s=longest_exchange
    )
    if as_json:
        print_json({"run_id": run_id, "study": study_id, "completed_rounds": done, "stopped": stopped})
    else:
        if stopped:
            click.echo(f"stopped, for they had no round driver any more: {', '.join(stopped)}")
        click.echo(f"Flower run {run_id} continues study {study_id} after round {done}")


@command.command("gate")
@study_option
@click.option("--out", type=PathType, help="Also copy the signed decision here, for approvals.")
@click.option(
    "--ledger",
    "ledgers",
    type=PathType,
    multiple=True,
    help="Ledger of a site whose agent cannot be asked any more (`lacuna site export-ledger`).",
)
@json_option
def gate(study_id: str, out: Path | None, ledgers: tuple[Path, ...], as_json: bool) -> None:
    """Evaluate every condition of a release and sign the decision, whatever it is."""
    from privacy.compliance.report import print_decision
    from server.coordinator_home import CoordinatorHome
    from server.gating import decide, keep_ledger
    from server.study_store import StudyStore

    home = CoordinatorHome.default()
    store = StudyStore(home.study(study_id))
    for path in ledgers:
        keep_ledger(store, read_input(path, what="ledger"))
    decision = decide(store, home.key())
    if as_json:
        print_json(decision.to_dict())
    else:
        print_decision(decision.to_dict(), console())
    if out is not None:
        write_output(out, store.decision_path.read_bytes(), what="gate decision")
    if not decision.released:
        sys.exit(ExitCode.REFUSED)


@command.command("release")
@study_option
@click.option("--approval", "approvals", type=PathType, multiple=True, help="Approval of a site or officer.")
def release(study_id: str, approvals: tuple[Path, ...]) -> None:
    """Write the release bundle, if decision and approvals suffice."""
    from server.coordinator_home import CoordinatorHome
    from server.gating import keep_approval
    from server.gating import release as write_release
    from server.study_store import StudyStore

    home = CoordinatorHome.default()
    store = StudyStore(home.study(study_id))
    for path in approvals:
        keep_approval(store, read_input(path, what="approval"))
    released = write_release(store, home.key())
    click.echo(f"released: {released.path}")
    click.echo(f"bundle SHA-256: {released.bundle_sha256}")
    click.echo(f"release log, for whoever verifies the bundle: {store.log_path}")


@command.command("withdraw")
@study_option
@click.option("--reason", required=True, help="Why; everybody who has the log will read it.")
@click.option("--log-out", type=PathType, help="Also copy the release log here, for whoever has the bundle.")
def withdraw(study_id: str, reason: str, log_out: Path | None) -> None:
    """Withdraw a released bundle, with a signed entry in the release log. It cannot be undone."""
    from server.coordinator_home import CoordinatorHome
    from server.gating import withdraw as append_entry
    from server.study_store import StudyStore

    home = CoordinatorHome.default()
    store = StudyStore(home.study(study_id))
    entry = append_entry(store, home.key(), reason=reason)
    click.echo(f"withdrawn: bundle {entry.bundle_sha256}, entry {entry.index} of {store.log_path}")
    if log_out is not None:
        write_output(log_out, store.log_path.read_bytes(), what="release log")


@command.command("compare")
@study_option
@click.option("--condition", required=True)
@click.option("--label", "labels", multiple=True, required=True, help="Mask label whose volume is measured.")
@click.option("--count", type=int, default=200, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--sheet", type=PathType, help="Picture of the first samples of both.")
@json_option
def compare(
    study_id: str,
    condition: str,
    labels: tuple[str, ...],
    count: int,
    seed: int,
    sheet: Path | None,
    as_json: bool,
) -> None:
    """Samples of the public prior beside the candidate: what did the hospitals add?"""
    from server.comparison import compare_with_prior
    from server.coordinator_home import CoordinatorHome
    from server.study_store import StudyStore

    store = StudyStore(CoordinatorHome.default().study(study_id))
    if not store.candidate_path.exists():
        raise CoordinatorError("there is no candidate yet", remedy="lacuna coordinator launch")
    with progress_bars() as progress:
        result = compare_with_prior(
            store.package(),
            store.candidate_path,
            condition=condition,
            labels=labels,
            count=count,
            seed=seed,
            sheet=sheet,
            progress=progress,
        )
    if as_json:
        print_json(result.to_dict())
        return
    click.echo(
        f"{condition}, mean volume of {'+'.join(labels)} over {count} samples: "
        f"prior {result.prior_mm3:.0f} mm3, candidate {result.candidate_mm3:.0f} mm3; "
        f"difference {result.difference_mm3:+.0f} mm3, 95% interval {result.low:+.0f} to {result.high:+.0f}"
        + ("" if result.excludes_zero else " (contains zero)")
    )


add_network_commands(command)
add_operations_commands(command)
command.add_command(evaluate)
