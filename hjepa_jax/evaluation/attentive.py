"""Attentive probe: learned queries pool the patch tokens, a linear layer classifies the result.

Useful if the patches have more information than their mean. One vmapped program trains all settings
of a grid.

    result = attentive_probe(train_tokens, train_y, test_tokens, test_y, num_classes=10)
    print(result.top1, result.chosen_learning_rate, result.chosen_weight_decay)

References:
  Bardes et al. 2024, "V-JEPA" (arXiv 2404.08471), section 4 and appendix: cross-attention with a
  learned query. We omit value and output projections: the linear layer on the pooled tokens of all
  queries contains both, and attention logits are linear in the token. We also omit the MLP.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Int, Int32, Integer

from hjepa_jax.errors import InputError
from hjepa_jax.evaluation.features import map_batches, progress
from hjepa_jax.evaluation.labelled import ProbeResult, check_labelled, choose, edge_note, hold_out

DEFAULT_LEARNING_RATES = (3e-4, 1e-3, 3e-3)
DEFAULT_WEIGHT_DECAYS = (1e-3, 1e-1)


@dataclasses.dataclass(frozen=True)
class AttentiveResult(ProbeResult):
    """Outcome of the attentive probe.

    `val_top1` is ordered by learning rate, then by weight decay. The smallest weight decay does not
    count as an end of its grid, because it is almost 0.
    """

    chosen_learning_rate: float
    chosen_weight_decay: float


def attentive_probe(
    train_tokens: Float[np.ndarray, "_ _ _"],
    train_y: Integer[np.ndarray, " _"],
    test_tokens: Float[np.ndarray, "_ _ _"],
    test_y: Integer[np.ndarray, " _"],
    *,
    num_classes: int,
    num_queries: int = 4,
    learning_rates: Sequence[float] = DEFAULT_LEARNING_RATES,
    weight_decays: Sequence[float] = DEFAULT_WEIGHT_DECAYS,
    num_epochs: int = 10,
    batch_size: int = 256,
    num_val: int = 5000,
    seed: int = 0,
    what: str = "",
) -> AttentiveResult:
    """Chooses the setting on held-out training rows, retrains on all rows, scores the test once.

    The arguments are those of `linear_probe`, with frozen tokens `[n, N, D]` instead of features.
    Tokens of float16 halve their memory. Every pair of `learning_rates` (peaks of Adam, with cosine
    decay to 0) and `weight_decays` (decoupled) is a setting; both lists ascend.

    Raises:
      InputError: tokens are empty or not finite, or arrays do not match.
    """
    for name, tokens, y in (("train", train_tokens, train_y), ("test", test_tokens, test_y)):
        if tokens.ndim != 3 or tokens.shape[1:] != train_tokens.shape[1:]:
            rule = "must be [n, N, D], N and D as in train_tokens"
            raise InputError(f"{name}_tokens", tokens.shape, rule)
        check_labelled(name, tokens.reshape(len(tokens), -1), y, num_classes=num_classes)
    train = functools.partial(
        _train, num_classes=num_classes, num_queries=num_queries, num_epochs=num_epochs, seed=seed,
        what=what,
    )  # fmt: skip
    grid = list(itertools.product(learning_rates, weight_decays))
    fit, val = hold_out(len(train_tokens), num_val=num_val, seed=seed)
    model = train(train_tokens[fit], train_y[fit], grid, batch_size=min(batch_size, len(fit)))
    predicted = _predict(model, train_tokens[val], batch_size)
    val_top1 = (predicted == train_y[None, val]).mean(axis=1).tolist()
    chosen, notes = _choose(val_top1, learning_rates, weight_decays)

    model = train(train_tokens, train_y, [chosen], batch_size=min(batch_size, len(train_y)))
    predictions = _predict(model, test_tokens, batch_size)[0]
    return AttentiveResult(
        top1=float((predictions == test_y).mean()),
        val_top1=tuple(val_top1),
        test_predictions=predictions,
        at_edge=notes,
        chosen_learning_rate=chosen[0],
        chosen_weight_decay=chosen[1],
    )


def _choose(
    val_top1: list[float], learning_rates: Sequence[float], weight_decays: Sequence[float]
) -> tuple[tuple[float, float], tuple[str, ...]]:
    """Chooses learning rate and weight decay; also returns notes about ends of the grid.

    The learning rate is chosen by its best score, then the weight decay among its scores.
    """
    by_rate = np.array(val_top1).reshape(len(learning_rates), len(weight_decays))
    rate, rate_at_edge = choose(by_rate.max(axis=1).tolist())
    decay, decay_at_edge = choose(by_rate[rate].tolist(), open_start=False)
    chosen = learning_rates[rate], weight_decays[decay]
    notes = [edge_note("learning rate", chosen[0], learning_rates)] if rate_at_edge else []
    notes += [edge_note("weight decay", chosen[1], weight_decays)] if decay_at_edge else []
    return chosen, tuple(notes)


@dataclasses.dataclass(frozen=True)
class _Model:
    """Probes for S settings on standardised tokens."""

    mean: Float32[np.ndarray, " D"]
    std: Float32[np.ndarray, " D"]
    params: Any


def _logits(params: Any, x: Float[Array, "B N D"]) -> Float[Array, "B C"]:
    """Returns class scores of one setting: softmax pooling by each query, then a linear layer."""
    weights = jax.nn.softmax(jnp.einsum("bnd,qd->bqn", x, params["queries"]), axis=-1)
    pooled = jnp.einsum("bqn,bnd->bqd", weights, x)
    return pooled.reshape(len(x), -1) @ params["kernel"] + params["bias"][None]


@jax.jit
def _update(
    params: Any,
    opt_state: Any,
    x: Float[Array, "B N D"],
    y: Int[Array, " B"],
    learning_rates: Float[Array, " S"],
    weight_decays: Float[Array, " S"],
) -> tuple[Any, Any]:
    """Applies one step of AdamW to every setting, on the same rows."""

    def update(params: Any, opt_state: Any, learning_rate: Array, decay: Array) -> tuple[Any, Any]:
        def loss(params: Any) -> Array:
            losses = optax.softmax_cross_entropy_with_integer_labels(_logits(params, x), y)
            return jnp.mean(losses)

        updates, opt_state = optax.scale_by_adam().update(jax.grad(loss)(params), opt_state)
        new = jax.tree.map(lambda p, u: p - learning_rate * (u + decay * p), params, updates)
        return new, opt_state

    return jax.vmap(update)(params, opt_state, learning_rates, weight_decays)


def _train(
    tokens: Float[np.ndarray, "n N D"],
    y: Integer[np.ndarray, " n"],
    grid: Sequence[tuple[float, float]],
    *,
    num_classes: int,
    num_queries: int,
    num_epochs: int,
    batch_size: int,
    seed: int,
    what: str,
) -> _Model:
    n, _, d = tokens.shape
    sample = tokens[:: max(1, n // 2000)].reshape(-1, d).astype(np.float32)
    std = sample.std(axis=0)
    mean, std = sample.mean(axis=0), np.where(std > 1e-6, std, 1.0).astype(np.float32)
    rng, s = np.random.default_rng(seed), len(grid)
    # Small queries start near mean pooling. Different queries can learn different weights.
    queries = 0.02 * rng.standard_normal((num_queries, d), np.float32)
    params = {
        "queries": np.repeat(queries[None], s, axis=0),
        "kernel": np.zeros((s, num_queries * d, num_classes), np.float32),
        "bias": np.zeros((s, num_classes), np.float32),
    }
    params = jax.tree.map(jnp.asarray, params)
    opt_state = jax.vmap(optax.scale_by_adam().init)(params)
    learning_rates, weight_decays = np.array(grid, np.float32).T
    num_batches = n // batch_size
    for epoch in progress(what, num_epochs, unit=" epochs", iterable=range(num_epochs)):
        order = rng.permutation(n)
        for i in range(num_batches):
            rows = np.sort(order[i * batch_size : (i + 1) * batch_size])
            done = (epoch * num_batches + i) / (num_epochs * num_batches)
            rates = learning_rates * np.float32(0.5 * (1 + np.cos(np.pi * done)))
            x = (tokens[rows].astype(np.float32) - mean) / std
            params, opt_state = _update(
                params, opt_state, x, y[rows].astype(np.int32), rates, weight_decays
            )
    return _Model(mean, std, params)


_predict_logits = jax.jit(jax.vmap(_logits, in_axes=(0, None), out_axes=1))


def _predict(
    model: _Model, tokens: Float[np.ndarray, "n N D"], batch_size: int
) -> Int32[np.ndarray, "S n"]:
    """Returns the most likely class of each row, for each setting."""

    def logits(x: np.ndarray) -> dict[str, Any]:
        x = (x.astype(np.float32) - model.mean) / model.std
        return {"logits": _predict_logits(model.params, x)}

    found = map_batches(logits, tokens, batch_size=batch_size)["logits"]  # [n, S, C]
    return found.argmax(axis=-1).T.astype(np.int32)
