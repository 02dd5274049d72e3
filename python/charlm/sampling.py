"""Text from a model: characters after a prompt, many of them in one call of `fused_lstm`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from charlm.errors import CharlmError
from charlm.model import CharacterModel
from charlm.settings import Config
from charlm.vocabulary import Vocabulary

if TYPE_CHECKING:
    from fused_lstm.generation import Choice

WEIGHTS = {"bf16": torch.bfloat16, "int8": torch.int8}  # that a cell may be narrowed to
PIECE = 32  # characters of each text, until they are shown


class Writer:
    """Texts that a model writes side by side, each going on from where it stands.

    Dropout is off. What is kept of a fused cell is a copy of its weights.

    Args:
        texts: how many.
        temperature: 0 takes the likeliest character.
        top_k: draw among the k most likely only.
        top_p: of those, draw among the fewest that together have at least this probability.
        seed: the same seed draws the same characters.
        weights: of WEIGHTS, to keep a fused cell's in; the model's own if not given.

    Raises:
        CharlmError: a value outside its range, weights that this model can't have.
    """

    def __init__(
        self,
        model: CharacterModel,
        vocabulary: Vocabulary,
        texts: int = 1,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        weights: str | None = None,
    ) -> None:
        self._vocabulary, self._texts = vocabulary, texts
        self._device = model.linear.weight.device
        self._generator = torch.Generator(self._device).manual_seed(seed)
        self._last: Tensor | None = None  # (texts, 1): drawn, but not yet taken in
        with _as_charlms():
            from fused_lstm.generation import Choice

            # All of the probability is no limit, and costs sorting.
            self._choice = Choice(temperature, top_k, None if top_p == 1 else top_p)
            self._model = _core(model, texts, weights)

    def write(self, prompt: str, length: int, stop: str = "") -> Iterator[list[str]]:
        """Takes the prompt in, all of it, and yields what comes after it piece by piece: of each
        text `length` characters, or fewer where one has come to `stop`, which is its end.

        Where it is broken off between two pieces, the next prompt goes on from there. With a
        length of 0 nothing is taken in.

        Raises:
            CharlmError: no prompt at the beginning, a character outside the vocabulary, a model
                whose scores aren't finite.
        """
        if length < 0:
            raise CharlmError(f"length must be at least 0, got {length}")
        if not prompt and self._last is None:
            raise CharlmError("the prompt is empty: give at least one character to begin with")
        ids = self._vocabulary.encode(prompt, "the prompt").to(self._device)
        given = ids.expand(self._texts, -1)
        if self._last is not None:
            given = torch.cat((self._last, given), 1)
        return self._drawn(given, length, stop)

    @torch.inference_mode()
    def _drawn(self, given: Tensor, length: int, stop: str) -> Iterator[list[str]]:
        texts = [_Text(self._vocabulary, stop) for _ in range(self._texts)]
        # One text's state is to be that behind its end.
        most = 1 if stop and self._texts == 1 else PIECE
        while length > 0 and not all(text.ended for text in texts):
            with _as_charlms():
                drawn = self._model.draw(given, min(length, most), self._choice, self._generator)
            given = self._last = drawn[:, -1:]
            length -= drawn.shape[1]
            rows = zip(texts, drawn.tolist(), strict=True)
            yield [text.take(row, last=length == 0) for text, row in rows]


class _Text:
    """A text of which characters come piece by piece, until it has come to `stop`."""

    def __init__(self, vocabulary: Vocabulary, stop: str) -> None:
        self._decode, self._stop = vocabulary.decoder(), stop
        self._end = ""  # of the text, in which the beginning of `stop` may be
        self.ended = False

    def take(self, ids: list[int], last: bool) -> str:
        """What they add to it."""
        text = "" if self.ended else self._decode(ids, last)
        if self._stop and text:
            known = self._end + text
            if (at := known.find(self._stop)) >= 0:
                self.ended = True
                return known[len(self._end) : at + len(self._stop)]
            self._end = known[max(0, len(known) - len(self._stop) + 1) :]
        return text


class _Loop:
    """`fused_lstm.generation.Sampler` for the cells of torch."""

    def __init__(self, model: CharacterModel, texts: int) -> None:
        self._model, self._states = model, model.zero_states(texts)

    def draw(self, ids: Tensor, length: int, choice: Choice, generator: torch.Generator) -> Tensor:
        from fused_lstm.generation import choose

        was_training = self._model.training
        self._model.eval()
        drawn = [ids]
        for _ in range(length):
            logits, self._states = self._model(drawn[-1], self._states)
            scores = logits.unflatten(0, (len(ids), -1))[:, -1]
            drawn.append(choose(scores, choice, generator)[:, None])
        self._model.train(was_training)
        return torch.cat(drawn[1:], 1)


def _core(model: CharacterModel, texts: int, weights: str | None) -> Any:
    cell = model.hyperparameters["cell"]
    if cell != "fused":
        if weights:
            raise CharlmError(f"weights can be {weights} in cell fused, not in {cell}")
        return _Loop(model, texts)
    from fused_lstm.generation import Sampler

    lstm: Any = model.recurrent
    embedding = getattr(model, "embedding", None)
    width = WEIGHTS[weights] if weights else None
    return Sampler(lstm, model.linear, texts, embedding=embedding, weights=width)


@contextmanager
def _as_charlms() -> Iterator[None]:
    """What fused_lstm says is wrong, as a CharlmError."""
    try:
        yield
    except ImportError as error:
        raise CharlmError(f"sampling needs fused_lstm ({error}): reinstall it") from error
    except (ValueError, RuntimeError) as error:
        words = str(error).partition("\n")[0].replace("top_", "top-")
        if "finite" in words:
            words = "the model's scores aren't finite: its training has diverged"
        raise CharlmError(words) from error


def sample(
    model: CharacterModel, vocabulary: Vocabulary, prompt: str, length: int, **choice: Any
) -> str:
    """The prompt with `length` characters after it.

    Args:
        choice: temperature, top_k, top_p, seed, as of `Writer`.

    Raises:
        CharlmError: as of `Writer`.
    """
    writer = Writer(model, vocabulary, **choice)
    return prompt + "".join(text for (text,) in writer.write(prompt, length))


def choice_of(config: Config) -> dict[str, Any]:
    """A run's settings, as `Writer` takes them."""
    return {
        "temperature": config.temperature,
        "top_k": config.top_k or None,
        "top_p": config.top_p,
        "seed": config.seed,
    }


def sample_by(
    config: Config, model: CharacterModel, vocabulary: Vocabulary, length: int, seed: int
) -> str:
    """`sample` with a run's settings, but for the seed."""
    choice = choice_of(config) | {"seed": seed}
    return sample(model, vocabulary, str(config.prompt), length, **choice)
