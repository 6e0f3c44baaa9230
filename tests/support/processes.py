"""Programs in processes of their own, forked from one that has torch: importing it takes longer than most.

What is imported before is from outside and reads no variable of the environment. Our packages, and the hub's
client, are imported by each program itself.
"""

import atexit
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
TIMEOUT = 300  # seconds, after which a process is ended by a signal

# What is forked leaves the loop, runs the program as `python -c` would, and ends without taking torch down.
SERVER = f"""
import atexit, gc, json, os, signal, sys, traceback
import einops, numpy, PIL.Image, safetensors.torch, sentencepiece, torch

gc.freeze()
for line in sys.stdin:
    if (child := os.fork()) == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    os._exit(0)
job = json.loads(line)
signal.alarm({TIMEOUT})
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for stream, file in enumerate(job["streams"], start=1):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
os.environ.clear()
os.environ.update(job["env"])
os.chdir(job["cwd"])
sys.argv[1:] = job["arguments"]
status = 0
try:
    exec(compile(job["program"], "<string>", "exec"), {{"__name__": "__main__"}})
except SystemExit as end:
    status = end.code or 0
    if not isinstance(status, int):
        status = print(status, file=sys.stderr) or 1
except BaseException:
    status = traceback.print_exc() or 1
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)
"""
COMMAND = "import runpy; runpy.run_module('kolors_core', run_name='__main__', alter_sys=True)"


@cache
def _server() -> subprocess.Popen[str]:
    """Start the process to fork from; it ends with this one, which closes its standard input."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "271828"},
    )  # fmt: skip
    atexit.register(server.communicate)
    return server


def run_program(
    program: str, *arguments: str, cwd: Path = ROOT, env: dict[str, str] | None = None
) -> CompletedProcess[str]:
    """Run a program as `python -c` does; `COMMAND` is `python -m kolors_core`. Status as subprocess's."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdout", "stderr")]
        job = {
            "program": program, "arguments": arguments, "cwd": str(cwd), "streams": [*map(str, streams)],
            "env": dict(os.environ if env is None else env),
        }  # fmt: skip
        print(json.dumps(job), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return CompletedProcess([program, *arguments], status, *(file.read_text() for file in streams))
