"""The one family of errors, grouped by who has to act.

Every error that Lacuna raises on purpose derives from :class:`LacunaError`. The command line prints
``str(error)`` and :meth:`LacunaError.diagnostics` without a traceback and exits with
``error.exit_code``; anything else that reaches the command line is a bug (exit code 70).
"""

from __future__ import annotations

from typing import ClassVar

from shared.exit_codes import ExitCode


class LacunaError(Exception):
    """Base of all errors.

    Args:
        message: What is wrong, naming the thing that is wrong.
        remedy: What the reader can do about it; printed on a line of its own.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.BUG

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def diagnostics(self) -> str:
        """The error as a person should read it: the message and, where known, the remedy."""
        if self.remedy is None:
            return self.message
        return f"{self.message}\n  what to do: {self.remedy}"


class UsageError(LacunaError):
    """The command's own arguments are wrong."""

    exit_code = ExitCode.USAGE


class SiteError(LacunaError):
    """The hospital's data engineer has to act: scans, keys, policy file, ledger, device."""

    exit_code = ExitCode.SITE_MUST_ACT


class CoordinatorError(LacunaError):
    """The coordinator has to act: plan, roster, store, SuperLink."""

    exit_code = ExitCode.COORDINATOR_MUST_ACT


class PeerError(LacunaError):
    """Somebody at the other end of a message broke the protocol, or sent bytes that do not parse."""

    exit_code = ExitCode.PEER_MISBEHAVED


class RefusedError(LacunaError):
    """A policy, a budget or a gate says no. Nothing is broken."""

    exit_code = ExitCode.REFUSED


class InternalError(LacunaError):
    """An invariant of ours does not hold: a bug in Lacuna."""

    exit_code = ExitCode.BUG


class MalformedMessageError(PeerError):
    """Bytes from outside do not parse, or break a size bound."""


class LedgerError(SiteError):
    """The privacy ledger cannot be written, or does not verify. Training stops; nothing is sent."""


class BudgetExceededError(RefusedError):
    """A charge would pass the site's cap. Refused before any computation."""


class ProtocolRefusedError(PeerError):
    """A protocol request was refused. ``reason`` is a member of a closed enum, independent of data."""

    def __init__(self, reason: str, message: str, *, remedy: str | None = None) -> None:
        super().__init__(f"{reason}: {message}", remedy=remedy)
        self.reason = reason
