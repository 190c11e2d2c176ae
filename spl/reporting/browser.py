"""Samples as the page shows them, policies side by side."""

from typing import Any

from spl.reporting.charts import thin
from spl.reporting.evidence import Arm, Evidence, arm_of, arm_order, seed_label

Column = tuple[Arm, int | None]


def browsable(evidence: Evidence, prompts: int, replies: int) -> dict[str, Any]:
    """Prompts, columns (an arm of a training seed), and of each column the replies to each prompt.

    Examples stand in where an arm has no samples.

    Args:
        evidence: of the report.
        prompts: at most, evenly spread.
        replies: of a column to a prompt, at most.
    """
    asked = _prompts(evidence)
    found = _replies(evidence)
    answered = [item for item in asked if any(item in of for of in found.values())]
    kept = [answered[k] for k in thin(len(answered), prompts)]
    columns = sorted(found, key=lambda column: (arm_order(column[0]), str(column[1])))
    return {
        "prompts": [{"item": item, "messages": asked[item]} for item in kept],
        "columns": [
            {"policy": arm.policy, "setting": arm.setting, "seed": seed, "label": seed_label(arm, seed)}
            for arm, seed in columns
        ],
        "replies": [[found[column].get(item, [])[:replies] for item in kept] for column in columns],
        "given": {"prompts": len(answered), "replies": sum(len(r) for of in found.values() for r in of.values())},
    }


def _prompts(evidence: Evidence) -> dict[str, list[dict[str, str]]]:
    examples = {record["item"]: [{"role": "user", "content": record["prompt"]}] for record in evidence.of("example")}
    given = {record["item"]: [_message(m) for m in record["messages"]] for record in evidence.of("prompt")}
    return examples | given


def _message(message: dict[str, str]) -> dict[str, str]:
    return {"role": message["role"], "content": message["content"]}


def _replies(evidence: Evidence) -> dict[Column, dict[str, list[list[Any]]]]:
    """Text, number of tokens, how it finished and log-probability of each reply, by column and item."""
    found: dict[Column, dict[str, list[list[Any]]]] = {}
    for record in evidence.of("sample"):
        of = found.setdefault((arm_of(record), record["train_seed"]), {})
        reply = [record["text"], record["num_tokens"], record["finish"], record["logp"]]
        of.setdefault(record["item"], []).append(reply)
    seen = {arm for arm, _ in found}
    for record in evidence.of("example"):
        if arm_of(record) not in seen:
            of = found.setdefault((arm_of(record), record["train_seed"]), {})
            of.setdefault(record["item"], [[text, None, "", None] for text in record["texts"]])
    return found
