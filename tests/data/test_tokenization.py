"""Token ids against hand-written ones, the tokenizer's own template call, and lengths in bytes that need no offsets."""

import copy
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from spl.data.collate import EncodedExample
from spl.data.tokenization import Encoder, TooLongError
from spl.types import Comparison, PreferenceExample, UserError

BOS, END, USER, ASSISTANT = 256, 257, 260, 261
SPACE, NEWLINE = 220, 198
PART = "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}"


def letters(text: str) -> list[int]:
    """The tiny tokenizer's ids: visible ASCII comes first, from 0."""
    return [{" ": SPACE, "\n": NEWLINE}.get(letter, ord(letter) - 33) for letter in text]


def example(prompt: str, *replies: str, system: str | None = None, row: str = "f, row 7") -> PreferenceExample:
    turns = [{"role": "system", "content": system}] if system else []
    comparisons = (Comparison(0, 1, 1.0),)
    return PreferenceExample((*turns, {"role": "user", "content": prompt}), replies, comparisons, row=row)


def with_template(tokenizer: Any, turn: str, cue: str = "<|assistant|>", start: str = "<|bos|>") -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = (
        f"{start}{{% for m in messages %}}{turn}{{% endfor %}}{{% if add_generation_prompt %}}{cue}{{% endif %}}"
    )
    return changed


def test_a_pair_by_hand(tiny_tokenizer: Any) -> None:
    encoded, cut = Encoder(tiny_tokenizer).encode(example("ab", "c", "de"))
    prompt = [BOS, USER, *letters("ab"), END, ASSISTANT]
    assert encoded.sequences == ((*prompt, *letters("c"), END), (*prompt, *letters("de"), END))
    assert encoded.starts == (6, 6)
    assert encoded.comparisons == (Comparison(0, 1, 1.0),)
    assert (encoded.alpha, encoded.row, cut) == (None, "f, row 7", 0)


def test_many_turns_and_replies_by_hand(tiny_tokenizer: Any) -> None:
    turns = tuple({"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user"))
    encoded, _ = Encoder(tiny_tokenizer).encode(PreferenceExample(turns, ("x", "y", "z"), (), alpha=0.5))
    text = ([259, *letters("s")], [USER, *letters("u")], [ASSISTANT, *letters("a")], [USER, *letters("u")])
    prompt = [BOS, *(token for turn in text for token in (*turn, END)), ASSISTANT]
    assert encoded.sequences == tuple((*prompt, *letters(reply), END) for reply in "xyz")
    assert encoded.starts == (14, 14, 14)
    assert encoded.alpha == 0.5


def test_the_plain_template_by_hand(tiny_tokenizer: Any) -> None:
    encoded, _ = Encoder(tiny_tokenizer, template="plain").encode(example("ab", "c", "d\n", system="s"))
    prompt = letters("System: s\n\nUser: ab\n\nAssistant:")
    assert encoded.sequences == ((*prompt, *letters(" c"), END), (*prompt, *letters(" d\n"), END))
    assert encoded.starts == (len(prompt),) * 2


def test_auto_writes_plainly_without_a_chat_template(tiny_tokenizer: Any) -> None:
    bare = copy.deepcopy(tiny_tokenizer)
    bare.chat_template = None
    asked = example("ab", "c", "d")
    assert Encoder(bare).encode(asked) == Encoder(tiny_tokenizer, template="plain").encode(asked)
    assert Encoder(tiny_tokenizer).encode(asked) == Encoder(tiny_tokenizer, template="model").encode(asked)


def test_the_plain_template_begins_with_the_bos_that_the_tokenizer_adds(tiny_tokenizer: Any) -> None:
    adding = copy.deepcopy(tiny_tokenizer)
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)]
    )
    without, _ = Encoder(tiny_tokenizer, template="plain").encode(example("ab", "c", "d"))
    encoded, _ = Encoder(adding, template="plain").encode(example("ab", "c", "d"))
    assert encoded.sequences == tuple((BOS, *sequence) for sequence in without.sequences)
    assert encoded.starts == tuple(start + 1 for start in without.starts)
    # The model's template writes its own: the tokenizer adds none to it.
    assert Encoder(adding).encode(example("ab", "c", "d")) == Encoder(tiny_tokenizer).encode(example("ab", "c", "d"))


def test_two_bos_tokens_are_an_error(tiny_tokenizer: Any) -> None:
    doubled = with_template(tiny_tokenizer, PART, start="<|bos|><|bos|>")
    with pytest.raises(UserError, match=r"^f, row 7: the text begins with two BOS tokens"):
        Encoder(doubled).encode(example("ab", "c", "d"))
    headless = with_template(tiny_tokenizer, "{{ '<|bos|>' + m['content'] + '<|end|>' }}", cue="<|bos|>", start="")
    assert Encoder(headless).encode(example("ab", "c", "d"))[0].sequences[0] == (
        *(BOS, *letters("ab"), END),
        *(BOS, *letters("c"), END),
    )
    with pytest.raises(UserError, match="two BOS tokens"):
        Encoder(headless).encode(example("<|bos|>ab", "c", "d"))


@pytest.mark.parametrize("turn_end", ["template", "eos"])
@pytest.mark.parametrize("space", ["", "\\n"])
def test_a_template_that_ends_no_turn_gets_an_eos(tiny_tokenizer: Any, space: str, turn_end: Any) -> None:
    endless = with_template(tiny_tokenizer, "{{ '<|' + m['role'] + '|>' + m['content'] + '" + space + "' }}")
    encoded, _ = Encoder(endless, turn_end=turn_end).encode(example("a", "b", "c"))
    gap = [NEWLINE] if space else []
    assert encoded.sequences[0] == (BOS, USER, *letters("a"), *gap, ASSISTANT, *letters("b"), *gap, END)


def test_what_the_template_writes_after_the_end(tiny_tokenizer: Any) -> None:
    trailing = with_template(tiny_tokenizer, PART + "{{ '\\n' }}")
    prompt = (BOS, USER, *letters("a"), END, NEWLINE, ASSISTANT)
    scored = {
        turn_end: Encoder(trailing, turn_end=turn_end).encode(example("a", "b", "c"))[0].sequences[0][len(prompt) :]
        for turn_end in ("template", "eos")
    }
    assert scored == {"template": (*letters("b"), END, NEWLINE), "eos": (*letters("b"), END)}


def test_another_mark_of_the_end_than_eos(tiny_tokenizer: Any) -> None:
    mark = "{{ '<|pad|>' if m.role == 'assistant' else '<|end|>' }}"
    other = with_template(tiny_tokenizer, "{{ '<|' + m['role'] + '|>' + m['content'] }}" + mark)
    for turn_end, end in (("template", [258]), ("eos", [258, END])):
        encoded, _ = Encoder(other, turn_end=turn_end).encode(example("a", "b", "c"))
        assert list(encoded.sequences[0][encoded.starts[0] :]) == [*letters("b"), *end]


def test_tokens_that_end_a_reply_besides_eos(tiny_tokenizer: Any) -> None:
    """As Gemma's: the template writes another mark than EOS and a line break, and sampling stops at the mark."""
    mark = "{{ '<|pad|>\n' if m.role == 'assistant' else '<|end|>' }}"
    other = with_template(tiny_tokenizer, "{{ '<|' + m['role'] + '|>' + m['content'] }}" + mark)
    for ends, end in (((258,), [258]), ((), [258, NEWLINE, END])):
        encoded, _ = Encoder(other, turn_end="eos", end_ids=ends).encode(example("a", "b", "c"))
        assert list(encoded.sequences[0][encoded.starts[0] :]) == [*letters("b"), *end]
    # A mark within the reply's own text is no end of it.
    encoded, _ = Encoder(other, turn_end="eos", end_ids=(258,)).encode(example("a", "b<|pad|>b", "c"))
    assert list(encoded.sequences[0][encoded.starts[0] :]) == [*letters("b"), 258, *letters("b"), 258]


def test_a_cue_that_opens_a_thought_is_no_part_of_replies_without_one(tiny_tokenizer: Any) -> None:
    thinking = with_template(tiny_tokenizer, PART, cue="<|assistant|><think>")
    encoded, _ = Encoder(thinking).encode(example("a", "b", "<thank you"))
    assert encoded.starts == (5, 5)
    assert encoded.sequences[0][5:] == (*letters("b"), END)
    assert encoded.sequences[1][5:] == (*letters("<thank you"), END)
    # Where all replies open one, the cue is theirs as well.
    encoded, _ = Encoder(thinking).encode(example("a", "<think>b", "<think>c"))
    assert encoded.starts == (12, 12)


@pytest.mark.parametrize(
    ("turn", "start", "complaint"),
    [
        ("{{ raise_exception('No system role.') if m.role == 'system' }}x", "", "refuses this conversation"),
        (PART, "{{ messages | length }}", "writes the prompt differently once a reply follows it"),
        ("{{ m.content if m.role != 'assistant' }}", "", "leaves no prompt before the reply, or no reply: 'sab'"),
        ("{{ m.content if m.role == 'assistant' }}", "", "leaves no prompt before the reply, or no reply: 'c'"),
    ],
)
def test_templates_that_cannot_be_used(tiny_tokenizer: Any, turn: str, start: str, complaint: str) -> None:
    unfit = with_template(tiny_tokenizer, turn, cue="", start=start)
    with pytest.raises(UserError) as caught:
        Encoder(unfit).encode(example("ab", "c", "d", system="s"))
    assert str(caught.value).startswith("f, row 7: ")
    assert complaint in str(caught.value)
    assert not isinstance(caught.value, TooLongError)


def test_replies_of_equal_token_ids_are_an_error(tiny_tokenizer: Any) -> None:
    lower = copy.deepcopy(tiny_tokenizer)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match=r"^f, row 7: two responses have the same token ids") as caught:
        Encoder(lower).encode(example("ab", "No", "no"))
    assert not isinstance(caught.value, TooLongError)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and three merges: "Assistant: -" ends in the tokens "t", ":Ġ-", but "Assistant: n" in "t:", "Ġ", "n"."""
    vocab = {letter: k for k, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"Ġ-": 256, ":Ġ-": 257, "t:": 258}
    backend = Tokenizer(BPE(vocab=vocab, merges=[("Ġ", "-"), (":", "Ġ-"), ("t", ":")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<e>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_responses_that_merge_with_the_prompt_differently_follow_the_same_tokens(order: tuple[int, int]) -> None:
    replies = ("-)", "no")
    encoded, _ = Encoder(merging_tokenizer()).encode(example("q", *(replies[k] for k in order)))
    prompt = letters("User: q\n\nAssistan")
    expected = ((*prompt, *letters("t"), 257, *letters(")"), 259), (*prompt, 258, *letters(" no"), 259))
    assert encoded.sequences == tuple(expected[k] for k in order)
    assert encoded.starts == (len(prompt), len(prompt))


# Truncation. The prompt "abcdefghij" is 14 tokens: BOS, the user's mark, ten letters, the end, the assistant's mark.


def test_a_cut_drops_the_oldest_tokens_of_the_prompt_and_keeps_bos(tiny_tokenizer: Any) -> None:
    encoded, cut = Encoder(tiny_tokenizer, max_length=12).encode(example("abcdefghij", "kl", "m"))
    prompt = [BOS, *letters("efghij"), END, ASSISTANT]
    assert encoded.sequences == ((*prompt, *letters("kl"), END), (*prompt, *letters("m"), END))
    assert encoded.starts == (9, 9)
    assert cut == 5


def test_a_cut_of_long_responses_scores_no_artificial_end(tiny_tokenizer: Any) -> None:
    encoded, cut = Encoder(tiny_tokenizer, max_length=8).encode(example("ab", "klmnopqr", "s"))
    assert encoded.sequences == ((BOS, ASSISTANT, *letters("klmnop")), (BOS, ASSISTANT, *letters("s"), END))
    assert encoded.starts == (2, 2)
    assert cut == 4 + 3


def test_a_row_that_just_fits_is_left_whole(tiny_tokenizer: Any) -> None:
    for truncation in ("cut", "drop", "raise"):
        encoder = Encoder(tiny_tokenizer, max_length=17, truncation=truncation)
        assert encoder.encode(example("abcdefghij", "kl", "m")) == (
            Encoder(tiny_tokenizer).encode(example("abcdefghij", "kl", "m"))[0],
            0,
        )


def test_without_bos_the_very_first_tokens_go(tiny_tokenizer: Any) -> None:
    encoded, cut = Encoder(tiny_tokenizer, max_length=12, template="plain").encode(example("ab", "c", "d"))
    assert encoded.sequences[0] == (*letters("ssistant: c"), END)
    assert cut == len("User: ab\n\nA")


@pytest.mark.parametrize("truncation", ["drop", "raise"])
def test_a_longer_row_raises_unless_it_may_be_cut(tiny_tokenizer: Any, truncation: Any) -> None:
    with pytest.raises(TooLongError, match=r"^f, row 7: 17 tokens are more than max_length 16; raise data\.max_length"):
        Encoder(tiny_tokenizer, max_length=16, truncation=truncation).encode(example("abcdefghij", "kl", "m"))


def test_a_cut_that_leaves_no_difference_raises(tiny_tokenizer: Any) -> None:
    with pytest.raises(TooLongError, match=r"^f, row 7: responses differ only past max_length 8; "):
        Encoder(tiny_tokenizer, max_length=8).encode(example("ab", "klmnopqr", "klmnopqs"))


WORDS = st.text("abc", min_size=1, max_size=30)


@settings(deadline=None)
@given(WORDS, st.lists(WORDS, min_size=2, max_size=4, unique=True), st.integers(8, 40))
def test_what_a_cut_keeps(tiny_tokenizer: Any, prompt: str, replies: list[str], max_length: int) -> None:
    try:
        encoded, cut = Encoder(tiny_tokenizer, max_length=max_length).encode(example(prompt, *replies))
    except TooLongError:
        assert len({reply[: max_length - 2] for reply in replies}) < len(replies)
        return
    whole = [USER, *letters(prompt), END, ASSISTANT]
    (start,) = set(encoded.starts)
    kept = encoded.sequences[0][:start]
    assert kept[0] == BOS
    assert list(kept[1:]) == whole[len(whole) - start + 1 :]
    assert start >= min(max_length // 4, len(whole) + 1)
    lost = len(whole) + 1 - start
    for sequence, reply in zip(encoded.sequences, replies, strict=True):
        scored = [*letters(reply), END]
        assert sequence[:start] == kept
        assert list(sequence[start:]) == scored[: max_length - start]
        lost += max(0, len(scored) - (max_length - start))
    assert cut == lost
    longest = max(map(len, replies)) + 1
    assert max(map(len, encoded.sequences)) == min(max_length, len(whole) + 1 + longest)


# A real tokenizer.


def test_the_ids_are_those_of_the_tokenizer_s_own_template_call(smollm2_tokenizer: Any) -> None:
    asked = example("Name a colour.\n\n1. Red", "Blue,\n or  teal 🦚.", "It's red", system="Be brief.")
    encoded, _ = Encoder(smollm2_tokenizer).encode(asked)
    for sequence, start, reply in zip(encoded.sequences, encoded.starts, asked.responses, strict=True):
        said = [*asked.prompt, {"role": "assistant", "content": reply}]
        assert list(sequence) == smollm2_tokenizer.apply_chat_template(said)["input_ids"]
        cue = smollm2_tokenizer.apply_chat_template(list(asked.prompt), add_generation_prompt=True)["input_ids"]
        assert list(sequence[:start]) == cue


def test_a_decoded_example(smollm2_tokenizer: Any) -> None:
    encoder = Encoder(smollm2_tokenizer)
    encoded, _ = encoder.encode(example("Tea?\nNow?", "Yes,\n\nplease 🍵.", "No"))
    prompt = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nTea?\nNow?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert encoder.decode_marked(encoded) == prompt + "«Yes,\n\nplease 🍵.<|im_end|>\n»"
    assert encoder.decode_marked(encoded, 1) == prompt + "«No<|im_end|>\n»"
    stopped, _ = Encoder(smollm2_tokenizer, turn_end="eos").encode(example("Tea?\nNow?", "Yes", "No"))
    assert encoder.decode_marked(stopped, 1) == prompt + "«No<|im_end|>»"
    plain = Encoder(smollm2_tokenizer, template="plain")
    assert plain.decode_marked(plain.encode(example("Tea?", "Yes", "No"))[0]) == (
        "User: Tea?\n\nAssistant:« Yes<|im_end|>»"
    )


def test_a_decoded_example_with_a_long_prompt_shows_its_ends(tiny_tokenizer: Any) -> None:
    encoder = Encoder(tiny_tokenizer, max_length=4000)
    encoded, _ = encoder.encode(example("b" * 1500 + "c" * 1500, "Yes", "No"))
    shown = encoder.decode_marked(encoded)
    assert shown.startswith("<|bos|><|user|>bbb")
    assert shown.endswith("ccc<|end|><|assistant|>«Yes<|end|>»")
    assert f" [... {3000 + len('<|bos|><|user|><|end|><|assistant|>') - 800:,} characters ...] " in shown
    assert len(shown) < 900


def test_a_decoded_example_whose_scored_span_begins_within_a_letter(tiny_tokenizer: Any) -> None:
    ids = (*letters("a"), *tiny_tokenizer("é")["input_ids"])
    encoded = EncodedExample((ids, ids[:2]), (2, 1), (), None, "")
    assert Encoder(tiny_tokenizer).decode_marked(encoded) == "a\N{REPLACEMENT CHARACTER}«\N{REPLACEMENT CHARACTER}»"


def test_a_decoder_that_drops_a_blank_which_begins_a_text(tiny_tokenizer: Any) -> None:
    stripping = copy.deepcopy(tiny_tokenizer)
    parts = [decoders.ByteLevel(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    stripping.backend_tokenizer.decoder = decoders.Sequence(parts)
    assert stripping.decode(letters(" c")) == "c"
    encoder = Encoder(stripping, template="plain")
    assert encoder.decode_marked(encoder.encode(example("ab", "c", "d"))[0]) == "User: ab\n\nAssistant:« c<|end|>»"


def test_a_newline_that_merges_with_the_cue_is_scored_for_every_response(smollm2_tokenizer: Any) -> None:
    encoder = Encoder(smollm2_tokenizer)
    encoded, _ = encoder.encode(example("Tea?", "No", "\n\nYes"))
    assert encoder.decode_marked(encoded, 1).endswith("<|im_start|>assistant«\n\n\nYes<|im_end|>\n»")
    assert encoder.decode_marked(encoded, 0).endswith("<|im_start|>assistant«\nNo<|im_end|>\n»")


def test_a_blank_before_the_reply_goes_to_the_reply_s_first_token(smollm2_tokenizer: Any) -> None:
    turn = "{{ 'Q: ' if m.role == 'user' else ' A: ' }}{{ m.content }}"
    blank = with_template(smollm2_tokenizer, turn, cue="{{ ' A: ' }}", start="")
    encoded, _ = Encoder(blank).encode(example("Tea?", "Yes", "No"))
    prompt, reply = (smollm2_tokenizer(text)["input_ids"] for text in ("Q: Tea? A:", " Yes"))
    assert encoded.sequences[0] == (*prompt, *reply, smollm2_tokenizer.eos_token_id)
    assert encoded.starts == (len(prompt),) * 2
    assert len(smollm2_tokenizer("Q: Tea? A: ")["input_ids"]) == len(prompt) + 1


# SmolLM2's vocabulary lacks some bytes, which it passes over in silence; these letters have all of theirs.
TEXTS = st.text(" \n:'-1aAéßд中🍵", min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.lists(TEXTS.filter(str.strip), min_size=2, max_size=3, unique_by=str.strip), st.booleans())
def test_the_boundary_by_lengths_in_bytes(smollm2_tokenizer: Any, prompt: str, replies: list[str], plain: bool) -> None:
    """A token of a byte-level tokenizer is written with one character a byte, and so are its special tokens."""
    encoder = Encoder(smollm2_tokenizer, template="plain" if plain else "model")
    asked = example(prompt, *replies)
    encoded, _ = encoder.encode(asked)
    (start,) = set(encoded.starts)
    before = encoder.render_prompt(asked.prompt)
    reaches = []
    for sequence, reply in zip(encoded.sequences, replies, strict=True):
        text = f"{before} {reply}<|im_end|>" if plain else f"{before}{reply}<|im_end|>\n"
        assert smollm2_tokenizer.decode(sequence, clean_up_tokenization_spaces=False) == text
        assert sequence[:start] == encoded.sequences[0][:start]
        ends = accumulate(map(len, smollm2_tokenizer.convert_ids_to_tokens(sequence)))
        reaches.append(next(k for k, end in enumerate(ends) if end > len(before.encode())))
    assert start == min(reaches)


# Settings.


@pytest.mark.parametrize(
    ("settings_", "complaint"),
    [
        ({"max_length": 7}, "max_length must be at least 8 tokens, but is 7"),
        ({"template": "modle"}, "template must be one of auto, model, plain, but is 'modle'"),
        ({"truncation": "keep"}, "truncation must be one of cut, drop, raise, but is 'keep'"),
        ({"turn_end": ""}, "turn_end must be one of template, eos, but is ''"),
    ],
)
def test_settings_that_cannot_be_used(tiny_tokenizer: Any, settings_: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        Encoder(tiny_tokenizer, **settings_)
    assert complaint in str(caught.value)


def test_tokenizers_that_cannot_be_used(tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="the tokenizer must be a fast one"):
        Encoder(object())
    changed = copy.deepcopy(tiny_tokenizer)
    changed.chat_template = None
    with pytest.raises(UserError, match="the model has no chat template: set data"):
        Encoder(changed, template="model")
    changed.eos_token = None
    with pytest.raises(UserError, match="the tokenizer has no EOS token"):
        Encoder(changed)
