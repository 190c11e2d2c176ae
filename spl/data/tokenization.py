"""The one place where text becomes token ids.

A whole conversation, prompt and response, is rendered and tokenised as one text, and the boundary is found on it: the
scored tokens begin with the first that reaches past the prompt's text. Tokenising the two apart would put other tokens
there than the model sees when it writes. Where the responses of a row disagree on that token ("Answer:" + "-)" may be
one token, "Answer:" + " no" two), all are scored from the earliest, so that all follow the same prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
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
        turn_end: "template" scores all that the template writes to end the reply, "eos" stops at the first token there
            that ends a reply, as sampling does. Where the template writes nothing there, both score an EOS token.
        reads_end: put one token more behind every response, so that its last own token goes through the network too:
            for a reward that is read there.
        end_ids: tokens besides EOS that end a reply, as Gemma's <end_of_turn> does.
        advice: what to do about a row that is too long.
    """

    tokenizer: Any
    max_length: int = 1024
    template: Template = "auto"
    truncation: Truncation = "cut"
    turn_end: TurnEnd = "template"
    reads_end: bool = False
    end_ids: tuple[int, ...] = ()
    advice: str = "raise data.max_length, or set data.truncation to cut or drop"

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

    @cached_property
    def _adds_bos(self) -> bool:
        return bool(self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id])

    @property
    def uses_model_template(self) -> bool:
        return self.template != "plain" and bool(self.tokenizer.chat_template)

    def encode(self, example: PreferenceExample) -> tuple[EncodedExample, int]:
        """Tokenise an example; also the number of tokens that were cut off, those of the prompt counted once.

        Raises:
            TooLongError: it is longer than max_length and truncation is not "cut", or the cut made responses equal.
            UserError: the template cannot render it, or the responses' token ids are equal.
        """
        outcome = self.encode_all([example])[0]
        if isinstance(outcome, UserError):
            raise outcome
        return outcome

    def encode_all(self, examples: Sequence[PreferenceExample]) -> list[tuple[EncodedExample, int] | UserError]:
        """Tokenise examples together, which is faster; for each what `encode` returns or would raise."""
        outcomes: list[tuple[EncodedExample, int] | UserError] = []
        for example, found in zip(examples, self.tokenised(examples), strict=True):
            try:
                if isinstance(found, UserError):
                    raise found
                sequences, start = found
                sequences, shift, cut = self.fit(sequences, start)
            except UserError as error:
                outcomes.append(type(error)(f"{example.row}: {error}" if example.row else str(error)))
                continue
            starts = (start - shift,) * len(sequences)
            tokens = tuple(tuple(self._to_read(ids) if self.reads_end else ids) for ids in sequences)
            outcomes.append((EncodedExample(tokens, starts, example.comparisons, example.alpha, example.row), cut))
        return outcomes

    def tokenised(self, examples: Sequence[PreferenceExample]) -> list[tuple[list[list[int]], int] | UserError]:
        """Of each, whole token ids of every response with its prompt and the index of the first scored one."""
        rendered = [self._rendered(example) for example in examples]
        texts = [text for r in rendered if not isinstance(r, UserError) for text in r[0]]
        encodings = iter(self._encodings(texts))
        outcomes: list[tuple[list[list[int]], int] | UserError] = []
        for example, render in zip(examples, rendered, strict=True):
            if isinstance(render, UserError):
                outcomes.append(render)
                continue
            try:
                outcomes.append(self._scored(example, *render, list(islice(encodings, len(render[0])))))
            except UserError as error:
                outcomes.append(error)
        return outcomes

    def _rendered(self, example: PreferenceExample) -> tuple[list[str], int] | UserError:
        try:
            return self._render(example)
        except UserError as error:
            return error

    def _encodings(self, texts: list[str]) -> list[Any]:
        """Of the tokenizer's own library, which works out offsets only where they are asked for."""
        if not texts:
            return []
        found = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return list(found.encodings)

    def render_prompt(self, turns: tuple[Message, ...]) -> str:
        """The prompt's text, up to where the reply begins."""
        if not self.uses_model_template:
            return "".join(_plain_turn(turn) for turn in turns) + "Assistant:"
        return self._apply(turns, generate=True)

    @property
    def before_reply(self) -> str:
        """What stands between a prompt and its reply, and is the first of what a model writes."""
        return "" if self.uses_model_template else " "

    def decode_reply(self, ids: Sequence[int], whole: bool = False) -> str:
        """The text of a reply's own tokens, given without its EOS token, as `encode` takes it.

        Args:
            ids: the tokens.
            whole: with what stands before it.
        """
        text = str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        return text if whole else text.removeprefix(self.before_reply)

    def decode_marked(self, encoded: EncodedExample, response: int | None = 0) -> str:
        """The text the model sees, special tokens too, with «the scored span» marked; a long prompt is shortened.

        Args:
            encoded: an example.
            response: which of its; None for a conversation: the longest, and the replies on the way to it.
        """
        spans = sorted(zip(map(len, encoded.sequences), encoded.starts, encoded.sequences, strict=True))
        if response is None:
            ids = spans[-1][2]
            spans = [span for span in spans if ids[: span[0]] == span[2]]
        else:
            ids = encoded.sequences[response]
            spans = [(len(ids), encoded.starts[response], ids)]
        text, done = "", 0
        for end, start, _ in spans:
            prompt = self._text_between(ids, done, start)
            if len(prompt) > 1000:
                prompt = f"{prompt[:400]} [... {len(prompt) - 800:,} characters ...] {prompt[-400:]}"
            done = end - self.reads_end
            text += f"{prompt}«{self._text_between(ids, start, done)}»"
        return text

    def _text_between(self, ids: tuple[int, ...], start: int, end: int) -> str:
        before, text = self._decode(ids[:start]), self._decode(ids[:end])
        # Some decoders drop a space that begins a text, so the part is taken from the whole.
        return text[len(before) :] if text.startswith(before) else self._decode(ids[start:end])

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

    def _scored(
        self, example: PreferenceExample, texts: list[str], boundary: int, encodings: list[Any]
    ) -> tuple[list[list[int]], int]:
        """Token ids of every response after its prompt, and the index of the first scored token, the same for all.

        Args:
            example: what was rendered.
            texts: of every response, with its prompt.
            boundary: characters of them that are the prompt's.
            encodings: of the texts.
        """
        ids_of = [encoding.ids for encoding in encodings]
        first, past = ids_of[0], _token_past(encodings[0], boundary)
        # A response whose tokens reach past the prompt earlier than that parts from the first one there.
        start = min(past if ids[:past] == first[:past] else common(first[:past], ids) for ids in ids_of)
        sequences = [
            self._ended(encoding, text, boundary, reply)
            for encoding, text, reply in zip(encodings, texts, example.responses, strict=True)
        ]
        bos = self.tokenizer.bos_token_id
        if not self.uses_model_template and bos is not None and self._adds_bos:
            sequences, start = [[bos, *ids] for ids in sequences], start + 1
        if bos is not None and sequences[0][:2] == [bos, bos]:
            raise UserError("the text begins with two BOS tokens: take one out of the chat template or of the prompt.")
        if start == 0 or min(map(len, sequences)) <= start:
            raise UserError(f"the template leaves no prompt before the reply, or no reply: {texts[0][-80:]!r}.")
        return sequences, start

    def _ended(self, encoding: Any, text: str, boundary: int, reply: str) -> list[int]:
        """The token ids of a text, by `turn_end`; its first `boundary` characters are the prompt's."""
        ids, eos, said = list(encoding.ids), self.tokenizer.eos_token_id, reply.strip()
        if _is_open(text[boundary:], reply):
            return [*ids, eos]
        if self.turn_end != "eos":
            return ids
        stands = text.rfind(said, boundary) if said else -1  # a template may write a reply in its own way
        past = _token_past(encoding, stands + len(said) if stands >= 0 else boundary)
        end = next((k for k in range(past, len(ids)) if ids[k] == eos or ids[k] in self.end_ids), None)
        return [*ids, eos] if end is None else ids[: end + 1]

    def fit(self, sequences: list[list[int]], start: int) -> tuple[list[list[int]], int, int]:
        """Sequences of at most max_length, how many of the prompt's tokens that took, and how many tokens in all.

        Raises:
            TooLongError: that is not allowed, or nothing is left to tell the sequences apart.
            UserError: two are equal.
        """
        longest, drop, cut = max(map(len, sequences)), 0, 0
        if longest > self.max_length:
            self.refuse_long(longest)
            drop = min(longest - self.max_length, max(0, start - max(self.max_length // 4, 2)))
            sequences = [self.without(ids, drop) for ids in sequences]
            cut = drop + sum(max(0, len(ids) - self.max_length) for ids in sequences)
            sequences = [ids[: self.max_length] for ids in sequences]
        if len(set(map(tuple, sequences))) < len(sequences):
            if cut:
                raise TooLongError(f"responses differ only past max_length {self.max_length}; raise data.max_length.")
            raise UserError("two responses have the same token ids: nothing tells them apart.")
        return sequences, drop, cut

    def refuse_long(self, longest: int) -> None:
        """Raise TooLongError of so many tokens, where they may not be cut."""
        if self.truncation != "cut":
            raise TooLongError(f"{longest} tokens are more than max_length {self.max_length}; {self.advice}.")

    def without(self, ids: list[int], drop: int) -> list[int]:
        """Token ids less the oldest, of which a BOS token stays."""
        head = 1 if ids[0] == self.tokenizer.bos_token_id else 0
        return ids[:head] + ids[head + drop :]

    def _to_read(self, ids: list[int]) -> list[int]:
        """Up to the last token that is not padding, where transformers reads a reward, and one more."""
        end = len(ids)
        while ids[end - 1] == self.tokenizer.pad_token_id:
            end -= 1
        return [*ids[:end], self.tokenizer.eos_token_id]


def _token_past(encoding: Any, boundary: int) -> int:
    """Index of the first token that ends past a text's first `boundary` characters; all tokens where none does."""
    found = encoding.char_to_token(boundary)
    if found is None:  # a character that no token covers, such as a space that the tokenizer drops
        ends = (end for _, end in encoding.offsets)
        found = next((k for k, end in enumerate(ends) if end > boundary), len(encoding.ids))
    return int(found)


def _is_open(rendered: str, reply: str) -> bool:
    """Whether nothing but white space stands after a reply, which a sample may have left empty."""
    text = reply.strip()
    return rendered.rstrip().endswith(text) if text else not rendered.strip()


def _plain_turn(turn: Message) -> str:
    return f"{_PLAIN_NAMES[turn['role']]}: {turn['content']}\n\n"
