"""The demonstration: its text has structure, its scorer finds it, its figures are what they claim to be."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import nsa_sel
from nsa_sel.demo import SHAPES, Cache, PooledKeys, Row, Settings, Shape, mass, output, run
from nsa_sel.demo.dense import candidates
from nsa_sel.demo.scorer import FIRST, LOCAL

CPU = torch.device("cpu")
SMALL = Shape("small", G=2, h=4, Dk=64, Dv=32, n=4, block_size=16, page_size=8)


def settings(**changes: object) -> Settings:
    values = {"contexts": (8192, 16384), "device": CPU, "dtype": torch.float32, "backend": "sdpa", "steps": 3}
    return Settings(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_the_scorer_keeps_far_more_of_the_dense_mass_than_chance(shape: Shape) -> None:
    for row in run(settings(shapes=(shape,))):
        assert (row.backend, row.reason, row.calls) == ("sdpa", "backend='sdpa'", 3)
        assert row.L <= shape.n * shape.block_size
        assert row.L > (shape.n - 1) * shape.block_size  # the last block may be in part
        assert row.max_err < 1e-4
        assert row.captured > 0.7
        assert row.captured > 2 * row.captured_random
        # Chance is a fraction of the context, plus what local structure the draw happens to meet.
        assert row.captured_random == pytest.approx(row.L / row.context, abs=0.12)


def test_on_white_noise_the_scorer_is_hardly_better_than_chance() -> None:
    (row,) = run(settings(contexts=(8192,), shapes=SHAPES[:1], signal=0.0))
    assert row.captured < 2 * row.captured_random
    assert row.captured < 0.3


def test_contexts_are_decoded_to_their_last_token_and_every_step_is_announced() -> None:
    heard: list[str] = []
    rows = list(run(settings(contexts=(300, 700), shapes=(SMALL,), steps=2), heard.append))
    assert [row.context for row in rows] == [300, 700]
    assert heard == ["small, 300 tokens"] * 4 + ["small, 700 tokens"] * 4
    again = list(run(settings(contexts=(300, 700), shapes=(SMALL,), steps=2)))
    assert [row.captured for row in again] == [row.captured for row in rows]  # of one seed
    (other, _) = run(settings(contexts=(300, 700), shapes=(SMALL,), steps=2, seed=1))
    assert other.captured != rows[0].captured


def test_a_call_that_stats_did_not_count_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def uncounted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **others: object) -> torch.Tensor:
        return torch.zeros(*q.shape[:-1], v.shape[-1])

    monkeypatch.setattr(nsa_sel, "selection_attention", uncounted)
    with pytest.raises(RuntimeError, match="expected 3 calls to be counted, got 0"):
        list(run(settings(contexts=(300,), shapes=(SMALL,))))


def test_the_error_is_the_oracle_s(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = nsa_sel.selection_attention

    def wrong(*tensors: torch.Tensor, **others: object) -> torch.Tensor:
        return genuine(*tensors, **others) + 0.5  # type: ignore[arg-type, operator]

    monkeypatch.setattr(nsa_sel, "selection_attention", wrong)
    (row,) = run(settings(contexts=(300,), shapes=(SMALL,)))
    assert row.max_err == pytest.approx(0.5, abs=1e-4)


def test_pages_hold_what_the_logical_cache_holds() -> None:
    cache = Cache(SMALL, 100, dtype=torch.float32, device=CPU, seed=3)
    new = torch.cat([cache.extend(37), cache.extend(1), cache.extend(0), cache.extend(62)], dim=2)
    assert torch.equal(new, cache.k)
    assert cache.block_table is not None
    assert cache.block_table[0].sort().values.tolist() == list(range(13))
    assert cache.block_table[0].tolist() != list(range(13))  # shuffled
    for stored, logical in zip(cache.stored, cache.dense, strict=True):
        gathered = stored[cache.block_table[0].long()].transpose(0, 1).flatten(1, 2)[:, :100]
        assert torch.equal(gathered, logical[0])
    with pytest.raises(ValueError, match="tokens: expected 0 to 0, got 1"):
        cache.extend(1)


def test_a_topic_s_token_stands_out_by_the_signal() -> None:
    cache = Cache(SHAPES[0], 4096, dtype=torch.float32, device=CPU, seed=0, signal=7.0)
    cache.extend(4096)
    topic = int(cache.topic[1000])
    wanted = cache.topic == topic
    query = cache._gain * cache._directions[:, topic]
    logits = (cache.k[0] * query[:, None]).sum(dim=-1) * SHAPES[0].Dk ** -0.5  # [G, 4096]
    lead = logits[:, wanted].mean() - logits[:, ~wanted].mean()
    assert lead == pytest.approx(7.0, abs=0.5)


def test_pooled_keys_grown_token_by_token_choose_what_their_definition_says() -> None:
    random = torch.Generator().manual_seed(5)
    keys, block_size, n = torch.randn(1, 2, 205, 8, generator=random), 16, 6
    q = torch.randn(1, 1, 2, 4, 8, generator=random)
    pooled = PooledKeys(keys, block_size)
    for start, end in ((0, 100), (100, 101), (101, 101), (101, 205)):
        pooled.append(keys[:, :, start:end])
    ids = pooled.choose(q, n)
    assert ids.dtype == torch.int32
    for group in range(2):
        means = torch.stack([part.mean(dim=0) for part in keys[0, group].split(block_size)])  # the last holds 13 tokens
        scores = means @ q[0, 0, group].sum(dim=0)
        forced = {0, 11, 12}
        rest = [block for block in scores.argsort(descending=True).tolist() if block not in forced]
        assert set(ids[0, 0, group].tolist()) == forced | set(rest[: n - len(forced)])


def test_a_context_of_few_blocks_leaves_slots_unused() -> None:
    keys = torch.randn(1, 1, 40, 8)
    pooled = PooledKeys(keys, 16)
    pooled.append(keys)
    ids = pooled.choose(torch.randn(1, 1, 1, 2, 8), 8)[0, 0, 0].tolist()
    assert sorted(ids) == [-1] * 5 + [0, 1, 2]
    assert FIRST + LOCAL <= 4  # room is left for the scorer at the smallest n used here


def test_random_blocks_hold_as_many_tokens_as_the_selection() -> None:
    selected = mass.selected_tokens(torch.tensor([[[[0, 12, 3, -1], [1, 2, 5, 7]]]]), 16, 205)
    assert selected.sum(dim=1).tolist() == [16 + 13 + 16, 64]
    assert selected[0].nonzero()[:, 0].tolist() == [*range(16), *range(48, 64), *range(192, 205)]
    drawn = set()
    for seed in range(20):
        other = mass.random_tokens(selected, 16, torch.Generator().manual_seed(seed))
        assert other.sum(dim=1).tolist() == [45, 64]
        blocks = [int(part.sum()) for part in other[1].split(16)]
        assert sum(0 < tokens < 16 for tokens in blocks[:-1]) <= 1  # whole blocks, but for the one drawn last
        drawn.add(tuple(blocks))
    assert len(drawn) > 10


def test_captured_mass_of_a_case_done_by_hand() -> None:
    q = torch.zeros(1, 1, 1, 2, 4)
    q[0, 0, 0, 1, 0] = 2 * math.log(3)  # scaled by 1/2: a logit of log 3 on the first token
    k = torch.zeros(1, 1, 4, 4)
    k[0, 0, 0, 0] = 1
    probabilities = mass.dense_probabilities(q, k)
    expected = torch.tensor([[[0.25] * 4, [0.5, 1 / 6, 1 / 6, 1 / 6]]])
    torch.testing.assert_close(probabilities, expected)
    first = torch.tensor([[True, False, False, False]])
    assert mass.captured(probabilities, first) == pytest.approx((0.25 + 0.5) / 2)
    assert mass.captured(probabilities, torch.ones_like(first)) == pytest.approx(1)


@pytest.mark.parametrize("way", sorted(candidates(torch.device("cuda"))))
def test_every_way_of_dense_attention_equals_a_selection_of_everything(way: str) -> None:
    random = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 4, 24, generator=random)
    k, v = torch.randn(1, 2, 50, 24, generator=random), torch.randn(1, 2, 50, 16, generator=random)
    everything = torch.tensor([[[[[0, 50]]] * 2]])
    expected = nsa_sel.selection_attention(q[:, None], k, v, everything, backend="sdpa")
    assert isinstance(expected, torch.Tensor)
    torch.testing.assert_close(candidates(torch.device("cuda"))[way](q, k, v), expected[:, 0])


def row(**changes: object) -> Row:
    values = dict(
        shape="small", context=4096, device="cpu", dtype="float32", backend="sdpa", reason="tensors on cpu", calls=3,
        L=64, score_ms=0.1, select_ms=1.0, dense_ms=12.0, dense_how="sdpa", speedup=12.0, speedup_with_scoring=10.9,
        max_err=1e-6, captured=0.9, captured_random=0.1,
    )  # fmt: skip
    return Row(**{**values, **changes})  # type: ignore[arg-type]


def test_the_picture_is_a_png_and_a_failed_one_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(), row(context=8192), row(shape="other", context=700)]
    target = tmp_path / "demo.png"
    output.draw(rows, target)
    picture = target.read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    assert list(tmp_path.iterdir()) == [target]

    def half(self: object, path: Path, **others: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    with pytest.raises(OSError, match="disk full"):
        output.draw(rows, target)
    assert target.read_bytes() == picture
    assert list(tmp_path.iterdir()) == [target]
