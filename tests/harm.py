"""Processes that tests kill or stop. A server that has imported the trainer forks them quickly.

The processes import this file too, so that it must not use pytest or `conftest.py`.
"""

import ctypes
import faulthandler
import io
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_intervene import trainer
from hf_intervene.data import quad
from hf_intervene.trainer import checkpoints


torch.set_num_threads(1)
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["hf_intervene.trainer.loop"])


def start(target, *arguments):
    process = SERVER.Process(target=target, args=arguments)
    process.start()
    return process


def run(target, *arguments, timeout=600):
    """Return the exit status of a function in its own process. If it hangs, show where."""
    process = start(target, *arguments)
    process.join(timeout)
    if process.is_alive():
        os.kill(process.pid, signal.SIGABRT)
        raise AssertionError(f"{target.__name__} hangs")
    return process.exitcode


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def dying_rows(rows, parent, shards, **arguments):
    """Yield the rows of `quad._rows`. A process other than the parent dies at the fourth row."""
    for number, row in enumerate(rows(shards, **arguments)):
        if number == 3 and os.getpid() != parent:
            die()
        yield row


def training(argv, errors=None):
    """The trainer's script; its standard error goes to a file."""
    faulthandler.enable()
    sys.stdout = io.StringIO()
    sys.stderr = open(errors, "a", buffering=1) if errors else io.StringIO()
    sys.exit(trainer.main(argv))


def trainer_rank(argv, errors, rank, world, port):
    """One process of several, as a launcher starts it."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    training(argv, errors)


def draw_and_die(cache, errors):
    """Images are drawn into a cache by two processes, one of which dies."""
    parent, rows = os.getpid(), quad._rows

    def dying(shards, **arguments):
        for number, row in enumerate(rows(shards, **arguments)):
            if number == 3 and os.getpid() != parent and shards[0][0] == "obs":
                die()
            yield row

    quad._rows = dying
    try:
        quad.load_quad(images_per_context=20, resolution=8, cache_dir=cache, num_proc=2)
    except OSError as error:
        Path(errors).write_text(str(error))
        os._exit(1)
    os._exit(0)


def trainer_on_full_disk(argv, errors, free):
    """Run the trainer where no file may grow beyond `free` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, free))
    training(argv, errors)


def trainer_on_small_disk(argv, errors, folder, size):
    """Run the trainer with a small disk of `size` bytes on `folder`, which only it sees.

    The exit status is 77 if such a disk is not allowed. The step of the newest checkpoint is
    printed at the end.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    new_user, new_mounts, private = 0x10000000, 0x00020000, 0x40000 | 0x4000
    if libc.unshare(new_mounts | (0 if os.geteuid() == 0 else new_user)) or libc.mount(
        b"none", b"/", None, private, None
    ):
        sys.exit(77)
    if libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={size}".encode()):
        sys.exit(77)
    try:
        training(argv, errors)
    finally:
        found = checkpoints.newest_checkpoint(Path(folder) / "run" / "checkpoints")
        sys.stderr.write(f"newest checkpoint: {found[2]['step'] if found else 0}\n")


TENSORS = {"model": {"w": torch.zeros(8)}, "optimizer": {"0.step": torch.zeros(())}}


def write(folder, value):
    """Replace a checkpoint of the same step, write a newer one, and replace the best model.

    The newer checkpoint causes an older one to be removed.
    """
    tensors = {
        file: {name: w + value for name, w in values.items()} for file, values in TENSORS.items()
    }
    for step in (value, value + 1):
        checkpoints.save_checkpoint(folder / "checkpoints", step, tensors, {"best": value}, keep=2)
    with checkpoints.atomic_folder(folder / "best") as best:
        save_file(tensors["model"], best / "model.safetensors")
    checkpoints.write_whole(folder / "training_arguments.yaml", f"value: {value}\n")


def write_and_die(folder, value, at):
    """Run `write`, and die before its change number `at` of the disk.

    The exit status is 0 if `write` makes fewer changes.
    """
    left = at
    changes = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}

    def watch(event, arguments):
        nonlocal left
        writes = (
            event == "open"
            and isinstance(arguments[2], int)
            and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if event in changes or writes:
            left -= 1
            if left == 0:
                die()

    sys.addaudithook(watch)
    write(Path(folder), value)
    os._exit(0)
