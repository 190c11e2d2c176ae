"""Functions as programs: a command line from a signature and its docstring, a log on the terminal."""

import inspect
import json
import logging
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any, get_args, get_origin, get_type_hints

from rich.console import Console
from rich.logging import RichHandler

from spl.secrets import SecretFilter
from spl.settings import Parser
from spl.types import UserError


class ProgramParser(Parser):
    """Names the program where it says what is wrong."""

    def _command(self) -> str:
        return str(self.prog).removeprefix("spl ")


def run_program(target: str, name: str, args: list[str]) -> None:
    """Run "module:function" with arguments from a command line; `--config FILE` reads them from YAML.

    Values of a list follow its name, `--samples a.jsonl b.jsonl`; those before any name are of the first argument.

    Raises:
        UserError: as the function does, or a package that it needs is not installed.
        SystemExit: the command line is wrong; status 2 after one sentence.
    """
    module, _, function_name = target.partition(":")
    function: Callable[..., None] = getattr(_imported(module, name), function_name)
    says = (inspect.getdoc(function) or "").split("\n\nArgs:")[0]
    parser = ProgramParser(prog=f"spl {name}", allow_abbrev=False, description=says, epilog=_hint(function))
    parser.add_argument("--config", action="config", help="A YAML file of these arguments.")
    parser.add_function_arguments(function, as_group=False, as_positional=False)
    settings = parser.instantiate_classes(parser.parse_settings(list(_with_lists(args, function)))).as_dict()
    settings.pop("config")
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_level=False, log_time_format="%X")
    handler.addFilter(SecretFilter())
    log = logging.getLogger("spl")
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        function(**settings)
    finally:
        log.removeHandler(handler)


def _imported(module: str, name: str) -> ModuleType:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "spl":
            raise
        raise UserError(f"spl {name} needs the package {error.name}: pip install 'spl[evaluation]'.") from error


def _hint(function: Callable[..., None]) -> str:
    """What of the command line is not to be seen in a list of options."""
    first = next(iter(inspect.signature(function).parameters))
    lists = [name for name, hint in get_type_hints(function).items() if _is_list(hint)]
    said = f" Values of a list follow its name: --{lists[0]} A B." if lists else ""
    return f"What stands before any option is of --{first}.{said} -o is --output."


def _with_lists(args: list[str], function: Callable[..., None]) -> Iterator[str]:
    """The arguments, with the values that follow the name of a list as one list."""
    hints = get_type_hints(function)
    lists = {f"--{name}" for name, hint in hints.items() if _is_list(hint)}
    given = ["--output" if arg == "-o" else arg for arg in args]
    if given and not given[0].startswith("-"):
        given = [f"--{next(iter(inspect.signature(function).parameters))}", *given]
    while given:
        option = given.pop(0)
        values = []
        while option in lists and given and not given[0].startswith("--"):
            values.append(given.pop(0))
        written = len(values) == 1 and values[0].startswith("[")  # as a list already
        yield from (option, *(values if written else [json.dumps(values)] if values else []))


def _is_list(hint: Any) -> bool:
    return get_origin(hint) is list or any(get_origin(part) is list for part in get_args(hint))
