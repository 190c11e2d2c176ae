"""The one place where text becomes token ids.

A whole conversation, prompt and response, is rendered and tokenised as one text, and the boundary is found on it: a
response's first scored token is the first that reaches past the prompt's text. Tokenising the two apart would put other
tokens there than the model sees when it writes.
"""

from dataclasses import dataclass
from typing import Any, Literal

from spl.data.collate import EncodedExample
from spl.types import Message, PreferenceExample, UserError

Truncation = Literal["cut", "drop", "raise"]
Template = Literal["auto", "model", "plain"]
TurnEnd = Literal["template", "eos"]

_PLAIN_NAMES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}


class TooLong(UserError):
    """A row does not fit in max_length and the setting does not allow to cut it."""


@dataclass(frozen=True)
class Encoder:
    """Renders and tokenises examples.

    Attributes:
        tokenizer: a fast transformers tokenizer.
        max_length: most tokens of prompt and response together.
        template: "model" takes the tokenizer's chat template, "plain" writes "User: ...", "auto" prefers the first.
        truncation: what happens to a longer row. "cut" drops the oldest tokens of the prompt, the same number for all
            responses, down to a quarter of max_length, and then the ends of longer responses, which so lose their EOS.
        turn_end: "template" scores all that the template writes to end the reply, "eos" stops at the EOS token, as
            sampling does.
    """

    tokenizer: Any
    max_length: int = 1024
    template: Template = "auto"
    truncation: Truncation = "cut"
    turn_end: TurnEnd = "template"

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "is_fast", False):
            raise UserError("the tokenizer must be a fast one: the prompt's end is found by character offsets.")
        if self.max_length < 8:
            raise UserError(f"max_length must be at least 8 tokens, but is {self.max_length}.")
        if self.template == "model" and not self.tokenizer.chat_template:
            raise UserError("the model has no chat template: set data.template to auto or plain to write turns plainly.")
        if self.tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token, so no response could ever end: set tokenizer.eos_token.")

    @property
    def uses_model_template(self) -> bool:
        return self.template != "plain" and bool(self.tokenizer.chat_template)

    def encode(self, example: PreferenceExample) -> tuple[EncodedExample, int]:
        """Tokenise an example; also the number of tokens that were cut off.

        Raises:
            TooLong: it is longer than max_length and truncation is not "cut".
            UserError: the template cannot render it.
        """
        prompt = self.render_prompt(example.prompt)
        encoded = [self._sequence(example.prompt, prompt, reply) for reply in example.responses]
        length = max(len(ids) for ids, _ in encoded)
        cut = 0
        if length > self.max_length:
            if self.truncation != "cut":
                raise TooLong(
                    f"{example.row or 'a row'}: {length} tokens are more than max_length {self.max_length}; "
                    "raise data.max_length, or set data.truncation to cut or drop."
                )
            encoded, cut = self._cut(encoded)
        sequences, starts = zip(*encoded, strict=True)
        return EncodedExample(sequences, starts, example.comparisons, example.alpha, example.row), cut

    def render_prompt(self, turns: tuple[Message, ...]) -> str:
        """The prompt's text, up to where the reply begins."""
        if not self.uses_model_template:
            return "".join(_plain_turn(turn) for turn in turns) + "Assistant:"
        return self._apply(turns, generate=True)

    def _apply(self, turns: tuple[Message, ...], generate: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=generate)
        except Exception as error:  # a template is a program of the model's maker and raises what it likes
            raise UserError(f"the model's chat template refuses this conversation: {error}") from None
        return str(text)

    def _sequence(self, turns: tuple[Message, ...], prompt: str, reply: str) -> tuple[tuple[int, ...], int]:
        """Token ids of prompt and response, and the index of the first scored one."""
        if self.uses_model_template:
            text = self._apply((*turns, {"role": "assistant", "content": reply}), generate=False)
            if not text.startswith(prompt):
                prompt = self._shared_beginning(turns, prompt, text)
        else:
            text = f"{prompt} {reply}"
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(encoding["input_ids"])
        start = next((k for k, (_, end) in enumerate(encoding["offset_mapping"]) if end > len(prompt)), len(ids))
        if self.uses_model_template:
            ids = self._end_turn(ids, start)
        else:
            ids.append(self.tokenizer.eos_token_id)
            if self._adds_bos():
                ids, start = [self.tokenizer.bos_token_id, *ids], start + 1
        if ids[:2] == [self.tokenizer.bos_token_id] * 2:
            raise UserError("the text begins with two BOS tokens: the chat template and the tokenizer both add one.")
        if not 0 < start < len(ids):
            raise UserError(f"no prompt token stands before the reply, or no reply after it: {text[:80]!r}.")
        return tuple(ids), start

    def _shared_beginning(self, turns: tuple[Message, ...], prompt: str, text: str) -> str:
        """Where the cue for a reply is not how replies begin (a template that opens a thought), the text they share."""
        closed = self._apply(turns, generate=False)
        if not text.startswith(closed):
            raise UserError("the chat template writes a prompt differently once a reply follows it; use template plain.")
        shared = len(closed)
        while shared < min(len(prompt), len(text)) and prompt[shared] == text[shared]:
            shared += 1
        return text[:shared]

    def _end_turn(self, ids: list[int], start: int) -> list[int]:
        """Apply `turn_end` to a reply rendered by the model's template."""
        eos = self.tokenizer.eos_token_id
        if self.turn_end == "eos":
            if eos not in ids[start:]:
                return [*ids, eos]
            return ids[: len(ids) - ids[::-1].index(eos)]
        return ids

    def _adds_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]

    def _cut(self, encoded: list[tuple[tuple[int, ...], int]]) -> tuple[list[tuple[tuple[int, ...], int]], int]:
        """Shorten every sequence to max_length: first the prompt's oldest tokens, then the responses' ends."""
        keep_bos = all(ids[0] == self.tokenizer.bos_token_id for ids, _ in encoded)
        shortest_prompt = min(start for _, start in encoded)
        excess = max(len(ids) for ids, _ in encoded) - self.max_length
        drop = min(excess, max(0, shortest_prompt - max(self.max_length // 4, 2)))
        head = 1 if keep_bos else 0
        shortened = [
            ((ids[:head] + ids[head + drop :])[: self.max_length], start - drop) for ids, start in encoded
        ]
        return shortened, sum(len(a) - len(b) for (a, _), (b, _) in zip(encoded, shortened, strict=True))


def _plain_turn(turn: Message) -> str:
    return f"{_PLAIN_NAMES[turn['role']]}: {turn['content']}\n\n"
