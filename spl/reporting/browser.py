"""Samples as the page shows them, policies side by side."""

import json
from typing import Any

from spl.reporting.charts import thin
from spl.reporting.evidence import Arm, Evidence, arm_of, arm_order
from spl.results import Results

Column = tuple[Arm, int | None]
Prompt = tuple[str, str]  # item and conversation as JSON: two files may use one item for different prompts
Reply = tuple[str, float | None, str, float | None]  # text, number of tokens, how it finished, log-probability


def browsable(evidence: Evidence, prompts: int, replies: int) -> dict[str, Any]:
    """Prompts, columns (an arm of a training seed), and of each column the replies to each prompt.

    Args:
        evidence: of the report.
        prompts: at most, evenly spread.
        replies: of a column to a prompt, at most.
    """
    found = _replies(evidence)
    answered = list(dict.fromkeys(prompt for of in found.values() for prompt in of))
    kept = [answered[k] for k in thin(len(answered), prompts)]
    columns = sorted(found, key=lambda column: (arm_order(column[0]), str(column[1])))
    return {
        "prompts": [{"item": item, "messages": json.loads(messages)} for item, messages in kept],
        "columns": [
            {"policy": arm.policy, "setting": arm.setting, "label": str(arm) if seed is None else f"{arm}, seed {seed}"}
            for arm, seed in columns
        ],
        "replies": [[found[column].get(prompt, [])[:replies] for prompt in kept] for column in columns],
        "given": {"prompts": len(answered), "replies": sum(len(r) for of in found.values() for r in of.values())},
    }


def _replies(evidence: Evidence) -> dict[Column, dict[Prompt, list[Reply]]]:
    """Replies by column and prompt; examples stand in where an arm has no samples."""
    found: dict[Column, dict[Prompt, list[Reply]]] = {}
    for file in evidence.files:
        prompts = _prompts(file)
        for record in file.of("sample"):
            reply = (record["text"], record["num_tokens"], record["finish"], record["logp"])
            of = found.setdefault((arm_of(record), record["train_seed"]), {})
            of.setdefault(prompts.get(record["item"], (record["item"], "[]")), []).append(reply)
    sampled = {arm for arm, _ in found}
    known = {prompt[0]: prompt for of in found.values() for prompt in of}
    for record in evidence.of("example"):
        if arm_of(record) not in sampled:
            asked = json.dumps([{"role": "user", "content": record["prompt"]}])
            of = found.setdefault((arm_of(record), record["train_seed"]), {})
            prompt = known.get(record["item"], (record["item"], asked))
            of.setdefault(prompt, [(text, None, "", None) for text in record["texts"]])
    return found


def _prompts(file: Results) -> dict[str, Prompt]:
    return {
        record["item"]: (
            record["item"],
            json.dumps([{"role": m["role"], "content": m["content"]} for m in record["messages"]]),
        )
        for record in file.of("prompt")
    }
