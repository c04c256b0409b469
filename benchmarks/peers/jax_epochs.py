"""Train 784-400-20 with JAX, each epoch one compiled scan, and print the seconds of each and the test ELBO.

    jax_epochs.py TRAIN.npy TEST.npy EPOCHS SEED

Runs in JAX's own environment. Same network, initial distribution of weights, batch size, optimizer, learning rate and
loss as vaelab's side. Images stay on the device, noise is drawn by JAX inside the scan, Adam is written out, and the
state is donated: as fast as JAX alone can be made to go. Compilation happens before the clock starts.
"""

import json
import math
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

BATCH, HIDDEN, LATENT, RATE = 128, 400, 20, 1e-3
LAYERS = {"encoder": (784, HIDDEN), "head": (HIDDEN, 2 * LATENT), "decoder": (LATENT, HIDDEN), "pixels": (HIDDEN, 784)}


def initial(key):
    """Weights and biases, uniform in 1/sqrt(fan-in) as torch draws them."""
    params = {}
    for name, (fan_in, fan_out) in LAYERS.items():
        key, for_weight, for_bias = jax.random.split(key, 3)
        bound = 1 / math.sqrt(fan_in)
        params[name] = (
            jax.random.uniform(for_weight, (fan_in, fan_out), minval=-bound, maxval=bound),
            jax.random.uniform(for_bias, (fan_out,), minval=-bound, maxval=bound),
        )
    return params


def terms(params, x, eps):
    """Mean distortion and mean rate of a batch, in nats."""
    hidden = jax.nn.relu(affine(params["encoder"], x))
    loc, log_scale = jnp.split(affine(params["head"], hidden), 2, axis=-1)
    z = loc + jnp.exp(log_scale) * eps
    logits = affine(params["pixels"], jax.nn.relu(affine(params["decoder"], z)))
    distortion = (jax.nn.softplus(logits) - x * logits).sum(-1).mean()
    rate = 0.5 * (jnp.exp(2 * log_scale) + loc**2 - 1 - 2 * log_scale).sum(-1).mean()
    return distortion, rate


def affine(layer, x):
    """A linear layer."""
    weight, bias = layer
    return x @ weight + bias


def epoch(params, first, second, count, key, images):
    """One pass over the images in a new order: Adam with torch's epsilon and bias correction."""
    for_order, for_noise = jax.random.split(key)
    steps = len(images) // BATCH
    order = jax.random.permutation(for_order, len(images))[: steps * BATCH].reshape(steps, BATCH)

    def step(state, rows_and_key):
        params, first, second, count = state
        rows, key = rows_and_key
        x = images[rows].astype(jnp.float32) / 255
        eps = jax.random.normal(key, (BATCH, LATENT))
        gradient = jax.grad(lambda p: sum(terms(p, x, eps)))(params)
        count = count + 1
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
        second = jax.tree.map(lambda s, g: 0.999 * s + 0.001 * g * g, second, gradient)
        by_first, by_second = 1 - 0.9**count, 1 - 0.999**count
        params = jax.tree.map(
            lambda p, m, s: p - RATE * (m / by_first) / (jnp.sqrt(s / by_second) + 1e-8), params, first, second
        )
        return (params, first, second, count), None

    keys = jax.random.split(for_noise, steps)
    state, _ = jax.lax.scan(step, (params, first, second, count), (order, keys))
    return state


def main() -> None:
    """Train and print."""
    images, test = (jnp.asarray(np.load(path).reshape(-1, 784)) for path in sys.argv[1:3])
    epochs, seed = int(sys.argv[3]), int(sys.argv[4])
    key = jax.random.key(seed)
    params = initial(jax.random.fold_in(key, 0))
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = (params, zeros, jax.tree.map(jnp.zeros_like, params), jnp.zeros(()))
    compiled = jax.jit(epoch, donate_argnums=(0, 1, 2, 3)).lower(*state, key, images).compile()
    seconds = []
    for number in range(epochs):
        started = time.perf_counter()
        state = jax.block_until_ready(compiled(*state, jax.random.fold_in(key, 1 + number), images))
        seconds.append(time.perf_counter() - started)
    x = test.astype(jnp.float32) / 255
    distortion, rate = terms(state[0], x, jax.random.normal(jax.random.key(0), (len(x), LATENT)))
    result = {"seconds": seconds, "distortion": float(distortion), "rate": float(rate)}
    result["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
