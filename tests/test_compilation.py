"""Recomputation: the same gradient for less memory, and the first of the ladder that fits."""

import ctypes
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstages.config import ModelConfig
from jaxstages.data.stage_data import prepare_stages
from jaxstages.models import cpu
from jaxstages.models.select import limit_memory
from jaxstages.models.sharding import place_batch, shardings_of
from jaxstages.models.transformer import REMAT, make_model
from jaxstages.training import compile as compilation
from jaxstages.training.compile import REMAT_ORDER, compile_step
from jaxstages.training.program import choose_attention
from jaxstages.training.setup import StageSetup, setup_stage
from jaxstages.training.step import init_state
from tests.tiny import VOCAB, example, mixed_batch, model_config, packed_batch, recipe, write_data


def gradient(config: ModelConfig, remat: str) -> tuple[dict, int]:
    """And the bytes that the compiler counts for what exists between forward and backward pass."""
    model, batch = make_model(config, VOCAB, remat=remat), mixed_batch(8)

    def loss(params: dict) -> jax.Array:
        return model.apply(params, batch, None)[..., 0].sum()

    params = jax.jit(model.init)(jax.random.key(0))
    step = jax.jit(jax.grad(loss)).lower(params).compile()
    return step(params), step.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("unroll", [False, True])
def test_less_memory_for_the_same_gradient(unroll: bool) -> None:
    config = model_config(layers=2 if unroll else 6, unroll=unroll)
    results = {remat: gradient(config, remat) for remat in REMAT_ORDER}
    for remat in REMAT_ORDER[1:]:
        jax.tree.map(
            lambda left, other: np.testing.assert_allclose(left, other, rtol=1e-4, atol=1e-6),
            results[remat][0],
            results["none"][0],
        )
    sizes = [results[remat][1] for remat in REMAT_ORDER]
    # XLA:CPU brings what is computed again forward where it can, and then it must keep it: out of a loop it can.
    assert unroll or sizes[0] > 1.1 * sizes[1] > 1.2 * sizes[2], sizes


def test_offload_is_lowered_for_gpu() -> None:
    """CPU has one memory; the copies to the host's and back are in the program for a GPU."""
    model, batch = make_model(model_config(layers=2), VOCAB, remat="offload"), mixed_batch(8)
    step = jax.jit(jax.grad(lambda params: model.apply(params, batch, None)[..., 0].sum()))
    text = step.trace(jax.eval_shape(model.init, jax.random.key(0))).lower(lowering_platforms=("cuda",)).as_text()
    assert "pinned_host" in text
    assert set(REMAT) == {*REMAT_ORDER[1:], "offload"}


class Heap(ctypes.Structure):
    """`mallinfo2` of glibc."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "mapped")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "used", "fordblks", "keepcost")),
    ]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="malloc is not that of glibc 2.33 or later")
def test_memory_is_given_back_before_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA:CPU says that results are there while it still holds what it made them in: dispatched at once, the next step
    would have its own beside it. More than half of the steps did."""
    monkeypatch.setattr(cpu, "LARGE_TEMP_BYTES", 2**20)
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Heap

    def taken() -> int:
        heap = mallinfo()
        return heap.used + heap.mapped

    step, x = jax.jit(lambda x: (x[:, None] * x[None] + 1.0) @ x), jnp.ones(2000)
    compiled = step.lower(x).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary == 4 * 2000**2
    waited = limit_memory(step, compiled, "cpu")
    waited(x)
    time.sleep(0.1)
    before, unseen = taken(), 0
    for _ in range(200):
        waited(x)
        unseen += taken() - before > temporary / 2
    assert unseen < 20, f"after {unseen} of 200 steps"


FREED = """
import os
import numpy as np
from jaxstages.runtime.cpu import disable_malloc_trim, freeze_gc_and_trim_heap

def resident() -> int:
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

assert disable_malloc_trim()
arrays = [np.ones(2**20) for _ in range(64)]
whole = resident()
del arrays[::2]
kept = resident()
freeze_gc_and_trim_heap()
print(whole - kept, kept - resident())
"""


SCATTERED = """
import ctypes, re, sys
from jaxstages.runtime.cpu import disable_malloc_trim, freeze_gc_and_trim_heap

libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
libc.free.argtypes = libc.fclose.argtypes = (ctypes.c_void_p,)
libc.malloc_info.argtypes = (ctypes.c_int, ctypes.c_void_p)

def in_lists() -> int:
    file = libc.fopen(sys.argv[1].encode(), b"w")
    libc.malloc_info(0, file)
    libc.fclose(file)
    found = re.findall('from="([0-9]+)".* count="([0-9]+)"', open(sys.argv[1]).read())
    return sum(int(count) for size, count in found if int(size) > 1024)

assert disable_malloc_trim()
pieces = [libc.malloc(1100 + 7 * (number % 4000)) for number in range(40_000)]
for piece in pieces[::2]:
    libc.free(piece)
before = in_lists()
freeze_gc_and_trim_heap()
print(before, in_lists())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="malloc is not glibc's")
def test_what_is_free_goes_back_before_the_first_step() -> None:
    """Every second of 64 arrays of 8 MiB is freed: in holes that a step's memory, one piece, does not fit in."""
    output = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True).stdout
    at_once, then = map(int, output.split())
    assert at_once < 2**25 and then > 31 * 2**23


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="malloc is not glibc's")
def test_free_pieces_leave_the_lists_before_the_first_step(tmp_path: Path) -> None:
    """Every second of 40,000 pieces of 1 to 29 KB is freed: each allocation of an array would walk over them."""
    command = [sys.executable, "-c", SCATTERED, str(tmp_path / "info.xml")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, then = map(int, output.split())
    assert before > 19_000 and then < 100


@pytest.fixture(scope="module")
def needed(setup: StageSetup) -> int:
    """Bytes of the step that keeps all."""
    _, step = compilation.jit_step(setup.program, "none")
    return compilation.memory_bytes(step.lower(*compilation.abstract_step_arguments(setup.program)).compile())


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> StageSetup:
    folder = tmp_path_factory.mktemp("compilation")
    write_data(folder)
    tiny = recipe(folder)
    assert tiny.pretrain is not None
    tiny.model.layers, tiny.pretrain.loop.remat = 6, "auto"
    prepare_stages(tiny, folder, ["pretrain"])
    return setup_stage(tiny, "pretrain", folder)


def test_on_cpu_there_is_no_other_attention_than_the_model_s_own(setup: StageSetup) -> None:
    assert setup.data.train and choose_attention(setup.recipe.model, 1, setup.data.train) is None


@pytest.mark.parametrize(("share", "rung"), [(2.0, "none"), (0.97, "dots"), (0.1, "full")])
def test_auto_takes_the_first_that_fits(
    setup: StageSetup,
    needed: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    share: float,
    rung: str,
) -> None:
    """Of what the step needs without recomputation, so much is there."""
    monkeypatch.setattr(compilation, "_memory_limit", lambda device: int(needed * share / compilation.MEMORY_FRACTION))
    compile_step(setup.program)
    said = capsys.readouterr()
    assert f"remat {rung}: a step takes" in said.out + said.err
    assert ("lower loop.batch_size" in said.out + said.err) == (rung == "full")


def test_memory_of_this_machine(setup: StageSetup) -> None:
    """More than the step takes, less than 64 TiB."""
    assert 2**26 < compilation._memory_limit(setup.program.mesh.devices.flat[0]) < 2**46
    state = init_state(jax.jit(setup.program.model.init)(jax.random.key(0)), setup.program.tx)
    _, step = compile_step(setup.program)
    assert int(step(state, packed_batch([[example(40, r)] for r in range(8)], 64))[0].step) == 1


def test_a_large_step_is_waited_for_and_compiled_once(
    setup: StageSetup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On CPU; what is found on the way to its size is what runs."""
    monkeypatch.setattr(setup.config.loop, "remat", "none")
    params = jax.jit(setup.program.model.init)(jax.random.key(0))
    state = init_state(params, setup.program.tx, setup.config.optim.spike_window)
    state = jax.device_put(state, shardings_of(setup.program.abstract_state))
    batch = place_batch(packed_batch([[example(40, r)] for r in range(8)], 64), 8, setup.program.row_sharding)
    for limit, waits in ((0, True), (2**60, False)):
        monkeypatch.setattr(cpu, "LARGE_TEMP_BYTES", limit)
        with jax.log_compiles():
            _, step = compile_step(setup.program)
            caplog.clear()
            for _ in range(3):
                state, sums = step(state, batch)
                ready = sums["nll"].is_ready()
                jax.block_until_ready(state)
        assert ready == waits
        assert not [line for line in caplog.messages if "Compiling jit(step)" in line]


def test_compiler_options_are_the_step_s_own(
    setup: StageSetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup.config.loop, "remat", "none")
    loop = setup.config.loop
    monkeypatch.setattr(loop, "compiler_options", (f"xla_dump_to={tmp_path}", "xla_dump_hlo_as_text=true"))
    assert not [*tmp_path.glob("*jit_step*")]
    compile_step(setup.program)
    jax.jit(lambda other: other + 1)(1)
    assert [*tmp_path.glob("*jit_step*.txt")] and not [*tmp_path.glob("*lambda*")]
    for wrong, complaint in (
        ("xla_cpu_fast", r"No such compile option: 'xla_cpu_fast'; mend or drop it"),
        ("xla_cpu_enable_fast_math=perhaps", "'perhaps' is not a valid bool"),
    ):
        monkeypatch.setattr(loop, "compiler_options", (wrong,))
        with pytest.raises(ValueError, match=f"config.pretrain.loop.compiler_options=.*{complaint}"):
            compile_step(setup.program)


def test_unknown_is_refused_at_the_door(tmp_path: Path) -> None:
    from jaxstages.config.checks import validate

    tiny = recipe(tmp_path)
    assert tiny.pretrain is not None
    tiny.pretrain.loop.remat = "some"
    with pytest.raises(ValueError, match="none, dots, offload, full, auto"):
        validate(tiny)
