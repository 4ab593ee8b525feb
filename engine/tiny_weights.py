"""The tiny model's weights: a small digital circuit, written down.

* Every token has 63 fixed random bits. Two heads of layer 0 copy the bits of the two preceding
  tokens, and layer 0's MLP takes 30 three-way parities of them: an order-dependent hash.
* In each layer and for each KV head one query head attends with *equal* weight to all earlier
  positions whose hashed class (in the key) is that of the current token, and to nothing else. The
  values are +1 or -1, so the result is a vote count over the whole context. It is exact in
  bfloat16: it depends neither on chunking nor on the batch.
* MLPs reduce each vote to its sign and exclusive-or that bit into a 10-bit state. Layer 0
  votes over tokens, layer 1 over the three-token hashes, layer 2 over the states, so keys and
  values of every layer and KV head reach the output.
* The final 10 bits name one of 1,024 word tokens; one wrong bit costs a fifth of the top logit.

Boundary: tensors and the configuration that fits them; `tiny_model` writes the files.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engine import tiny_tokenizer as tok

if TYPE_CHECKING:
    from torch import Tensor

_SEED = 20_240_229
_HIDDEN, _HEAD_DIM, _HEADS, _KV_HEADS, _LAYERS, _INTERMEDIATE = 256, 64, 4, 2, 3, 128
_MAX_POSITIONS = tok.MAX_LENGTH_TOKENS
_ROPE_THETA = 1e12
_BITS = 10  # of the state and the output: 2**10 word tokens can be generated
_BITS_PER_KV_HEAD = _BITS // _KV_HEADS
_HASHES = 30

# The residual stream. Only the token's own columns are large; all that layers write is _TINY, so
# that RMSNorm never scales by anything but 1 and +-1 stays exactly +-1. bfloat16 keeps its relative
# precision however small the numbers, and the readers multiply by 1 / _TINY.
_TINY = 2.0**-10
_EMBED = 2.0  # 64 of 256 columns at +-2: mean square 1
_CONST = 0
_TOKEN = range(1, 64)  # the token's random bits; the first ones start the state
_VOTE = [range(64 + 10 * layer, 74 + 10 * layer) for layer in range(_LAYERS)]
_POSITIVE = [range(94 + 10 * layer, 104 + 10 * layer) for layer in range(_LAYERS - 1)]
_STATE = range(114, 124)
_OUT = range(124, 134)
_HASH = range(134, 164)
_BEFORE = [range(164, 194), range(194, 224)]  # one bit per hash, from 1 and 2 tokens back

# Key dimensions, each the first of its rotary pair. The fast ones tell neighbours apart; the
# slow ones turn by less than 1e-4 radians in _MAX_POSITIONS positions, so they match contents.
_FAST = range(7)
_SLOW = range(22, 32)
_NEIGHBOUR_GAIN = 768.0  # the best position leads by 0.57 * gain / sqrt(head_dim) = 54 nats
_MISMATCH_GAIN = 256.0  # one wrong class bit costs 2 * gain / sqrt(head_dim) = 64 nats

# MLP gates are on or off by at least this much, where silu(x) is x or 0 to bfloat16 precision.
_GATE = 32.0
# The smallest vote above zero is 1 / _MAX_POSITIONS; the threshold is half of that, so a tied vote
# stays tied even where a kernel leaves rounding errors in it.
_VOTE_GAIN = 2 * _GATE * _MAX_POSITIONS
# Large enough to close also the gates that _DIRECT_GAIN holds open.
_POSITIVE_GAIN = 128 * _GATE * _MAX_POSITIONS
# Layer 2 has no later layer to clean its vote, so its bit saturates at once; this is exact up to
# 48 voters, and its classes are 1/128 of the context.
_DIRECT_GAIN = 1536.0

# Logits. A generated word has _BITS, its nearest rivals have 2 less.
_EOS_LOGIT = 6.0  # about one token in 200 when sampling at temperature 1, never when greedy
_JSON_LOGIT = 5.0  # above any digit or blank, so guided JSON closes what it has opened
_NEVER_LOGIT = -10.0

# A residual column and the amplitude of its bits after RMSNorm.
_Bit = tuple[int, float]


def _class_bits(layer: int, kv_head: int) -> list[_Bit]:
    """The bits whose agreement lets a position vote."""
    if layer == 0:
        return [(_TOKEN[_BITS + 3 * kv_head + i], _EMBED) for i in range(3)]
    if layer == 1:
        return [(_HASH[_BITS + 3 * kv_head + i], _TINY) for i in range(3)]
    return [(_HASH[_BITS + 6 + 7 * kv_head + i], _TINY) for i in range(7)]


def _vote_bits(layer: int) -> list[_Bit]:
    """What the positions vote on, one per state bit."""
    if layer == 0:
        return [(_TOKEN[16 + k], _EMBED) for k in range(_BITS)]
    if layer == 1:
        return [(_HASH[k], _TINY) for k in range(_BITS)]
    # Shifted, since a sole voter is the current token itself and must not cancel its own bit.
    return [(_STATE[(k + 3) % _BITS], _TINY) for k in range(_BITS)]


def _attention(layer: int, neighbour_bits: Sequence[Sequence[_Bit]]) -> dict[str, Tensor]:
    import torch

    q = torch.zeros(_HEADS * _HEAD_DIM, _HIDDEN)
    k = torch.zeros(_KV_HEADS * _HEAD_DIM, _HIDDEN)
    v = torch.zeros(_KV_HEADS * _HEAD_DIM, _HIDDEN)
    o = torch.zeros(_HIDDEN, _HEADS * _HEAD_DIM)
    for kv_head in range(_KV_HEADS):
        kv = kv_head * _HEAD_DIM
        vote_head = 2 * kv_head * _HEAD_DIM
        bits = _class_bits(layer, kv_head)
        for dim, (column, amplitude) in zip(_SLOW, bits, strict=False):
            k[kv + dim, column] = 1 / amplitude
            q[vote_head + dim, column] = _MISMATCH_GAIN / amplitude
        # Offset such that full agreement scores exactly 0: then exp() is exactly 1 for each voter.
        k[kv + _SLOW[-1], _CONST] = 1 / _EMBED
        q[vote_head + _SLOW[-1], _CONST] = -_MISMATCH_GAIN * len(bits) / _EMBED
        first = kv_head * _BITS_PER_KV_HEAD
        for j in range(_BITS_PER_KV_HEAD):
            column, amplitude = _vote_bits(layer)[first + j]
            v[kv + j, column] = 1 / amplitude
            o[_VOTE[layer][first + j], vote_head + j] = _TINY
        if not neighbour_bits:
            continue
        neighbour_head, distance = vote_head + _HEAD_DIM, kv_head + 1
        for dim in _FAST:
            angle = distance * _ROPE_THETA ** (-2 * dim / _HEAD_DIM)
            k[kv + dim, _CONST] = 1 / _EMBED
            q[neighbour_head + dim, _CONST] = _NEIGHBOUR_GAIN * math.cos(angle) / _EMBED
            q[neighbour_head + dim + _HEAD_DIM // 2, _CONST] = (
                -_NEIGHBOUR_GAIN * math.sin(angle) / _EMBED
            )
        for j, (column, amplitude) in enumerate(neighbour_bits[kv_head]):
            v[kv + _BITS_PER_KV_HEAD + j, column] = 1 / amplitude
            o[_BEFORE[kv_head][j], neighbour_head + _BITS_PER_KV_HEAD + j] = _TINY
    return {"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": o}


class _Mlp:
    """Collects hidden units: silu(sum of gate terms) * (up bit), added to one output column."""

    def __init__(self) -> None:
        import torch

        self._used = 0
        self.gate = torch.zeros(_INTERMEDIATE, _HIDDEN)
        self.up = torch.zeros(_INTERMEDIATE, _HIDDEN)
        self.down = torch.zeros(_HIDDEN, _INTERMEDIATE)

    def unit(self, gate: dict[int, float], up: _Bit, out: int, weight: float) -> None:
        """Gate terms map a column to the factor for its value as normalised."""
        for column, factor in gate.items():
            self.gate[self._used, column] = factor
        self.up[self._used, up[0]] = 1 / up[1]
        self.down[out, self._used] = weight * _TINY
        self._used += 1

    def keep_positive_votes(self, layer: int) -> None:
        """Half of a step function; the next layer's gates do the other half."""
        for vote, positive in zip(_VOTE[layer], _POSITIVE[layer], strict=True):
            gate = {vote: _VOTE_GAIN / _TINY, _CONST: -_GATE / _EMBED}
            self.unit(gate, (_CONST, _EMBED), positive, 1 / _VOTE_GAIN)


def _mlps(hashed: Sequence[Sequence[_Bit]]) -> list[_Mlp]:
    on = _GATE / _EMBED  # factor of the constant column which opens a gate
    mlps = [_Mlp() for _ in range(_LAYERS)]
    for layer in range(_LAYERS - 1):
        mlps[layer].keep_positive_votes(layer)
    # a xor b xor c = c * (2 * (a and b) + 2 * (not a and not b) - 1), for bits of +-1.
    for out, (a, _, _), b, c in zip(_HASH, hashed, *_BEFORE, strict=True):
        a_factor, b_factor = _GATE / a[1], _GATE / _TINY
        mlps[0].unit({a[0]: a_factor, b: b_factor, _CONST: -on}, (c, _TINY), out, 2 / _GATE)
        mlps[0].unit({a[0]: -a_factor, b: -b_factor, _CONST: -on}, (c, _TINY), out, 2 / _GATE)
        mlps[0].unit({_CONST: on}, (c, _TINY), out, -1 / _GATE)
    # state = token bit * (2 * (vote 0 not positive) - 1)
    for token, positive, out in zip(_TOKEN, _POSITIVE[0], _STATE, strict=False):
        not_positive = {_CONST: on, positive: -_POSITIVE_GAIN / _TINY}
        mlps[1].unit(not_positive, (token, _EMBED), out, 2 / _GATE)
        mlps[1].unit({_CONST: on}, (token, _EMBED), out, -1 / _GATE)
    # out = state * (1 - 2 * A) * (1 - 2 * B), A = (vote 1 not positive), B = (vote 2 not negative).
    # B's step is the difference of two ramps; a closed A holds both ramps down.
    for state, positive, vote, out in zip(_STATE, _POSITIVE[1], _VOTE[2], _OUT, strict=True):
        up = (state, _TINY)
        closed = {positive: -_POSITIVE_GAIN / _TINY}
        ramp = {vote: _DIRECT_GAIN / _TINY}
        mlps[2].unit({_CONST: on}, up, out, 1 / _GATE)
        mlps[2].unit({_CONST: on} | closed, up, out, -2 / _GATE)
        for start, sign in (({_CONST: on}, 1), ({}, -1)):
            mlps[2].unit(start | ramp, up, out, -2 * sign / _GATE)
            mlps[2].unit(start | ramp | closed, up, out, 4 * sign / _GATE)
    return mlps


def weights(token_texts: Sequence[str]) -> dict[str, Tensor]:
    """All tensors by their checkpoint names, bfloat16; `token_texts` are by token id."""
    import torch

    rng = random.Random(_SEED)
    embed = torch.zeros(tok.VOCAB_SIZE, _HIDDEN)
    embed[:, _CONST] = _EMBED
    for row in embed:
        for column in _TOKEN:
            row[column] = rng.choice((-_EMBED, _EMBED))
    # For each hash one bit of the current token, one of the last and one of the last but one.
    picks = [rng.sample(_TOKEN, _HASHES) for _ in range(3)]
    hashed = [[(column, _EMBED) for column in columns] for columns in zip(*picks, strict=True)]

    tensors = {"model.embed_tokens.weight": embed, "model.norm.weight": torch.ones(_HIDDEN)}
    neighbours = [[bits[1 + kv_head] for bits in hashed] for kv_head in range(_KV_HEADS)]
    for layer, mlp in enumerate(_mlps(hashed)):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.ones(_HIDDEN)
        for name, weight in _attention(layer, neighbours if layer == 0 else ()).items():
            tensors[f"{prefix}self_attn.{name}.weight"] = weight
        for name, weight in (("gate", mlp.gate), ("up", mlp.up), ("down", mlp.down)):
            tensors[f"{prefix}mlp.{name}_proj.weight"] = weight
    tensors["lm_head.weight"] = _lm_head(token_texts, rng)
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def _lm_head(token_texts: Sequence[str], rng: random.Random) -> Tensor:
    import torch

    head = torch.zeros(tok.VOCAB_SIZE, _HIDDEN)
    words = [i for i, text in enumerate(token_texts) if re.fullmatch(r" ?[A-Za-z]{2,}", text)]
    words = words[: 2**_BITS]
    if len(words) < 2**_BITS:
        raise RuntimeError(f"the tokenizer has {len(words)} words, too few for {_BITS} bits")
    code_of_word = dict(zip(words, rng.sample(range(2**_BITS), 2**_BITS), strict=True))
    for token_id, text in enumerate(token_texts):
        if token_id == tok.EOS_ID:
            head[token_id, _CONST] = _EOS_LOGIT / _EMBED
        elif token_id in (tok.PAD_ID, tok.TURN_START_ID) or "\ufffd" in text:
            head[token_id, _CONST] = _NEVER_LOGIT / _EMBED
        elif re.fullmatch(r'["{}\[\],:]+', text):
            head[token_id, _CONST] = _JSON_LOGIT / _EMBED
        else:
            code = code_of_word.get(token_id)
            # Half a code word never beats a whole one, yet keeps the token likely when sampling.
            scale = 1.0 if code is not None else 0.5
            code = rng.getrandbits(_BITS) if code is None else code
            for bit, column in enumerate(_OUT):
                head[token_id, column] = (scale if code >> bit & 1 else -scale) / _TINY
    return head


def config() -> dict[str, Any]:
    """The content of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tok.VOCAB_SIZE,
        "hidden_size": _HIDDEN,
        "intermediate_size": _INTERMEDIATE,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": _MAX_POSITIONS,
        "rms_norm_eps": 1e-6,
        # Both spellings: which one is read depends on the version of transformers.
        "rope_theta": _ROPE_THETA,
        "rope_parameters": {"rope_type": "default", "rope_theta": _ROPE_THETA},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tok.EOS_ID,
        "pad_token_id": tok.PAD_ID,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
