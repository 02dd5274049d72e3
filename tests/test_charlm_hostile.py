"""A run's files from anyone: damaged, wrong and hostile ones each give one clear line."""

import json
import os
import pickle
import random
import re
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from charlm.checkpoint import Checkpoints
from charlm.cli import main
from charlm.corpus import Text, builtin_text, read_corpus
from charlm.errors import CharlmError
from charlm.reading import one_line, parse_json, plain_name, printable
from charlm.runfolder import RunFolder
from charlm.training import Trainer, hyperparameters
from click.testing import CliRunner

MODEL, CONFIG, METRICS, SAMPLE = "model.safetensors", "config.json", "metrics.jsonl", "sample.txt"
CHECKPOINT = "checkpoint.safetensors"
MUTATIONS = 500  # of each of the five files


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run, small: every test has a copy of its own."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "text.txt").write_text(builtin_text()[:3_000], encoding="utf-8")
    arguments = ["train", "--text", str(folder / "text.txt"), "--run", str(folder / "run"),
                 "--steps", "6", "--hidden", "9", "--embedding", "5", "--window", "7", "--layers",
                 "2", "--batch-size", "3", "--prompt", "The "]  # fmt: skip
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """Whatever a file claims, reading it may take 256 MB of address space at the most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + 256 * 2**20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def refused(run: Path, *command: object) -> str:
    """The one line with which a command on a run ends."""
    result = CliRunner().invoke(main, [str(word) for word in (*(command or ("show",)), run)])
    assert isinstance(result.exception, SystemExit) and result.exit_code == 1, result.output
    assert result.output.startswith("Error: ") and result.output.count("\n") == 1, result.output
    assert result.output == printable(result.output) and len(result.output) < 700
    return result.output


def header(run: Path) -> tuple[dict[str, Any], bytes]:
    data = (run / MODEL).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def rewrite(run: Path, head: dict[str, Any] | bytes, tensors: bytes) -> None:
    if isinstance(head, dict):
        head = json.dumps(head).encode()
    (run / MODEL).write_bytes(struct.pack("<Q", len(head)) + head + tensors)


def with_about(run: Path, **changes: Any) -> None:
    """Changes what the weights say of themselves: vocabulary or hyperparameters."""
    head, tensors = header(run)
    about = json.loads(head["__metadata__"]["charlm"])
    for name, value in changes.items():
        about[name] = about[name] | value if isinstance(value, dict) else value
    head["__metadata__"]["charlm"] = json.dumps(about)
    rewrite(run, head, tensors)


@pytest.mark.parametrize("length", [2**60, 2**63, 2**64 - 1, 2**31, 0, 1])
def test_a_header_of_any_length(run: Path, length: int) -> None:
    data = (run / MODEL).read_bytes()
    (run / MODEL).write_bytes(struct.pack("<Q", length) + data[8:])
    assert f"its header would have {length:,} bytes" in refused(run)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_truncated_model(run: Path, keep: int) -> None:
    data = (run / MODEL).read_bytes()
    (run / MODEL).write_bytes(data[:keep])
    assert "isn't a model that charlm saved" in refused(run)
    (run / MODEL).write_bytes(data + b"more")
    assert "bytes, but" in refused(run)


def test_duplicate_tensors(run: Path) -> None:
    head, tensors = header(run)
    twice = json.dumps(head)[:-1] + ', "linear.bias": ' + json.dumps(head["linear.bias"]) + "}"
    rewrite(run, twice.encode(), tensors)
    assert "'linear.bias' is there twice" in refused(run)


def test_tensors_that_share_bytes(run: Path) -> None:
    head, tensors = header(run)
    head["recurrent.bias_hh_l0"]["data_offsets"] = head["recurrent.bias_ih_l0"]["data_offsets"]
    rewrite(run, head, tensors)
    assert "isn't a model that charlm saved: Error while deserializing" in refused(run)


def test_a_tensor_that_is_not_the_models(run: Path) -> None:
    tensors = safetensors.torch.load((run / MODEL).read_bytes())
    metadata = header(run)[0]["__metadata__"]
    for name, change, message in (
        ("linear.bias", None, "it has no tensor 'linear.bias'"),
        ("../../linear", torch.zeros(1), "it has a tensor '../../linear', which this model has"),
        ("linear.bias", torch.zeros(3), "linear.bias has the shape (3,), expected"),
        ("linear.bias", tensors["linear.bias"].double(), "linear.bias is F64, expected torch."),
    ):
        changed = {**tensors, name: change}
        if change is None:
            del changed[name]
        (run / MODEL).write_bytes(safetensors.torch.save(changed, metadata))
        assert message in refused(run)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(run: Path, value: float) -> None:
    head, tensors = header(run)
    begin = head["linear.bias"]["data_offsets"][0]
    rewrite(run, head, tensors[:begin] + struct.pack("<f", value) + tensors[begin + 4 :])
    assert "linear.bias has numbers that aren't finite" in refused(run, "sample")


def test_weights_so_large_that_scores_overflow(run: Path) -> None:
    tensors = safetensors.torch.load((run / MODEL).read_bytes())
    # Finite, but a sum of 9 such products is not. After "T" the state is still zero, after any
    # other character it is not, and "T" is never drawn.
    _, vocabulary = RunFolder(run).read_model()
    for name, tensor in tensors.items():
        tensor.fill_(0.0 if "bias" in name else 9.0)
    tensors["linear.weight"].fill_(3e38)
    tensors["embedding.weight"][vocabulary.encode("T")] = 0
    tensors["linear.bias"][vocabulary.encode("T")] = -1e30
    data = safetensors.torch.save(tensors, header(run)[0]["__metadata__"])
    (run / MODEL).write_bytes(data)
    assert "scores aren't finite" in refused(run, "sample", "--prompt", "T")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary": ""}, "its vocabulary is not a string of distinct characters"),
        ({"vocabulary": ["a", "b"]}, "its vocabulary is not"),
        ({"vocabulary": "aa"}, "its vocabulary is not"),
        ({"vocabulary": "\ud800"}, "surrogates not allowed"),
        ({"vocabulary": "".join(map(chr, range(0xE000, 0x110000)))}, "has the shape"),
        ({"hyperparameters": {"hidden": 2**20}}, "has the shape"),
        ({"hyperparameters": {"hidden": 2**62}}, "isn't a model that charlm saved"),
        ({"hyperparameters": {"hidden": 2**64}}, "is too large a number"),
        ({"hyperparameters": {"hidden": -1}}, "isn't a model that charlm saved"),
        ({"hyperparameters": {"hidden": 1.5}}, "isn't a model that charlm saved"),
        ({"hyperparameters": {"hidden": "9"}}, "isn't a model that charlm saved"),
        ({"hyperparameters": {"layers": 10**9}}, "it has no 1000000000 layers"),
        ({"hyperparameters": {"dropout": 7}}, "isn't a model that charlm saved"),
        ({"hyperparameters": {"cell": "os.system"}}, "no cell is called 'os.system'"),
        ({"hyperparameters": {"exec": "os.system"}}, "unexpected keyword argument 'exec'"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_what_the_model_says_of_itself(run: Path, changes: dict, message: str) -> None:
    with_about(run, **changes)
    assert message in refused(run)


def test_a_model_as_large_as_it_says_but_hollow(run: Path) -> None:
    """Shapes that agree with the header, in a file with a hole of 2 TB: nothing of it is read."""
    head, tensors = header(run)
    head["linear.weight"] = {"dtype": "F32", "shape": [2**39],
                             "data_offsets": [0, 2**41]}  # fmt: skip
    head = {name: head[name] for name in ("__metadata__", "linear.weight")}
    rewrite(run, head, b"")
    size = (run / MODEL).stat().st_size
    os.truncate(run / MODEL, size + 2**41)
    assert "don't fit this machine's memory" in refused(run)


@pytest.mark.parametrize("name", [MODEL, CONFIG, METRICS, SAMPLE, CHECKPOINT])
def test_links_devices_and_folders_in_a_files_place(run: Path, name: str) -> None:
    command = ("train", "--resume") if name == CHECKPOINT else ("show",)
    outside = run.parent / "secret"
    shutil.copy(run / name, outside)
    (run / name).unlink()
    (run / name).symlink_to(outside)
    assert f"{name} is a symbolic link" in refused(run, *command)
    (run / name).unlink()
    os.mkfifo(run / name)  # whoever opens it to read waits for a writer
    assert f"{name} isn't a plain file" in refused(run, *command)
    (run / name).unlink()
    (run / name).mkdir()
    assert f"{name} isn't a plain file" in refused(run, *command)


@pytest.mark.parametrize("name", [CONFIG, METRICS, SAMPLE])
def test_a_file_that_is_too_large(run: Path, name: str) -> None:
    os.truncate(run / name, 2**40)
    assert f"{name} has {2**40:,} bytes, and a run's {name}" in refused(run)


def resumed(run: Path, values: dict[str, Any], tensors: dict[str, torch.Tensor | None]) -> str:
    """What resuming says after a change of a checkpoint's values and tensors."""
    data = (run / CHECKPOINT).read_bytes()
    about = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"][
        "charlm"])  # fmt: skip
    changed = safetensors.torch.load(data) | tensors
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    metadata = {"charlm": json.dumps(about | values)}
    (run / CHECKPOINT).write_bytes(safetensors.torch.save(kept, metadata))
    message = refused(run, "train", "--resume")
    (run / CHECKPOINT).write_bytes(data)
    return message


def test_checkpoints_that_claim_what_cannot_be(run: Path) -> None:
    nan = torch.full((57,), float("nan"))
    for values, tensors, message in (
        ({"step": 5}, {}, "step 5 isn't at batch 6 of epoch 0"),
        ({"step": 2**62, "epoch": 2**62 - 6, "batch": 6}, {}, "isn't at batch 6"),
        ({"batch": -1, "step": -1}, {}, "step -1 isn't at batch -1"),
        ({"metrics": -1}, {}, "it counts below zero"),
        ({"metrics": 10**6}, {}, "its checkpoint knows of 1,000,000"),
        ({"lr": "os.system"}, {}, "lr must be float, got 'os.system'"),
        ({"losses": True}, {}, "losses must be int, got True"),
        ({"more": 1}, {}, "it has 'more', which is none of step"),
        ({}, {"optimizer.0.exp_avg": None}, "it has no tensor 'optimizer.0.exp_avg'"),
        ({}, {"optimizer.99.step": torch.zeros(())}, "it has a tensor 'optimizer.99.step'"),
        ({}, {"state.0": torch.zeros(2, 3, 8)}, "state.0 has the shape (2, 3, 8)"),
        ({}, {"state.1": None}, "it has no tensor 'state.1'"),
        ({}, {"generator.cpu": torch.zeros(9)}, "generator.cpu has the shape"),
        ({}, {"model.linear.bias": nan}, "model.linear.bias has numbers that aren't finite"),
        ({}, {"optimizer.0.step": nan[0].clone()}, "optimizer.0.step has numbers that"),
    ):
        assert message in resumed(run, values, tensors)


def test_no_model_larger_than_its_checkpoint_is_made(run: Path) -> None:
    values = json.loads((run / CONFIG).read_text())
    for change in ({"hidden": 2**20}, {"layers": 10**8}, {"embedding": 2**40}):
        (run / CONFIG).write_text(json.dumps(values | change))
        assert "isn't a checkpoint of this run" in refused(run, "train", "--resume")


class Explosive:
    def __reduce__(self) -> tuple:
        return pytest.fail, ("a file was unpickled",)


@pytest.mark.parametrize("name", [MODEL, CONFIG, METRICS, SAMPLE, CHECKPOINT])
def test_nothing_is_unpickled(run: Path, name: str) -> None:
    command = ("train", "--resume") if name == CHECKPOINT else ("show",)
    for data in (pickle.dumps(Explosive()), pickle.dumps(Explosive(), 0) + b"\xff"):
        (run / name).write_bytes(data)
        assert f"{name} isn't" in refused(run, *command)
    torch.save({"a": torch.zeros(3)}, run / name)
    assert f"{name} isn't" in refused(run, *command)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../../etc/passwd"}, "leads out of its folder"),
        ({"file": "/etc/passwd"}, "leads out of its folder"),
        ({"file": ".."}, "'..' is not a file's name"),
        ({"file": "a\x1b[2Jb"}, "is not a file's name"),
        ({"hidden": "9"}, "hidden must be a whole number, got '9'"),
        ({"hidden": True}, "hidden must be a whole number, got True"),
        ({"lr": -1.0}, "lr must be positive, got -1.0"),
        ({"lr": [1]}, "lr must be a number, got [1]"),
        ({"characters": [1]}, "characters must be"),
        ({"batches": "os.system"}, "batches must be one of"),
        ({"steps": None}, "give one of epochs and steps"),
        ({"\x1b[31mred": 1}, "there is no setting \ufffd[31mred"),
        ({"facts": []}, "its facts are no JSON object"),
        ({"facts": {"sources": "/etc"}}, "its sources are no list of files"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_settings_of_the_wrong_kind(run: Path, change: dict, message: str) -> None:
    values = json.loads((run / CONFIG).read_text()) | change
    (run / CONFIG).write_text(json.dumps(values))
    assert message in refused(run)


def test_settings_that_lack_one(run: Path) -> None:
    values = json.loads((run / CONFIG).read_text())
    for name, message in (("preset", "the setting preset is missing"), ("facts", "has no 'facts'")):
        (run / CONFIG).write_text(json.dumps({k: v for k, v in values.items() if k != name}))
        assert message in refused(run)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "at line 2: Expecting value"),
        ("[]", "at line 2: expected a JSON object"),
        ("{}", "at line 2: it has no epoch"),
        ('{"epoch": 1, "epoch": 1}', "'epoch' is there twice"),
        ('{"epoch": NaN}', "NaN is not a finite number"),
        ('{"epoch": 1e999}', "1e999 is not a finite number"),
        ('{"epoch": 1.5}', "epoch must be int, got 1.5"),
        ('{"rm -rf": 1}', "which is none of"),
    ],
)
def test_metrics_of_the_wrong_kind(run: Path, line: str, message: str) -> None:
    with (run / METRICS).open("a") as file:
        file.write(line + "\n")
    for command in ("show", "plot"):
        assert message in refused(run, command)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is there twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b"-Infinity", "not a finite number"),
        (b"1" * 5_000, "too large a number"),
        (b"9223372036854775808", "too large a number"),
        (b'"\\ud800"', "surrogates not allowed"),
        (b"\xff", "can't decode byte"),
        (b"\xef\xbb\xbf{}", "BOM"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_json_by_the_letter(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(data)


def test_words_of_others_are_shown_safely(run: Path) -> None:
    (run / SAMPLE).write_text("The \x1b[2J\x07cat\u200dzwj\n\tsat")
    result = CliRunner().invoke(main, ["show", str(run)])
    assert result.exit_code == 0, result.output
    assert "The \ufffd[2J\ufffdcat\u200dzwj\n\tsat" in result.output
    assert one_line("a\r\n b\x00" + "x" * 9_999) == "a\ufffd b\ufffd" + "x" * 292 + "..."
    assert plain_name("text.txt") == "text.txt"
    for name in ("a/b", "..", "", "/", "a\\b", None, "a\nb"):
        with pytest.raises(ValueError, match="file's name|leads out"):
            plain_name(name)


ODD = [
    *(b"-1", b"0", b"1e999", b"NaN", b"-Infinity", b"null", b"true", b"[]", b"{}", b'""'),
    *(b"9" * 30, b"18446744073709551616", b"9223372036854775807", b"4294967296", b"1e308", b"0.5"),
    *(b'"../../etc/passwd"', b'"\\ud800"', b'"\\u0000"', b"[" * 2_000),
    *(b"\xff\xfe", b"\x00" * 9, b"\n", b",", b'"'),
]


def mutated(data: bytes, others: list[bytes], dice: random.Random) -> bytes:
    """The data with one to three of the things that happen to files, or that people do to them."""
    for _ in range(dice.choice((1, 1, 2, 3))):
        place = dice.randrange(len(data) + 1)
        end = min(len(data), place + dice.choice((1, 1, 2, 4, 8, 30, 500)))
        kind = dice.randrange(8)
        if kind == 0:  # flipped bits
            flipped = bytes(byte ^ (1 << dice.randrange(8)) for byte in data[place:end])
            data = data[:place] + flipped + data[end:]
        elif kind == 1:  # truncated
            data = data[:place]
        elif kind == 2:  # a part lost
            data = data[:place] + data[end:]
        elif kind == 3:  # a part twice
            data = data[:end] + data[place:]
        elif kind == 4:  # something odd inserted
            data = data[:place] + dice.choice(ODD) + data[place:]
        elif kind == 5:  # an odd value in a value's place
            values = list(re.finditer(rb'(?<=[:,\[ ])("[^"]*"|-?[\d.e+-]+|null|\[[^]]*\])', data))
            if values:
                value = dice.choice(values[:2_000])
                data = data[: value.start()] + dice.choice(ODD) + data[value.end() :]
        elif kind == 6:  # another header's length, or other first bytes
            lengths = (2**60, 2**64 - 1, 2**31, len(data), len(data) - 8, dice.randrange(1, 9_000))
            data = struct.pack("<Q", max(0, dice.choice(lengths))) + data[8:]
        else:  # spliced with another file
            other = dice.choice(others)
            data = data[:place] + other[dice.randrange(len(other)) :]
    return data


def read_checkpoint(folder: RunFolder) -> None:
    config = folder.read_config()
    _, vocabulary = folder.read_model()
    corpus = read_corpus(Text(folder.read_facts()["sources"]), vocabulary=vocabulary)
    checkpoints = Checkpoints(folder.path)
    checkpoints.check_model(len(vocabulary), hyperparameters(config))
    checkpoints.load(Trainer(config, corpus.ids, len(vocabulary)))


READ: dict[str, Callable[[RunFolder], object]] = {
    MODEL: RunFolder.read_model,
    CONFIG: lambda folder: (folder.read_config(), folder.read_facts()),
    METRICS: RunFolder.read_metrics,
    SAMPLE: RunFolder.read_sample,
    CHECKPOINT: read_checkpoint,
}


@pytest.mark.parametrize("name", READ)
def test_mutations_of_a_runs_files(run: Path, name: str, seed: int) -> None:
    """Each is read, or refused in one line that names it; a part of them through the commands."""
    files = {name: (run / name).read_bytes() for name in READ}
    dice = random.Random(f"{seed} {name}")
    refusals = 0
    for number in range(MUTATIONS):
        data = mutated(files[name], list(files.values()), dice)
        (run / name).write_bytes(data)
        try:
            READ[name](RunFolder(run))
        except CharlmError as error:
            refusals += 1
            message = str(error)
            assert name in message and "\n" not in message and message == printable(message)
            assert len(message) < 500
        except BaseException as error:
            error.add_note(f"mutation {number} of {name}, seed {seed}: {data[:500]!r}")
            raise
        if number % 10 == 0:
            command = ["train", "--resume"] if name == CHECKPOINT else ["show"]
            result = CliRunner().invoke(main, [*command, str(run)])
            assert result.exception is None or isinstance(result.exception, SystemExit), number
            assert "Traceback" not in result.output
    # A sample may be any text, and a weight any finite number.
    assert refusals > MUTATIONS * {MODEL: 0.5, CHECKPOINT: 0.5, SAMPLE: 0.1}.get(name, 0.7)
