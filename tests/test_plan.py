"""What is said of a recipe before it is run: arithmetic, and what is read out of a compiler's text."""

import dataclasses
from pathlib import Path

import jax
import pytest

from jaxstages.cli.main import main
from jaxstages.cli.plan import make_plan, with_local_import
from jaxstages.config import AttentionConfig, ExpertsConfig, LoraConfig, ModelConfig, TokenizerConfig
from jaxstages.models.flops import flops_per_token
from jaxstages.plan.collectives import SMALL, collectives_of, total
from jaxstages.plan.estimate import roofline, wire_bytes
from jaxstages.plan.topology import Topology, topology_of
from jaxstages.runtime.chips import CHIPS
from jaxstages.runtime.files import write_json
from tests import tiny

LLAMA_8B = ModelConfig(
    context=4096,
    layers=32,
    width=4096,
    ff_width=14336,
    attention=AttentionConfig(heads=32, kv_heads=8, head_dim=128),
    tied_head=False,
)


def test_flops_are_those_of_the_published_count() -> None:
    """Llama 3.1 8B at 4096: 48.249 G a token, 51.470 G with all of attention; its frozen products cost 4 of 6."""
    actual = flops_per_token(LLAMA_8B, 128_256)
    assert actual.causal == pytest.approx(48.249e9, rel=1e-4) and actual.full == pytest.approx(51.470e9, rel=1e-4)
    frozen = flops_per_token(LLAMA_8B, 128_256, LoraConfig(rank=8))
    attention = actual.full - actual.causal
    assert frozen.causal == pytest.approx((actual.causal - attention) * 4 / 6 + attention)


def test_flops_of_windows_and_experts() -> None:
    part = AttentionConfig(heads=2, kv_heads=2, head_dim=8)
    whole = ModelConfig(context=64, layers=2, width=16, ff_width=32, attention=part)
    seen = [AttentionConfig(heads=2, kv_heads=2, head_dim=8, window=w) for w in (64, 8)]
    left, right = (
        flops_per_token(ModelConfig(context=64, layers=2, width=16, ff_width=32, attention=a), 50) for a in seen
    )
    assert left.full == flops_per_token(whole, 50).full
    pairs = sum(min(query + 1, 8) for query in range(64)) / 64  # that a query sees, on average
    assert left.full - right.full == 2 * 12 * 16 * (64 - 8)
    assert right.causal == pytest.approx(left.full - 2 * 12 * 16 * 64 + 2 * 12 * 16 * pairs)
    mixture = dataclasses.replace(whole, experts=ExpertsConfig(count=8, per_token=2))
    router = 6 * 2 * 16 * 8
    assert flops_per_token(mixture, 50).full - flops_per_token(whole, 50).full == 6 * 2 * 3 * 16 * 32 + router


TEXT = """HloModule jit_step

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %x = f32[4,8]{1,0} parameter(0)
  %all-gather.1 = f32[32,8]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %reduce-scatter.1 = f32[4,8]{1,0} reduce-scatter(%all-gather.1), channel_id=2, dimensions={0}
}

%condition (p: (s32[], f32[4,8])) -> pred[] {
  %limit = s32[] constant(3)
}

ENTRY %main (a: f32[4,8]) -> f32[] {
  %a = f32[4,8]{1,0} parameter(0)
  %loop = (s32[], f32[4,8]{1,0}) while(%a), condition=%condition, body=%body
  %b = f32[16]{0} parameter(1)
  %all-reduce.7 = (f32[4,8]{1,0}, f32[16]{0}) all-reduce(%a, %b), channel_id=3, metadata={op_name="jit(step)/sum"}
}
"""


def test_collectives_are_read_with_their_loops() -> None:
    """A gather counts as what it gives, a reduction as what it starts from; a loop as often as it turns."""
    actual = collectives_of(TEXT)
    assert [(entry.kind, entry.times) for entry in actual] == [
        ("all-gather", 3),
        ("reduce-scatter", 3),
        ("all-reduce", 1),
    ]
    assert total(actual) == {"all-gather": 3 * 1024, "reduce-scatter": 3 * 1024, "all-reduce": 128, SMALL: 64}
    assert actual[-1].source == "jit(step)/sum"


def test_a_collective_that_is_begun_early_counts_once() -> None:
    early = TEXT.replace("%body (", "%async_collective_fusion.1 (").replace(
        "body=%body", "body=%async_collective_fusion.1"
    )
    line = next(line for line in early.splitlines() if "all-gather(" in line)
    assert total(collectives_of(early.replace(line, f"{line}\n{line}")))["all-gather"] == 3 * 1024
    assert total(collectives_of(TEXT.replace(line, f"{line}\n{line}")))["all-gather"] == 2 * 3 * 1024


def test_the_roofline_is_the_slowest_part_or_the_sum() -> None:
    chip = CHIPS["v5p"]
    actual = roofline(chip, 4, 4 * 0.75 * chip.flops, chip.bandwidth, {"all-gather": chip.link / 2})
    assert actual == pytest.approx((1.0, 2.0, 0.5))
    assert (actual.overlapped, actual.one_by_one) == pytest.approx((2.0, 2.5))
    assert wire_bytes({"all-reduce": 8.0, "all-gather": 8.0}, 4) == {"all-reduce": 12.0, "all-gather": 6.0}


def test_a_recipe_is_planned_for_the_devices_that_are_here(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    recipe.mesh.data, recipe.mesh.fsdp = 1, 8
    actual = make_plan(recipe, "pretrain", Topology("local", jax.devices(), None, "cpu"))
    assert actual.params > 1000 and actual.estimate is None and actual.remat == "none"
    assert actual.param_bytes < actual.params * 4 and actual.optimizer_bytes < 2 * actual.param_bytes + 4096
    assert actual.step_bytes > actual.param_bytes + actual.optimizer_bytes
    assert actual.sent["reduce-scatter"] == sum(size for _, kind, size in actual.theory if kind == "reduce-scatter")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("plan",), "plan needs --config=RECIPE"),
        (
            ("plan", "--config=configs/demo.py", "--topology=v4:2x2"),
            "known chips: v5e, v5p, v6e, a100, a100_40gb",
        ),
        (("plan", "--config=configs/demo.py", "--topology=h100:2x2"), "write h100:N, a number of devices"),
        (("plan", "--config=configs/demo.py", "--stage=import"), "has no stage import; it has pretrain"),
        (("plan", "--config=configs/scale.py:9b"), "has no variant '9b'; known: 1b_v5e16"),
    ],
)
def test_what_can_t_be_planned_is_one_line(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["jaxstages", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_model_that_is_imported_is_planned_if_it_is_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny.recipe(tmp_path)
    recipe.pretrain, recipe.finetune.init_from = None, f"hf:{tmp_path}/model"
    assert with_local_import(recipe) is recipe
    assert "which the recipe imports, is not here: config.model is planned instead" in capsys.readouterr().out
    (tmp_path / "model").mkdir()
    config = {"model_type": "llama", "hidden_size": 96, "num_attention_heads": 3, "num_hidden_layers": 2}
    config |= {"intermediate_size": 64, "vocab_size": 300, "max_position_embeddings": 64}
    write_json(tmp_path / "model" / "config.json", config)
    recipe.model, recipe.tokenizer = ModelConfig(context=64), TokenizerConfig()
    assert with_local_import(recipe).model.width == 96


def test_local_is_what_is_here() -> None:
    assert topology_of("local").devices == jax.devices()
