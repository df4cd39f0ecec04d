"""The demo's study up to its rounds, with certificates for perimeters. (No tests of its own.)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from deploy.demo import STUDY, Demo


@dataclass(kw_only=True)
class NetworkedDemo(Demo):
    """By the demo's commands; the rounds run over perimeters that others start.

    Args:
        address: ``host:port`` of the coordinator's perimeter.
        plan_choices: More options of ``coordinator plan new``.
        policy_clauses: In which every hospital agrees to less than a policy asks for by itself.
    """

    address: str
    plan_choices: Sequence[str] = ()
    policy_clauses: Sequence[str] = field(default=("allow_low_power=true", "min_power=0.0"))

    def prepare(self) -> None:
        """Everything up to the rounds."""
        self._prepare_output()
        study = self._scans()
        self._enrol()
        self._lacuna("coordinator", "coordinator", "init-network", "--address", self.address)
        for name in self.names:
            request, certificate = (
                str(self._exchange(f"{name}.{kind}.json")) for kind in ("request", "certificate")
            )
            self._lacuna("coordinator", "coordinator", "certify", request, "--out", certificate)
            self._lacuna(name, "site", "install-certificate", certificate)
        study.pretrain()
        self._lacuna(
            "coordinator", "coordinator", "plan", "new", "--study", STUDY, *study.plan_choices,
            "--epsilon", "8", "--low-power", "accept", "--min-power", "0", *self.plan_choices,
        )  # fmt: skip
        plan = str(self._exchange("plan"))
        self._lacuna("coordinator", "coordinator", "plan", "sign", "--study", STUDY, "--out", plan)
        approvals = []
        for name in self.names:
            for clause in self.policy_clauses:
                self._lacuna(name, "site", "policy", "--set", clause)
            self._lacuna(name, "site", "import", "--plan", plan, *study.import_choices(name))
            approvals.append(str(self._exchange(f"{name}.plan-approval.json")))
            self._lacuna(name, "site", "approve", plan, "--out", approvals[-1])
        self._lacuna("coordinator", "coordinator", "plan", "collect", "--study", STUDY, *approvals)
