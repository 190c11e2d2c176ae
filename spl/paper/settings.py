"""Settings of the paper's runs: how much of what; the choices themselves are in configs/paper/."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """How many examples go to each part of the pairs; the parts share no prompt.

    Attributes:
        prompts: that are sampled from.
        dev: held out in training; learning rates are chosen on them.
        reward_dev: held out from the reward model.
        reward: that the reward model is trained on.
        train: that policies are trained on.
        max_chars: most characters of a prompt and its longest response together; longer examples are left out.
        num_rows: of the source that are looked at.
    """

    prompts: int = 24
    dev: int = 32
    reward_dev: int = 48
    reward: int = 280
    train: int = 320
    max_chars: int = 700
    num_rows: int = 5000


@dataclass(frozen=True)
class Training:
    """Steps and learning rates.

    Attributes:
        batch_size: examples a step, of all runs.
        sft_steps: of the policy that all others start from, on the preferred responses; 0 starts from the model itself.
        sft_lr: its learning rate.
        gem: train DPO once more from a policy that SFT with GEM (arXiv 2408.16673) made.
        reward_steps: of the reward model.
        reward_lr: its learning rate.
        steps: of every policy.
        lrs: of the policies; of several each policy's best by the loss on the development prompts is taken.
        seeds: training seeds of the policies.
        settings: of every run besides, as {trainer: configs/trainer/gpu.yaml}.
    """

    batch_size: int = 8
    sft_steps: int = 20
    sft_lr: float = 2e-4
    gem: bool = False
    reward_steps: int = 35
    reward_lr: float = 2e-4
    steps: int = 30
    lrs: list[float] = field(default_factory=lambda: [5e-4])
    seeds: list[int] = field(default_factory=lambda: [0])
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measuring:
    """Samples and questions.

    Attributes:
        num_samples: replies to each prompt.
        max_new_tokens: most of a reply; not stated by the paper.
        decodings: names to options of spl sample, by which DPO's policy is decoded besides its own law.
        problems: arithmetic, gsm8k or math to the number of problems.
        problem_samples: replies to each problem.
        problem_tokens: most of such a reply.
        difficulty_samples: replies of the start, drawn apart, by which problems are easy, medium or hard.
        easy_samples: of these that solve an easy problem at most; the paper has 4.
        medium_samples: that solve a medium one at most; the paper has 64.
        num_questions: of MMLU and of TruthfulQA.
        num_opinions: of GlobalOpinionQA.
        orders: of the options of an opinion question that shares are averaged over.
        encoder: sentence encoder for cosine distance and Vendi; null leaves them out.
        device: of samples and evaluations.
    """

    num_samples: int = 8
    max_new_tokens: int = 64
    decodings: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: dict[str, int] = field(default_factory=lambda: {"arithmetic": 24})
    problem_samples: int = 16
    problem_tokens: int = 32
    difficulty_samples: int = 32
    easy_samples: int = 2
    medium_samples: int = 16
    num_questions: int = 48
    num_opinions: int = 16
    orders: int = 2
    encoder: str | None = None
    device: str = "auto"
