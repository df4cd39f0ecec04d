"""Envelopes of what a site signs beside its verdict: mechanism audit and opening of canaries. No torch."""

from __future__ import annotations

from privacy.audit import canary_opening, mechanism_statement
from privacy.audit.canary_opening import CanaryOpening
from privacy.audit.mechanism_statement import MechanismStatement
from shared.attestation import Statement, Subject, open_statement, sign_statement
from shared.errors import MalformedMessageError
from shared.identity import SigningKey, VerifyKey


def sign_mechanism(statement: MechanismStatement, key: SigningKey) -> bytes:
    """DSSE envelope; the subject is the plan."""
    subjects = (Subject(name="plan", sha256=statement.plan_sha256),)
    return sign_statement(
        Statement(
            predicate_type=mechanism_statement.PREDICATE_TYPE,
            subjects=subjects,
            predicate=statement.to_dict(),
        ),
        key,
    )


def open_mechanism(data: bytes, *, key: VerifyKey, what: str = "mechanism audit") -> MechanismStatement:
    """Verify the signature, then parse. Call :meth:`MechanismStatement.check` next.

    Raises:
        MalformedMessageError: not such an envelope, or its subject is not the plan of its predicate.
        BadSignatureError: no valid signature of that key.
    """
    opened = open_statement(data, key=key, predicate_type=mechanism_statement.PREDICATE_TYPE, what=what)
    statement = MechanismStatement.from_dict(opened.predicate)
    _check_subjects(opened, {"plan": statement.plan_sha256}, what)
    return statement


def sign_opening(opening: CanaryOpening, key: SigningKey) -> bytes:
    """DSSE envelope; subjects are the candidate and the plan."""
    subjects = (
        Subject(name="candidate", sha256=opening.candidate_sha256),
        Subject(name="plan", sha256=opening.plan_sha256),
    )
    return sign_statement(
        Statement(
            predicate_type=canary_opening.PREDICATE_TYPE, subjects=subjects, predicate=opening.to_dict()
        ),
        key,
    )


def open_opening(data: bytes, *, key: VerifyKey, what: str = "canary opening") -> CanaryOpening:
    """Verify the signature, then parse. Call :meth:`CanaryOpening.check` next.

    Raises:
        MalformedMessageError: not such an envelope, or its subjects are not those of its predicate.
        BadSignatureError: no valid signature of that key.
    """
    opened = open_statement(data, key=key, predicate_type=canary_opening.PREDICATE_TYPE, what=what)
    opening = CanaryOpening.from_dict(opened.predicate)
    _check_subjects(opened, {"candidate": opening.candidate_sha256, "plan": opening.plan_sha256}, what)
    return opening


def _check_subjects(opened: Statement, expected: dict[str, str], what: str) -> None:
    if {subject.name: subject.sha256 for subject in opened.subjects} != expected:
        raise MalformedMessageError(f"{what}: subjects and predicate name different artefacts")
