"""charlm eval."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from charlm.batches import rows_for_evaluation
from charlm.commands import FOLDER
from charlm.corpus import Ids, read_corpus, split
from charlm.dynamic import Following, evaluate_following
from charlm.errors import CharlmError
from charlm.evaluation import bits_per_character, evaluate, perplexity
from charlm.results import table
from charlm.runfolder import RunFolder
from charlm.runs import same_text
from charlm.sampling import WEIGHTS
from charlm.settings import Config
from charlm.training import device_of
from charlm.vocabulary import Vocabulary

SPLITS = ("train", "validation", "test")


@click.command("eval")
@click.argument("run", type=FOLDER)
@click.option(
    "--split",
    "part",
    type=click.Choice([*SPLITS, "all"]),
    help="Which part of the text; all of it may be another text than the run's.  "
    "[default: test if the run has one, else validation, else train]",
)
@click.option(
    "--text", multiple=True, metavar="FILE|-", help="The text.  [default: where it was in training]"
)
@click.option("--batch-size", type=click.IntRange(1), help="Rows at a time.  [default: the run's]")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, auto.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: torch's]")
@click.option(
    "--weights", type=click.Choice(list(WEIGHTS)), help="Kept narrower, as charlm sample may."
)
@click.option(
    "--dynamic",
    is_flag=True,
    help="Its loss, too, with weights that follow the text (dynamic evaluation, Krause et al.).",
)
@click.option(
    "--rate",
    type=click.FloatRange(0),
    default=Following.rate,
    show_default=True,
    help="How fast they follow.",
)
@click.option(
    "--decay", type=click.FloatRange(0, 1), default=Following.decay, show_default=True,
    help="How strongly they are drawn back.",
)  # fmt: skip
def eval_command(
    run: Path,
    part: str | None,
    text: tuple[str, ...],
    batch_size: int | None,
    device: str,
    threads: int | None,
    weights: str | None,
    dynamic: bool,
    rate: float,
    decay: float,
) -> None:
    """Print the loss of RUN on a part of its text: mean cross-entropy, dropout off."""
    if dynamic and weights:
        raise CharlmError("--dynamic changes the weights, --weights keeps a copy: choose one")
    if threads is not None:
        torch.set_num_threads(threads)
    folder = RunFolder(run)
    config, facts = folder.read_config(), folder.read_facts()
    model, vocabulary = folder.read_model()
    model.to(device_of(device))
    fractions = dict(zip(SPLITS, (1.0, config.validation, config.test), strict=True))
    part = part or [name for name in SPLITS if fractions[name]][-1]
    if part != "all" and not fractions[part]:
        held = ", ".join(name for name in SPLITS if fractions[name])
        raise CharlmError(
            f"{run} holds no {part} part out: its text is for {held}; choose one, or all"
        )
    ids = read_part(config, facts, vocabulary, text, part)
    batches = rows_for_evaluation(ids, config.window, batch_size or config.batch_size)
    if batches is None:
        raise CharlmError(
            f"the {part} part has {len(ids):,} characters, too few for one window of "
            f"{config.window} and the character after it"
        )
    began = time.perf_counter()
    loss = evaluate(model, batches, weights=WEIGHTS[weights] if weights else None)
    seconds = time.perf_counter() - began
    if not math.isfinite(loss):
        raise CharlmError(f"the loss is {loss}: the weights of {run} are no use")
    rows = {
        "split": part,
        "characters": f"{batches.characters:,}",
        "loss": f"{loss:.4f}",
        "perplexity": f"{perplexity(loss):.3f}",
        "bits per character": f"{bits_per_character(loss):.4f}",
        "characters a second": f"{batches.characters / seconds:,.0f}",
    }
    if dynamic:
        # What is evaluated may be another text: how far weights move is learned from the run's own.
        own = read_part(config, facts, vocabulary, () if part == "all" else text, "train")
        training = rows_for_evaluation(own, config.window, config.batch_size)
        following = Following(rate, decay)
        one = rows_for_evaluation(ids, min(following.window, config.window), 1)
        assert training is not None and one is not None  # as long as `batches` at least
        loss = evaluate_following(model, training, one, following)
        rows["dynamic loss"] = f"{loss:.4f}"
        rows["dynamic bits per character"] = f"{bits_per_character(loss):.4f}"
    click.echo(table(list(rows.items())))


def read_part(
    config: Config,
    facts: dict[str, Any],
    vocabulary: Vocabulary,
    sources: Sequence[str],
    part: str,
) -> Ids:
    """The ids of a part of the run's text, or with "all" of any text.

    Raises:
        CharlmError: the text isn't where it was, or isn't the run's.
    """
    whole = part == "all" and bool(sources)
    corpus = read_corpus(
        same_text(facts, sources, config),
        config.vocabulary,
        None if whole else config.characters,
        vocabulary,
    )
    if not whole and corpus.sha256 != facts.get("sha256"):
        raise CharlmError(
            f"{corpus.text.name} is not the text that the run was trained on, so its parts would "
            "be others: pass that text with --text, or --split all with any text"
        )
    if part == "all":
        return corpus.ids
    return split(corpus.ids, [config.validation, config.test])[SPLITS.index(part)]
