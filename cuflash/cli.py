"""The command line. A subcommand is a function that adds its parser and one that runs it; COMMANDS lists the first.

What a subcommand needs is imported when it runs: `cuflash --help` loads neither rich nor matplotlib.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import cuflash
from cuflash.bench.workloads import SUITES
from cuflash.cuda.toolchain import ARCHS
from cuflash.demo import compilation
from cuflash.errors import UnsupportedError

_INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
_EVERYTHING = "all"  # beside the names of SUITES


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code: 0, 1 (a check failed), 2 (it could not be run), 130 (Ctrl-C).

    `argv` without the program's name; None is the command line. Errors are one line on stderr.
    """
    try:
        arguments = _parser().parse_args(argv)
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("cuflash: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except (UnsupportedError, ValueError, OSError, MemoryError) as error:
        print(f"cuflash: error: {_one_line(error)}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    """Bad arguments become an exception, so that every error is reported alike."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parser() -> _Parser:
    parser = _Parser(prog="cuflash", description="Exact attention, forward and backward, in linear memory.")
    parser.add_argument("--version", action="version", version=f"cuflash {cuflash.__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    for add in COMMANDS:
        add(commands)
    return parser


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="train a small language model on real text, check exactness, measure memory",
        description="Checks exactness, measures memory against standard attention, and trains a byte-level language "
        "model on real text. Leaves report.json and report.png in the output folder.",
    )
    parser.add_argument("--quick", action="store_true", help="a smaller job, below 20 seconds")
    parser.add_argument("--text", metavar="PATH", help="the text to train on (default: Python's language reference)")
    parser.add_argument("--context", type=_positive, metavar="N", help="tokens (default: 2,048; on a GPU 65,536)")
    parser.add_argument("--steps", type=_positive, metavar="N", help="training steps (default: as many as time allows)")
    parser.add_argument("--output", default="cuflash_demo", metavar="DIR", help="folder (default: %(default)s)")
    _add_device(parser)
    parser.set_defaults(run=_run_demo)


def _run_demo(arguments: argparse.Namespace) -> int:
    from cuflash.demo import job

    return job.run(
        job.Settings(
            quick=arguments.quick,
            text=arguments.text,
            context=arguments.context,
            steps=arguments.steps,
            output=arguments.output,
            device=arguments.device,
        )
    )


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="what is installed, which backend and kernels arrays get, one exactness check",
        description="Names what is installed, the GPU, the compiler and the kernel cache, the kernel and tile that "
        "common problems get here, and checks exactness on every backend. Fails where something that this machine "
        "needs is missing.",
    )
    parser.set_defaults(run=_run_doctor)


def _run_doctor(_: argparse.Namespace) -> int:
    from cuflash.demo import doctor

    return doctor.run()


def _add_compile(commands: Any) -> None:
    parser = commands.add_parser(
        "compile",
        help="fill the kernel cache ahead of time, also for a GPU that is not here",
        description="Compiles the kernels of every combination of the arguments, forward and backward, causal and not. "
        "Needs NVRTC and CUDA's headers (the extras cuda12 and cuda13) and no GPU. What is in the folder already is "
        "left alone.",
    )
    parser.add_argument("--arch", choices=ARCHS, action="append", help="repeatable (default: this machine's GPUs)")
    parser.add_argument(
        "--dtype", choices=compilation.DTYPES, action="append", help="repeatable (default: float16 and bfloat16)"
    )
    parser.add_argument(
        "--head-dim",
        type=_head_dims,
        action="append",
        metavar="N[:N]",
        help="repeatable; head_dim, or head_dim:head_dim_v where they differ (default: 64 and 128)",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="a folder to carry to another machine, used there through CUFLASH_PRECOMPILED (default: the kernel cache)",
    )
    parser.add_argument("--workers", type=_positive, metavar="N", help="threads (default: one a core)")
    for name, option in compilation.OPTIONS.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"without and with {option.argument}")
    parser.set_defaults(run=_run_compile)


def _run_compile(arguments: argparse.Namespace) -> int:
    given = {"archs": arguments.arch, "dtypes": arguments.dtype, "head_dims": arguments.head_dim}
    return compilation.run(
        compilation.Settings(
            options=tuple(name for name in compilation.OPTIONS if getattr(arguments, name.replace("-", "_"))),
            output=arguments.output,
            workers=arguments.workers,
            **{name: tuple(dict.fromkeys(values)) for name, values in given.items() if values},
        )
    )


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="speed, memory and host cost beside every peer found here",
        description="Measures attention beside every peer found on this machine, interleaved in one process, results "
        "verified first. Without a GPU a reduced form runs on the NumPy backend. --suite all --update-readme does "
        "everything: it measures, draws the plots and writes README's section.",
    )
    parser.add_argument(
        "--suite",
        choices=(*SUITES, _EVERYTHING),
        nargs="+",
        action="extend",
        default=[],
        help="what to measure, repeatable (default: all; nothing where --plots or --update-readme is given alone)",
    )
    parser.add_argument(
        "--json", default="benchmarks/results", metavar="FOLDER", help="folder of the results (default: %(default)s)"
    )
    parser.add_argument("--plots", action="store_true", help="draw every table of the folder, beside its JSON")
    parser.add_argument(
        "--update-readme",
        action="store_true",
        help="rewrite what ./README.md says of speed, and its plots, from the GPU results in the folder",
    )
    _add_device(parser)
    parser.set_defaults(run=_run_bench)


def _run_bench(arguments: argparse.Namespace) -> int:
    from cuflash.bench import command

    return command.run(
        command.Settings(
            suites=tuple(SUITES) if _EVERYTHING in arguments.suite else tuple(dict.fromkeys(arguments.suite)),
            json=arguments.json,
            plots=arguments.plots,
            update_readme=arguments.update_readme,
            device=arguments.device,
        )
    )


COMMANDS = (_add_demo, _add_doctor, _add_compile, _add_bench)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="default: %(default)s")


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a positive whole number")
    return number


def _head_dims(text: str) -> tuple[int, int]:
    """(head_dim, head_dim_v) of "128" or "192:128"."""
    head_dim, colon, head_dim_v = text.partition(":")
    first = _positive(head_dim)
    return first, _positive(head_dim_v) if colon else first


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
