"""EleutherAI's lm-evaluation-harness on a checkpoint of a workdir: the model "jaxstages".

    python -m jaxstages.cli.lm_eval run --model jaxstages --model_args workdir=runs/demo,stage=pretrain --tasks piqa

runs lm-eval's own command line, with this model registered. From Python, import this module, and then
`lm_eval.simple_evaluate(model="jaxstages", model_args="workdir=runs/demo")`.

Texts are tokenized as the `hf` model of lm-eval tokenizes them with an exported checkpoint, so that both give the same
scores: a text begins with the tokens that began a document in training. Control tokens that a text spells remain text.
"""

from collections.abc import Callable, Sequence
from typing import Any

import lm_eval.models  # noqa: F401  # pyright: ignore[reportMissingImports]  # registers lm-eval's own models
import numpy as np
from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]  # an extra
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from jaxstages.cli.resolve import resolve_recipe
from jaxstages.cli.select_checkpoint import choose, last_finished
from jaxstages.data.packing import lay_out
from jaxstages.data.tasks import Example
from jaxstages.generation.choices import make_row_scores
from jaxstages.generation.evaluate import make_texts
from jaxstages.generation.sampling import Sampling
from jaxstages.runtime.files import parse_path
from jaxstages.training.handoff import read_parent
from jaxstages.training.setup import setup_stage

MAX_NEW_TOKENS = 256
"""Length of an answer for tasks that do not set it, as in lm-eval."""

Scored = tuple[Any, list[int], list[int]]
"""A request of lm-eval's: the texts, the ids of the context, and those of the continuation, which is scored."""


@register_model("jaxstages")
class JaxstagesLM(TemplateLM):
    """A checkpoint as a model of lm-eval."""

    def __init__(self, workdir: str, stage: str | None = None, step: int | None = None, **_ignored: Any) -> None:
        """
        Args:
            workdir: folder of a run whose recipe has no parts of its own.
            stage: by default the last finished one.
            step: by default the best one.
            _ignored: what lm-eval passes to every model: device and batch size. The batch size is the recipe's
                `evaluation.batch_size`.
        """
        super().__init__()
        folder = parse_path(workdir, "workdir")
        recipe = resolve_recipe(None, folder)
        name = stage or last_finished(recipe, folder)
        chosen = choose(recipe, folder / name, step)
        setup = setup_stage(recipe, name, folder, with_data=False)
        self._params, _ = read_parent(setup.folder, setup.program, setup.contract, chosen)
        self._text_model, self._batch_size = setup.text_model, setup.config.evaluation.batch_size
        self._row_scores = make_row_scores(self._text_model, self._batch_size, setup.config.loop.loss_tile)

    @property
    def eot_token_id(self) -> int:
        return self._text_model.tokenizer.specials.end_of_text

    @property
    def prefix_token_id(self) -> int:
        """Token that precedes a text without context."""
        return next(iter(self._text_model.tokenizer.begin), self.eot_token_id)

    @property
    def max_length(self) -> int:
        return self._text_model.context

    @property
    def tokenizer_name(self) -> str:
        return self._text_model.tokenizer.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_ignored: Any) -> list[int]:
        tokenizer = self._text_model.tokenizer
        begin = () if add_special_tokens is False else tokenizer.begin
        return [*begin, *tokenizer.encode(string).tolist()]

    def _loglikelihood_tokens(self, requests: Sequence[Scored], **_ignored: Any) -> list[tuple[float, bool]]:
        """Score continuations. A context that is too long loses its beginning."""
        if not requests:
            return []
        rows = np.stack([self._row(context, continuation) for _, context, continuation in requests])
        scores = self._row_scores(self._params, rows)
        return list(zip(scores.log_likelihoods.tolist(), scores.greedy.tolist(), strict=True))

    def _row(self, context: list[int], continuation: list[int]) -> np.ndarray:
        if not 0 < len(continuation) <= self.max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens does not fit the model's context of {self.max_length}; "
                "leave the task out"
            )
        ids = [*context, *continuation][-(self.max_length + 1) :]
        weights = np.zeros(len(ids), np.float32)
        weights[-len(continuation) :] = 1.0
        return lay_out([Example(np.asarray(ids, np.int32), weights)], self.max_length)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts: windows of the model's context, in which each token is scored once."""
        windows: list[Scored] = []
        owners = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        sums = np.zeros(len(requests))
        np.add.at(sums, owners, [score for score, _ in self._loglikelihood_tokens(windows)])
        return sums.tolist()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate answers. Requests with the same settings are one batch job."""
        groups: dict[tuple[Sampling, tuple[str, ...]], list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(self._settings(request.args[1]), []).append(number)

        answers = [""] * len(requests)
        for (sampling, stops), numbers in groups.items():
            answer = self._make_answer(sampling, stops)
            for number, text in zip(numbers, answer([requests[each].args[0] for each in numbers]), strict=True):
                answers[number] = text
        return answers

    def _make_answer(self, sampling: Sampling, stops: tuple[str, ...]) -> Callable[[list[str]], list[str]]:
        texts = make_texts(self._text_model, sampling, self._batch_size, stops=stops)
        room = self.max_length - sampling.max_new_tokens

        def answer(prompts: list[str]) -> list[str]:
            ids = [self.tok_encode(prompt)[-room:] for prompt in prompts]
            return [stream.text for batch in texts(self._params, ids, 0) for stream in batch]

        return answer

    def _settings(self, arguments: dict[str, Any]) -> tuple[Sampling, tuple[str, ...]]:
        """Return the sampling parameters and stop strings of a request. Without `do_sample` it is greedy."""
        until = arguments.get("until") or []
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        length = next((arguments[name] for name in names if arguments.get(name)), MAX_NEW_TOKENS)
        if length >= self.max_length:
            raise ValueError(
                f"max_gen_toks={length} must be less than the model's context, {self.max_length}; set it with "
                "--gen_kwargs max_gen_toks=N"
            )
        sampling = Sampling(max_new_tokens=length, stop=self._text_model.tokenizer.stops)
        temperature = float(arguments.get("temperature", 0.0))
        if arguments.get("do_sample", temperature > 0) and temperature > 0:
            top_k, top_p = int(arguments.get("top_k", 0)), float(arguments.get("top_p", 1.0))
            sampling = sampling._replace(temperature=temperature, top_k=top_k, top_p=top_p)
        return sampling, tuple([until] if isinstance(until, str) else until)


if __name__ == "__main__":
    cli_evaluate()
