"""Models of transformers, imported, are the same models; exported, transformers loads them as they were.

The models of `ZOO` are also packed and decoded; those of `MORE` differ from them by a table only.

Runs where the extra `parity` is installed (torch, transformers). Bounds are those of float32: log-probabilities differ
by at most 2e-5 over 288 tokens of noise, of text, and of a row of three documents, each of which transformers sees by
itself; 64 greedy tokens are the same.
"""

import os
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxstages.checkpoint.fingerprint import named_leaves
from jaxstages.cli.main import main
from jaxstages.cli.resolve import resolve_recipe
from jaxstages.cli.train import train
from jaxstages.config import LoraConfig, MeshConfig, ModelConfig, TokenizerConfig
from jaxstages.data.tokenizer import load_tokenizer
from jaxstages.data.train_tokenizer import make_tokenizer
from jaxstages.generation.decode import make_answers
from jaxstages.generation.sampling import Sampling
from jaxstages.interop import peft, peft_import
from jaxstages.interop.config_json import choose_family, read_config
from jaxstages.interop.families import FAMILIES
from jaxstages.interop.hf_import import Plan, describe, load, with_imported_model
from jaxstages.interop.layout import by_plain_names, entries_of, match, tensor_slots
from jaxstages.interop.peft_import import read_adapter
from jaxstages.interop.tensors import open_folder, write_shards
from jaxstages.models import lora
from jaxstages.models.sharding import batch_sharding, make_mesh
from jaxstages.models.transformer import make_model
from jaxstages.runtime.files import read_json, write_json
from jaxstages.training.handoff import read_parent
from jaxstages.training.setup import setup_stage
from jaxstages.types import Batch, Params
from tests.interop.zoo import MORE, PARTS, VOCAB, ZOO, make
from tests.tiny import recipe as tiny_recipe
from tests.tiny import write_data

WHY = "the extra `parity` is not installed: pip install '.[parity]'"
torch = pytest.importorskip("torch", reason=WHY)
pytest.importorskip("transformers", reason=WHY)
pytest.importorskip("peft", reason=WHY)
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
LENGTH, CUTS, NEW = 288, (90, 200, 288), 64
MOST = 2e-5

FIGURES: list[str] = []


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    text = (ROOT / "README.md").read_text()
    make_tokenizer(TokenizerConfig(kind="bpe", vocab_size=320), iter([text]), path)
    return path


@pytest.fixture(scope="session")
def rows(tokenizer: Path) -> np.ndarray:
    """Noise, text, and text."""
    text = load_tokenizer(tokenizer).encode((ROOT / "README.md").read_text())
    noise = np.random.default_rng(0).integers(0, VOCAB, LENGTH)
    return np.stack([noise, text[1000 : 1000 + LENGTH], text[3000 : 3000 + LENGTH]]).astype(np.int32)


@pytest.fixture(scope="session", autouse=True)
def _figures() -> Any:
    yield
    if (file := os.environ.get("JAXSTAGES_TEST_FIGURES")) and FIGURES:
        with Path(file).open("a", encoding="utf-8") as opened:
            opened.write(
                "\n".join(["| model | noise, text | packed | greedy | exported |", "| --- " * 5 + "|", *FIGURES, ""])
            )


def call(*words: str) -> None:
    assert main(["jaxstages", *words]) == 0


def theirs_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.tensor(tokens, dtype=torch.long)[None]).logits[0]
        return torch.log_softmax(logits.float(), -1).numpy()


def packed(rows: np.ndarray) -> Batch:
    """The last row is three documents."""
    segments, positions = np.ones_like(rows), np.tile(np.arange(LENGTH, dtype=np.int32), (len(rows), 1))
    for number, (start, stop) in enumerate(zip((0, *CUTS), CUTS, strict=False), start=1):
        segments[-1, start:stop], positions[-1, start:stop] = number, np.arange(stop - start)
    weights = np.ones(rows.shape, np.float32)
    return Batch(*map(jnp.asarray, (rows, rows, weights, segments, positions)))


def opened(folder: Path) -> tuple[ModelConfig, Params]:
    """The model of a folder, read without a workdir."""
    actual = describe(folder)
    config = actual.model
    config.context = actual.positions if config.attention.position == "learned" else LENGTH
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree = jax.eval_shape(make_model(config, config.vocab_size).init, jax.random.key(0))
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree)
    shapes = {path: tuple(leaf.shape) for path, leaf in named_leaves(target).items()}
    places = tensor_slots(actual.family, shapes)
    stored = by_plain_names(open_folder(folder), str(folder))
    stored = match(places, shapes, stored, config.vocab_size, str(folder), parts=True)
    return config, load(Plan(places, shapes, stored, config.vocab_size), target)


def greedy_of(model: Any, prompt: np.ndarray, new: int) -> np.ndarray:
    ids = torch.tensor(prompt, dtype=torch.long)[None]
    words = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "eos_token_id": None}
    with torch.no_grad():
        return model.generate(ids, attention_mask=torch.ones_like(ids), **words)[0].numpy()


def check_same(name: str, model: Any, folder: Path, rows: np.ndarray) -> tuple[ModelConfig, Params]:
    """The folder's model here gives what `model` gives: log-probabilities, and 48 greedy tokens after 48 of text."""
    config, params = opened(folder)
    text = rows.copy()
    text[2, :96] = greedy_of(model, rows[1, :48], 48)
    weights, ones = np.ones(text.shape, np.float32), np.ones_like(text)
    batch = Batch(*map(jnp.asarray, (text, text, weights, ones, np.tile(np.arange(LENGTH, dtype=np.int32), (3, 1)))))
    ours = make_model(config, config.vocab_size)
    actual = np.asarray(jax.nn.log_softmax(jax.jit(lambda p, b: ours.apply(p, b, None))(params, batch), axis=-1))
    worst = max(float(np.abs(actual[r] - theirs_of(model, text[r])).max()) for r in range(2))
    assert worst <= MOST, worst
    assert np.array_equal(actual[2, 47:95].argmax(-1), text[2, 48:96]), "greedy tokens"
    FIGURES.append(f"| {name} | {worst:.1e} | | 48 of 48 | 0 |")
    return config, params


def check_export(config: ModelConfig, params: Params, model: Any, folder: Path, rows: np.ndarray) -> Any:
    """Written by itself, the model is loaded by transformers, and gives what `model` gives."""
    from transformers import AutoModelForCausalLM

    family, written = choose_family(config)
    leaves = {path: np.asarray(leaf) for path, leaf in named_leaves(params).items()}
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    folder.mkdir()
    write_json(folder / "config.json", written)
    entries = entries_of(tensor_slots(FAMILIES[family.model_type], shapes), leaves, shapes)
    write_shards(folder, entries, "F32", 10**9, lambda done: None)
    words: Any = {"output_loading_info": True, "attn_implementation": "eager"}
    again, info = AutoModelForCausalLM.from_pretrained(folder, **words)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    # Not to the bit: gelu has several names, and an implementation for each.
    assert max(float(np.abs(theirs_of(again.eval(), row) - theirs_of(model, row)).max()) for row in rows) <= MOST
    assert read_config(again.config.to_dict(), "x").model == read_config(written, "x").model
    return again


@pytest.mark.parametrize("name", ZOO)
def test_a_family_is_the_same_here_and_there(name: str, tmp_path: Path, tokenizer: Path, rows: np.ndarray) -> None:
    """Log-probabilities of whole rows and of packed documents, tokens decoded with a cache, and the export."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make(name, tmp_path / "theirs", tokenizer)
    config, params = opened(tmp_path / "theirs")
    ours = make_model(config, config.vocab_size)
    logits = jax.jit(lambda p, b: ours.apply(p, b, None))(params, packed(rows))
    log_probs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    assert log_probs.shape[-1] == VOCAB
    alone = max(float(np.abs(log_probs[r] - theirs_of(model, rows[r])).max()) for r in (0, 1))
    parts = [(start, stop) for start, stop in zip((0, *CUTS), CUTS, strict=False)]
    together = max(float(np.abs(log_probs[2, a:b] - theirs_of(model, rows[2, a:b])).max()) for a, b in parts)
    assert alone <= MOST and together <= MOST, (alone, together)
    assert float(np.abs(theirs_of(model, rows[2])[CUTS[0] :] - log_probs[2, CUTS[0] :]).max()) > 0.01, "no boundaries"

    prompt = rows[1, :48]
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    answers = make_answers(ours, Sampling(max_new_tokens=NEW), context=LENGTH, batch_size=1, rows=batch_sharding(mesh))
    assert next(answers(params, [prompt.tolist()], 0)) == [greedy_of(model, prompt, NEW)[len(prompt) :].tolist()]

    again = check_export(config, params, model, tmp_path / "ours", rows)
    assert type(again) is type(model) and config.family == name.split(",")[0]
    exported = max(float(np.abs(theirs_of(again.eval(), row) - theirs_of(model, row)).max()) for row in rows)
    assert exported == 0.0
    FIGURES.append(f"| {name} | {alone:.1e} | {together:.1e} | {NEW} of {NEW} | {exported:g} |")


BY_COMMAND = ("llama, grouped heads wider than D/H, llama3 scaling", "gpt2", "gemma3_text", "qwen3_moe")
"""Models that also go through the commands; `test_folders.py` does so with every family, without transformers."""


@pytest.mark.parametrize("name", BY_COMMAND)
def test_import_and_export_by_command(name: str, tmp_path: Path, tokenizer: Path, rows: np.ndarray) -> None:
    """transformers loads the exported folder as the same model, to the bit, and a second import has the same digest."""
    from transformers import AutoModelForCausalLM

    model = make(name, tmp_path / "theirs", tokenizer)
    call("import", f"--from={tmp_path}/theirs", f"--workdir={tmp_path}/work")
    recipe = resolve_recipe(None, tmp_path / "work")
    assert recipe.model.family == name.split(",")[0]
    call("export", f"--workdir={tmp_path}/work", f"--to={tmp_path}/ours")
    words: Any = {"output_loading_info": True, "attn_implementation": "eager"}
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", **words)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(again) is type(model)
    assert all(np.array_equal(theirs_of(again.eval(), row), theirs_of(model, row)) for row in rows)
    call("import", f"--from={tmp_path}/ours", f"--workdir={tmp_path}/again")
    results = [read_json(tmp_path / work / "import" / "result.json") for work in ("work", "again")]
    assert results[0]["params_sha256"] == results[1]["params_sha256"]
    assert resolve_recipe(None, tmp_path / "again").model == recipe.model


@pytest.mark.parametrize("name", MORE)
def test_the_table_of_a_family_is_right(name: str, tmp_path: Path, tokenizer: Path, rows: np.ndarray) -> None:
    model = make(name, tmp_path / "theirs", tokenizer)
    config, params = check_same(name, model, tmp_path / "theirs", rows)
    again = check_export(config, params, model, tmp_path / "ours", rows)
    assert again.config.model_type == name.split(",")[0] and type(again) is type(model)


TEXT_FAMILIES = {"gemma3": "gemma3_text", "mistral3": "mistral", "qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3"}


@pytest.mark.parametrize("name", PARTS)
def test_the_text_part_of_a_model_with_more_parts(name: str, tmp_path: Path, tokenizer: Path, rows: np.ndarray) -> None:
    model = make(name, tmp_path / "theirs", tokenizer)
    config, params = check_same(f"{name}, text part", model, tmp_path / "theirs", rows)
    again = check_export(config, params, model, tmp_path / "ours", rows)
    assert again.config.model_type == TEXT_FAMILIES.get(name, "llama")


@pytest.mark.parametrize("kind", [{}, {"dora": True, "rank_stabilized": True}])
def test_adapters_are_the_same_beside_the_base_in_peft(kind: dict[str, Any], tmp_path: Path, tokenizer: Path) -> None:
    from peft import PeftModel

    name = "qwen3, tied"
    model = make(name, tmp_path / "theirs", tokenizer)
    write_data(tmp_path / "data")
    made = tiny_recipe(tmp_path / "data", steps=3)
    made.model, made.tokenizer, made.pretrain, made.instruct = ModelConfig(context=64), TokenizerConfig(), None, None
    assert made.finetune is not None
    made.finetune.init_from = f"hf:{tmp_path}/theirs"
    made.finetune.lora = LoraConfig(rank=4, **kind)
    made.finetune.optim.schedule.peak_lr = 0.03
    work = tmp_path / "work"
    train(with_imported_model(made, work), work, "finetune")
    call("export", f"--workdir={work}", f"--to={tmp_path}/merged")
    call("export", f"--workdir={work}", f"--to={tmp_path}/adapter", "--adapter")
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    tokens = np.random.default_rng(0).integers(0, VOCAB, 64)
    before = theirs_of(model, tokens)
    assert (tmp_path / "adapter" / "tokenizer.json").is_file(), "with the control tokens of training"
    beside = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    expected, actual = theirs_of(merged, tokens), theirs_of(beside, tokens)
    assert float(np.abs(expected - before).max()) > 0.1, "they learned something"
    worst = float(np.abs(expected - actual).max())
    assert worst <= MOST
    FIGURES.append(f"| adapters on {name}, {kind or 'LoRA'} | {worst:.1e} (merged, beside) | | | |")


def logits_of(config: ModelConfig, params: Params, tokens: np.ndarray) -> np.ndarray:
    """Log-probabilities of one row."""
    row = jnp.asarray(tokens[None], jnp.int32)
    batch = Batch(row, row, jnp.ones_like(row, jnp.float32), jnp.ones_like(row), jnp.arange(row.shape[1])[None])
    model = make_model(config, config.vocab_size)
    return np.asarray(jax.nn.log_softmax(model.apply(params, batch, None)[0], axis=-1))


MERGED = {
    "gpt2": {"targets": ("/kernel$",), "dora": True},
    "phi3, window": {"targets": ("query/kernel", "value/kernel", "/up/kernel", "down/kernel"), "rank_stabilized": True},
}


@pytest.mark.parametrize("name", MERGED)
def test_adapters_of_projections_in_one_tensor_go_there_and_back(name: str, tmp_path: Path, tokenizer: Path) -> None:
    """Of GPT-2's `c_attn`, Phi-3's `qkv_proj` and `gate_up_proj`, all parts or some are adapted."""
    from peft import PeftModel

    model = make(name, tmp_path / "theirs", tokenizer)
    config, params = opened(tmp_path / "theirs")
    kind = LoraConfig(rank=3, alpha=7.0, **MERGED[name])
    adapters = lora.init(jax.random.key(0), params, make_model(config, VOCAB).axes, kind)
    noise = iter(jax.random.split(jax.random.key(1), 99))
    adapters = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(noise), x.shape), adapters)
    merged = lora.merge(params, adapters, kind)
    shapes = {path: tuple(leaf.shape) for path, leaf in named_leaves(params).items()}
    leaves = {path: np.asarray(leaf) for path, leaf in named_leaves(adapters).items()}
    family = FAMILIES[name.split(",")[0]]
    tensors, chosen = peft._tensors(family, leaves, shapes)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", peft._config(kind, chosen, str(tmp_path / "theirs")))

    tokens = np.random.default_rng(0).integers(0, VOCAB, 64)
    expected, before = logits_of(config, merged, tokens), theirs_of(model, tokens)
    # In float64: two float32 models of opposite errors differ by more than either from the truth.
    beside = theirs_of(PeftModel.from_pretrained(model, folder).eval().double(), tokens)
    worst = float(np.abs(beside - expected).max())
    assert worst <= MOST < float(np.abs(expected - before).max())
    FIGURES.append(f"| adapters on {name}, in PEFT | {worst:.1e} | | | |")
    again = lora.merge(params, *read_adapter(folder, tensor_slots(family, shapes), shapes))
    for (path, left), right in zip(named_leaves(merged).items(), named_leaves(again).values(), strict=True):
        np.testing.assert_allclose(right, left, atol=2e-6, err_msg=path)


def test_a_pattern_of_alpha_goes_by_the_name_that_peft_has(tmp_path: Path) -> None:
    """In a multimodal model it is longer than that of the text model alone."""
    name = "model.language_model.layers.0.self_attn.q_proj"
    tensors = {f"base_model.model.{name}.{part}.weight": np.ones((2, 2), np.float32) for part in ("lora_A", "lora_B")}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    modules, names = peft_import._modules(tmp_path)
    (module,) = modules
    assert module == "model.layers.0.self_attn.q_proj" and names[module] == name
    config = {"lora_alpha": 16, "alpha_pattern": {name: 64}}
    assert peft_import._scale(config, names[module], 8) == 8.0


def test_adapters_that_peft_wrote_are_imported_beside_their_base(tmp_path: Path, tokenizer: Path) -> None:
    from peft import LoraConfig as Theirs
    from peft import get_peft_model

    model = make("llama, one key head, tied, linear scaling", tmp_path / "theirs", tokenizer)
    tokens = np.random.default_rng(0).integers(0, VOCAB, 64)
    before = theirs_of(model, tokens)
    expected = {"r": 4, "lora_alpha": 6, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 11}}
    where = {"target_modules": ["q_proj", "o_proj", "down_proj"], "layers_to_transform": [1]}
    adapted = get_peft_model(model, Theirs(**expected, **where)).eval()
    with torch.no_grad():
        for path, weight in adapted.named_parameters():
            if "lora_B" in path:
                weight.copy_(0.2 * torch.randn(weight.shape))
    adapted.save_pretrained(tmp_path / "adapter")
    config = read_json(tmp_path / "adapter" / "adapter_config.json")
    write_json(tmp_path / "adapter" / "adapter_config.json", config | {"base_model_name_or_path": f"{tmp_path}/theirs"})
    call("import", f"--from={tmp_path}/adapter", f"--workdir={tmp_path}/work")
    setup = setup_stage(resolve_recipe(None, tmp_path / "work"), "import", tmp_path / "work", with_data=False)
    params, _ = read_parent(setup.folder, setup.program, setup.contract)
    actual, theirs = logits_of(setup.recipe.model, params, tokens), theirs_of(adapted, tokens)
    worst = float(np.abs(actual - theirs).max())
    assert worst <= MOST < float(np.abs(theirs - before).max())
    FIGURES.append(f"| adapters by PEFT, imported | {worst:.1e} | | | |")
