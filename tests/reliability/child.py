"""The program as a child process of these tests: it tells in shared memory what it is doing, and can be made to fail.

The product has no hook for this: its functions are wrapped here, from outside. Slot 0 of the file that
`JAXSTAGES_TEST_PHASES` names is the phase of the main thread, slot 1 that of a background thread, slots 2 and 3 the
last step that was read (low and high byte), slot 4 the step of the stage's last save that was begun.
"""

import mmap
import os
from pathlib import Path
from typing import Any

PHASES = (
    *("start", "import", "prepare", "restore", "hand-off", "compile", "step", "evaluate", "save", "commit", "cleanup"),
    *("finish", "end"),
)
BACKGROUND = ("commit", "cleanup")
SLOTS = 5


def shared(path: str) -> mmap.mmap:
    with Path(path).open("r+b") as file:
        return mmap.mmap(file.fileno(), SLOTS)


def within(owner: Any, name: str, phase: str, slots: mmap.mmap) -> None:
    """Wrap a function so that the phase stands in its slot for as long as it runs."""
    function = getattr(owner, name)
    slot = int(phase in BACKGROUND)

    def wrapped(*args: Any, **named: Any) -> Any:
        before, slots[slot] = slots[slot], PHASES.index(phase)
        try:
            return function(*args, **named)
        finally:
            slots[slot] = before

    setattr(owner, name, wrapped)


def tell_phases(slots: mmap.mmap) -> None:
    from jax._src import compiler
    from orbax.checkpoint._src.path import deleter

    import jaxstages.checkpoint.manager as checkpoint
    import jaxstages.cli.train as train
    import jaxstages.training.handoff as parent
    import jaxstages.training.loop as loop
    import jaxstages.training.stage as stage

    within(train, "prepare_stages", "prepare", slots)
    within(checkpoint.Checkpoints, "restore_newest", "restore", slots)
    within(parent, "read_params", "hand-off", slots)
    within(compiler, "compile_or_get_cached", "compile", slots)
    within(loop.Loop, "run", "step", slots)
    within(loop.Loop, "_evaluate", "evaluate", slots)
    within(stage, "_finish", "finish", slots)
    within(checkpoint.Checkpoints, "save", "save", slots)
    within(checkpoint.Checkpoints, "_finalize", "commit", slots)
    within(checkpoint, "remove_tree", "cleanup", slots)
    within(deleter.StandardCheckpointDeleter, "delete_steps", "cleanup", slots)
    within(train, "stage_matrix", "end", slots)
    read, run = loop.Loop._read_sums, loop.Loop.run

    def noted(self: Any, step: int, sums: Any) -> None:
        slots[2], slots[3] = step % 256, step // 256
        read(self, step, sums)

    def begun(self: Any, state: Any, first: int, last: int) -> Any:
        slots[2], slots[3] = first % 256, first // 256
        return run(self, state, first, last)

    restore, save = checkpoint.Checkpoints.restore_newest, checkpoint.Checkpoints.save

    def opened(self: Any, *args: Any) -> Any:
        slots[4] = 0  # of the stage before
        return restore(self, *args)

    def saving(self: Any, step: int, *args: Any) -> Any:
        self.wait()  # as it begins itself
        slots[4] = step
        return save(self, step, *args)

    loop.Loop._read_sums, loop.Loop.run = noted, begun
    checkpoint.Checkpoints.restore_newest, checkpoint.Checkpoints.save = opened, saving


def main() -> None:
    from jaxstages import __main__ as door
    from jaxstages.runtime.signals import stop_signals

    slots = shared(os.environ["JAXSTAGES_TEST_PHASES"])
    with stop_signals(owns_process=True):  # as the door itself does, which is one import later here
        slots[0] = PHASES.index("import")
        import jaxstages.cli.main  # noqa: F401
        from jaxstages.generation import decode
        from jaxstages.runtime import lost_host
        from jaxstages.training import program
        from tests.compiled import made_once, traced_once, write_whole_files

        default = lost_host.LOST_AFTER_SECONDS
        lost_host.LOST_AFTER_SECONDS = int(os.environ.get("JAXSTAGES_TEST_LOST_AFTER", default))
        tell_phases(slots)
        write_whole_files()
        program.make_model = traced_once(program.make_model)
        decode.compile_decode = made_once(decode.compile_decode)
        door.cli()


if __name__ == "__main__":
    main()
