"""Load on `jaxstages serve`: clients with mixed prompt lengths, beside batched `generate` of transformers.

    python benchmarks/serve_load.py --workdir=runs/demo --stage=instruct --clients=1,8,32 --seconds=60
    python benchmarks/serve_load.py --workdir=runs/demo --stage=instruct --clients=8 --transformers=exported --rounds=3

Answers are greedy and have `--tokens` tokens or fewer. Prints JSON: requests, failures, tokens per second, time to the
first token and between tokens (p50, p99, in ms), growth of the server's memory, and compilations after the warm-up.
With `--transformers`, an exported folder, the same prompts are also answered by `model.generate` in batches of as many
prompts as there are clients, by turns with the server (A B A B), and ratios are printed.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import openai

HERE = Path(__file__).resolve().parent
WORDS = (
    "Anna lives in Lisbon and her friend Karl works as a doctor",
    "who likes the red house near the old river",
)


def prompts(count: int, longest: int) -> list[str]:
    """Prompts of 3 to `longest` words."""
    draw = random.Random(0)
    return [" ".join(draw.choices(" ".join(WORDS).split(), k=draw.randint(3, longest))) for _ in range(count)]


def start(arguments: argparse.Namespace) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "jaxstages", "serve", f"--workdir={arguments.workdir}", "--port=0"]
    command += [
        f"--stage={arguments.stage}",
        f"--slots={arguments.slots}",
        f"--drafts={arguments.drafts}",
        "--queue=256",
    ]
    environment = {**os.environ, "JAX_LOG_COMPILES": "1"}
    log = arguments.log.open("w")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.search(r"(http://\S+?) has a page", line):
            return process, match[1]
    raise SystemExit(f"the server did not start; see {arguments.log}")


def resident_megabytes(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    match = re.search(r"VmRSS:\s+(\d+)", status)
    assert match is not None
    return int(match[1]) / 1000


def compilations(log: Path) -> int:
    return log.read_text(errors="replace").count("Finished XLA compilation")


async def load(address: str, arguments: argparse.Namespace, clients: int, seconds: float) -> dict[str, object]:
    """Send requests from `clients` clients, one after the other each, for a time."""
    client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600)
    texts, end = prompts(200, arguments.longest), time.monotonic() + seconds
    first, between, tokens, failures = [], [], 0, []

    async def answer(number: int) -> None:
        nonlocal tokens
        count = number
        while time.monotonic() < end:
            count += clients
            sent = last = time.monotonic()
            try:
                stream = await client.completions.create(
                    model=arguments.stage,
                    prompt=texts[count % len(texts)],
                    max_tokens=arguments.tokens,
                    temperature=0,
                    stream=True,
                    stream_options={"include_usage": True},
                )
                is_first = True
                async for chunk in stream:
                    now = time.monotonic()
                    if chunk.usage:
                        tokens += chunk.usage.completion_tokens
                    elif is_first:
                        first.append(now - sent)
                        is_first = False
                    else:
                        between.append(now - last)
                    last = now
            except openai.APIError as error:
                failures.append(str(error))

    started = time.monotonic()
    async with client:
        await asyncio.gather(*(answer(number) for number in range(clients)))
    took = time.monotonic() - started
    return {
        "clients": clients,
        "requests": len(first),
        "failures": failures[:3] or 0,
        "tokens_per_second": round(tokens / took, 1),
        "first_token_ms": percentiles(first),
        "between_chunks_ms": percentiles(between),
    }


def percentiles(seconds: list[float]) -> list[float]:
    """p50 and p99 in ms."""
    cuts = statistics.quantiles(seconds, n=100) if len(seconds) > 1 else [0.0] * 99
    return [round(1000 * cuts[49], 1), round(1000 * cuts[98], 1)]


class Transformers:
    """Greedy `generate` of an exported folder, in batches."""

    def __init__(self, folder: str) -> None:
        import torch
        import transformers

        torch.set_num_threads(os.cpu_count() or 1)
        self.torch = torch
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token

    def tokens_per_second(self, texts: list[str], batch: int, new_tokens: int, seconds: float, chat: bool) -> float:
        end, tokens, start, number = time.monotonic() + seconds, 0, time.monotonic(), 0
        while time.monotonic() < end:
            chosen = [texts[(number + i) % len(texts)] for i in range(batch)]
            number += batch
            if chat:
                chosen = [
                    self.tokenizer.apply_chat_template(
                        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
                    )
                    for text in chosen
                ]
            inputs = self.tokenizer(chosen, return_tensors="pt", padding=True, add_special_tokens=not chat)
            inputs.pop("token_type_ids", None)
            with self.torch.no_grad():
                out = self.model.generate(
                    **inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=self.tokenizer.pad_token_id
                )
            new = out[:, inputs["input_ids"].shape[1] :]
            stops = (
                {self.model.generation_config.eos_token_id}
                if isinstance(self.model.generation_config.eos_token_id, int)
                else {*(self.model.generation_config.eos_token_id or [])}
            )
            for row in new.tolist():
                tokens += next((i for i, token in enumerate(row) if token in stops), len(row))
        return tokens / (time.monotonic() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--stage", default="instruct")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--longest", type=int, default=60, help="words of the longest prompt")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--drafts", type=int, default=8)
    parser.add_argument("--transformers", default="", help="exported folder of the same checkpoint")
    parser.add_argument("--chat", action="store_true", help="the stage is a chat: transformers takes its template")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--log", type=Path, default=Path("serve.log"))
    arguments = parser.parse_args()

    process, address = start(arguments)
    try:
        peer = Transformers(arguments.transformers) if arguments.transformers else None
        texts = prompts(200, arguments.longest)
        for clients in map(int, arguments.clients.split(",")):
            asyncio.run(load(address, arguments, clients, min(arguments.seconds, 5)))  # the client's own warm-up
            compiled, memory, ratios = compilations(arguments.log), resident_megabytes(process.pid), []
            for _ in range(arguments.rounds):
                result = asyncio.run(load(address, arguments, clients, arguments.seconds))
                if peer is not None:
                    theirs = peer.tokens_per_second(texts, clients, arguments.tokens, arguments.seconds, arguments.chat)
                    ours = float(str(result["tokens_per_second"]))
                    ratios.append(round(ours / theirs, 2))
                    result["transformers_tokens_per_second"] = round(theirs, 1)
                result["memory_growth_mb"] = round(resident_megabytes(process.pid) - memory, 1)
                result["compilations"] = compilations(arguments.log) - compiled
                print(json.dumps(result), flush=True)
            if ratios:
                print(json.dumps({"clients": clients, "ratios": ratios, "mean": round(statistics.mean(ratios), 2)}))
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
