"""A GPT of bytes trained on real text, 65,536 tokens at a time on a GPU.

    python -m examples.long_context                        # trains; on a CPU in a reduced form
    python -m examples.long_context --attention sdpa --compare long_context_run/report.json --output sdpa_run
    python -m examples.long_context --smoke --length 1048576 --output smoke_run   # one forward and backward step

Run it from the root of the repository, with torch, rich and matplotlib installed. It writes report.json, report.png and
checkpoint.pt into --output; --resume goes on from that checkpoint.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for --deterministic; read when CUDA starts

import numpy as np
import torch
from rich.console import Console

from cuflash.demo import machine, text
from examples.long_context import corpus, progress
from examples.long_context.model import ATTENTIONS, CHECKPOINTS, Config
from examples.long_context.training import Schedule, Trainer, peak_memory, reset_peak_memory

GPU = {"length": 65_536, "steps": 400, "rate": 1e-3, "layers": 8, "width": 512, "heads": 4, "kv_heads": 2}
CPU = {"length": 1_024, "steps": 200, "rate": 3e-3, "layers": 2, "width": 64, "heads": 4, "kv_heads": 2}
CPU |= {"mlp_tile": 256, "loss_chunk": 256}


def main(arguments: list[str] | None = None) -> int:
    """0 when all was done, 1 out of memory or with a loss that is not finite, 2 for bad arguments, 130 after Ctrl-C."""
    given = _parser().parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        run = _Run(given, device, console)
    except (OSError, RuntimeError, ValueError) as error:  # UnsupportedError is a RuntimeError
        console.print(f"error: {error}", markup=False)
        return 2
    return run.run()


def _parser() -> argparse.ArgumentParser:
    description, epilog = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        "python -m examples.long_context",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", metavar="PATH", help="train on this file instead of Python's language reference")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="the GPU wherever there is one")
    parser.add_argument("--attention", choices=tuple(ATTENTIONS), default="cuflash")
    parser.add_argument("--checkpoint", choices=CHECKPOINTS, default="selective", help="what blocks recompute")
    for name, meaning in (
        ("length", "tokens a step"),
        ("steps", "steps of training"),
        ("layers", "blocks"),
        ("width", "of the residual stream"),
        ("heads", "of attention"),
        ("kv-heads", "heads of keys and values"),
        ("mlp-tile", "tokens the MLP takes at a time, 0 for all"),
        ("loss-chunk", "tokens whose logits exist at a time, 0 for all"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=meaning)
    parser.add_argument("--rate", type=float, metavar="X", help="the highest learning rate")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--deterministic", action="store_true", help="bitwise the same losses from run to run on a GPU")
    parser.add_argument("--smoke", action="store_true", help="one forward and backward step, and what it took")
    parser.add_argument("--output", default="long_context_run", metavar="FOLDER")
    parser.add_argument("--save-every", type=int, default=50, metavar="N", help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")
    parser.add_argument("--compare", nargs="+", default=[], metavar="REPORT", help="report.json of other runs, to plot")
    return parser


class _Run:
    """One run: everything is checked before anything is computed."""

    def __init__(self, given: argparse.Namespace, device: torch.device, console: Console) -> None:
        self.given, self.device, self.console = given, device, console
        if given.save_every < 1:
            raise ValueError(f"save-every: got {given.save_every}; allowed: 1 or more")
        if given.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: got 'cuda'; allowed: cpu, as torch finds no GPU")
        sizes = (GPU if device.type == "cuda" else CPU) | {
            name: getattr(given, name.replace("-", "_"))
            for name in ("length", "steps", "rate", "layers", "width", "heads", "kv_heads", "mlp_tile", "loss_chunk")
            if getattr(given, name) is not None
        }
        schedule = Schedule(**{name: sizes.pop(name) for name in ("length", "steps", "rate")}, seed=given.seed)
        config = Config(**sizes, attention=given.attention, checkpoint=given.checkpoint)
        self.text = text.load(given.text)
        if not given.smoke:
            corpus.check_length(self.text, schedule.length)
        elif schedule.length < 2:
            raise ValueError(f"length: got {schedule.length}; allowed: 2 or more")
        self.others = [progress.read(path) for path in given.compare]
        self.folder = Path(given.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.use_deterministic_algorithms(given.deterministic)
        self.trainer = Trainer(config, schedule, self.text, device)
        if given.resume:
            self.trainer.resume(self.folder / "checkpoint.pt")
        self.report: dict[str, Any] = {
            "framework": f"torch {torch.__version__}",
            "cuflash": machine.version_of("cuflash"),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else machine.describe(np)["processor"],
            "text": self.text.name,
            "bytes": len(self.text.data),
            **asdict(schedule),
            **asdict(config),
            "deterministic": given.deterministic,
            "parameters": sum(parameter.numel() for parameter in self.trainer.model.parameters()),
            "entropies": corpus.entropies(self.text),
            "resumed_at": len(self.trainer.losses),
            "losses": list(self.trainer.losses),
            "peak_of": "torch's tensors on the GPU" if device.type == "cuda" else "the process",
        }

    def run(self) -> int:
        self.introduce()
        reset_peak_memory(self.device)
        with progress.recorded(
            self.report,
            self.folder,
            self.others,
            self.console,
            peak=lambda: peak_memory(self.device),
            failures=(torch.cuda.OutOfMemoryError,),
        ):
            self.smoke() if self.given.smoke else self.train()
        return progress.exit_code(self.report)

    def introduce(self) -> None:
        report, say = self.report, self.console.print
        say(f"{report['attention']} attention on {report['device']}, {report['framework']}", markup=False)
        if self.device.type == "cpu":
            say("no GPU: a reduced form in float32 (a GPU trains 65,536 tokens a step in bfloat16)")
        say(f"{report['text']}, {report['bytes']:,} bytes; {report['parameters']:,} parameters", markup=False)
        say(f"{report['length']:,} tokens a step, checkpoint: {report['checkpoint']}", markup=False)

    def train(self) -> None:
        trainer = self.trainer
        for step in progress.followed(trainer.steps(), self.report, self.console):
            if step.number % self.given.save_every == 0 or step.number == self.report["steps"]:
                trainer.save(self.folder / "checkpoint.pt")
        held_out = corpus.held_out_window(self.text, self.report["length"])
        self.report["held_out_bits"] = trainer.evaluate(held_out)

    def smoke(self) -> None:
        length = self.report["length"]
        if length >= len(self.text.data):
            self.console.print(f"the text is repeated to fill {length:,} tokens")
        begin = time.perf_counter()
        with self.console.status("one forward and backward step"):
            loss = self.trainer.forward_backward(corpus.repeated(self.text, length))
            bits = loss.item() / math.log(2)
            norm = torch.nn.utils.clip_grad_norm_(self.trainer.model.parameters(), math.inf).item()
        seconds = time.perf_counter() - begin
        self.report |= {"smoke_bits": bits, "gradient_norm": norm, "tokens_per_second": length / seconds}
        self.report["step_seconds"].append(seconds)
        self.console.print(f"{bits:.3f} bits per byte, gradient norm {norm:.3g}, {seconds:.2f} s, compilation included")
        if not math.isfinite(bits) or not math.isfinite(norm):
            raise FloatingPointError(f"the loss is {bits} and the norm of its gradient {norm}")


if __name__ == "__main__":
    sys.exit(main())
