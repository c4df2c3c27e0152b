"""KV cache of CpuDecoder in blocks of a few tokens, as in vLLM (Kwon et al., PagedAttention, SOSP
2023).

Each row has a list of blocks, so it takes the memory of its own tokens, and rows join and leave
without a copy. Full blocks of a prompt are kept for later prompts that begin alike. Price: the last
block of a row is half empty on average, and attention without the C kernels copies keys and values.
"""

import hashlib
import weakref
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch

from .multi_lora import LoadedAdapter

BLOCK_TOKENS = 16


class Block:
    """Keys and values of `BLOCK_TOKENS` tokens: `kv` (layers, 2, kv_heads, BLOCK_TOKENS, head_dim),
    zeros where no token is yet."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.kv = torch.zeros(*shape)
        self.layers = self.kv.unbind()
        self.address = self.kv.data_ptr()


class KVCache:
    """Keys and values of a batch: row i has `lengths[i]` tokens in `blocks[i]`.

    Args:
        shape: of a block's `kv`.
        padding: number of columns at the start of each row that are no tokens.
        prefixes: full blocks with which each row begins; they are shared, never written.
    """

    def __init__(
        self, shape: Sequence[int], padding: Sequence[int], prefixes: Sequence[Sequence[Block]] = ()
    ) -> None:
        self.shape = shape
        self.padding = list(padding)  # columns still to come
        self.blocks = [list(prefix) for prefix in prefixes] or [[] for _ in padding]
        self.lengths = [BLOCK_TOKENS * len(blocks) for blocks in self.blocks]
        self._addresses: torch.Tensor | None = None

    def extend(self, columns: int) -> list[int]:
        """Add that many columns to each row. Returns how many of them are padding, for each row."""
        skipped = [min(padding, columns) for padding in self.padding]
        for row, skip in enumerate(skipped):
            self.padding[row] -= skip
            self.lengths[row] += columns - skip
            while self.lengths[row] > BLOCK_TOKENS * len(self.blocks[row]):
                self.blocks[row].append(Block(self.shape))
                self._addresses = None
        return skipped

    def write(self, new: torch.Tensor, skipped: Sequence[int]) -> None:
        """Write keys and values of the columns that `extend` added, (layers, 2, kv_heads, rows,
        columns, head_dim)."""
        columns = new.shape[4]
        for row, skip in enumerate(skipped):
            column = skip
            while column < columns:
                block, at = divmod(self.lengths[row] - columns + column, BLOCK_TOKENS)
                count = min(BLOCK_TOKENS - at, columns - column)
                self.blocks[row][block].kv[:, :, :, at : at + count] = new[:, :, :, row, column : column + count]
                column += count

    def addresses(self) -> torch.Tensor:
        """Return where the blocks of each row are in memory, (rows, most blocks of a row)."""
        if self._addresses is None:
            width = max(map(len, self.blocks))
            table = [[block.address for block in blocks] + [0] * (width - len(blocks)) for blocks in self.blocks]
            self._addresses = torch.tensor(table)
        return self._addresses

    def append_rows(self, other: "KVCache") -> None:
        """Add the rows of another cache after the present ones."""
        self.blocks += other.blocks
        self.lengths += other.lengths
        self.padding += other.padding
        self._addresses = None

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Make old row `rows[i]` row i, and drop the others."""
        self.blocks = [self.blocks[row] for row in rows]
        self.lengths = [self.lengths[row] for row in rows]
        self.padding = [self.padding[row] for row in rows]
        self._addresses = None

    def fork(self, rows: Sequence[int]) -> "KVCache":
        """Return a cache that goes on from rows, which may repeat; this one stays as it is. Full
        blocks are shared."""
        fork = KVCache(self.shape, [self.padding[row] for row in rows])
        fork.lengths = [self.lengths[row] for row in rows]
        fork.blocks = [self._copy_blocks(row) for row in rows]
        return fork

    def _copy_blocks(self, row: int) -> list[Block]:
        blocks = list(self.blocks[row])
        if self.lengths[row] % BLOCK_TOKENS:
            last = Block(self.shape)
            last.kv.copy_(blocks[-1].kv)
            blocks[-1] = last
        return blocks


# The adapter, by identity, and a hash of all tokens up to the end of the block.
_BlockKey = tuple["weakref.ref[LoadedAdapter] | None", bytes]


class PrefixCache:
    """Full blocks of earlier prompts, of `max_tokens` tokens at most: those unused for longest are
    dropped.

    Blocks belong to one version of an adapter: one that is loaded again shares none with the old.
    """

    def __init__(self, max_tokens: int = 0) -> None:
        self.max_tokens = max_tokens
        self._blocks: OrderedDict[_BlockKey, Block] = OrderedDict()

    def find(self, lora: LoadedAdapter | None, prompt_ids: Sequence[int]) -> list[Block]:
        """Return the blocks with which a prompt begins. Its last token is in none of them, as its
        logits are needed."""
        keys: list[_BlockKey] = []
        for key in _block_keys(lora, prompt_ids[:-1]):
            if key not in self._blocks:
                break
            keys.append(key)
        self._mark_used(keys)
        return [self._blocks[key] for key in keys]

    def add(self, lora: LoadedAdapter | None, prompt_ids: Sequence[int], blocks: Sequence[Block]) -> None:
        """Keep the full blocks of a prompt; `blocks` are those of its row in a cache."""
        if not self.max_tokens:
            return
        keys = list(_block_keys(lora, prompt_ids))
        for key, block in zip(keys, blocks, strict=False):
            self._blocks.setdefault(key, block)
        self._mark_used(keys)
        while len(self._blocks) * BLOCK_TOKENS > self.max_tokens:
            self._blocks.popitem(last=False)

    def _mark_used(self, keys: Sequence[_BlockKey]) -> None:
        for key in reversed(keys):  # the first block last: without it the others are of no use
            self._blocks.move_to_end(key)


def _block_keys(lora: LoadedAdapter | None, token_ids: Sequence[int]) -> Iterator[_BlockKey]:
    """Yield the key of each full block of a prompt."""
    adapter, digest = None if lora is None else weakref.ref(lora), b""
    for end in range(BLOCK_TOKENS, len(token_ids) + 1, BLOCK_TOKENS):
        tokens = array("q", token_ids[end - BLOCK_TOKENS : end]).tobytes()
        digest = hashlib.blake2b(digest + tokens, digest_size=16).digest()
        yield adapter, digest
