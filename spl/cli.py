"""The command line: `spl fit | validate | test | predict`.

A LightningCLI behind a thin dispatcher. Heavy imports wait until a command is known, so `spl --help` answers at once.
"""

import errno
import logging
import os
import sys
from contextlib import nullcontext
from typing import NoReturn

from spl import __version__
from spl.secrets import print_redacted, redact, remember
from spl.types import UserError

HELP = """\
Soft Preference Learning: preference training that keeps a language model's diversity.

  spl fit       --config CONFIG   train a policy on preferences
  spl validate  --config CONFIG --ckpt_path RUN/checkpoints/last.ckpt
  spl test      --config CONFIG --ckpt_path RUN/checkpoints/last.ckpt
  spl predict   --config CONFIG   log-probabilities and rewards of every response, to parquet
  spl plan      --config CONFIG   memory, operations and time of a run on GPUs, before it is started
  spl sweep     --config CONFIG   a grid of settings and seeds, one run each
  spl sample    --model MODEL     replies to prompts, from a model or a server
  spl pairs     divpo             preference pairs from samples and a reward model, by a recipe
  spl evaluate  EVALUATION        diversity-quality, best-of-n, calibration, opinions or lm-eval of policies
  spl paper     --config CONFIG   all of it in a row: the paper's evidence from training to the report
  spl report    RESULTS           one page of figures and tables of all that was measured

Start here:

  spl fit --config configs/experiment/tiny.yaml                      every part in seconds, no download
  spl fit --config configs/experiment/smollm2_hh.yaml --data.path pairs.jsonl
  spl fit --config ... --config configs/callbacks/monitor.yaml       entropy, calibration, samples while it trains
  spl fit --config ... --model.alpha 0.2 --model.beta 0.1            keep more diversity; alpha = beta is DPO
  spl fit --task sft --model configs/model/sft.yaml --data.path chats.jsonl ...        learn to write replies
  spl fit --task reward --model configs/model/reward.yaml --data.path pairs.jsonl ...  a reward model
  spl fit --config ... --output runs/mine --resume                   go on after an interruption, or begin
  spl plan --config ... --model.model llama-3.1-8b --gpus 8          what a run would take on GPUs

fit exits with 75 where a signal stopped it (SIGTERM, SIGUSR1): run the same command with --resume. Ctrl-C gives 130, a
mistake in the settings or the data 2, and a run that cannot go on 1.

Every setting and its default: spl fit --help
"""
_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EISDIR, errno.ENOTDIR)
COMMANDS = ("fit", "validate", "test", "predict", "plan")
# Functions, which jsonargparse gives a command line.
PROGRAMS: dict[str, str | dict[str, str]] = {
    "sample": "spl.evaluation.sample:sample",
    "evaluate": {
        "diversity-quality": "spl.evaluation.diversity_quality:diversity_quality",
        "best-of-n": "spl.evaluation.best_of_n:best_of_n",
        "calibration": "spl.evaluation.calibration:calibration",
        "opinions": "spl.evaluation.opinions:opinions",
        "lm-eval": "spl.evaluation.lm_eval:lm_eval",
    },
    "pairs": {"divpo": "spl.evaluation.divpo:divpo"},
    "report": "spl.reporting.report:report",
    "sweep": "spl.sweep:sweep",
    "paper": "spl.paper.paper:paper",
}


def main(argv: list[str] | None = None) -> None:
    """Run a command; a user's mistake ends in one sentence and exit status 2."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return
    if args[0] == "--version":
        sys.stdout.write(f"spl {__version__}\n")
        return
    if args[0] not in (*COMMANDS, *PROGRAMS):
        known = ", ".join((*COMMANDS, *PROGRAMS))
        _fail(f"unknown command {args[0]!r}: expected one of {known}; spl --help shows what they do.", 2)
    if args[0] in PROGRAMS:
        _run_program(args)
    else:
        _run(args)


def _fail(sentence: str, status: int) -> NoReturn:
    sys.stderr.write(f"error: {redact(sentence)}\n")
    raise SystemExit(status)


def _unwritten(error: OSError) -> NoReturn:
    """End in a sentence where a file has no place; any other error stays what it is."""
    if error.errno not in _NO_PLACE:
        raise error
    _fail(f"{error.filename or 'a file'} could not be written: {error.strerror}.", 1)


def _run_program(args: list[str]) -> None:
    """Run a function that stands outside of training."""
    sys.excepthook = print_redacted
    remember(args)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    found, name, rest = PROGRAMS[args[0]], args[0], args[1:]
    if isinstance(found, dict):
        if rest and rest[0] in ("-h", "--help"):
            sys.stdout.write("".join(f"spl {name} {one} --help\n" for one in found))
            return
        if not rest or rest[0] not in found:
            given = f"but got {rest[0]!r}" if rest else "to follow"
            _fail(f"spl {name}: expected one of {', '.join(found)} {given}; each has its --help.", 2)
        found, name, rest = found[rest[0]], f"{name} {rest[0]}", rest[1:]
    from spl.programs import run_program

    try:
        run_program(found, name, rest)
    except UserError as error:
        _fail(str(error), 2)
    except OSError as error:
        _unwritten(error)
    except KeyboardInterrupt:
        _fail("stopped; the same command goes on where it can.", 130)


def _run(args: list[str]) -> None:
    sys.excepthook = print_redacted
    remember(args)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes would warn of it at every step
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from spl.callbacks.checkpoints import UnsavedRunError
    from spl.callbacks.interrupt import InterruptedTrainingError, stoppable
    from spl.commands import SPLCommand
    from spl.data.loader import killed_worker
    from spl.modules.non_finite import NonFiniteLossError
    from spl.plan import PlanCommand
    from spl.processes import lost_process
    from spl.resume import RunFinishedError

    try:
        if args[0] == "plan":
            PlanCommand(args)
        else:
            with stoppable() if args[0] == "fit" else nullcontext():
                SPLCommand(args)
    except RunFinishedError as done:
        sys.stdout.write(f"{done}\n")
    except (UserError, MisconfigurationException) as error:
        _fail(str(error).split("\n")[0], 2)
    except (NonFiniteLossError, UnsavedRunError) as error:
        _fail(str(error), 1)
    except OSError as error:
        _unwritten(error)
    except InterruptedTrainingError as error:
        _fail(f"{error}. To go on: the same command with --output {error.folder or 'DIR'} --resume", error.exit_code)
    except RuntimeError as error:  # raised wherever the run happens to be
        if sentence := killed_worker(error) or lost_process(error):
            _fail(sentence, 1)
        raise
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning turns an interrupt outside of the steps into a silent exit.
        if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
            _fail("stopped at once; checkpoints saved before are kept.", 130)
        raise
    finally:
        for handler in list(logging.getLogger("spl").handlers):
            logging.getLogger("spl").removeHandler(handler)
            handler.close()


if __name__ == "__main__":
    main()
