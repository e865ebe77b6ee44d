"""What `dschat doctor` says: findings, each with what was found and what to do about it."""

from dataclasses import asdict, dataclass

__all__ = ["Check", "as_dict", "render", "worst"]

STATES = ("ok", "warn", "fail")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding. `state` is ok, warn (it runs, but read this) or fail (it cannot run, or its numbers are wrong)."""

    name: str
    state: str
    found: str
    cure: str = ""
    """What to do, as a sentence or a command; empty when there is nothing to do."""

    def __post_init__(self):
        assert self.state in STATES and (self.state == "ok" or self.cure), self


def worst(checks: list[Check]) -> str:
    """The worst state of all: ok, warn or fail."""
    return max((check.state for check in checks), key=STATES.index, default="ok")


def as_dict(checks: list[Check]) -> dict:
    """The findings for `--json`: {"state": worst, "checks": [{name, state, found, cure}]}."""
    return {"state": worst(checks), "checks": [asdict(check) for check in checks]}


def render(checks: list[Check]) -> str:
    """The findings as text: a line each, the cure under it, a closing line that counts them."""
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        lines.append(f"{check.state:<4}  {check.name:<{width}}  {check.found}")
        if check.cure:
            lines.append(f"      {'':<{width}}  -> {check.cure}")
    count = {state: sum(check.state == state for check in checks) for state in STATES}
    return "\n".join([*lines, "doctor: " + ", ".join(f"{number} {state}" for state, number in count.items() if number)])
