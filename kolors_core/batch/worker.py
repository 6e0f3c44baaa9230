"""Many images, many processes: `python -m kolors_core.batch prompts.jsonl OUT`, alone or under `torchrun`.

A line of the file is a job: an image OUT/NUMBER-SEED.png, which carries the line's fingerprint;
OUT/manifest.jsonl has the result of each. Any number of processes and machines that share OUT work at once:
each locks a job (manifest.py), runs it and writes the image whole or not at all, so a fast one does more, and
a killed one loses what it was at. The same command resumes: jobs whose image exists are skipped, failed ones
are tried again.

An image is its line's alone: it is drawn by itself with noise of its own seed, so that it is the same bits
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

from kolors_core.batch.manifest import JobLocks, Manifest, Record
from kolors_core.batch.prompt_file import FINGERPRINT_KEY, Job, JobSettings, png_fingerprint, read_jobs
from kolors_core.batch.split_guidance import GuidancePair, PeerLost
from kolors_core.checkpoint import logger
from kolors_core.cli.options import (
    default_steps,
    files_of,
    guidance_of,
    guide,
    load_loras,
    load_pipeline,
    parse_source_scale,
    precision,
    quantization_bits,
    quantize,
    set_lora_scales,
)
from kolors_core.pipelines.png_metadata import attach_metadata, save_png
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.validation import LARGEST_SEED, check_int
from weights_convert.atomic_write import remove_stale_scratch
from weights_convert.untrusted_files import one_line

PAUSE = 0.2  # seconds between looks at lines that others draw


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
        model |= {"dtype": str(precision(options, device)), "bits": quantization_bits(options)} | files_of(
            options
        )
        if (keywords := guidance_of(options)) and options.split_guidance:
            raise ValueError("--split-guidance splits no --pag, --guidance-rescale or --guidance-interval")
        # Of what is not asked for, a fingerprint has nothing: older images keep theirs.
        model |= {name: value for name, value in {"rule": keywords, "freeu": options.freeu}.items() if value}
        seed = check_int("--seed", options.seed, least=0, most=LARGEST_SEED)
        self.jobs = read_jobs(options.prompts, model, seed, default_steps(options.sampler))
        self.run_name = self._synchronize_jobs()
        self.pair = GuidancePair() if options.split_guidance else None
        self.folder.mkdir(parents=True, exist_ok=True)
        self.locks = JobLocks(self.folder / ".claims")  # the name that earlier versions lock
        self.manifest = Manifest(self.folder / "manifest.jsonl", self.locks)
        self.process_name = f"{self.rank} of {self.world}, {socket.gethostname()} {os.getpid()}"
        self.loras: tuple[str, ...] = ()  # the sources of those that are loaded
        self.metadata: dict[str, str] = {}  # of every image

    def _synchronize_jobs(self) -> str:
        """A name of this run, the same for all its processes.

        ValueError if one has other lines, PeerLost if one is gone.
        """
        name, lines = secrets.token_hex(4), [(job.number, job.fingerprint) for job in self.jobs]
        if self.world == 1:
            return name
        kind = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        told: list[Any] = [None] * self.world
        mine = name, lines, f"torch {torch.__version__}, {kind}{threads}"
        try:
            dist.all_gather_object(told, mine)
        except RuntimeError as error:
            raise PeerLost(f"another process of this run is gone: {one_line(error)}") from error
        if others := [rank for rank, (_, lines, _) in enumerate(told) if lines != told[0][1]]:
            wanted = "expected one file, the same options and one precision for all"
            raise ValueError(f"process {others[0]} has other lines than process 0: {wanted}")
        if len(engines := {engine for *_, engine in told}) > 1:
            logger.warning("who draws an image decides how it is rounded: %s", "; ".join(sorted(engines)))
        return told[0][0]

    def run(self) -> list[Job]:
        """Draw until every line is drawn or has failed; returns those that failed in this run."""
        if self.pair is not None and self.pair.role == 1:
            self._run_follower(self.pair)
        else:
            self._run_leader()
        self.manifest.refresh()
        failed = [job for job in self.jobs if self._has_failed(job)]
        is_everyone_here = self._barrier()
        if self.rank == 0 or not is_everyone_here:
            self._finish(failed)
        if self.world > 1 and is_everyone_here:
            dist.destroy_process_group()
        return failed

    def _run_leader(self) -> None:
        from tqdm.auto import tqdm

        pending = self._job_order([job for job in self.jobs if not self._is_done(job)])
        unseen = {job.number for job in pending}
        done = len(self.jobs) - len(pending)
        with tqdm(total=len(self.jobs), initial=done, unit="picture", smoothing=0,
                  disable=self.options.quiet) as bar:  # fmt: skip
            while pending:
                held = []
                for job in pending:
                    if not self.locks.acquire(job.number):
                        held.append(job)
                        continue
                    try:
                        news = self.manifest.refresh()
                        if not self._has_ended(job):
                            self._run_job(job)
                    finally:
                        self.locks.release(job.number)
                    unseen.discard(job.number)
                    unseen.difference_update(r["line"] for r in news if r.get("run") == self.run_name)
                    bar.update(len(self.jobs) - len(unseen) - bar.n)
                pending = held
                if pending:
                    time.sleep(PAUSE)
        if self.pair is not None:
            self.pair.broadcast(None)

    def _run_follower(self, pair: GuidancePair) -> None:
        """Compute the other half of the images that the leader of the pair generates."""
        while (settings := pair.broadcast()) is not None:
            pipe = self.pipe
            try:
                self._generate(pipe, settings)
            except PeerLost:
                raise
            except Exception:  # the leader writes down why
                self._check_device()

    def _job_order(self, lines: Sequence[Job]) -> list[Job]:
        """This process's share first, from the front; then the others', from the back.

        Lines of one LoRA stand together. What a process did not live to finish comes last, in case that was
        the line's doing.
        """
        together = 1 if self.pair is None else 2  # processes that draw one image
        share = lines[self.rank // together :: self.world // together]
        own = {job.number for job in share}
        rest = [job for job in lines[::-1] if job.number not in own]

        def place(job: Job) -> tuple[bool, bool, tuple[str, ...]]:
            is_cut_short = self.locks.was_interrupted(job.number)
            return is_cut_short, job.number not in own, _sources(job.settings.lora if job.settings else ())

        return sorted([*share, *rest], key=place)

    def _run_job(self, job: Job) -> None:
        """Run a locked job, and record its result."""
        start, reason = time.perf_counter(), job.reason
        if job.settings is not None and (reason := self._conflict(job)) is None:
            self.locks.mark_running(job.number, True)
            if self.pair is not None:
                self.pair.broadcast(job.settings)
            pipe = self.pipe
            try:
                image = self._generate(pipe, job.settings)
                lora = {"lora": ", ".join(job.settings.lora)} if job.settings.lora else {}
                attach_metadata(image, image.info | lora | self.metadata | {FINGERPRINT_KEY: job.fingerprint})
                save_png(image, self._path(job))
            except PeerLost:
                raise
            except Exception as error:
                self._check_device()
                reason = one_line(error, None)
        seconds = round(time.perf_counter() - start, 3)
        self.manifest.add(self._as_record(job, reason, seconds, self.process_name))
        self.locks.mark_running(job.number, False)

    def _generate(self, pipe: KolorsPipeline, settings: JobSettings) -> Any:
        """Generate the image; latents in the process of a pair that does not lead."""
        pair = self.pair
        if pair is not None:
            pair.handshake_done = False
        try:
            self._set_loras(pipe, settings.lora)
            return pipe(
                settings.prompt, settings.height, settings.width, settings.steps,
                guidance_scale=settings.guidance, negative_prompt=settings.negative_prompt,
                generator=torch.Generator().manual_seed(settings.seed),
                output_type="pil" if pair is None or pair.role == 0 else "latent",
            )[0][0]  # fmt: skip
        except Exception as error:
            if pair is not None and not pair.handshake_done:
                pair.handshake(one_line(error, None))
            raise

    @cached_property
    def pipe(self) -> KolorsPipeline:
        """Loaded when the first line needs it."""
        pipe = load_pipeline(self.options, self.device)
        pipe.set_progress_bar_config(disable=True)
        if (report := quantize(pipe, self.options)) is not None:
            self.metadata["quantized"] = str(report)
        guide(pipe, self.options)
        if self.pair is not None:
            pipe.guided = self.pair.guided
        return pipe

    def _set_loras(self, pipe: KolorsPipeline, loras: tuple[str, ...]) -> None:
        """Attach these LoRAs and no others."""
        sources = _sources(loras)
        try:
            if sources == self.loras:
                set_lora_scales(pipe, loras)
            else:
                pipe.unload_lora_weights()
                load_loras(pipe, loras, self.options.local_files_only, is_quiet=True)
                self.loras = sources
        except BaseException:
            pipe.unload_lora_weights()
            self.loras = ()
            raise

    def _path(self, job: Job) -> Path:
        return self.folder / (job.file or "")

    def _is_done(self, job: Job) -> bool:
        return job.settings is not None and png_fingerprint(self._path(job)) == job.fingerprint

    def _conflict(self, job: Job) -> str | None:
        """Return why the image may not be written, which is that there is a file of its name, or None."""
        if self.options.force or png_fingerprint(self._path(job)) is None:
            return None
        return f"{job.file} is there, and not of this line or these options: choose another OUT, or --force"

    def _has_ended(self, job: Job) -> bool:
        """Return whether the job is done, by any run, or has failed in this one."""
        return self._record(job).get("run") == self.run_name or self._is_done(job)

    def _has_failed(self, job: Job) -> bool:
        """Of a line that has ended. What another run writes of its own line of this number says nothing."""
        return self._record(job).get("status") != "done" and not self._is_done(job)

    def _record(self, job: Job) -> Record:
        """Return the last record of a job; empty if none, or of another job of its number."""
        record = self.manifest.records.get(job.number, {})
        return record if record.get("fingerprint") == job.fingerprint else {}

    def _as_record(self, job: Job, reason: str | None, seconds: float | None, process: str | None) -> Record:
        return {
            "line": job.number, "file": job.file if reason is None else None,
            "seed": None if job.settings is None else job.settings.seed,
            "status": "done" if reason is None else "failed", "reason": reason, "seconds": seconds,
            "process": process, "fingerprint": job.fingerprint, "run": self.run_name,
        }  # fmt: skip

    def _check_device(self) -> None:
        """After a job's error, raise again what is the accelerator's, which no job would survive."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def _barrier(self) -> bool:
        """Wait for the other processes to end; False if one is gone, whose jobs others then run."""
        try:
            if self.world > 1:
                dist.barrier()
            return True
        except RuntimeError:
            return False

    def _finish(self, failed: Sequence[Job]) -> None:
        """Compact the manifest, remove scratch files and print a report."""

        def complete(records: dict[int, Record]) -> None:
            for job in self.jobs:
                self.locks.mark_running(job.number, False)
                # The process that drew it did not live to say so.
                if self._record(job).get("status") != "done" and self._is_done(job):
                    records[job.number] = self._as_record(job, None, None, None)

        self.manifest.compact(complete)
        remove_stale_scratch(self.folder)
        if self.is_quiet:
            return
        names = {job.file for job in self.jobs}
        found = [name for name in os.listdir(self.folder) if re.fullmatch(r"\d{6,}-\d+\.png", name)]
        others = [name for name in found if name not in names]
        drawn = len(self.jobs) - len(failed)
        report = [f"{drawn} of {len(self.jobs)} images are in {self.folder}"]
        if others:
            report.append(f"{len(others)} more are of no line of this file, such as {others[0]}")
        for job in failed:
            reason = self._record(job).get("reason") or "another run on this OUT has a line of its number"
            report.append(f"line {job.number} failed: {reason}")
        print(*report, sep="\n", file=sys.stderr)


def _sources(loras: Sequence[str]) -> tuple[str, ...]:
    """LoRAs without their scales."""
    return tuple(parse_source_scale(text)[0] for text in loras)
