"""A qft bundle in a Python program: onnxruntime, tokenizers and numpy.

python answer.py "A waste of two hours."     one answer a text: a label, words that are written, or a translation
python answer.py --check                     does this machine compute what was measured? (qft.json's golden cases)
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

BUNDLE = Path(__file__).parent / "bundle"
MOST_NEW_TOKENS = 128
ort.set_default_logger_severity(3)  # errors: it warns of inputs that need not be given


class Bundle:
    def __init__(self, folder):
        self.manifest = json.loads((folder / "qft.json").read_text("utf-8"))
        self.feeding = self.manifest["feeding"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        sessions = {graph: ort.InferenceSession(folder / name) for graph, name in self.manifest["models"].items()}
        self.encoder, self.model = sessions.get("encoder_model"), list(sessions.values())[-1]
        self.never = never_written(folder)

    def answer(self, text):
        if self.manifest["task"] == "text-classification":
            return self.decide(self.first_logits(self.encode(text))[0, 0])
        source = self.encode(text)
        ids = self.generate(source, MOST_NEW_TOKENS)
        return self.tokenizer.decode([i for i in ids if i not in self.feeding["stop_ids"]]).strip()

    def encode(self, text):
        """Token ids of a text in what the model was trained to see around it."""
        around, longest = self.feeding, self.manifest["max_length"]
        text = around["before"] + text + around["after"]
        ids = self.tokenizer.encode(text, add_special_tokens=around["special_tokens"]).ids
        if self.manifest["task"] == "text-generation" or len(ids) <= longest:
            return ids
        return [*ids[: longest - 1], ids[-1]]  # without its end, but with the token that marks it

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

    def generate(self, source, most):
        """The greedy answer's ids; of an encoder-decoder to `source`, otherwise after it."""
        asked, out, cache = self.asked(source), [], None
        ids = self.feeding["start_ids"] or source
        while len(out) < most and (not out or out[-1] not in self.feeding["stop_ids"]):
            logits, cache = self.step(ids, asked, cache)
            allowed = logits[0, -1].copy()
            allowed[self.never] = -np.inf
            ids = [int(allowed.argmax())]
            out += ids
        return out

    def first_logits(self, ids, source=None):
        """float32 (1, positions, vocabulary), or (1, 1, labels)."""
        logits, _ = self.step(ids, self.asked(source), None)
        return logits.reshape(1, -1, logits.shape[-1])

    def asked(self, source):
        """What the decoder reads of the encoder; nothing if there is none."""
        if not self.encoder:
            return {}
        fed = {"input_ids": row(source), "attention_mask": row([1] * len(source))}
        (states,) = self.encoder.run(["last_hidden_state"], fed)
        return {"encoder_hidden_states": states, "encoder_attention_mask": fed["attention_mask"]}

    def step(self, ids, asked, cache):
        """Logits after ids, and keys and values for the next step."""
        known = 0 if cache is None else next(v for n, v in cache.items() if ".encoder." not in n).shape[2]
        fed = {
            "input_ids": row(ids),
            "attention_mask": row([1] * (known + len(ids))),
            "position_ids": row(range(known, known + len(ids))),
            "token_type_ids": row([0] * len(ids)),
            "use_cache_branch": np.array([cache is not None]),
            **asked,
        }
        inputs = {i.name: i for i in self.model.get_inputs()}
        past = {name: i for name, i in inputs.items() if name.startswith("past_key_values.")}
        fed |= cache or {name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for name, i in past.items()}
        names = [output.name for output in self.model.get_outputs()]
        found = dict(zip(names, self.model.run(names, {n: v for n, v in fed.items() if n in inputs}), strict=True))
        grown = {name: found[name.replace("past_key_values", "present")] for name in past}
        if cache:  # what the decoder keeps of the encoder never changes, and comes back empty
            grown |= {name: value for name, value in cache.items() if ".encoder." in name}
        return found["logits"], grown

    def check(self):
        """Golden cases: the first choice at every position, and whole answers where no choice was close."""
        same = clear = positions = wrong = 0
        for case in self.manifest["golden"]:
            answer, written = case["answer"], bool(self.feeding["stop_ids"])
            ids = case["prompt"] + (answer[:-1] if written else [])
            chosen = self.first_logits(ids, case.get("source"))[0, -len(answer) :].argmax(-1)
            for choice, best, logits in zip(chosen, case["top_ids"], case["top_logits"], strict=True):
                positions, same = positions + 1, same + int(choice == best[0])
                clear += int(choice != best[0] and logits[0] - logits[1] > 0.5)
            if case["free_running"]:
                free = self.generate(case.get("source") or case["prompt"], len(answer)) if written else list(chosen)
                wrong += int(free != answer)
        agrees = same >= 0.98 * positions and not clear and not wrong
        return {"positions": positions, "agreement": same / positions, "clearDifferences": clear,
                "freeDifferences": wrong, "agrees": agrees}  # fmt: skip


def row(numbers):
    return np.array([list(numbers)], dtype=np.int64)


def never_written(folder):
    """Ids that generation_config.json rules out, as Marian does its padding."""
    path = folder / "generation_config.json"
    words = json.loads(path.read_text("utf-8")).get("bad_words_ids") if path.exists() else None
    return [word[0] for word in words or [] if len(word) == 1]


if __name__ == "__main__":
    bundle = Bundle(BUNDLE)
    if bundle.manifest["task"] not in ("text-generation", "text-classification", "translation"):
        sys.exit(f"this program does not do {bundle.manifest['task']}: `qft predict` and the node and web apps do")
    if sys.argv[1:] == ["--check"]:
        result = bundle.check()
        print(json.dumps(result))
        sys.exit(0 if result["agrees"] else 1)
    for text in sys.argv[1:]:
        print(bundle.answer(text))
