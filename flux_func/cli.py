"""What every program shares: flags are parsed, `main` runs, and a user's error is one line and exit code 2.

Where a program runs as several ranks, the first of them speaks for all, and a rank that fails ends the rest.
"""

import functools
import math
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import tqdm
from absl import app, flags, logging
from ml_collections import config_flags

from flux_func import config as configs
from flux_func.errors import UserError
from flux_func.launch import failures, joining, processes

# Seconds in which a signal that comes again is the same one: a scheduler sends it, and the launcher passes it on.
SAME_SIGNAL = 5


def define_config(required: bool = True) -> flags.FlagHolder:
    """Defines --config, a Python file with `get_config()`, and --config.FIELD for each of its fields.

    Where it is not required, it is flux_func/config.py if left out: every field as it is by default.
    """
    help_line = "Config file, such as configs/flux_debug.py; any field by --config.train.steps=20."
    holder = config_flags.DEFINE_config_file("config", None, help_line, lock_config=True)
    if required:
        flags.mark_flag_as_required("config")
    elif not any(re.match(r"--?config(=|$)", arg) for arg in sys.argv[1:]):
        # A default would be read here and now, with --config.FIELD, out of reach of `run`'s one-line errors.
        sys.argv.insert(1, f"--config={configs.__file__}")
    return holder


def define_workdir(help_line: str, required: bool = True) -> None:
    """Defines --workdir, which may not be empty: that would be the folder one happens to be in."""
    flags.DEFINE_string("workdir", None, help_line, required=required)
    flags.register_validator("workdir", lambda value: value != "", message="should name a folder")


def split_weight(text: str) -> tuple[str, float]:
    """Returns (file, weight) of --lora, FILE or FILE:WEIGHT, 1 where none is given; UserError for what is no weight."""
    file, colon, weight = text.rpartition(":")
    # An address of the hub has a colon too.
    if text and (not colon or weight.startswith("//") or Path(text).exists()):
        return text, 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not file or not math.isfinite(number):
        raise UserError(f"--lora is {text!r}: should be a file, or FILE:WEIGHT with a number, such as FILE:0.8")
    return file, number


LESS_MEMORY = (
    "a smaller batch or image needs less, in training also train.accumulate, remat.policy and numerics; plan_main says "
    "beforehand what fits"
)


def run(main: Callable[[list[str]], int | None], alone: bool = False) -> None:
    """Runs a program: `main(argv)` under absl; UserError and flag errors print one line and exit with 2.

    Args:
      main: the program.
      alone: whether it is one process, of which a launcher should not start more.
    """
    # In --flag=~/path a shell leaves the ~ as it is.
    sys.argv[1:] = [re.sub(r"(?<==)~(?=/)", os.path.expanduser("~"), arg, count=1) for arg in sys.argv[1:]]
    try:
        rank, count = processes.launched()
        if rank:
            _leave_talking_to_the_first(rank)
        if alone and count > 1:
            raise UserError(f"WORLD_SIZE is {count}: this program is one process; start it without torchrun")
        app.run(main, flags_parser=functools.partial(_parse, main))
    except SystemExit as done:
        # With the threads of a process group about, Python's own way out may end in an abort.
        if not (_is_one_of_many() and isinstance(done.code, int | None)):
            raise
        _exit(done.code or 0)
    except UserError as error:
        _fail(error, isinstance(error, joining.Unreachable))
    except KeyboardInterrupt:
        _exit(128 + signal.SIGINT)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which not every program has imported
            _fail(f"{str(error).partition('. ')[0]}: {LESS_MEMORY}")
        if not _is_one_of_many():
            raise
        failures.fail(error)


def _is_one_of_many() -> bool:
    try:
        return processes.launched()[1] > 1
    except UserError:  # which is what will be said, by each
        return False


def _leave_talking_to_the_first(rank: int) -> None:
    """Silences what a program prints, and its progress bars; what is logged, and errors, say which rank it is."""

    class Formatter(logging.PythonFormatter):
        def format(self, record):
            return f"[rank {rank}] {super().format(record)}"

    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    # Bars of libraries too, which ask nobody.
    tqdm.tqdm.__init__ = functools.partialmethod(tqdm.tqdm.__init__, disable=True)
    handler = logging.get_absl_handler()
    handler.setFormatter(Formatter())
    handler.setLevel("WARNING")


def _parse(main: Callable, argv: list[str]) -> list[str]:
    if {"--help", "-help", "-h", "--helpshort"} & set(argv[1:]):
        print(usage(main))
        sys.exit(0)
    path = _config_path(argv)
    configs.check_known(_overrides(argv))
    try:
        rest = flags.FLAGS(argv)
    except Exception as error:  # a config file may raise anything, and ml_collections passes it on
        _fail(_explain(error, path))
    if len(rest) > 1:
        _fail(f"argument {rest[1]!r} is not a flag; flags start with --")
    return rest


def _config_path(argv: list[str]) -> str:
    """Returns the path that --config gives, or "" where it is not given; ends the program if there is no such file."""
    path = ""
    for i, arg in enumerate(argv):
        name, equals, value = arg.partition("=")
        if name in ("-config", "--config"):
            path = value if equals else (argv[i + 1] if i + 1 < len(argv) else "")
            path = path.split(":")[0]
            if not os.path.isfile(path):
                _fail(f"--config is {path!r}: no such file; see the folder configs/")
    return path


def _overrides(argv: list[str]) -> list[str]:
    """Returns the dotted fields that are set by --config.FIELD or --noconfig.FIELD."""
    names = (re.match(r"--?(?:no)?config\.([^=]+)", arg) for arg in argv[1:])
    return [name[1] for name in names if name]


def _explain(error: Exception, path: str) -> str:
    """Returns in one line what was raised while flags were parsed: over a flag, or by the code of a config file."""
    message, parsing = str(error), "whilst parsing config file"
    if not isinstance(error, flags.Error) or parsing in message:
        return _explain_file(error, path)
    absent = re.match(r"flag --(\w+)=None: Flag --\1 must have a value", message)
    if absent:
        return f"--{absent[1]} is not given: {flags.FLAGS[absent[1]].help}"
    field = re.match(r"flag --config\.([\w.]+)=", message)
    usual = dict(configs.flat(configs.default())).get(field[1]) if field else None
    return message if usual is None else f"{message}: should be of the type of {usual!r}, its default"


def _explain_file(error: Exception, path: str) -> str:
    lines = re.findall(rf'File "{re.escape(path)}", line (\d+)', "".join(traceback.format_exception(error)))
    where = f"--config is {path!r}" + (f" (line {lines[-1]})" if lines else "")
    if isinstance(error, AttributeError) and error.name == "get_config":
        return f"{where}: should define get_config(), as configs/flux_debug.py does"
    if isinstance(error, flags.Error):
        return f"{where}: {str(error).splitlines()[-1]}"  # all before is a traceback
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    message = str(error.args[0]) if error.args else type(error).__name__
    return f"{where}: " + re.sub(r"(?s) Other fields present:.*\n", " ", message)


def usage(main: Callable) -> str:
    """Returns what --help prints: the program's docstring and its flags."""
    ours = [
        flag
        for module, defined in flags.FLAGS.flags_by_module_dict().items()
        if module.startswith("flux_func.") or module == sys.argv[0]
        for flag in defined
    ]
    lines = [f"  --{flag.name}: {flag.help}{_default(flag)}" for flag in sorted(ours, key=lambda flag: flag.name)]
    return "\n".join([(main.__globals__["__doc__"] or "").strip(), "", "flags:", *lines])


def _default(flag: flags.Flag) -> str:
    return f" (default: {flag.default})" if flag.default not in (None, [], "") else ""


def _fail(message: object, again: bool = False) -> NoReturn:
    line = f"{os.path.basename(sys.argv[0])}: error: {' '.join(str(message).split())}"
    if _is_one_of_many():
        failures.refuse(line, again)
    print(line, file=sys.stderr, flush=True)
    sys.exit(2)


def _exit(code: int) -> NoReturn:
    if _is_one_of_many():
        failures.leave(code)
    sys.exit(code)


def define_device() -> flags.FlagHolder:
    """Defines --device; see `choose_device`."""
    return flags.DEFINE_enum("device", "auto", ["auto", "cpu", "cuda"], "What to compute on; auto: cuda where it is.")


def choose_device(name: str):
    """Returns the torch.device that --device names; UserError for a cuda that is not there."""
    import torch

    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UserError("--device is 'cuda': torch finds no such device here; use --device=cpu")
    return torch.device(name if name != "auto" else "cuda" if there else "cpu")


def stop_requested() -> Callable[[], str]:
    """Installs handlers of SIGTERM and SIGINT; returns a function that names the signal received, or "" .

    The first signal asks the loop to stop at the next step; a second one of the same kind acts as it would have. One of
    many ranks gets the same one twice, from its launcher too, and is watched for what never comes to ask.
    """
    received: list[str] = []
    told: list[str] = []
    many = _is_one_of_many()

    def handle(number, frame):
        del frame
        received.append(signal.Signals(number).name)
        if many:
            _at_last(number)
        else:
            signal.signal(number, signal.SIG_DFL)

    def stop() -> str:
        told[:] = received[:1]
        return told[0] if told else ""

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
    if many:
        failures.watch(lambda: bool(told))
    return stop


def _at_last(number: int) -> None:
    """From some seconds on, lets a signal act as it would have."""
    start = time.monotonic()

    def handle(number, frame):
        del frame
        if time.monotonic() - start > SAME_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.signal(number, handle)
