"""What a user waits for before anything happens: help, mistakes and listings import neither jax nor what needs it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SLOW = ("jax", "torch", "tensorboardX", "orbax", "flax", "tensorflow_datasets", "sacrebleu")

PROGRAM = """
import sys, time
from jaxstages.cli.main import main
code = main(["jaxstages", *sys.argv[1:]])
print("SECONDS", time.process_time())
print("LOADED", *(name for name in {slow!r} if sys.modules.get(name) is not None))
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--help",), 0),
        (("trian",), 2),
        (("run", "--workdri=x"), 2),
        (("run", "--workdir=new", "--config=configs/demo.py", "--config.pretrain.optim.clip_nrom=1"), 2),
        (("run", "--workdir=new", "--config=configs/demo.py", "--config.pretrain.optim.name=adam"), 2),
        (("run", "--workdir=ftp://host/run", "--config=configs/demo.py"), 2),
        (("checkpoints", "list", "--workdir=tests/reliability/golden/run"), 0),
        (("checkpoints", "verify", "--workdir=tests/reliability/golden/run"), 0),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_help_mistakes_and_listings_come_at_once(words: tuple[str, ...], code: int) -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", PROGRAM.format(slow=SLOW), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == code, done.stderr
    seconds, loaded = done.stdout.splitlines()[-2:]
    assert loaded.strip() == "LOADED", loaded
    assert float(seconds.split()[1]) < 1.0


def test_tensorboard_does_not_import_torch(tmp_path: Path) -> None:
    """tensorboardX would, where it is installed, for tensors of torch."""
    (tmp_path / "torch.py").write_text("")
    program = "import sys; from pathlib import Path; from jaxstages.training.event_file import EventFile as File; "
    program += (
        "File(Path(sys.argv[1])).write_scalars(1, {'loss': 1.0}); assert 'torch' not in sys.modules; import torch"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "events")], env=environment, check=True)


def test_a_reader_that_leaves_is_no_traceback() -> None:
    """`jaxstages --help | head -1`; the pipe is closed before anything is written."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-u", "-m", "jaxstages", "--help"]
    try:
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, cwd=Path(__file__).parents[1])
    finally:
        os.close(write)
    assert done.stderr == b"" and done.returncode == 128 + signal.SIGPIPE
