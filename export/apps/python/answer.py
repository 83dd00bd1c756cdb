"""A qft bundle in a Python program: onnxruntime, tokenizers and numpy.

python answer.py "A waste of two hours."     one answer a text: a label, words that are written, or a translation; of a sound
                                             file what is said
python answer.py QUESTION CONTEXT            what answers a question
python answer.py TEXT OTHER OTHER …          the nearest of the others, by the cosines of their vectors
python answer.py --check                     does this machine compute what was measured? (qft.json's golden cases)
"""

import json
import os
import sys
from pathlib import Path

# onnxruntime tells Microsoft of every session, since 1.29; whether it may is read when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime as ort
from sound import log_mel, read_wav
from tokenizers import Tokenizer

BUNDLE = Path(__file__).parent / "bundle"
MOST_NEW_TOKENS, NEAREST = 128, 5
CLEAR_MARGIN, LEAST_AGREEMENT, LEAST_COSINE = 0.5, 0.98, 0.99  # what qft asks of a runtime
ort.set_default_logger_severity(3)  # errors: it warns of inputs that need not be given


class Bundle:
    def __init__(self, folder):
        self.folder, self.manifest = folder, read_json(folder / "qft.json")
        self.task, self.feeding = self.manifest["task"], self.manifest["feeding"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()  # a base's own settings are for training
        self.tokenizer.no_truncation()
        sessions = {graph: ort.InferenceSession(folder / name) for graph, name in self.manifest["models"].items()}
        self.encoder, self.model = sessions.get("encoder_model"), list(sessions.values())[-1]
        self.never, self.not_first = ruled_out(read_json(folder / "generation_config.json"))

    def answer(self, given):
        """A text's, or a sound file's."""
        if self.task == "text-classification":
            return self.decide(self.read(self.encode(given))[0, 0])
        heard = self.task == "automatic-speech-recognition"
        # What is said is no longer than what was learnt.
        most = self.manifest["max_length"] - len(self.feeding["start_ids"]) if heard else MOST_NEW_TOKENS
        ids = self.generate(self.hear(given) if heard else self.encode(given), most)
        return self.tokenizer.decode([i for i in ids if i not in self.feeding["stop_ids"]]).strip()

    def encode(self, text):
        """Token ids of a text in what the model was trained to see around it."""
        around, longest = self.feeding, self.manifest["max_length"]
        text = around["before"] + text + around["after"]
        ids = self.tokenizer.encode(text, add_special_tokens=around["special_tokens"]).ids
        if self.task == "text-generation" or len(ids) <= longest:
            return ids
        return [*ids[: longest - 1], ids[-1]]  # without its end, but with the token that marks it

    def hear(self, path):
        """A sound file's features."""
        how = read_json(self.folder / "preprocessor_config.json")
        return log_mel(read_wav(path), how["feature_size"], how["chunk_length"])

    def decide(self, logits):
        """The label, or every label that is likelier than not, and its probability, which the temperature makes honest."""
        names, how = self.manifest["labels"], self.manifest.get("calibration") or {"temperature": 1, "threshold": 0}
        scaled = logits.astype(np.float64) / how["temperature"]
        if self.manifest["several_labels"]:
            text = ", ".join(name for name, value in zip(names, scaled, strict=True) if value > 0)
            probability = np.exp(-np.log1p(np.exp(-np.abs(scaled))).sum())
        else:
            text, probability = names[scaled.argmax()], 1 / np.exp(scaled - scaled.max()).sum()
        return f"{text or '(none)'}  {probability:.0%}{'' if probability >= how['threshold'] else '  unsure'}"

    def find(self, question, context):
        """The best span of all windows of a context, or none where none answers, and its share of all that were possible."""
        keys, longest = self.manifest["keys"], self.manifest["max_length"]
        self.tokenizer.encode_special_tokens = True  # those that stand in the texts are text
        pair = self.tokenizer.encode(question, context)
        texts, ids = pair.sequence_ids, pair.ids
        asked = 1 + texts.count(0)
        begin = texts.index(1) if 1 in texts else len(ids) - 1
        end = begin + texts.count(1)
        head, tail = ids[: min(asked, longest // 2)] + ids[asked:begin], ids[end:]
        room = longest - len(head) - len(tail)
        shared = min(keys["stride"], room // 2)
        best, none, total, span = -np.inf, np.inf, -np.inf, None
        for at in range(begin, max(begin + 1, end - shared), room - shared):
            part = ids[at : min(end, at + room)]
            first, last = self.read(head + part + tail)[0].astype(np.float64)
            none = min(none, first[0] + last[0])
            inside = slice(len(head), len(head) + len(part))
            shape = np.tril(np.triu(np.ones((len(part), len(part)))), keys["longest_answer"] - 1)
            scores = np.where(shape, first[inside, None] + last[inside], -np.inf)
            total = np.logaddexp(total, np.logaddexp.reduce(scores, axis=None))
            if part and scores.max() > best:
                best, (a, b) = scores.max(), divmod(int(scores.argmax()), len(part))
                span = slice(pair.offsets[at + a][0], pair.offsets[at + b][1])
        none = none if "no answer" in self.manifest["labels"] else -np.inf
        total = np.logaddexp(total, none)
        if span is None or none - best > keys["no_answer_margin"]:
            return f"(none)  {np.exp(none - total) if span else 1:.0%}"
        return f"{context[span]}  {np.exp(best - total):.0%}"

    def nearest(self, text, among):
        """The nearest of some texts with their cosines."""
        vectors = [self.read(self.encode(one))[0, 0] for one in among]
        cosines = np.array(vectors) @ self.read(self.encode(text))[0, 0]
        order = np.argsort(-cosines, kind="stable")[:NEAREST]
        return "\n".join(f"{cosines[i]:.2f}  {among[i]}" for i in order)

    def generate(self, source, most):
        """The greedy answer's ids; of an encoder-decoder to `source`, otherwise after it."""
        asked, out, cache = self.asked(source), [], None
        ids = self.feeding["start_ids"] or source
        while len(out) < most and (not out or out[-1] not in self.feeding["stop_ids"]):
            found, cache = self.step(ids, asked, cache)
            allowed = found["logits"][0, -1].copy()
            allowed[self.never if out else self.never + self.not_first] = -np.inf
            ids = [int(allowed.argmax())]
            out += ids
        return out

    def read(self, ids, source=None):
        """(1, positions, values): logits of tokens or labels, of places for an answer's first and last token, or a vector."""
        found, _ = self.step(ids, self.asked(source), None)
        if self.task == "question-answering":
            return np.stack([found["start_logits"], found["end_logits"]], 1)
        values = found["sentence_embedding" if self.task == "sentence-similarity" else "logits"]
        return values.reshape(1, -1, values.shape[-1])

    def asked(self, source):
        """What the decoder reads of the encoder; nothing if there is none. source: a text's ids, or a sound's features."""
        if not self.encoder:
            return {}
        heard = isinstance(source, np.ndarray)
        fed = (
            {"input_features": source}
            if heard
            else {"input_ids": row(source), "attention_mask": row([1] * len(source))}
        )
        (states,) = self.encoder.run(["last_hidden_state"], fed)
        return {"encoder_hidden_states": states, "encoder_attention_mask": row([1] * states.shape[1])}

    def step(self, ids, asked, cache):
        """The outputs after ids by name, and keys and values for the next step."""
        known = 0 if cache is None else next(v for n, v in cache.items() if ".encoder." not in n).shape[2]
        mark = self.feeding["pair_mark"]  # after it a pair's second text begins
        second = ids.index(mark) + 1 if mark in ids else len(ids)
        fed = {
            "input_ids": row(ids),
            "attention_mask": row([1] * (known + len(ids))),
            "position_ids": row(range(known, known + len(ids))),
            "token_type_ids": row([0] * second + [1] * (len(ids) - second)),
            "use_cache_branch": np.array([cache is not None]),
            **asked,
        }
        inputs = {i.name: i for i in self.model.get_inputs()}
        past = {name: i for name, i in inputs.items() if name.startswith("past_key_values.")}
        fed |= cache or {name: np.zeros((1, i.shape[1], 0, i.shape[3]), float_type(i)) for name, i in past.items()}
        names = [output.name for output in self.model.get_outputs()]
        found = dict(zip(names, self.model.run(names, {n: v for n, v in fed.items() if n in inputs}), strict=True))
        grown = {name: found[name.replace("past_key_values", "present")] for name in past}
        if cache:  # what the decoder keeps of the encoder never changes, and comes back empty
            grown |= {name: value for name, value in cache.items() if ".encoder." in name}
        return found, grown

    def check(self):
        """Golden cases: the first choice at every position, and whole answers where no choice was close; or the vector."""
        same = clear = positions = wrong = 0
        for case in self.manifest["golden"]:
            if "embedding" in case:
                near = self.read(case["prompt"])[0, 0] @ np.array(case["embedding"]) >= LEAST_COSINE
                positions, same, clear = positions + 1, same + int(near), clear + int(not near)
                continue
            answer, written = case["answer"], bool(self.feeding["stop_ids"])
            source = self.hear(self.folder / case["clip"]) if "clip" in case else case.get("source")
            ids = case["prompt"] + (answer[:-1] if written else [])
            chosen = self.read(ids, source)[0, -len(answer) :].argmax(-1)
            for choice, best, logits in zip(chosen, case["top_ids"], case["top_logits"], strict=True):
                positions, same = positions + 1, same + int(choice == best[0])
                clear += int(choice != best[0] and logits[0] - logits[1] > CLEAR_MARGIN)
            if case["free_running"]:
                asked = case["prompt"] if source is None else source
                free = self.generate(asked, len(answer)) if written else list(chosen)
                wrong += int(free != answer)
        agrees = same >= LEAST_AGREEMENT * positions and not clear and not wrong
        return {"positions": positions, "agreement": same / positions, "clearDifferences": clear,
                "freeDifferences": wrong, "agrees": agrees}  # fmt: skip


def row(numbers):
    return np.array([list(numbers)], dtype=np.int64)


def float_type(value):
    return np.float16 if value.type == "tensor(float16)" else np.float32


def read_json(path):
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def ruled_out(generation):
    """Ids that a generation_config rules out, as Marian does its padding, and those that may not come first."""
    words = [word[0] for word in generation.get("bad_words_ids") or [] if len(word) == 1]
    return words + (generation.get("suppress_tokens") or []), generation.get("begin_suppress_tokens") or []


if __name__ == "__main__":
    bundle, given = Bundle(BUNDLE), sys.argv[1:]
    several = bundle.task in ("question-answering", "sentence-similarity")
    if given == ["--check"]:
        result = bundle.check()
        print(json.dumps(result))
        sys.exit(0 if result["agrees"] else 1)
    if len(given) < 1 + several:
        sys.exit(__doc__)
    if bundle.task == "question-answering":
        print(bundle.find(*given[:2]))
    elif bundle.task == "sentence-similarity":
        print(bundle.nearest(given[0], given[1:]))
    else:
        for one in given:
            print(bundle.answer(one))
