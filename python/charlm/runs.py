"""The three ways to begin: a new run, a new run from an old one's weights, an old run resumed."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from charlm.checkpoint import Checkpoints
from charlm.corpus import Corpus, Text, find_text, read_corpus
from charlm.errors import CharlmError
from charlm.files import Lock, remove_leftovers
from charlm.model import CharacterModel
from charlm.optimisation import depends_on_length
from charlm.presets import read_preset
from charlm.processes import ALONE, Processes
from charlm.reading import one_line
from charlm.runfolder import RunFolder, check_free
from charlm.settings import Config
from charlm.training import Trainer, hyperparameters

# What a resumed run may change: nothing of it decides a bit of the steps that were made.
_SAFE = {
    "epochs", "steps", "stop", "stop_below", "device", "threads", "fsdp", "checkpoint_every", "log",
    "log_every", "prompt", "length", "temperature", "top_k", "top_p", "samples", "sample_length",
    "preview", "headings",
}  # fmt: skip
# What the weights of a run decide for one that begins from them; the first two cells share theirs.
_SHAPE = ("vocabulary", "embedding", "hidden", "layers", "biases", "cell")
_SAME_WEIGHTS = ("fused", "lstm")


@dataclass
class Part:
    """What another process than the first has of a run that is ready to train."""

    trainer: Trainer
    checkpoints: Checkpoints


@dataclass
class Run(Part):
    """A run that is ready to train, its folder locked."""

    corpus: Corpus
    folder: RunFolder
    facts: dict[str, Any]
    resumed: bool = False

    @property
    def config(self) -> Config:
        return self.trainer.config


@contextlib.contextmanager
def begin(
    config: Config,
    sources: Sequence[str],
    path: Path | None,
    init: Path | None = None,
    processes: Processes = ALONE,
) -> Iterator[Run | Part]:
    """A new run; with `init`, from the weights of the run there, whose vocabulary it takes.

    The first of the processes that train it has the Run.

    Raises:
        CharlmError: text, settings, weights or place won't do; nothing has been written then.
    """
    if path is not None and processes.first:
        check_free(path)
    weights, vocabulary = RunFolder(init).read_model() if init is not None else (None, None)
    config = _with_threads(config)
    corpus = read_corpus(
        find_text(sources, config.file), config.vocabulary, config.characters, vocabulary
    )
    config = config.override({"prompt": config.prompt or _first_word(corpus)})
    trainer = _trainer(config, corpus, processes)
    if weights is not None:
        _take_weights(trainer, weights)
    if not processes.first:
        yield Part(trainer, Checkpoints(None, config.checkpoint_every))
        return
    facts = _facts(trainer, corpus)
    folder = RunFolder.create(path, config.preset)
    with Lock(folder.path):
        check_free(folder.path)  # another process may have been as quick
        remove_leftovers(folder.path)
        folder.write_config(config, facts)
        checkpoints = Checkpoints(folder.path, config.checkpoint_every)
        yield Run(trainer, checkpoints, corpus, folder, facts)


def settings_from(init: Path, preset: str | None, overrides: Mapping[str, Any]) -> Config:
    """The settings of a run that begins from the weights of another: the other's, or a preset's in
    the other's shape, changed by the overrides.

    Raises:
        CharlmError: an override that the weights don't fit.
    """
    old = RunFolder(init).read_config()
    shape = {name: getattr(old, name) for name in _SHAPE}
    config = (old if preset is None else read_preset(preset)[0]).override(shape)
    for name in _SHAPE:
        value = overrides.get(name)
        same = value == shape[name] or (name == "cell" and {value, shape[name]} <= {*_SAME_WEIGHTS})
        if value is not None and not same:
            raise CharlmError(
                f"--{name} {value} doesn't fit the weights of {init}, whose {name} is "
                f"{shape[name]}: leave it out, or start without --init"
            )
    return config.override(overrides)


@contextlib.contextmanager
def resume(
    path: Path,
    sources: Sequence[str],
    overrides: Mapping[str, Any],
    processes: Processes = ALONE,
) -> Iterator[Run | Part]:
    """The run in a folder, where its last checkpoint left it; from its beginning if there is none.

    The first of the processes that train it has the Run.

    Raises:
        CharlmError: the folder isn't a run's, another process writes to it, its text isn't there
            or is another, or an override would have changed steps that were made.
    """
    folder = RunFolder(path)
    folder.read_config()  # or else a wrong folder would get a lock
    with Lock(path) if processes.first else contextlib.nullcontext():
        old, facts = folder.read_config(), folder.read_facts()
        config = _with_threads(_changed(old, overrides))
        if processes.first:
            remove_leftovers(path)
        text = same_text(facts, sources, config)
        corpus = read_corpus(text, config.vocabulary, config.characters)
        if corpus.sha256 != facts.get("sha256"):
            raise CharlmError(
                f"{text.name} isn't the text that {path} was trained on: pass that one with "
                f"--text, or begin a new run from its weights with --init {path}"
            )
        checkpoints = Checkpoints(path, config.checkpoint_every)
        if checkpoints.exist:
            checkpoints.check_model(len(corpus.vocabulary), hyperparameters(config))
        trainer = _trainer(config, corpus, processes)
        _go_on(trainer, folder, checkpoints)
        if not processes.first:
            yield Part(trainer, Checkpoints(None, config.checkpoint_every))
            return
        _note_changes(trainer, old, facts)
        facts |= {"sources": text.sources, "processes": processes.size}
        folder.write_config(config, facts)
        yield Run(trainer, checkpoints, corpus, folder, facts, resumed=True)


def _note_changes(trainer: Trainer, old: Config, facts: Mapping[str, Any]) -> None:
    config = trainer.config
    for name, was, now in (
        ("device", old.device, config.device),
        ("threads", old.threads, config.threads),
        ("fsdp", old.fsdp, config.fsdp),
        ("the number of processes", facts.get("processes", 1), trainer.processes.size),
    ):
        if was != now:
            trainer.notes.append(
                f"{name} was {was} and is {now}: the run goes on, but not with the bits that it "
                "would have had"
            )


def _go_on(trainer: Trainer, folder: RunFolder, checkpoints: Checkpoints) -> None:
    metrics = checkpoints.load(trainer) if checkpoints.exist else 0
    if trainer.step > trainer.total_steps:
        raise CharlmError(
            f"{folder.path} has made {trainer.step:,} steps already, more than the "
            f"{trainer.total_steps:,} asked for"
        )
    trainer.records = folder.cut_metrics(metrics, write=trainer.processes.first)


def _changed(old: Config, overrides: Mapping[str, Any]) -> Config:
    given = {name: value for name, value in overrides.items() if value is not None}
    for name, value in given.items():
        if name not in _SAFE and value != getattr(old, name):
            option = name.replace("_", "-")
            raise CharlmError(
                f"--{option} {value} isn't the run's, which is {getattr(old, name)}: a run goes "
                "on with its own settings; --init begins a new one from its weights"
            )
    length = {name: given[name] for name in ("epochs", "steps") if name in given}
    config = old.override(given)
    if length and (config.epochs, config.steps) != (old.epochs, old.steps):
        if depends_on_length(old):
            raise CharlmError(
                f"the run's learning rate was laid out for its length (schedule {old.schedule}, "
                f"warmup {old.warmup:g}), so another --{next(iter(length))} would have changed "
                "every step: --init begins a new run from its weights"
            )
    return config


def same_text(facts: Mapping[str, Any], sources: Sequence[str], config: Config) -> Text:
    """The sources given, or those of the run if they are still there, or what the preset finds."""
    if sources:
        return Text(sources)
    recorded = facts.get("sources", [])
    if all(map(os.path.isfile, recorded)):  # anyone may have named them: no device, no pipe
        return Text(recorded)
    if config.file is not None:
        return find_text((), config.file)
    where = ", ".join("standard input" if source == "-" else source for source in recorded)
    raise CharlmError(
        f"the run's text was {one_line(where)}, which isn't there: pass it with --text"
    )


def _with_threads(config: Config) -> Config:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return config.override({"threads": torch.get_num_threads()})


def _trainer(config: Config, corpus: Corpus, processes: Processes) -> Trainer:
    # Better refused now than after training.
    corpus.vocabulary.encode(str(config.prompt), "the prompt")
    return Trainer(config, corpus.ids, len(corpus.vocabulary), processes)


def _take_weights(trainer: Trainer, weights: CharacterModel) -> None:
    trainer.load_weights(weights.state_dict())


def _first_word(corpus: Corpus) -> str:
    """The text's first word is the one prompt that any vocabulary has."""
    beginning = corpus.vocabulary.decode(corpus.ids[:10_000].tolist())
    return (beginning.split(maxsplit=1) or [beginning])[0]


def _facts(trainer: Trainer, corpus: Corpus) -> dict[str, Any]:
    name = corpus.text.name
    if trainer.config.characters is not None:
        name += ", characters {}..{}".format(*trainer.config.characters)
    return {
        "text": name,
        "ids": len(corpus.ids),
        "vocabulary": len(corpus.vocabulary),
        "samples": trainer.batches.samples,
        "batches": len(trainer.batches),
        "parameters": trainer.model.parameter_count(),
        "torch": str(torch.__version__),
        "processes": trainer.processes.size,
        "sources": corpus.text.sources,
        "sha256": corpus.sha256,
    }
