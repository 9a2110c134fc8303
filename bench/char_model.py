"""What the demo trains: a small character-level transformer, and the text that it learns. Also the same in the size of GPT-2."""

from __future__ import annotations

from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CONTEXT = 64


@dataclass(frozen=True)
class Size:
    """Of a model.

    Attributes:
        width: of the residual stream.
        layers: number of blocks.
        heads: of each layer's attention; they divide the width.
        context: most tokens of a text.
        tied: whether the output layer is the token embedding.
        embedding_std: of the initial values of both embeddings.
    """

    width: int
    layers: int
    heads: int
    context: int
    tied: bool = False
    embedding_std: float = 0.02


# torch's fused kernel computes what follows the last full vector (8 or 16 floats) of a thread's share of a tensor in
# double precision, fused_opt computes every element alike: the bits can agree only where no share has such a rest. With
# this width the size of every tensor is a multiple of 128, whatever the vocabulary. torch 2.6 to 2.14 cut shares at
# multiples of 16 elements, so that 16 would do on any number of threads (seen: equal bits on 1 to 8); an even split of
# 128 would still leave full vectors on 1, 2, 4 and 8.
# Held-out loss after 500 steps with an embedding_std of 0.2: 1.6; with 0.02: 1.8.
DEMO = Size(width=128, layers=2, heads=4, context=CONTEXT, embedding_std=0.2)

# GPT-2 small: Radford et al., 2019. 124,439,808 parameters.
GPT2 = Size(width=768, layers=12, heads=12, context=1024, tied=True)
GPT2_VOCABULARY = 50257


class Corpus:
    """The reference that CPython carries for `help()`: about 450,000 characters, the same in every run of a version.

    Attributes:
        vocabulary: the distinct characters, sorted; about 100. A token is an index into it.
        train: the first nine tenths of the text; int64 tokens of shape (n,).
        held_out: the last tenth.
    """

    def __init__(self) -> None:
        text = "\n".join(topics[name] for name in sorted(topics))
        self.vocabulary = "".join(sorted(set(text)))
        tokens = self.encode(text)
        cut = len(tokens) * 9 // 10
        self.train, self.held_out = tokens[:cut], tokens[cut:]

    def encode(self, text: str) -> Tensor:
        """Text of n characters, all in the vocabulary, to int64 tokens of shape (n,)."""
        token = {character: i for i, character in enumerate(self.vocabulary)}
        return torch.tensor([token[character] for character in text])

    def decode(self, tokens: Tensor) -> str:
        """The reverse of `encode`."""
        return "".join(self.vocabulary[i] for i in tokens.tolist())

    def batch(self, size: int, generator: torch.Generator, length: int = CONTEXT) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 of shape (size, length), from places in `train` that `generator` draws."""
        places = torch.randint(len(self.train) - length, (size, 1), generator=generator) + torch.arange(length)
        return self.train[places], self.train[places + 1]

    def held_out_windows(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 of shape (n, CONTEXT): `held_out` cut into windows, without the last rest."""
        end = (len(self.held_out) - 1) // CONTEXT * CONTEXT
        return self.held_out[:end].view(-1, CONTEXT), self.held_out[1 : end + 1].view(-1, CONTEXT)


class Block(nn.Module):
    """Causal self-attention, then a perceptron, each added to its input; (batch, time, width) in and out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.query_key_value(self.attention_norm(x)).unflatten(2, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (batch, heads, time, width / heads)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.perceptron(x)
        return out


class CharModel(nn.Module):
    """Tokens, int64 of shape (batch, time) with time <= size.context, to logits of shape (batch, time, vocabulary).

    No dropout: a forward pass draws no random number, so two copies that see the same batches compute the same.
    """

    def __init__(self, vocabulary: int, size: Size = DEMO) -> None:
        super().__init__()
        self.size = size
        self.token = nn.Embedding(vocabulary, size.width)
        self.position = nn.Embedding(size.context, size.width)
        self.body = nn.Sequential(*(Block(size.width, size.heads) for _ in range(size.layers)), nn.LayerNorm(size.width))
        self.head = nn.Linear(size.width, vocabulary, bias=False)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=size.embedding_std)
        if size.tied:
            self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.token(tokens) + self.position.weight[: tokens.shape[1]]))
        return logits

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats a character, a scalar, for inputs and targets of shape (batch, time)."""
        return functional.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """For an optimizer: the matrices of linear layers, decayed; biases, norms and embeddings (but for a tied one), not decayed."""
        matrices = [module.weight for module in self.modules() if isinstance(module, nn.Linear)]
        known = {id(matrix) for matrix in matrices}
        others = [param for param in self.parameters() if id(param) not in known]
        return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]

    @torch.no_grad()
    def continue_from(self, prompt: Tensor, count: int, seed: int, temperature: float = 0.7) -> Tensor:
        """`prompt`, int64 of shape (n,) with n >= 1, followed by `count` tokens drawn from the model with `seed`."""
        generator = torch.Generator().manual_seed(seed)
        tokens = prompt
        for _ in range(count):
            logits = self(tokens[None, -self.size.context :])[0, -1]
            drawn = torch.multinomial((logits / temperature).softmax(0), 1, generator=generator)
            tokens = torch.cat([tokens, drawn])
        return tokens
