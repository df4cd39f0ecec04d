"""What no audit of a study can see, in words for a person, for reports to print. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BlindSpot:
    """A kind of defect that passes every audit, and what stands against it, if anything does."""

    defect: str
    instead: str


BLIND_SPOTS: tuple[BlindSpot, ...] = (
    BlindSpot(
        defect="Noise that looks random and is not secret: a seed that somebody knows or can guess.",
        instead="The code takes noise from the operating system alone; nothing shows it afterwards.",
    ),
    BlindSpot(
        defect="An installation that behaves while it is audited, and otherwise in training.",
        instead="Each hospital runs software that it installed itself; a statement is no proof of what ran.",
    ),
    BlindSpot(
        defect="Charges that a hospital never writes into its ledger, or a ledger and its witness put back "
        "together.",
        instead="The other hospitals follow each ledger's head at every attempt.",
    ),
    BlindSpot(
        defect="Scans that are not what the hospital says: wrong patients, one patient at two hospitals.",
        instead="The unit is the patient at one hospital; epsilon adds up over hospitals.",
    ),
    BlindSpot(
        defect="A patient who is coupled to others before training: a public network that was trained on "
        "them, settings chosen by looking at them.",
        instead="Networks and settings are in the plan, by hash, before a scan is read.",
    ),
    BlindSpot(
        defect="Leaks smaller than the power that is printed, and attacks that nobody has thought of.",
        instead="The accounting bounds every attack, if the software does what it says.",
    ),
    BlindSpot(
        defect="Pooled counts that the coordinator invents: hospitals cannot see whether they are the sum.",
        instead="Nothing about patients leaks by it. A hospital signs one set of counts, is told where they "
        "cannot contain its own part, and has its own figures and its veto.",
    ),
    BlindSpot(
        defect="Traces that are not in the released model: timing, memory, logs of the hospital's machine.",
        instead="The agent needs no network, and its refusals do not depend on patients.",
    ),
)
