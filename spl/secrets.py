"""Keys, tokens and passwords, taken out of everything that a run prints, logs or writes. Imports nothing from spl.

A secret is known by its form (`hf_...`, `sk-...`), by the name that stands before it (`api_key: ...`), by its place in
an address (`https://user:password@host`), or by being the value of an option or an environment variable with such a
name.
"""

import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import Any

HIDDEN = "***"

_KEY = r"api[_-]?key|access[_-]?key|secret[_-]?key|private[_-]?key|password|passwd|secret|credentials?"
_NAME = re.compile(rf"({_KEY}|(^|[_.-])token)$", re.IGNORECASE)
# Tokens of a tokenizer, and rates, whose values are no secrets.
_ORDINARY = re.compile(
    r"(^|[_.-])(bos|eos|pad|unk|cls|sep|mask|image|audio|video|special|start|end|stop|first|last|next|new|per)[_-]token$",
    re.IGNORECASE,
)
# Bounded and anchored, so that a text of any kind is read in linear time.
_FORMS = tuple(
    re.compile(form)
    for form in (
        r"(?P<before>:/{1,2})[^\s/]{1,500}(?=@)",  # an address's user and password
        r"(?P<before>\b)(hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16})",
        r"(?P<before>(?i:\bauthorization)\W{1,4}((?i:bearer|basic|token)\s+)?)[^\s\"',}]+",
        r"(?P<before>\b[Bb]earer\s+)(?=[^\s\d]{0,200}\d)[\w.~+/=-]{12,}",
    )
)
_PAIRS = tuple(
    re.compile(form, re.IGNORECASE)
    for form in (
        rf"(?<![\w.-])(?P<name>[\w.-]{{0,80}}?({_KEY}|token))(?P<between>['\"]?\s?[:=]\s?['\"]?)(?P<value>[^\s\"',;&}})\]]+)",
        rf"(?<![\w.-])(?P<name>--[\w.-]{{0,80}}?({_KEY}|token))(?P<between>\s+['\"]?)(?P<value>[^\s\"']+)",
    )
)

_given: set[str] = set()  # on the command line


def is_secret(name: str, value: object) -> bool:
    """Whether a value under a name is to be hidden: a key or password is, a token where it is a text and no token id.

    >>> [is_secret(name, "x") for name in ("wandb_api_key", "hf_token", "eos_token", "max_tokens")]
    [True, True, False, False]
    """
    if value is None or isinstance(value, bool) or not _NAME.search(name) or _ORDINARY.search(name):
        return False
    return isinstance(value, str) or not name.lower().endswith("token")


def remember(args: Sequence[str]) -> None:
    """Know the secrets of a command line, `--logger.api_key VALUE` or `--logger.api_key=VALUE`, from now on."""
    for option, following in zip(args, [*args[1:], ""], strict=True):
        name, _, value = option.partition("=")
        if name.startswith("--") and is_secret(name, value or following):
            _given.add(value or following)


def redact(text: str) -> str:
    """The text with every secret in it hidden.

    >>> redact("cannot reach https://me:pass@host/data with hf_aaaaaaaaaaaaaaaaaaaaaaaa")
    'cannot reach https://***@host/data with ***'
    """
    known = _given | {value for name, value in os.environ.items() if is_secret(name, value)}
    for value in sorted(known, key=len, reverse=True):
        if len(value) >= 6:  # a shorter one stands in other words
            text = text.replace(value, HIDDEN)
    for form in _FORMS:
        text = form.sub(rf"\g<before>{HIDDEN}", text)
    for pair in _PAIRS:
        text = pair.sub(_without_value, text)
    return text


def _without_value(found: re.Match[str]) -> str:
    name, value = found["name"], found["value"]
    # A sentence may well speak of a token: one that opens something has digits and some length.
    shaped = not name.lower().endswith("token") or (len(value) >= 8 and any(letter.isdigit() for letter in value))
    return f"{name}{found['between']}{HIDDEN}" if shaped and is_secret(name, value) else found[0]


def without_secrets(value: Any) -> Any:
    """Settings without those whose names say that they are secret, and with the secrets in other texts hidden."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not is_secret(str(k), v)}
        return {redact(k) if isinstance(k, str) else k: without_secrets(v) for k, v in kept.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_secrets(v) for v in value)
    return redact(value) if isinstance(value, str) else value


class SecretFilter(logging.Filter):
    """Hides secrets in the messages of a handler."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), None
        return True


def print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Takes the place of sys.excepthook: an error that nobody expected tells no secrets either."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))
