"""The workloads: what a row trains, on what, and how many floating-point operations a token costs."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """A GPT-2 without biases: learned positions, tied head, LayerNorm, exact GELU, no dropout; AdamW with clipping."""

    name: str
    layers: int
    heads: int
    width: int
    context: int
    batch: int
    vocab: int
    steps: int
    """Steps under the clock."""
    warmup: int = 3
    """Steps before the clock, the first of which compiles."""
    dtype: str = "float32"
    """Of activations and matmuls; parameters and optimizer are float32."""
    device: str = "cpu"
    norm_eps: float = 1e-5
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.1
    """Of matrices and embeddings, not of the norms' scales."""
    clip_norm: float = 1.0
    rank: int = 0
    """Of LoRA on attention's output and the feed-forward, all else frozen; 0 trains all. GPT-2's query, key and value
    are one map to the peers, which would give the three one `A`: they are left out."""

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.context

    @property
    def tolerance(self) -> float:
        """Relative difference that the first batch's loss and gradient norm may have."""
        return 1e-5 if self.dtype == "float32" else 1e-2


def flops_per_token(row: Row, causal: bool = True) -> float:
    """Floating-point operations to train on one token: 6 a matrix parameter, tied head included, and attention; 4 a
    parameter that is frozen beside adapters.

    Norms, softmax and optimizer are left out. `causal` counts the half of the attention square that is needed; papers
    that count the whole of it (PaLM, nanoGPT) are 3 to 13 % higher."""
    matrices = 12 * row.layers * row.width**2 + row.width * row.vocab
    adapters = row.layers * row.rank * 12 * row.width
    return (
        (4 if row.rank else 6) * matrices + 6 * adapters + (6 if causal else 12) * row.layers * row.context * row.width
    )


def matmul_shapes(row: Row) -> list[tuple[int, int, int]]:
    """The (m, k, n) of the forward's matrix products: attention's input and output, feed-forward up and down, head."""
    m, d = row.tokens_per_step, row.width
    return [(m, d, 3 * d), (m, d, d), (m, d, 4 * d), (m, 4 * d, d), (m, d, row.vocab)]


ROWS = {
    row.name: row
    for row in (
        Row(name="C1", layers=4, heads=4, width=128, context=64, batch=12, vocab=65, steps=300),
        Row(name="C2", layers=6, heads=6, width=384, context=256, batch=16, vocab=65, steps=20),
        Row(name="C3", layers=12, heads=12, width=768, context=256, batch=4, vocab=50304, steps=5, warmup=2),
        Row(name="C4", layers=8, heads=6, width=384, context=512, batch=8, vocab=16384, steps=10),
        Row(name="C5", layers=12, heads=12, width=768, context=256, batch=4, vocab=50304, steps=5, warmup=2, rank=16),
        Row(
            name="G1", layers=12, heads=12, width=768, context=1024, batch=64, vocab=50304,
            steps=50, warmup=5, dtype="bfloat16", device="gpu",
        ),
        Row(
            name="G2", layers=24, heads=16, width=1024, context=1024, batch=32, vocab=50304,
            steps=50, warmup=5, dtype="bfloat16", device="gpu",
        ),
        Row(
            name="G3", layers=48, heads=25, width=1600, context=1024, batch=16, vocab=50304,
            steps=50, warmup=5, dtype="bfloat16", device="gpu",
        ),
        Row(
            name="G5", layers=36, heads=32, width=4096, context=2048, batch=8, vocab=128256,
            steps=20, warmup=3, dtype="bfloat16", device="gpu", rank=16,
        ),
    )
}  # fmt: skip
