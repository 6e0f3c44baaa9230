"""Many pictures, many processes: `python -m kolors_core.batch prompts.jsonl OUT`, alone or under `torchrun`.

A line of the file is a picture OUT/NUMBER-SEED.png, which carries the line's fingerprint; OUT/manifest.jsonl
says what became of each line. Any number of processes and machines that share OUT work at once: each claims a
line (claims.py), draws it and writes it whole or not at all, so a fast one draws more, and a killed one loses
what it was at. The same command goes on from there: lines whose picture is there are passed over, failed ones
are tried again.

A picture is its line's alone: it is drawn by itself with noise of its own seed, so that it is the same bits
whoever draws it, in whatever company, and the command line's for the same options. Bits are equal for equal
kernels: another kind of device, another release of torch or cuDNN, or on a CPU another number of threads
(`torchrun` sets OMP_NUM_THREADS=1) rounds differently, as does --split-guidance.
"""

import argparse
import logging
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kolors_core.batch.manifest import Claims, Manifest, Record
from kolors_core.batch.prompt_file import KEY, Line, Picture, fingerprint_of, read_lines
from kolors_core.batch.split_guidance import Pair, PartnerLost
from kolors_core.checkpoint import logger
from kolors_core.cli.options import (
    add_guidance,
    add_model,
    add_sampler,
    bits_of,
    default_steps,
    files_of,
    guidance_of,
    guide,
    load_loras,
    load_pipeline,
    precision,
    quantize,
    weigh_loras,
    with_scale,
)
from kolors_core.devices import join_processes
from kolors_core.pipelines.png_metadata import attach_metadata, save_png
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.validation import LARGEST_SEED, whole_number
from weights_convert.atomic_write import sweep
from weights_convert.untrusted_files import one_line

PAUSE = 0.2  # seconds between looks at lines that others draw


def parser() -> argparse.ArgumentParser:
    """Every flag."""
    top = argparse.ArgumentParser(
        prog="python -m kolors_core.batch",
        description="Make a picture of each line of a file.",
        epilog="On 8 GPUs: torchrun --nproc-per-node 8 -m kolors_core.batch prompts.jsonl OUT -w DIR. "
        "Exit status: 1 if a line failed, 2 if none could be tried.",
    )
    top.add_argument(
        "prompts", type=Path, help="JSON lines, or a .csv, with the fields prompt, negative_prompt, seed, "
        "height, width, steps, guidance, lora (FROM[:SCALE], or a list of them)",
    )  # fmt: skip
    top.add_argument("out", type=Path, help="the folder of the pictures and their manifest.jsonl")
    top.add_argument("--force", action="store_true", help="write over files in OUT that are of other lines")
    top.add_argument(
        "--seed", type=int, default=0, help="a line without a seed takes this plus its number (default: 0)"
    )
    top.add_argument(
        "--split-guidance", action="store_true",
        help="two processes draw each picture, one with the prompt and one with the negative prompt: sooner "
        "done, not more of them",
    )  # fmt: skip
    add_model(top.add_argument_group("model"))
    sampling = top.add_argument_group("sampling")
    add_sampler(sampling)
    add_guidance(sampling)
    top.add_argument("-q", "--quiet", action="store_true", help="no progress bar and no report")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 if a line failed, 2 if none could be tried."""
    options, level = parser().parse_args(arguments), logger.level
    worker = None
    try:
        worker = Worker(options, join_processes(options.device))
        failed = worker.run()
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    except (OSError, ValueError, TypeError, PartnerLost, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        logger.setLevel(level)
        if worker is not None:
            worker.claims.close()
    return 1 if failed else 0


class Worker:
    """One process of a run."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        """Reads the lines and agrees with the other processes; loads no weights yet.

        Raises OSError or ValueError where nothing can be done, or the processes were told different things.
        """
        self.options, self.device, self.folder = options, device, options.out
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.is_quiet = options.quiet
        options.quiet = options.quiet or self.rank > 0  # one process speaks for all
        if options.quiet:
            logger.setLevel(logging.ERROR)
        model = {name: getattr(options, name) for name in ("weights", "variant", "revision", "sampler")}
        model |= {"dtype": str(precision(options, device)), "bits": bits_of(options)} | files_of(options)
        if (keywords := guidance_of(options)) and options.split_guidance:
            raise ValueError("--split-guidance splits no --pag, --guidance-rescale or --guidance-interval")
        # Of what is not asked for, a fingerprint has nothing: older pictures keep theirs.
        model |= {name: value for name, value in {"rule": keywords, "freeu": options.freeu}.items() if value}
        seed = whole_number("--seed", options.seed, least=0, most=LARGEST_SEED)
        self.lines = read_lines(options.prompts, model, seed, default_steps(options.sampler))
        self.run_name = self._agree()
        self.pair = Pair() if options.split_guidance else None
        self.folder.mkdir(parents=True, exist_ok=True)
        self.claims = Claims(self.folder / ".claims")
        self.manifest = Manifest(self.folder / "manifest.jsonl", self.claims)
        self.process = f"{self.rank} of {self.world}, {socket.gethostname()} {os.getpid()}"
        self.loras: tuple[str, ...] = ()  # the sources of those that are loaded
        self.told: dict[str, str] = {}  # what all pictures' descriptions say

    def _agree(self) -> str:
        """A name of this run, the same for all its processes.

        ValueError if one has other lines, PartnerLost if one is gone.
        """
        name, lines = secrets.token_hex(4), [(line.number, line.fingerprint) for line in self.lines]
        if self.world == 1:
            return name
        kind = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        told: list[Any] = [None] * self.world
        mine = name, lines, f"torch {torch.__version__}, {kind}{threads}"
        try:
            dist.all_gather_object(told, mine)
        except RuntimeError as error:
            raise PartnerLost(f"another process of this run is gone: {one_line(error)}") from error
        if others := [rank for rank, (_, lines, _) in enumerate(told) if lines != told[0][1]]:
            wanted = "wanted one file, the same options and one precision for all"
            raise ValueError(f"process {others[0]} has other lines than process 0: {wanted}")
        if len(engines := {engine for *_, engine in told}) > 1:
            logger.warning("who draws a picture decides how it is rounded: %s", "; ".join(sorted(engines)))
        return told[0][0]

    def run(self) -> list[Line]:
        """Draw until every line is drawn or has failed; returns those that failed in this run."""
        if self.pair is not None and self.pair.half == 1:
            self._follow(self.pair)
        else:
            self._lead()
        self.manifest.refresh()
        failed = [line for line in self.lines if self._has_failed(line)]
        is_everyone_here = self._is_everyone_here()
        if self.rank == 0 or not is_everyone_here:
            self._end(failed)
        if self.world > 1 and is_everyone_here:
            dist.destroy_process_group()
        return failed

    def _lead(self) -> None:
        from tqdm.auto import tqdm

        pending = self._in_order([line for line in self.lines if not self._is_drawn(line)])
        unseen = {line.number for line in pending}
        done = len(self.lines) - len(pending)
        with tqdm(total=len(self.lines), initial=done, unit="picture", smoothing=0,
                  disable=self.options.quiet) as bar:  # fmt: skip
            while pending:
                held = []
                for line in pending:
                    if not self.claims.take(line.number):
                        held.append(line)
                        continue
                    try:
                        news = self.manifest.refresh()
                        if not self._has_ended(line):
                            self._draw(line)
                    finally:
                        self.claims.give(line.number)
                    unseen.discard(line.number)
                    unseen.difference_update(r["line"] for r in news if r.get("run") == self.run_name)
                    bar.update(len(self.lines) - len(unseen) - bar.n)
                pending = held
                if pending:
                    time.sleep(PAUSE)
        if self.pair is not None:
            self.pair.tell(None)

    def _follow(self, pair: Pair) -> None:
        """Compute the other half of what the leader of the pair draws."""
        while (picture := pair.tell()) is not None:
            pipe = self.pipe
            try:
                self._make(pipe, picture)
            except PartnerLost:
                raise
            except Exception:  # the leader writes down why
                self._check_device()

    def _in_order(self, lines: Sequence[Line]) -> list[Line]:
        """This process's share first, from the front; then the others', from the back.

        Lines of one LoRA stand together. What a process did not live to finish comes last, in case that was
        the line's doing.
        """
        together = 1 if self.pair is None else 2  # processes that draw one picture
        share = lines[self.rank // together :: self.world // together]
        own = {line.number for line in share}
        rest = [line for line in lines[::-1] if line.number not in own]

        def place(line: Line) -> tuple[bool, bool, tuple[str, ...]]:
            is_cut_short = self.claims.was_cut_short(line.number)
            return is_cut_short, line.number not in own, _sources(line.picture.lora if line.picture else ())

        return sorted([*share, *rest], key=place)

    def _draw(self, line: Line) -> None:
        """Draw a claimed line, and write down what became of it."""
        start, reason = time.perf_counter(), line.reason
        if line.picture is not None and (reason := self._obstacle(line)) is None:
            self.claims.mark(line.number, True)
            if self.pair is not None:
                self.pair.tell(line.picture)
            pipe = self.pipe
            try:
                image = self._make(pipe, line.picture)
                lora = {"lora": ", ".join(line.picture.lora)} if line.picture.lora else {}
                attach_metadata(image, image.info | lora | self.told | {KEY: line.fingerprint})
                save_png(image, self._path(line))
            except PartnerLost:
                raise
            except Exception as error:
                self._check_device()
                reason = one_line(error, None)
        seconds = round(time.perf_counter() - start, 3)
        self.manifest.add(self._as_record(line, reason, seconds, self.process))
        self.claims.mark(line.number, False)

    def _make(self, pipe: KolorsPipeline, picture: Picture) -> Any:
        """The picture; latents of it for the half of a pair that does not lead."""
        pair = self.pair
        if pair is not None:
            pair.has_met = False
        try:
            self._use(pipe, picture.lora)
            return pipe(
                picture.prompt, picture.height, picture.width, picture.steps, guidance_scale=picture.guidance,
                negative_prompt=picture.negative_prompt,
                generator=torch.Generator().manual_seed(picture.seed),
                output_type="pil" if pair is None or pair.half == 0 else "latent",
            )[0][0]  # fmt: skip
        except Exception as error:
            if pair is not None and not pair.has_met:
                pair.meet(one_line(error, None))
            raise

    @cached_property
    def pipe(self) -> KolorsPipeline:
        """Loaded when the first line needs it."""
        pipe = load_pipeline(self.options, self.device)
        pipe.set_progress_bar_config(disable=True)
        if (report := quantize(pipe, self.options)) is not None:
            self.told["quantized"] = str(report)
        guide(pipe, self.options)
        if self.pair is not None:
            pipe.guided = self.pair.guided
        return pipe

    def _use(self, pipe: KolorsPipeline, loras: tuple[str, ...]) -> None:
        """Have these LoRAs and no others."""
        sources = _sources(loras)
        try:
            if sources == self.loras:
                weigh_loras(pipe, loras)
            else:
                pipe.unload_lora_weights()
                load_loras(pipe, loras, self.options.local_files_only, is_quiet=True)
                self.loras = sources
        except BaseException:
            pipe.unload_lora_weights()
            self.loras = ()
            raise

    def _path(self, line: Line) -> Path:
        return self.folder / (line.file or "")

    def _is_drawn(self, line: Line) -> bool:
        return line.picture is not None and fingerprint_of(self._path(line)) == line.fingerprint

    def _obstacle(self, line: Line) -> str | None:
        """Why the picture may not be written: there is a file of its name."""
        if self.options.force or fingerprint_of(self._path(line)) is None:
            return None
        return f"{line.file} is there, and not of this line or these options: choose another OUT, or --force"

    def _has_ended(self, line: Line) -> bool:
        """Whether it was drawn, by whatever run, or has failed in this one."""
        return self._record(line).get("run") == self.run_name or self._is_drawn(line)

    def _has_failed(self, line: Line) -> bool:
        """Of a line that has ended. What another run writes of its own line of this number says nothing."""
        return self._record(line).get("status") != "done" and not self._is_drawn(line)

    def _record(self, line: Line) -> Record:
        """What was written down about a line last; empty if nothing, or of another line of its number."""
        record = self.manifest.records.get(line.number, {})
        return record if record.get("fingerprint") == line.fingerprint else {}

    def _as_record(
        self, line: Line, reason: str | None, seconds: float | None, process: str | None
    ) -> Record:
        return {
            "line": line.number, "file": line.file if reason is None else None,
            "seed": None if line.picture is None else line.picture.seed,
            "status": "done" if reason is None else "failed", "reason": reason, "seconds": seconds,
            "process": process, "fingerprint": line.fingerprint, "run": self.run_name,
        }  # fmt: skip

    def _check_device(self) -> None:
        """After a line's error: raises again what is the accelerator's, which no line would survive."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def _is_everyone_here(self) -> bool:
        """Wait for the other processes to end; False if one is gone, whose lines are then drawn by others."""
        try:
            if self.world > 1:
                dist.barrier()
            return True
        except RuntimeError:
            return False

    def _end(self, failed: Sequence[Line]) -> None:
        """One record for each line, no scratch files, and a report."""

        def complete(records: dict[int, Record]) -> None:
            for line in self.lines:
                self.claims.mark(line.number, False)
                # The process that drew it did not live to say so.
                if self._record(line).get("status") != "done" and self._is_drawn(line):
                    records[line.number] = self._as_record(line, None, None, None)

        self.manifest.settle(complete)
        sweep(self.folder)
        if self.is_quiet:
            return
        names = {line.file for line in self.lines}
        found = [name for name in os.listdir(self.folder) if re.fullmatch(r"\d{6,}-\d+\.png", name)]
        others = [name for name in found if name not in names]
        drawn = len(self.lines) - len(failed)
        report = [f"{drawn} of {len(self.lines)} pictures are in {self.folder}"]
        if others:
            report.append(f"{len(others)} more are of no line of this file, such as {others[0]}")
        for line in failed:
            reason = self._record(line).get("reason") or "another run on this OUT has a line of its number"
            report.append(f"line {line.number} failed: {reason}")
        print(*report, sep="\n", file=sys.stderr)


def _sources(loras: Sequence[str]) -> tuple[str, ...]:
    """LoRAs without their scales."""
    return tuple(with_scale(text)[0] for text in loras)
