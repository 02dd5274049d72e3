"""Text from a model, one character at a time."""

import math

import torch
from torch import Tensor

from charlm.errors import CharlmError
from charlm.model import CharacterModel
from charlm.settings import Config
from charlm.vocabulary import Vocabulary


def choose(
    logits: Tensor,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> int:
    """Draws an id from softmax(logits / temperature), logits (V,).

    Args:
        generator: on the CPU; unused where there is nothing to draw.
        temperature: 0 takes the largest.
        top_k: draw among the k most likely only.
        top_p: of those, draw among the fewest that together have at least this probability.
    """
    if temperature == 0:
        return int(logits.argmax())
    scores, order = logits.double().sort(descending=True, stable=True)
    # Subtracting the largest first keeps any temperature from overflowing.
    probabilities = ((scores - scores[0]) / temperature).softmax(0)[:top_k]
    if top_p is not None:
        before = (probabilities / probabilities.sum()).cumsum(0).roll(1)
        before[0] = 0
        probabilities = probabilities * (before < top_p)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


@torch.inference_mode()
def sample(
    model: CharacterModel,
    vocabulary: Vocabulary,
    prompt: str,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> str:
    """The prompt with `length` characters after it; the same seed draws the same ones.

    All of the prompt primes the state. Dropout is off; the model is left in the mode in which it
    came.

    Raises:
        CharlmError: an empty prompt or one with a character outside the vocabulary, a value
            outside its range, a model whose scores aren't finite.
    """
    if not prompt:
        raise CharlmError("the prompt is empty: give at least one character to begin with")
    if length < 0:
        raise CharlmError(f"length must be at least 0, got {length}")
    if not 0 <= temperature < math.inf:
        raise CharlmError(f"temperature must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise CharlmError(f"top-k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise CharlmError(f"top-p must be above 0 and at most 1, got {top_p}")
    ids = vocabulary.encode(prompt, "the prompt")
    generator = torch.Generator().manual_seed(seed)
    device = model.linear.weight.device
    was_training = model.training
    model.eval()
    drawn: list[int] = []
    logits, states = model(ids[None].to(device), model.zero_states(1))
    while len(drawn) < length:
        scores = logits[-1].cpu()
        if not scores.isfinite().all():
            raise CharlmError("the model's scores aren't finite: its training has diverged")
        drawn.append(choose(scores, generator, temperature, top_k, top_p))
        logits, states = model(torch.tensor([drawn[-1:]], device=device), states)
    model.train(was_training)
    return prompt + vocabulary.decode(drawn)


def sample_by(
    config: Config, model: CharacterModel, vocabulary: Vocabulary, length: int, seed: int
) -> str:
    """`sample` with a run's settings."""
    return sample(
        model,
        vocabulary,
        str(config.prompt),
        length,
        temperature=config.temperature,
        top_k=config.top_k or None,
        top_p=config.top_p,
        seed=seed,
    )
