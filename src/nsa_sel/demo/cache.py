"""A KV cache with structure in it, and queries that look for that structure.

On white noise every block is worth as much as any other and a selection captures L / context of the softmax mass,
however it is chosen. So the synthetic text is made of *runs*: 32 to 160 consecutive tokens about one *topic*, and
topics come back: RECURRENCES runs each, on average, over the longest context. Per group a topic is a random direction
`c` of length sqrt(Dk), and

    key   = a * c(topic of the token)   + N(0, 1)
    query = a * c(topic it looks for)   + N(0, 1), the noise drawn for each of the h heads of the group
    value = N(0, 1)

with a = sqrt(SIGNAL / sqrt(Dk)), so that a token of the wanted topic has a scaled logit SIGNAL above the others.
"""

from __future__ import annotations

import math

import torch

from nsa_sel.demo.shapes import Shape

SIGNAL = 7.0  # in units of the scaled logit, whose noise has a standard deviation of about 1.4
RUN_TOKENS = (32, 160)  # shortest and longest run
RECURRENCES = 6
CHUNK = 8192  # tokens written at once while the context is filled


class Cache:
    """K and V of one request as a decode sees them, filled step by step up to `capacity` tokens.

    Args:
        shape: the attention shape; with a page_size, K and V live in shuffled pages behind a block_table.
        capacity: the longest context in tokens.
        signal: SIGNAL, or 0 for white noise.
        seed: of the text; the same on every device.
    """

    def __init__(
        self,
        shape: Shape,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        seed: int,
        signal: float = SIGNAL,
    ) -> None:
        self.shape, self.capacity, self.dtype, self.device = shape, capacity, dtype, torch.device(device)
        self.length = 0  # tokens in the cache
        self._random = torch.Generator().manual_seed(seed)
        self._gain = math.sqrt(signal / math.sqrt(shape.Dk))

        shortest, longest = RUN_TOKENS
        runs = capacity // shortest + 1  # enough, even if all of them are short
        lengths = torch.randint(shortest, longest + 1, (runs,), generator=self._random)
        topics = max(2, capacity * 2 // ((shortest + longest) * RECURRENCES))
        run_topic = torch.randint(topics, (runs,), generator=self._random)
        self.topic = run_topic.repeat_interleave(lengths)[:capacity]  # [capacity], of each token
        directions = torch.randn(shape.G, topics, shape.Dk, generator=self._random)
        self._directions = torch.nn.functional.normalize(directions, dim=-1) * math.sqrt(shape.Dk)

        # Logical order, [1, G, capacity, D]: what dense attention reads and, where nothing is paged, the cache itself.
        self.k = torch.zeros(1, shape.G, capacity, shape.Dk, dtype=dtype, device=self.device)
        self.v = torch.zeros(1, shape.G, capacity, shape.Dv, dtype=dtype, device=self.device)
        self.block_table: torch.Tensor | None = None
        if shape.page_size is not None:
            pages = -(-capacity // shape.page_size)
            self.block_table = torch.randperm(pages, generator=self._random).int()[None].to(self.device)
            self.k_pages = torch.zeros(pages, shape.G, shape.page_size, shape.Dk, dtype=dtype, device=self.device)
            self.v_pages = torch.zeros(pages, shape.G, shape.page_size, shape.Dv, dtype=dtype, device=self.device)

    def extend(self, tokens: int) -> torch.Tensor:
        """Append `tokens` tokens and return their keys [1, G, tokens, Dk].

        Raises:
            ValueError: the cache has no room for them.
        """
        if not 0 <= tokens <= self.capacity - self.length:
            raise ValueError(f"tokens: expected 0 to {self.capacity - self.length}, got {tokens}")
        start = self.length
        for begin in range(start, start + tokens, CHUNK):
            self._write(begin, min(begin + CHUNK, start + tokens))
        self.length += tokens
        return self.k[:, :, start : self.length]

    def _write(self, begin: int, end: int) -> None:
        shape = self.shape
        key = self._gain * self._directions[:, self.topic[begin:end]]
        key = key + torch.randn(key.shape, generator=self._random)
        value = torch.randn(shape.G, end - begin, shape.Dv, generator=self._random)
        self.k[0, :, begin:end] = key.to(self.dtype)
        self.v[0, :, begin:end] = value.to(self.dtype)
        if self.block_table is not None and shape.page_size is not None:
            position = torch.arange(begin, end, device=self.device)
            page, slot = self.block_table[0][position // shape.page_size], position % shape.page_size
            self.k_pages[page, :, slot] = self.k[0, :, begin:end].transpose(0, 1)
            self.v_pages[page, :, slot] = self.v[0, :, begin:end].transpose(0, 1)

    def query(self) -> torch.Tensor:
        """Return the next query [1, 1, G, h, Dk]: each group looks for the topic of a token drawn from the context."""
        shape = self.shape
        token = torch.randint(self.length, (shape.G,), generator=self._random)
        wanted = self._directions[torch.arange(shape.G), self.topic[token]]  # [G, Dk]
        noise = torch.randn(shape.G, shape.h, shape.Dk, generator=self._random)
        return (self._gain * wanted[:, None] + noise)[None, None].to(self.device, self.dtype)

    @property
    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of every token so far, [1, G, length, D]."""
        return self.k[:, :, : self.length], self.v[:, :, : self.length]

    @property
    def stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as `selection_attention` takes them: pages where there is a block_table."""
        return (self.k, self.v) if self.block_table is None else (self.k_pages, self.v_pages)
