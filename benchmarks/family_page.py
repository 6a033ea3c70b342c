"""The page of models, docs/models.md, from what was found."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from benchmarks.family_audit import NEW, PROMPT, Finding

_HEAD = """\
# Which models run

Written by `python -m benchmarks.families --markdown docs/models.md`: every model type of which transformers
{transformers} makes a language model, tried as a tiny random model. *Runs* means: with n-gram draft tokens and
trees, greedy, in fp32, the {new} tokens after a prompt of {prompt} are those of transformers' own `generate` (eager
attention), one by one. All others are refused with the sentence below, most of them before any weights are read;
`offload-triforce plan` refuses the same and says the same. A model that is not here may run as well: before its first
use it is compared with transformers' own attention on 64 tokens with a tree, and refused if they differ by more than
rounding does (`--no-check` leaves that out).

Of models that see or hear as well (*text*), the text decoder alone is loaded from the files of the whole model, and
has to say what the whole model says; the other parts' weights are never read, and images or sound are refused.

{running} model types run, {refused} are refused.
"""


def render(findings: Sequence[Finding], versions: Mapping[str, str]) -> str:
    """The whole page."""
    families = [found for found in findings if not found.variant]
    running = [found for found in families if found.verdict == "equal"]
    refused = [found for found in families if found.verdict in ("refused", "unbuilt")]
    counts = {"running": len(running), "refused": len(refused), "new": NEW, "prompt": PROMPT}
    parts = [_HEAD.format(**versions, **counts), "## Run\n"]
    parts.append("| model type | class | layers | also tried |\n|---|---|---|---|")
    for found in running:
        parts.append(f"| `{found.model_type}` | {found.model} | {_layers(found)} | {_others(found, findings)} |")
    parts.append("\n## Refused\n\n| why | model types |\n|---|---|")
    reasons: dict[str, list[str]] = {}
    for found in refused:
        reasons.setdefault(_general(found), []).append(f"`{found.model_type}`")
    parts += [f"| {why} | {', '.join(types)} |" for why, types in sorted(reasons.items())]
    parts.append("\n## Refused in some settings\n\n| model type | setting | why |\n|---|---|---|")
    known = {(found.model_type, _general(found)) for found in families}
    for found in findings:
        if found.variant and found.verdict == "refused" and (found.model_type, _general(found)) not in known:
            parts.append(f"| `{found.model_type}` | {found.variant} | {_general(found)} |")
    return "\n".join(parts) + "\n"


def documented(page: str) -> tuple[set[str], set[str]]:
    """The model types that a page says run, and those that it says are refused."""
    _, run, refused, *_ = re.split(r"^## .*$", page, flags=re.MULTILINE)
    first = {row.split("|")[1].strip(" `") for row in run.splitlines() if row.startswith("| `")}
    rows = [row.rsplit("|", 2)[1] for row in refused.splitlines() if row.startswith("| ")]
    return first, {kind for row in rows for kind in re.findall(r"`([^`]+)`", row)}


def _layers(found: Finding) -> str:
    return " and ".join(found.kinds) + (", *text*" if found.part else "")


def _others(found: Finding, findings: Sequence[Finding]) -> str:
    """The variants of a family that were equal too."""
    same = [other for other in findings if other.variant and other.model_type == found.model_type]
    return ", ".join(other.variant for other in same if other.verdict == "equal")


def _general(found: Finding) -> str:
    """A reason without the name of the model, and without the numbers of the tiny one."""
    if found.verdict == "unbuilt":
        return "not tried: transformers makes no tiny random model of it here, or does not run that by itself"
    why = found.why.removeprefix(found.model).lstrip(": ")
    why = re.sub(r"^\d+ of \d+ layers of \w+ keep", "layers keep", why)
    why = re.sub(r"has \d+ of \d+ layers", "has layers", why)
    why = re.sub(rf"\b{found.model}\b", "it", why)
    why = re.sub(r"\b\w+Attention uses", "uses", why)
    why = re.sub(r"\blayer \d+\b", "a layer", why)
    return why.replace("|", "\\|")
