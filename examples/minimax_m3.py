"""MiniMax-M3 of transformers generates text token by token: eager, sdpa and nsa_sel side by side.

The model has random weights and a few small layers, so the text is nonsense, but the code is the model's own: its
indexer selects blocks, its cache grows. The three attention functions must choose the same tokens at every context;
time per token against context goes to a table and a picture. `make example` runs it.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import MiniMaxM3VLForCausalLM, MiniMaxM3VLTextConfig

import nsa_sel
from nsa_sel.integrations.transformers import register

IMPLEMENTATIONS = ("eager", "sdpa", "nsa_sel")
PROMPT = "Sparse attention reads what it selected and nothing else. "


def tiny_model(attn_implementation: str, layers: tuple[str, ...] | None = None, **sizes: Any) -> MiniMaxM3VLForCausalLM:
    """Return MiniMax-M3 with random weights (always the same ones), its first layer dense, the others selecting."""
    layers = layers or ("full_attention", *["minimax_m3_sparse"] * 3)
    config = MiniMaxM3VLTextConfig(
        **{
            "vocab_size": 256,  # bytes
            "hidden_size": 128,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "rotary_dim": 32,
            "index_n_heads": 2,
            "index_head_dim": 32,
            "index_block_size": 64,
            "index_topk_blocks": 8,
            "dense_intermediate_size": 256,
            "intermediate_size": 64,
            "shared_intermediate_size": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 65536,
            "initializer_range": 0.2,
            **sizes,
        },
        num_hidden_layers=len(layers),
        layer_types=list(layers),
        mlp_layer_types=["dense"] + ["sparse"] * (len(layers) - 1),
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    config._attn_implementation = attn_implementation
    torch.manual_seed(0)
    return MiniMaxM3VLForCausalLM(config).eval()


@torch.inference_mode()
def extend(model: MiniMaxM3VLForCausalLM, cache: Any, tokens: torch.Tensor, chunk: int = 256) -> Any:
    """Read tokens [1, T] into the cache, a chunk at a time; return it."""
    for part in tokens.split(chunk, dim=1):
        cache = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    return cache


@torch.inference_mode()
def generate(model: MiniMaxM3VLForCausalLM, cache: Any, token: torch.Tensor, steps: int) -> tuple[list[int], float]:
    """Choose `steps` tokens greedily after `token` [1, 1]: the tokens, and the median seconds of one."""
    tokens, seconds = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        logits = model(token, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)
        tokens.append(int(token))  # waits for the device
        seconds.append(time.perf_counter() - begin)
    return tokens, statistics.median(seconds)


def run(contexts: list[int], steps: int, device: str = "cpu") -> list[dict[str, Any]]:
    """Generate at each context with each implementation: tokens and seconds per token.

    Raises:
        RuntimeError: two implementations chose different tokens.
    """
    register()
    model = tiny_model("sdpa").to(device)
    prompt = torch.tensor([list(PROMPT.encode())], device=device)
    prompt = prompt.repeat(1, max(contexts) // prompt.shape[1] + 1)[:, : max(contexts)]
    cache, read, rows = None, 0, []
    for context in contexts:
        model.set_attn_implementation("sdpa")
        cache = extend(model, cache, prompt[:, read : context - 1])  # the last token of the prompt starts to generate
        read = context - 1
        chosen = {}
        for name in IMPLEMENTATIONS:
            model.set_attn_implementation(name)
            chosen[name], seconds = generate(model, copy.deepcopy(cache), prompt[:, read : read + 1], steps)
            rows.append({"context": context, "attention": name, "seconds": seconds, "tokens": chosen[name]})
        if len({tuple(tokens) for tokens in chosen.values()}) != 1:
            raise RuntimeError(f"context {context}: expected the same tokens, got {chosen}")
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw time per token against context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name in IMPLEMENTATIONS:
        mine = [row for row in rows if row["attention"] == name]
        axes.plot([row["context"] for row in mine], [row["seconds"] * 1e3 for row in mine], marker="o", label=name)
    axes.set_xscale("log", base=2)
    contexts = sorted({row["context"] for row in rows})
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("context (tokens in the cache)")
    axes.set_ylabel("time per token (ms)")
    axes.set_title("MiniMax-M3 with random weights, four layers: the same tokens, by three attention functions")
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Parse the command line, run, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--steps", type=int, default=16, help="tokens to generate at each context")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("example_out"))
    arguments = parser.parse_args()

    rows = run(sorted(arguments.contexts), arguments.steps, arguments.device)
    print(f"{'context':>8} " + " ".join(f"{name + ' ms':>11}" for name in IMPLEMENTATIONS) + "   tokens, all three")
    for begin in range(0, len(rows), len(IMPLEMENTATIONS)):
        group = rows[begin : begin + len(IMPLEMENTATIONS)]
        times = " ".join(f"{row['seconds'] * 1e3:11.2f}" for row in group)
        print(f"{group[0]['context']:8,} {times}   {bytes(group[0]['tokens'])!r}")
    picture = arguments.out / "minimax_m3.png"
    draw(rows, picture)
    print(f"calls of selection_attention, by backend and reason: {nsa_sel.stats()}")
    print(f"picture: {picture}")


if __name__ == "__main__":
    main()
