// A qft bundle under transformers.js, the same in a page and in Node: ids in, answers out, as `qft predict` gives them.

const MODELS = {
  "text-generation": "AutoModelForCausalLM",
  "translation": "AutoModelForSeq2SeqLM",
  "automatic-speech-recognition": "AutoModelForSpeechSeq2Seq",
};
const NEAREST = 5;

export class Bundle {
  // transformers: the module, which a page and Node import from different places. name: the folder, below env.localModelPath.
  // manifest: its qft.json. options: transformers.js's own, as {device: "webgpu", progress_callback}.
  static async open(transformers, name, manifest, options = {}) {
    // A model with a head over labels or places is run by the base class: transformers.js has no head for every decoder.
    const kind = MODELS[manifest.task] ?? "PreTrainedModel";
    const speech = manifest.task === "automatic-speech-recognition";
    const [tokenizer, model, processor] = await Promise.all([
      transformers.AutoTokenizer.from_pretrained(name),
      transformers[kind].from_pretrained(name, options),
      speech ? transformers.AutoProcessor.from_pretrained(name) : null,
    ]);
    return new Bundle(transformers, manifest, tokenizer, model, processor);
  }

  constructor(transformers, manifest, tokenizer, model, processor) {
    Object.assign(this, { transformers, manifest, tokenizer, model, processor });
  }

  // input: a text; {question, context}; {text, among}, the texts to search; or a Float32Array of sound, 16 kHz, no longer than
  // the model's window. Gives {text}, and {probability, accepted} where the model chooses. onText is called with each piece as it
  // is written.
  async answer(input, { maxNewTokens = 128, onText } = {}) {
    switch (this.manifest.task) {
      case "text-classification":
        return this.#decide(await this.logits(this.#encode(input)));
      case "question-answering":
        return this.#find(input.question, input.context);
      case "sentence-similarity":
        return this.#nearest(input.text, input.among);
      default:
        return { text: (await this.#write(input, maxNewTokens, onText)).trim() };
    }
  }

  // Token ids of a text in what the model was trained to see around it.
  #encode(text) {
    const { before, after, special_tokens } = this.manifest.feeding;
    const ids = this.tokenizer.encode(before + text + after, { add_special_tokens: special_tokens });
    return this.manifest.task === "text-generation" ? ids : this.#shortened(ids);
  }

  // What is too long loses its end, but not the token that marks it.
  #shortened(ids) {
    const longest = this.manifest.max_length;
    return ids.length <= longest ? ids : [...ids.slice(0, longest - 1), ids.at(-1)];
  }

  async #write(input, maxNewTokens, onText) {
    const streamer = onText && this.#streamer(onText);
    const { start_ids } = this.manifest.feeding;
    const heard = input instanceof Float32Array; // what is said is no longer than what was learnt
    const asked = heard
      ? { source: input, maxNewTokens: this.manifest.max_length - start_ids.length, streamer }
      : { source: this.#encode(input), maxNewTokens, streamer };
    return this.tokenizer.decode(await this.generate(asked), { skip_special_tokens: true });
  }

  #streamer(onText) {
    const options = { skip_prompt: this.manifest.task === "text-generation", skip_special_tokens: true };
    return new this.transformers.TextStreamer(this.tokenizer, { ...options, callback_function: onText });
  }

  // The greedy answer's token ids. source: what a text is asked with, token ids or sound.
  async generate({ source, maxNewTokens, streamer }) {
    const fed = source instanceof Float32Array ? await this.processor(source) : this.#text(source);
    const options = { max_new_tokens: maxNewTokens, do_sample: false, num_beams: 1, streamer };
    const [ids] = (await this.model.generate({ ...fed, ...options })).tolist();
    const known = this.manifest.task === "text-generation" ? source.length : this.manifest.feeding.start_ids.length;
    return ids.slice(known).map(Number);
  }

  // A text's vector, Float32Array of length 1: the product of two is their cosine.
  async embed(text) {
    const [{ data }] = await this.forward(this.#encode(text));
    return Float32Array.from(data);
  }

  // The model's output for ids, and for what an encoder reads: [{data, width}], one per output, rows of `width` logits or a vector.
  async forward(ids, source) {
    const encoder = source instanceof Float32Array ? await this.processor(source) : source && this.#text(source);
    const fed = encoder ? { ...encoder, decoder_input_ids: this.#tensor(ids) } : this.#text(ids);
    const output = await this.model(fed);
    const one = output.logits ?? output.sentence_embedding;
    return (one ? [one] : [output.start_logits, output.end_logits]).map(({ data, dims }) => ({
      data,
      width: dims.at(-1),
    }));
  }

  // A classifier's logits.
  async logits(ids) {
    const [{ data }] = await this.forward(ids);
    return Array.from(data);
  }

  #text(ids) {
    const fed = { input_ids: this.#tensor(ids), attention_mask: this.#tensor(ids.map(() => 1)) };
    const mark = this.manifest.feeding.pair_mark; // after it begins a pair's second text
    const second = mark === null ? -1 : ids.indexOf(mark);
    if (second >= 0) {
      fed.token_type_ids = this.#tensor(ids.map((_, place) => Number(place > second)));
    }
    return fed;
  }

  #tensor(ids) {
    return new this.transformers.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);
  }

  // The label, or every label that is likelier than not, with a probability that the temperature makes honest.
  #decide(logits) {
    const { labels, several_labels } = this.manifest;
    const { temperature, threshold } = this.manifest.calibration ?? { temperature: 1, threshold: 0 };
    const scaled = logits.map((value) => value / temperature);
    const best = scaled.indexOf(Math.max(...scaled));
    const probability = several_labels
      ? Math.exp(-sum(scaled.map((value) => Math.log1p(Math.exp(-Math.abs(value))))))
      : 1 / sum(scaled.map((value) => Math.exp(value - scaled[best])));
    const text = several_labels ? labels.filter((_, place) => scaled[place] > 0).join(", ") : labels[best];
    return { text, probability, accepted: probability >= threshold };
  }

  // The nearest of some texts, one a line, with the cosines of their vectors.
  async #nearest(text, among) {
    const wanted = await this.embed(text);
    const found = [];
    for (const other of among) found.push({ other, cosine: cosine(wanted, await this.embed(other)) });
    const best = found.sort((one, another) => another.cosine - one.cosine).slice(0, NEAREST);
    return { text: best.map(({ other, cosine }) => `${cosine.toFixed(2)}  ${other}`).join("\n") };
  }

  // The best span of all windows of a context, or "" where none answers.
  async #find(question, context) {
    const { stride, longest_answer, no_answer_margin } = this.manifest.keys;
    const { ids, begin } = this.#pair(question, context);
    const [head, tail, inside] = [ids.slice(0, begin), ids.slice(-1), ids.slice(begin, -1)];
    const room = this.manifest.max_length - head.length - tail.length;
    const step = room - Math.min(stride, Math.floor(room / 2));
    let best = { score: -Infinity, tokens: [] };
    let none = Infinity;
    const scores = [];
    for (let at = 0; at === 0 || at < inside.length - (room - step); at += step) {
      const part = inside.slice(at, at + room);
      const [first, last] = await this.forward([...head, ...part, ...tail]);
      none = Math.min(none, first.data[0] + last.data[0]);
      for (let a = 0; a < part.length; a++) {
        for (let b = a; b < Math.min(part.length, a + longest_answer); b++) {
          const score = first.data[begin + a] + last.data[begin + b];
          scores.push(score);
          if (score > best.score) best = { score, tokens: part.slice(a, b + 1) };
        }
      }
    }
    if (!this.manifest.labels.includes("no answer")) none = -Infinity;
    const greatest = Math.max(best.score, none);
    const total = greatest + Math.log(sum([...scores, none].map((score) => Math.exp(score - greatest))));
    if (none - best.score > no_answer_margin) return { text: "", probability: Math.exp(none - total) };
    return { text: this.#asWritten(best.tokens, context), probability: Math.exp(best.score - total) };
  }

  // Tokens as the context writes them: a model may read lower case alone.
  #asWritten(tokens, context) {
    const read = this.tokenizer.decode(tokens);
    const letters = [...read.replace(/\s/g, "")].map((letter) => letter.replace(/[\^$\\.*+?()[\]{}|]/, "\\$&"));
    return context.match(new RegExp(letters.join("\\s*"), "iu"))?.[0] ?? read;
  }

  // Ids of question and context, and where the context begins; of a long question the beginning.
  #pair(question, context) {
    const ids = this.tokenizer.encode(question, { text_pair: context });
    const asked = this.tokenizer.encode(question, { add_special_tokens: false }).length;
    const between = ids.length - 2 - asked - this.tokenizer.encode(context, { add_special_tokens: false }).length;
    const kept = [...ids.slice(0, Math.min(1 + asked, this.manifest.max_length >> 1)), ...ids.slice(1 + asked, 1 + asked + between)];
    return { ids: [...kept, ...ids.slice(1 + asked + between)], begin: kept.length };
  }
}

// Of two vectors of length 1.
export const cosine = (one, other) => sum(Array.from(one, (value, place) => value * other[place]));

const sum = (values) => values.reduce((total, value) => total + value, 0);
