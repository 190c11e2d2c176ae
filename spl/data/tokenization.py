"""The one place where text becomes token ids.

A whole conversation, prompt and response, is rendered and tokenised as one text, and the boundary is found on it: the
scored tokens begin with the first that reaches past the prompt's text. Tokenising the two apart would put other tokens
there than the model sees when it writes. Where the responses of a row disagree on that token ("Answer:" + "-)" may be
one token, "Answer:" + " no" two), all are scored from the earliest, so that all follow the same prompt.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from spl.data.collate import EncodedExample, common
from spl.types import Message, PreferenceExample, UserError

Truncation = Literal["cut", "drop", "raise"]
Template = Literal["auto", "model", "plain"]
TurnEnd = Literal["template", "eos"]

_PLAIN_NAMES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}


class TooLongError(UserError):
    """A row does not fit in max_length, and cutting it is not allowed or would leave nothing to learn from."""


@dataclass(frozen=True)
class Encoder:
    """Renders and tokenises examples.

    Attributes:
        tokenizer: a fast transformers tokenizer.
        max_length: most tokens of prompt and response together.
        template: "model" takes the tokenizer's chat template, "plain" writes "User: ...", "auto" prefers the first.
        truncation: what happens to a longer row. "cut" drops the oldest tokens of the prompt (a BOS token stays), the
            same for all responses, down to a quarter of max_length, and then the ends of longer responses, which so
            lose their EOS; "drop" and "raise" raise TooLongError, which the caller may pass over.
        turn_end: "template" scores all that the template writes to end the reply, "eos" stops at the EOS token, as
            sampling does. Where the template writes nothing there, both score an EOS token.
    """

    tokenizer: Any
    max_length: int = 1024
    template: Template = "auto"
    truncation: Truncation = "cut"
    turn_end: TurnEnd = "template"

    def __post_init__(self) -> None:
        for name, choices in (("template", Template), ("truncation", Truncation), ("turn_end", TurnEnd)):
            if getattr(self, name) not in get_args(choices):
                raise UserError(
                    f"{name} must be one of {', '.join(get_args(choices))}, but is {getattr(self, name)!r}."
                )
        if not getattr(self.tokenizer, "is_fast", False):
            raise UserError("the tokenizer must be a fast one: the prompt's end is found by character offsets.")
        if self.max_length < 8:
            raise UserError(f"max_length must be at least 8 tokens, but is {self.max_length}.")
        if self.template == "model" and not self.tokenizer.chat_template:
            raise UserError("the model has no chat template: set data.template to auto or plain to write turns so.")
        if self.tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token, so no response could ever end: set tokenizer.eos_token.")

    @property
    def uses_model_template(self) -> bool:
        return self.template != "plain" and bool(self.tokenizer.chat_template)

    def encode(self, example: PreferenceExample) -> tuple[EncodedExample, int]:
        """Tokenise an example; also the number of tokens that were cut off, those of the prompt counted once.

        Raises:
            TooLongError: it is longer than max_length and truncation is not "cut", or the cut made responses equal.
            UserError: the template cannot render it, or the responses' token ids are equal.
        """
        try:
            sequences, start = self._tokenise(example)
            sequences, shift, cut = self._fit(sequences, start)
        except UserError as error:
            raise type(error)(f"{example.row}: {error}" if example.row else str(error)) from None
        starts = (start - shift,) * len(sequences)
        return EncodedExample(
            tuple(map(tuple, sequences)), starts, example.comparisons, example.alpha, example.row
        ), cut

    def render_prompt(self, turns: tuple[Message, ...]) -> str:
        """The prompt's text, up to where the reply begins."""
        if not self.uses_model_template:
            return "".join(_plain_turn(turn) for turn in turns) + "Assistant:"
        return self._apply(turns, generate=True)

    def decode_marked(self, encoded: EncodedExample, response: int = 0) -> str:
        """The text the model sees, special tokens too, with «the scored span» marked; a long prompt is shortened."""
        ids, start = encoded.sequences[response], encoded.starts[response]
        prompt, text = self._decode(ids[:start]), self._decode(ids)
        # Some decoders drop a space that begins a text, so the scored part is taken from the whole.
        scored = text[len(prompt) :] if text.startswith(prompt) else self._decode(ids[start:])
        if len(prompt) > 1000:
            prompt = f"{prompt[:400]} [... {len(prompt) - 800:,} characters ...] {prompt[-400:]}"
        return f"{prompt}«{scored}»"

    def _decode(self, ids: tuple[int, ...]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _apply(self, turns: tuple[Message, ...], generate: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=generate)
        except Exception as error:  # a template is a program of the model's maker and raises what it likes
            raise UserError(
                f"the model's chat template refuses this conversation ({error}): mend the row, or set data.template "
                "to plain."
            ) from None
        return str(text)

    def _render(self, example: PreferenceExample) -> tuple[list[str], int]:
        """The whole text of every response, and how many characters of it are the prompt's."""
        turns, prompt = example.prompt, self.render_prompt(example.prompt)
        if not self.uses_model_template:
            return [f"{prompt} {reply}" for reply in example.responses], len(prompt)
        replies: list[Message] = [{"role": "assistant", "content": reply} for reply in example.responses]
        texts = [self._apply((*turns, reply), generate=False) for reply in replies]
        if all(text.startswith(prompt) for text in texts):
            return texts, len(prompt)
        # The cue for a reply may not be how replies begin (a template that opens a thought): then as far as they agree.
        shared = min(common(prompt, text) for text in texts)
        if shared < common(prompt, self._apply(turns, generate=False)):
            raise UserError(
                "the chat template writes the prompt differently once a reply follows it: set data.template to plain."
            )
        return texts, shared

    def _tokenise(self, example: PreferenceExample) -> tuple[list[list[int]], int]:
        """Token ids of every response after its prompt, and the index of the first scored token, the same for all."""
        texts, boundary = self._render(example)
        encoding = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        first, ends = encoding["input_ids"][0], (end for _, end in encoding["offset_mapping"][0])
        past = next((k for k, end in enumerate(ends) if end > boundary), len(first))
        # A response whose tokens reach past the prompt earlier than that parts from the first one there.
        start = min(common(first[:past], ids) for ids in encoding["input_ids"])
        sequences = [
            self._ended(ids, start, text.rstrip().endswith(reply.strip()))
            for ids, text, reply in zip(encoding["input_ids"], texts, example.responses, strict=True)
        ]
        bos = self.tokenizer.bos_token_id
        if not self.uses_model_template and bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]:
            sequences, start = [[bos, *ids] for ids in sequences], start + 1
        if bos is not None and sequences[0][:2] == [bos, bos]:
            raise UserError("the text begins with two BOS tokens: take one out of the chat template or of the prompt.")
        if start == 0 or min(map(len, sequences)) <= start:
            raise UserError(f"the template leaves no prompt before the reply, or no reply: {texts[0][-80:]!r}.")
        return sequences, start

    def _ended(self, ids: list[int], start: int, is_open: bool) -> list[int]:
        """Apply `turn_end`; `is_open` where nothing but white space stands after the reply."""
        eos = self.tokenizer.eos_token_id
        if is_open or (self.turn_end == "eos" and eos not in ids[start:]):
            return [*ids, eos]
        return ids[: len(ids) - ids[::-1].index(eos)] if self.turn_end == "eos" else ids

    def _fit(self, sequences: list[list[int]], start: int) -> tuple[list[list[int]], int, int]:
        """Sequences of at most max_length, how many of the prompt's tokens that took, and how many tokens in all."""
        longest, drop, cut = max(map(len, sequences)), 0, 0
        if longest > self.max_length:
            if self.truncation != "cut":
                raise TooLongError(
                    f"{longest} tokens are more than max_length {self.max_length}; "
                    "raise data.max_length, or set data.truncation to cut or drop."
                )
            drop = min(longest - self.max_length, max(0, start - max(self.max_length // 4, 2)))
            head = 1 if sequences[0][0] == self.tokenizer.bos_token_id else 0
            sequences = [ids[:head] + ids[head + drop :] for ids in sequences]
            cut = drop + sum(max(0, len(ids) - self.max_length) for ids in sequences)
            sequences = [ids[: self.max_length] for ids in sequences]
        if len(set(map(tuple, sequences))) < len(sequences):
            if cut:
                raise TooLongError(f"responses differ only past max_length {self.max_length}; raise data.max_length.")
            raise UserError("two responses have the same token ids: nothing tells them apart.")
        return sequences, drop, cut


def _plain_turn(turn: Message) -> str:
    return f"{_PLAIN_NAMES[turn['role']]}: {turn['content']}\n\n"
