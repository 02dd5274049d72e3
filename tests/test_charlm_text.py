"""charlm's texts: files of any size, several files, standard input, bytes, and what is wrong."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
from pathlib import Path

import charlm.corpus
import numpy as np
import pytest
from charlm.cli import main
from charlm.corpus import Text, builtin_text, find_text, read_corpus, release
from charlm.errors import CharlmError
from charlm.shuffling import Permutation
from charlm.vocabulary import Vocabulary
from click.testing import CliRunner, Result

SMALL = ["--hidden", "9", "--window", "17", "--batch-size", "3", "--embedding", "5", "--length",
         "30"]  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CHARLM_DATA", raising=False)
    return tmp_path


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces so small that characters, line ends and parts lie across them."""
    monkeypatch.setattr(charlm.corpus, "_PIECE", 3)


def decoded(*sources: str, **options: object) -> str:
    corpus = read_corpus(Text(sources), **options)
    return corpus.vocabulary.decode(corpus.ids.tolist())


def charlm_run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


UNICODE = "\ufeffGrüße, 世界! \U0001f30d\U0001f600 ñandú\r\nπάντα ῥεῖ\r\r\nend\r"


@pytest.mark.usefixtures("small_pieces")
def test_characters_and_line_ends_across_pieces() -> None:
    Path("t.txt").write_bytes(UNICODE.encode())
    expected = UNICODE.replace("\r\n", "\n").replace("\r", "\n")
    assert decoded("t.txt") == expected
    assert decoded("t.txt", characters=(3, 20)) == expected[3:20]
    corpus = read_corpus(Text(["t.txt"]), characters=(3, 20))
    assert corpus.vocabulary == Vocabulary.of(expected[3:20])


@pytest.mark.usefixtures("small_pieces")
def test_several_files_and_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.txt").write_text("first ")
    Path("b.txt").write_text("third")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("secönd ".encode())))
    text = Text(["a.txt", "-", "b.txt"])
    corpus = read_corpus(text)
    assert corpus.vocabulary.decode(corpus.ids.tolist()) == "first secönd third"
    assert text.name == "a.txt, standard input, b.txt"


@pytest.mark.usefixtures("small_pieces")
def test_bytes_are_taken_as_they_are() -> None:
    data = b"\xff\r\n\0" + UNICODE.encode()
    Path("t.bin").write_bytes(data)
    corpus = read_corpus(Text(["t.bin"]), "bytes")
    assert corpus.ids.tobytes() == data and len(corpus.vocabulary) == 256
    assert corpus.vocabulary.decode([*"é".encode(), 0xFF]) == "é\N{REPLACEMENT CHARACTER}"
    assert corpus.vocabulary.encode("é").tolist() == [*"é".encode()]


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 65_537])
def test_ids_are_as_small_as_they_can_be(size: int) -> None:
    characters = [chr(code) for code in range(14, size + 3_000) if not 0xD800 <= code < 0xE000]
    text = "".join(characters[:size])
    Path("t.txt").write_text(text, encoding="utf-8", newline="")
    corpus = read_corpus(Text(["t.txt"]))
    assert corpus.ids.dtype == (np.uint8 if size <= 256 else np.uint16 if size <= 65_536
                                else np.uint32)  # fmt: skip
    assert corpus.ids.tolist() == list(range(len(text)))
    release(corpus.ids)
    assert corpus.ids.tolist() == list(range(len(text)))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("data", "place"),
    [(b"ab\xffcd", 2), ("äöü".encode() + b"\xe4\xb8", 6), (b"abcd\xe4\xb8x", 4),
     (b"0123456789\xc3(", 10), (b"ab\xed\xa0\x80", 2)],
)  # fmt: skip
def test_not_utf8_names_file_and_byte(data: bytes, place: int) -> None:
    Path("t.txt").write_bytes(data)
    with pytest.raises(UnicodeDecodeError) as plain:
        data.decode()
    assert plain.value.start == place
    with pytest.raises(CharlmError, match=rf"^t.txt is not UTF-8 at byte {place}: .*bytes$"):
        read_corpus(Text(["t.txt"]))


def test_unknown_characters_are_named_with_their_position(small_pieces: None) -> None:
    Path("t.txt").write_text("abcabcabcxabc")
    message = "t.txt has the character 'x' at position 9, which is not among the 3 characters"
    with pytest.raises(CharlmError, match=message):
        read_corpus(Text(["t.txt"]), vocabulary=Vocabulary("abc"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "absent.txt"], "cannot read the text absent.txt: No such file or directory"),
        (["--text", "text.txt", "--text", "absent.txt"], "cannot read the text absent.txt"),
        (["--text", "."], "cannot read the text .: Is a directory"),
        (["--text", "empty.txt"], "has 0 characters, too few for one batch, which takes 16 x 64"),
        (["--text", "short.txt", "--batches", "windows"],
         "has 45 characters, too few for one window of 64 and the character after it, 65"),
        (["--text", "latin1.txt"], "latin1.txt is not UTF-8 at byte 3"),
        (["--text", "text.txt", "--characters", "5"], "'5' isn't FIRST:END, such as 1380:8230"),
        (["--text", "text.txt", "--characters", "9:5"], "characters must be FIRST below END"),
        (["--text", "text.txt", "--characters", "0:99999"], "has 12,000 characters, but"),
        (["--text", "text.txt", "--validation", "0.6", "--test", "0.5"], "leave nothing to train"),
        (["--preset", "sonnets"], "oceanumeric/NLP on GitHub"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(arguments: list[str], message: str) -> None:
    Path("empty.txt").touch()
    Path("short.txt").write_text("a" * 50)
    Path("latin1.txt").write_bytes("café".encode("latin-1"))
    Path("text.txt").write_text(builtin_text()[:12_000])
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    result = charlm_run("train", "--run", "r", *arguments)
    assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit)
    assert message in " ".join(result.output.split())
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named() -> None:
    Path("t.txt").touch(mode=0)
    with pytest.raises(CharlmError, match="cannot read the text t.txt: Permission denied"):
        read_corpus(Text(["t.txt"]))


def test_a_presets_text_is_named_with_its_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHARLM_DATA", "texts")
    with pytest.raises(CharlmError, match=r"texts/sonnets.txt isn't there: .*SHA-256 [0-9a-f]{64}"):
        find_text((), "sonnets.txt")


@pytest.mark.parametrize("vocabulary", ["characters", "bytes"])
def test_unicode_from_text_to_terminal(vocabulary: str) -> None:
    Path("t.txt").write_text("Grüße, 世界! 🌍 " * 200, encoding="utf-8")
    arguments = ["--text", "t.txt", "--vocabulary", vocabulary, "--prompt", "世", "--steps", "40"]
    result = charlm_run("train", "--run", "r", *arguments, *SMALL)
    assert result.exit_code == 0, result.output
    sample = Path("r/sample.txt").read_text(encoding="utf-8")
    assert sample.startswith("世") and sample in result.output
    assert "🌍" in charlm_run("sample", "r", "--prompt", "🌍", "--length", 9).output


def in_a_process(*arguments: str, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import resource, sys\nfrom charlm.cli import main\n"
         "try: main(sys.argv[1:])\nfinally: "
         "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)", *arguments],
        capture_output=True,
        encoding="latin-1",
        env={**os.environ, "PYTHONIOENCODING": "latin-1:strict",
             "PYTHONPATH": str(Path(charlm.__file__).parent.parent)},
        preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))),
    )  # fmt: skip


def test_no_room_for_the_ids() -> None:
    Path("t.txt").write_text("text " * 9_000)
    process = in_a_process("train", "--text", "t.txt", "--run", "r", limit=20_000)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert "where the ids of the text are kept: File too large; TMPDIR names" in process.stderr
    assert not Path("r").exists()


@pytest.mark.parametrize("batches", ["rows", "windows"])
def test_memory_does_not_grow_with_the_text(batches: str) -> None:
    """As int64 the 64 MB would take 512 MB, and their shuffled order as much again."""
    block = builtin_text()[:100_000].encode()
    peaks = []
    for name, copies in (("small.txt", 1), ("large.txt", 640)):
        with open(name, "wb") as file:
            for _ in range(copies):
                file.write(block)
        process = in_a_process("train", "--text", name, "--run", name[:-4], "--batches", batches,
                               "--steps", "30", "--eval-batches", "5", "--threads", "1",
                               *SMALL)  # fmt: skip
        assert process.returncode == 0, process.stderr
        peaks.append(int(process.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 90, peaks


def test_a_terminal_without_the_characters_shows_question_marks() -> None:
    Path("t.txt").write_text("Grüße, 世界! 🌍 " * 200, encoding="utf-8")
    process = in_a_process("train", "--text", "t.txt", "--run", "r", "--steps", "3", *SMALL)
    assert process.returncode == 0 and "?" in process.stdout and "ü" in process.stdout, (
        process.stderr
    )


@pytest.mark.parametrize("n", [1, 2, 3, 17, 33, 129, 1000, 6802])
def test_a_permutation_is_one(n: int, seed: int) -> None:
    whole = Permutation(n, seed)(0, n)
    assert sorted(whole.tolist()) == list(range(n))
    parts = [Permutation(n, seed)(first, first + 36) for first in range(0, n, 36)]
    assert np.array_equal(np.concatenate(parts), whole)
    if n > 16:
        assert not np.array_equal(whole, Permutation(n, seed + 1)(0, n))


def test_every_number_is_as_likely_in_every_place(seed: int) -> None:
    n, draws = 17, 4_000
    counts = np.zeros((n, n))
    for index in range(draws):
        counts[np.arange(n), Permutation(n, seed * draws + index)(0, n)] += 1
    expected = draws / n
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    freedom = (n - 1) ** 2
    assert abs(chi_squared - freedom) < 5 * (2 * freedom) ** 0.5, chi_squared


def test_a_permutation_of_any_size_takes_no_memory() -> None:
    order = Permutation(10**15, 3)(10**14, 10**14 + 5)
    assert len(set(order.tolist())) == 5 and order.max() < 10**15
