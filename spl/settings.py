"""How settings are read: YAML whose aliases cannot swell up, and a parser that says what is wrong in one sentence."""

import re
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from spl.secrets import redact
from spl.types import UserError

MOST_VALUES = 100_000
MOST_SAID = 500  # letters of a sentence, which may quote a whole file
# Where a setting may be of several plain types.
_UNION = re.compile(
    r'Parser key "(?P<key>[^"]+)":.* Subtypes: \[(?P<kinds>(<class \'\w+\'>(, )?)+)\].* Given value: (?P<value>.*)'
)
_CLASS = re.compile(r"Problem with given class_path .*?(?= - Expected| Given value|$)")
_load = get_loader("yaml")


def load_settings(text: str) -> Any:
    """A YAML document as jsonargparse reads it, of no more than MOST_VALUES values with its aliases written out.

    Raises:
        YAMLError: it is no YAML, or too much, or an alias stands in itself.
    """
    try:
        value = _load(text)
    except (ValueError, RecursionError, OverflowError) as error:  # a number of too many digits, for one
        raise yaml.YAMLError(str(error)) from error
    seen, left = 0, [value]
    while left:
        item = left.pop()
        seen += 1
        if seen > MOST_VALUES:
            raise yaml.YAMLError(f"with its aliases written out it has more than {MOST_VALUES:,} values")
        left += item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple | set) else ()
    return value


set_loader("yaml", load_settings, (yaml.YAMLError,))


def in_one_sentence(message: str) -> str:
    """What a library says of a setting, on one line, short, and without secrets."""
    sentence = redact(" ".join(message.split()))
    if found := _UNION.search(sentence):
        kinds = " or ".join(re.findall(r"'([^']+)'", found["kinds"])).replace("NoneType", "null")
        sentence = f"{found['key']} must be {kinds}, but is {found['value']}"
    elif found := _CLASS.search(sentence):
        sentence = found[0]
    return sentence if len(sentence) <= MOST_SAID else f"{sentence[: MOST_SAID - 100]} ... {sentence[-95:]}"


def setting_ahead(args: list[str], name: str) -> str | None:
    """A setting of the top level before the parser exists, which depends on it; None where it is not given.

    The last one counts, of the command line and the files that it names; what cannot be read is left to the parser.
    """
    found: str | None = None
    for k, word in enumerate(args):
        option, equals, value = word.partition("=")
        if not equals:
            value = args[k + 1] if k + 1 < len(args) else ""
        if option == f"--{name}":
            found = value
        elif option == "--config":
            try:
                content = load_settings(Path(value).read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError, yaml.YAMLError):
                continue
            found = content.get(name, found) if isinstance(content, dict) else found
    return found


class Parser(LightningArgumentParser):
    """Says what is wrong in one sentence, without a page of usage before it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sys.stderr.write(f"error: {in_one_sentence(message)} (spl {self._command()} --help lists every setting)\n")
        raise SystemExit(2)

    def _command(self) -> str:
        return next((word for word in sys.argv[1:2] if not word.startswith("-")), "fit")

    def parse_settings(self, args: list[str]) -> Any:
        """What `parse_args` gives.

        Raises:
            UserError: a config is no text.
        """
        try:
            return self.parse_args(args)
        except UnicodeDecodeError as error:
            files = [after for option, after in pairwise(args) if option == "--config"]
            named = next((f for f in files if error.object in Path(f).read_bytes()), "a config")
            raise UserError(f"{named} is no UTF-8 text: {error.reason} at byte {error.start}.") from error


def check_groups(settings: Any, groups: Mapping[str, type]) -> None:
    """Groups of settings hold settings, and no null where a class takes none; jsonargparse would let both pass.

    Args:
        settings: of a command.
        groups: names to the classes that take their settings.

    Raises:
        UserError: a group is a single value, or a setting in it is null.
    """
    for group, kind in groups.items():
        given = settings[group]
        if not hasattr(given, "keys"):
            raise UserError(f"{group} must be a group of settings, but is {str(given)[:60]}.")
        hints: dict[str, Any] = {}
        for base in reversed(kind.__mro__):
            hints |= get_type_hints(base.__init__) if base.__module__.startswith("spl.") else {}  # type: ignore[misc]
        for name in given.keys() & hints.keys():
            if given[name] is None and type(None) not in get_args(hints[name]):
                raise UserError(f"{group}.{name} is null, but needs a value: leave it out for its default.")


def check_accumulation(settings: Any) -> None:
    """Lightning would divide by it in the middle of a run.

    Raises:
        UserError: no batch makes a step.
    """
    if (number := settings.trainer.accumulate_grad_batches) < 1:
        raise UserError(f"trainer.accumulate_grad_batches must be 1 or more, but is {number}.")
